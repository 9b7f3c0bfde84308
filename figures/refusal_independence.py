"""Orthogonal is not independent: what ablating one kind's direction does to another's at later layers, beyond geometry.

One panel per ablated and read pair, one line per source layer; grey are random directions of equal norm (same source layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "refusal_geometry"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """One panel per ordered pair, rows by what is ablated."""
    data = study_data(result)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found, label = data["independence"], {k["name"]: k["label"] for k in data["kinds"]}
    pairs, width = found["downstream"], len(found["kinds"]) - 1
    with style():
        figure = Figure(figsize=(DOUBLE, 1.75 * len(found["kinds"])), layout="constrained")
        grid = figure.subplots(len(found["kinds"]), width, sharex=True, sharey=True, squeeze=False)
        for axes, pair in zip(grid.flat, pairs, strict=True):
            _panel(axes, pair, found, label)
        grid[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[:, 0]:
            axes.set_ylabel("|shift| / gap")
        for axes in grid[-1]:
            axes.set_xlabel("layer where it is read")
        handles, words = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside lower center", ncols=4)
    return Drawing(
        figure,
        "What ablating one kind's direction does to another's at later layers",
        "Mean |change| of the projection on the direction read, as a share of its gap between refused and answered fit prompts, less "
        f"what the ablated component itself carries along (so without later blocks it would be 0), n = {found['n']} refused report prompts. "
        "One line per layer at which the direction is ablated; dashed, of the same colour: mean of "
        f"{pairs[0]['n_random']} random directions whose displacement is as large. Filled: beyond them at a false-discovery rate of 5 % over the panel. "
        + " ".join(
            f"{label[p['ablated']]} on {label[p['read']]}: {p['size']['value']:.2f} ({p['size']['low']:.2f} to "
            f"{p['size']['high']:.2f}), random {p['random_size']:.2f}, {p['beyond']} of {p['pairs']} beyond."
            for p in pairs
        ),
        {"independence": found},
    )


def _panel(axes: Any, pair: dict[str, Any], found: dict[str, Any], label: dict[str, str]) -> None:
    from matplotlib import colormaps

    start, n = 0, len(found["sources"])
    for k, (source, layers) in enumerate(zip(found["sources"], found["later"], strict=True)):
        ink = colormaps["viridis"](0.85 * k / max(n - 1, 1))
        values, null = pair["mean"][k], pair["null"][k]
        q = pair["q"][start : start + len(layers)]
        start += len(layers)
        axes.plot(layers, values, color=ink, lw=1.0, label=f"ablated at layer {source}")
        axes.plot(layers, null, color=ink, lw=0.8, ls="--", label="random, equal norm (dashed)" if k == n - 1 else None)
        for filled in (True, False):
            points = [
                (x, v) for x, v, m, p in zip(layers, values, null, q, strict=True) if (p <= 0.05 and v > m) == filled
            ]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o", color=ink, ms=2.8, mew=0.7,
                      mfc=ink if filled else "white")  # fmt: skip
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_title(f"ablate {label[pair['ablated']]}, read {label[pair['read']]}", fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "refusal_independence", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
