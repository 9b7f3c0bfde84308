"""In which layers refusal can be read, and in which it is caused, each with its null, on one depth axis.

(a) Pearson r of projection and verdict by layer, with its interval, the permutation null and r inside subjects, and a
line for each further estimator of the study;
(b) refusal log-odds removed by ablating at one block input, (c) by adding minus the direction at matched relative dose, beside random
directions of equal norm; filled markers are beyond them at a false-discovery rate of 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, method_label, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "layer_concentration"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """The read-out on top, the two causal curves below it on the same layers."""
    data = study_data(result)
    if "readouts" not in data or "causal" not in data:
        raise UserError(f"'{result.folder}' holds no curves; run analyses/layer_concentration.py again")
    methods, causal, n_layers = data["methods"], data["causal"], data["model"]["n_layers"]
    read = data["readouts"][methods[0]]
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style():
        figure = Figure(figsize=(DOUBLE, 5.6), layout="constrained")
        a, b, c = figure.subplots(3, 1, sharex=True)
        _read_out(a, methods, data["readouts"])
        first = method_label(methods[0])
        _causes(b, causal, "ablate", f"(b) Ablating {first} at one block input")
        _causes(c, causal, "add", f"(c) Adding minus {first}, {causal['dose']:g} of |resid|")
        c.set_xlabel("layer (state entering the block)")
        c.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (a, b, c):  # ticks that change with the height never settle the layout
            axes.yaxis.set_major_locator(MaxNLocator(5))
        top = a.secondary_xaxis("top", functions=(lambda x: x / n_layers, lambda x: x * n_layers))
        top.set_xlabel("depth, layer / number of layers")
    return Drawing(
        figure,
        "In which layers refusal concentrates",
        f"(a) Directions fitted on other prompts; n = {read['n']} report prompts; the thin lines are the 95 % bootstrap interval "
        f"of {first}, and the nulls are its label permutations. "
        f"(b, c) Log-odds of a refusal opening removed on n = {causal['n']} refusing report prompts; bars are 95 % bootstrap "
        f"intervals, the grey band is where one more random direction of equal norm would lie (95 %, {causal['n_random']} directions per "
        f"layer, {causal['null']}). Filled markers: more removed than by random directions at a false-discovery rate of 5 %. {data['finding']}",
        {"methods": methods, "readouts": data["readouts"], "causal": causal, "n": read["n"], "n_layers": n_layers},
    )


def _read_out(axes: Any, methods: list[str], readouts: dict[str, Any]) -> None:
    first, *others = methods
    read = readouts[first]
    x = read["layers"]
    axes.fill_between(
        x, read["null_low"], read["null_high"], color=colour("null"), alpha=0.6, lw=0, label="null, 95 % per layer"
    )
    axes.axhline(read["null_max_q95"], color=colour("neutral"), ls=":", label="null of the maximum, 95 %")
    axes.plot(x, read["r"], color=colour("ink"), label=f"{method_label(first)}, all prompts")
    axes.plot(x, read["low"], color=colour("ink"), lw=0.6, label="95 % interval over subjects")
    axes.plot(x, read["high"], color=colour("ink"), lw=0.6)
    axes.plot(
        x, read["within_subject_r"], color=colour("answering"), ls="--", label=f"{method_label(first)}, inside subjects"
    )
    for name in others:
        curve = readouts[name]["r"]
        axes.plot(
            x,
            curve,
            marker=marker(name),
            ms=2.5,
            lw=0.8,
            color=colour(name),
            label=f"{method_label(name)}, all prompts",
        )
    chosen = read["chosen_on_select"]
    axes.plot(
        chosen["layer"], chosen["r"]["value"], "D", mfc="white", mec=colour("ink"), label="chosen on the select split"
    )
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_ylabel("Pearson r")
    axes.set_title(f"(a) Read-out: projection against verdict, n = {read['n']}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _causes(axes: Any, causal: dict[str, Any], edit: str, title: str) -> None:
    x, curve, ink = causal["layers"], causal[edit], colour("refusing")
    value = [e["value"] for e in curve["effect"]]
    errors = [[v - e["low"] for v, e in zip(value, curve["effect"], strict=True)],
              [e["high"] - v for v, e in zip(value, curve["effect"], strict=True)]]  # fmt: skip
    axes.fill_between(
        x,
        curve["null_low"],
        curve["null_high"],
        color=colour("null"),
        alpha=0.6,
        lw=0,
        label="random, equal norm, 95 %",
    )
    axes.errorbar(x, value, errors, color=ink, lw=1.0, elinewidth=0.7, label="direction, 95 % interval")
    for filled, words in ((True, "beyond random, q ≤ 0.05"), (False, "not beyond random")):
        points = [
            (i, v)
            for i, v, q, z in zip(x, value, curve["q"], curve["z"], strict=True)
            if (q <= 0.05 and z > 0) == filled
        ]
        axes.plot(
            [i for i, _ in points],
            [v for _, v in points],
            "o",
            color=ink,
            mfc=ink if filled else "white",
            zorder=3,
            label=words,
        )
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_ylabel("log-odds removed, nats")
    axes.set_title(f"{title}, n = {causal['n']}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "layer_concentration", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
