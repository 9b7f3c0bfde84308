"""The conditions that decide which prompts are edited: ROC on report prompts, area by layer, and for whom they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "steer"
PARTS = (("remove", "answering"), ("induce", "refusing"))
LINES = {
    ("discriminant", "instruction"): ("-", "discriminant, mean over instruction"),
    ("discriminant", "last"): ("--", "discriminant, last token"),
    ("cosine", "instruction"): (":", "CAST's cosine, mean over instruction"),
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """ROC and area by layer of both conditions on top of each other, and the share of every set below."""
    data = study_data(result)
    if "remove" not in data or "induce" not in data:
        raise UserError(f"'{result.folder}' holds no conditions; run analyses/steer.py again")
    from matplotlib.figure import Figure

    conditions = {part: data[part]["condition"] for part, _ in PARTS}
    with style():
        figure = Figure(figsize=(DOUBLE, 5.4), layout="constrained")
        axes = figure.subplots(2, 2)
        for part, tone in PARTS:
            _roc(axes[0][0], conditions[part], colour(tone))
            _areas(axes[0][1], conditions[part], colour(tone))
        axes[0][0].plot([0, 1], [0, 1], color=colour("null"), label="chance")
        axes[0][0].legend(loc="upper center", bbox_to_anchor=(0.4, -0.2))
        for dash, words in LINES.values():
            axes[0][1].plot([], [], dash, color=colour("ink"), label=words)
        axes[0][1].legend(loc="upper center", bbox_to_anchor=(0.4, -0.2))
        axes[0][1].set_ylim(0.45, 1.02)
        axes[0][1].axhline(0.5, color=colour("null"))
        for place, letter, (part, tone) in zip(axes[1], "cd", PARTS, strict=True):
            _holds(place, conditions[part], colour(tone), letter)
    nulls = {part: c["roc"]["null"] for part, c in conditions.items()}
    return Drawing(
        figure,
        "The conditions of selective steering",
        "(a) ROC on report prompts; nothing there was fitted or chosen. (b) Area by layer on report: discriminant of the mean over "
        "the instruction's tokens or of the last token, and CAST's cosine (below or above its threshold, as on select); layer and pooling were chosen on select. (c, d) Share of "
        "every set for which the condition holds at the threshold from select, 95 % Wilson intervals, n in brackets; the first set is "
        f"the one it should hold for. Area under permuted labels, 95 %: {nulls['remove'][0]:.2f} to {nulls['remove'][1]:.2f}, and "
        f"{nulls['induce'][0]:.2f} to {nulls['induce'][1]:.2f}.",
        {"null": nulls, "n": {p: c["roc"]["area"]["n"] for p, c in conditions.items()}, "conditions": conditions},
    )


def _roc(axes: Any, condition: dict[str, Any], tone: str) -> None:
    curve, area = condition["roc"], condition["roc"]["area"]
    words = (
        f"{_words(condition['inside'])}: {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f}), n = {area['n']}"
    )
    axes.step(curve["false_rate"], curve["true_rate"], where="post", color=tone, label=words)
    axes.set_xlabel("false alarms, sets outside")
    axes.set_ylabel("holds, set inside")
    axes.set_title("(a) ROC, report split")


def _areas(axes: Any, condition: dict[str, Any], tone: str) -> None:
    for line in condition["areas"]:
        style_of = LINES.get((line["kind"], line["pooling"]))
        if line["split"] == "report" and style_of is not None:
            axes.plot(condition["layers"], line["area"], style_of[0], color=tone)
    axes.set_xlabel("layer (state entering the block)")
    axes.set_ylabel("ROC area")
    axes.set_title("(b) Area by layer, report split")


def _holds(axes: Any, condition: dict[str, Any], tone: str, letter: str) -> None:
    inside = condition["inside"]
    holds = {inside: condition["holds"][inside]} | condition["holds"]
    for y, rate in enumerate(holds.values()):
        error = [[rate["rate"] - rate["low"]], [rate["high"] - rate["rate"]]]
        axes.errorbar(rate["rate"], y, xerr=error, fmt="o", color=tone, elinewidth=0.7)
    axes.set_yticks(range(len(holds)), [f"{_words(k)} ({v['n']})" for k, v in holds.items()])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of prompts that are edited")
    axes.set_title(f"({letter}) For whom it holds, layer {condition['layer']}")


def _words(name: str) -> str:
    return name.replace("_", " ")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "steer_condition", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
