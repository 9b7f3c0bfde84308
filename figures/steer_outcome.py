"""What selective steering does to every prompt set: judged refusal before and after, for removal and for induction.

Hollow: unsteered; filled: with the edit and its condition; cross: the same edit on every prompt, without the condition.
"""

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


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """One panel per configuration, one row per prompt set."""
    data = study_data(result)
    if "remove" not in data or "induce" not in data:
        raise UserError(f"'{result.folder}' holds no configurations; run analyses/steer.py again")
    names = data["names"]
    from matplotlib.figure import Figure

    order = [names["remove"], names["contrast"], *names["keep"], names["induce"]]
    removed, induced = (_ordered(data[part]["report"]["sets"], order) for part in ("remove", "induce"))
    with style():
        figure = Figure(figsize=(DOUBLE, 3.4), layout="constrained")
        a, b = figure.subplots(1, 2)
        _panel(a, removed, data["ungated"]["sets"], f"(a) Removing: {_words(names['remove'])}")
        _panel(b, induced, {}, f"(b) Inducing: {_words(names['induce'])}")
        handles, labels = a.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    n = {name: row["before"]["n"] for name, row in removed.items()}
    return Drawing(
        figure,
        "Selective steering, every prompt set",
        f"Judged greedy replies on the report split, 95 % Wilson intervals, n = {', '.join(f'{k} {v}' for k, v in n.items())}; "
        f"without the condition n = {_n(data['ungated']['sets'])} per set. The null is the unsteered model on the same prompts: a "
        "set that should not change lies on it. " + data["finding"],
        {"null": "unsteered replies to the same prompts", "n": n, "remove": removed, "induce": induced,
         "ungated": data["ungated"]["sets"]},
    )  # fmt: skip


def _panel(axes: Any, sets: dict[str, Any], bare: dict[str, Any], title: str) -> None:
    for y, (name, row) in enumerate(sets.items()):
        axes.plot([row["before"]["rate"], row["after"]["rate"]], [y, y], color=colour("neutral"), lw=0.8, zorder=1)
        for key, shift, face, words in (
            ("before", -0.14, "white", "unsteered"),
            ("after", 0.14, None, "with the condition"),
        ):
            rate = row[key]
            tone = colour("ink") if key == "before" else colour("answering")
            axes.errorbar(
                rate["rate"],
                y + shift,
                xerr=[[rate["rate"] - rate["low"]], [rate["high"] - rate["rate"]]],
                fmt="o",
                color=tone,
                mfc=face or tone,
                elinewidth=0.7,
                label=words if y == 0 else None,
            )
        if name in bare:
            axes.plot(
                bare[name]["after"]["rate"],
                y,
                "x",
                color=colour("refusing"),
                label="same edit, no condition" if y == 0 else None,
            )
    axes.set_yticks(range(len(sets)), [f"{_words(name)} ({row['before']['n']})" for name, row in sets.items()])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share refused")
    axes.set_title(title)


def _ordered(sets: dict[str, Any], order: list[str]) -> dict[str, Any]:
    return {name: sets[name] for name in dict.fromkeys([*order, *sets]) if name in sets}


def _n(sets: dict[str, Any]) -> str:
    return " to ".join(str(v) for v in sorted({row["before"]["n"] for row in sets.values()}))


def _words(name: str) -> str:
    return name.replace("_", " ")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "steer_outcome", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
