"""Every method's removal, safety kept, safety kept at matched removal, over-refusal and KL, beside random directions.

One row per method, best on the select split first; each panel one measure with its 95 % interval, the band is the null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "compare_methods"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """A forest of intervals, five panels that share their rows."""
    data = study_data(result)
    rows, names = data["methods"], data["names"]
    order = sorted(rows, key=lambda name: -rows[name]["select_score"])
    beside = {name: rows[name]["equal_dose"] or {} for name in order}
    panels: list[tuple[str, dict[str, Mapping[str, Any] | None]]] = [
        (f"{_words(names['remove'])}:\nnow answered", {n: rows[n]["own_best"]["removed"] for n in order}),
        (f"{_words(names['keep'])}:\nstill refused", {n: rows[n]["own_best"]["kept"] for n in order}),
        (
            f"the same at\n{data['target']:.0%} removal",
            {n: (rows[n]["matched"] or {}).get("kept") for n in order},
        ),
        (
            f"{_words(names['watch'][0])}:\nrefused, change",
            {n: rows[n]["own_best"]["watched"][names["watch"][0]]["difference"] for n in order},
        ),
        ("benign answers:\nKL, nats per token", {n: rows[n]["own_best"]["kl"] for n in order}),
    ]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 0.8 + 0.17 * len(order)), layout="constrained")
        every = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, values) in zip(every, panels, strict=True):
            _panel(axes, values, order, data["null"])
            axes.set_title(title, fontsize=6.5)
        for axes, share in ((every[0], "null_removed"), (every[1], "null_kept")):
            for y, name in enumerate(order):
                draws = beside[name].get(share, ())
                axes.plot(draws, [y] * len(draws), "|", ms=4, mew=0.8, color=colour("neutral"))
        every[0].set_yticks(range(len(order)), [rows[n]["label"] + "*" * rows[n]["edge"] for n in order], fontsize=6.5)
        every[0].set_ylim(len(order) - 0.4, -0.6)
        for axes in every[:3]:
            axes.set_xlim(-0.04, 1.04)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        every[4].set_xscale("symlog", linthresh=0.01)
        every[4].set_xticks([0, 0.1, 1], ["0", "0.1", "1"])
        every[4].minorticks_off()
    n = data["n"]
    n_draws = max((len(each["null_removed"]) for each in beside.values() if each), default=0)
    return Drawing(
        figure,
        "The related methods under one protocol",
        f"Each method at the strength chosen for it on the select split, judged replies on the report split: n = {n[names['remove']]} "
        f"refused {_words(names['remove'])} and {n[names['keep']]} refused {_words(names['keep'])} prompts, 95 % intervals (Wilson, Newcombe, "
        f"bootstrap). Third panel: at the strength at which {data['target']:.0%} of refused select prompts are answered; "
        "no point: out of reach, or no knob. Star: the strength is at the edge of what was tried. Grey ticks: each edit's own null, "
        f"{n_draws} random rotations of it, one for all its sites (no p beside so few is below {1 / (1 + n_draws):.2g}). Grey band: random "
        "directions at their own best dose. Order: the select split's. "
        f"{data['finding']}",
        {
            "order": order,
            "null": data["null"],
            "n": n,
            "equal_dose": beside,
            "panels": [{"title": t, "values": v} for t, v in panels],
        },
    )


def _panel(axes: Any, values: Mapping[str, Mapping[str, Any] | None], order: Sequence[str], null: str) -> None:
    random = values[null]
    if random is not None:
        axes.axvspan(random["low"], random["high"], color=colour("null"), alpha=0.5, lw=0)
    for y, name in enumerate(order):
        found = values[name]
        if found is None:
            continue
        value = found["rate"] if "rate" in found else found["value"]
        tone = colour("neutral") if name == null else colour("ink")
        axes.plot([found["low"], found["high"]], [y, y], color=tone, lw=0.9)
        axes.plot([value], [y], "o", ms=3.2, color=tone)
    axes.tick_params(axis="y", length=0)


def _words(name: str) -> str:
    return name.replace("_", " ")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "compare_methods", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
