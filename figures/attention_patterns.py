"""What the heads that write the refusal direction look at from the last token: one prompt's tokens, and spans of many prompts.

(a) Attention of each chosen head to every token of an example, the template before it summed up; (b) attention by span, mean of
the chosen heads over refused prompts, beside random heads of the same layers.
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

KIND = "component_attribution"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """The example on top, the spans below."""
    data = study_data(result)
    if "attention" not in data:
        raise UserError(f"'{result.folder}' holds no attention; run analyses/component_attribution.py again")
    look = data["attention"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 4.3), layout="constrained")
        a, b = figure.subplots(2, 1, height_ratios=[1.3, 1])
        _example(figure, a, look, data["chosen"])
        _spans(b, look, len(data["chosen"]))
        figure.legend(*b.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    spans = look["spans"]
    words = "; ".join(
        f"{name} {100 * s['effect']['value']:.0f} % ({100 * s['effect']['low']:.0f} to {100 * s['effect']['high']:.0f}, random heads "
        f"{100 * s['random_low']:.0f} to {100 * s['random_high']:.0f}, p = {s['p']:.2g})"
        for name, s in ((name, spans[name]) for name in look["order"])
    )
    return Drawing(
        figure,
        "What the heads that write the refusal direction look at",
        f"Attention from the last prompt token, of the {len(data['chosen'])} heads that write most of the mean difference at layer "
        f"{data['layer']} (chosen on the select split, the first on top). (a) One prompt; the template before the instruction is "
        f"summed up but for the first token, where heads rest. (b) Mean over these heads, n = {look['n']} refused report prompts, 95 % "
        f"intervals; grey: where one more random set of as many heads of the same layers would lie (95 %, "
        f"{spans['instruction']['n_random']} sets). Attention says where heads read, not what they do with it. By span: {words}.",
        {"attention": look, "chosen": data["chosen"], "null": "random heads of the same layers", "n": look["n"]},
    )


def _example(figure: Any, axes: Any, look: dict[str, Any], chosen: list[list[int]]) -> None:
    before = look["ends"][0]
    values = [[row[0], sum(row[1:before]), *row[max(1, before) :]] for row in look["pattern"]]
    names = ["first token", "template", *(_token(t) for t in look["tokens"][max(1, before) :])]
    image = axes.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    end = 2 + look["ends"][1] - max(1, before)
    for edge in (1.5, end - 0.5):
        axes.axvline(edge, color=colour("refusing"), lw=0.8)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(values)), [f"{layer}.{head}" for layer, head in chosen])
    axes.tick_params(length=0)
    axes.set_ylabel("block.head")
    axes.set_title("(a) One prompt, token by token; the instruction is between the lines")
    figure.colorbar(image, ax=axes, label="attention", aspect=12)


def _token(text: str) -> str:
    shown = text.strip().replace("\n", "↵") or text.replace("\n", "↵").replace(" ", "␣")
    return shown if len(shown) < 14 else f"{shown[:12]}…"


def _spans(axes: Any, look: dict[str, Any], count: int) -> None:
    for x, name in enumerate(look["order"]):
        found, first = look["spans"][name], x == 0
        effect = found["effect"]
        axes.bar(
            x,
            found["random_high"] - found["random_low"],
            bottom=found["random_low"],
            width=0.5,
            color=colour("null"),
            alpha=0.6,
            label=f"{count} random heads, same layers, 95 %" if first else None,
        )
        axes.errorbar(
            x,
            effect["value"],
            [[effect["value"] - effect["low"]], [effect["high"] - effect["value"]]],
            fmt="o",
            color=colour("refusing"),
            label=f"the {count} chosen heads, 95 %" if first else None,
        )
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_xticks(range(len(look["order"])), look["order"])
    axes.set_xlim(-0.5, len(look["order"]) - 0.5)
    axes.set_ylabel("attention")
    axes.set_title(f"(b) By span, n = {look['n']} refused prompts")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "attention_patterns", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
