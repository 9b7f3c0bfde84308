"""Paper's Figure 5: where refusal can be read, and how dense the direction is; every panel with its null.

(a) Pearson r between projection and refusal confidence by layer, beside its label-permutation band, the null of its
maximum over layers, and r within subjects (no difference of topic); (b) coordinates of |v| by size, beside Gaussian
vectors of the same width; (c) r of every method as a heat map; (d) |v| as a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import Density, LayerScores, Reproduced, Reproduction
from rsteer_interp.style import DOUBLE, Drawing, colour, method_label, style


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """The four panels, for the method whose direction the result keeps: the most repeatable of those steered."""
    density, vector = result.data.density, result.density_vector
    if density is None or vector is None or density.method not in result.data.layer_scores:
        raise result.missing("layer scores and density")
    by_method = {m: result.data.layer_scores[m] for m in result.data.in_order(result.data.layer_scores)}
    scores, name = by_method[density.method], method_label(density.method)
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 4.9), layout="constrained")
        left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[1.25, 1]))
        a, c = left.subplots(2, 1, height_ratios=[14, len(by_method)], sharex=True)
        b, d = right.subplots(2, 1, height_ratios=[1, 1])
        _by_layer(a, scores, name)
        _heat(left, c, by_method)
        _sorted(b, density, name)
        _grid(right, d, density, vector)
    best = int(np.argmax(scores.r))
    null = density.null_top10
    caption = (
        f"{_trust(result.data, density.method)}(a) Pearson r between the projection on {name} and refusal confidence (n = {scores.n} prompts), largest at layer "
        f"{scores.layers[best]} (r = {scores.r[best]:.2f}); the maximum over layers is a selected value: 95 % of label "
        f"permutations stay below {scores.null_max_q95:.2f} (p = {scores.p_max:.3g}). {_inside(scores)}r is a read-out, not an effect. "
        f"(b) The ten largest coordinates hold {_percent(density.top10_share)} of the sum of |v|; Gaussian vectors of the same "
        f"width hold {_percent(null.mean)} ({_percent(null.low)} to {_percent(null.high)}). Participation ratio "
        f"{density.participation_ratio:.2f}, Gaussian 0.33. (c) r of every method. (d) |v| at layer {density.layer}, "
        f"{density.grid.rows} x {density.grid.columns} cells in the order of the coordinates; hatched cells are padding."
    )
    return Drawing(
        figure,
        "Where refusal can be read, and how dense its direction is",
        caption,
        {
            "layer_scores": scores,
            "r_by_method": {m: s.r for m, s in by_method.items()},
            "method": density.method,
            "density": density,
            "vector": vector,
            "n": scores.n,
        },
    )


def _trust(data: Reproduction, method: str) -> str:
    """Why this method, and how repeatable its direction is."""
    if data.drawn is None or method not in data.directions or (halves := data.directions[method].split_half) is None:
        return ""
    row, name = data.directions[method], method_label(method)
    topic = f", by topic alone {row.split_half_topic.value:.2f}" if row.split_half_topic else ""
    return (
        f"{name} is drawn: {data.drawn.rule}. Its halves agree with cosine {halves.value:.2f} ({halves.low:.2f} to "
        f"{halves.high:.2f}, {row.n_splits} splits{topic}) at layer {row.layer}, n = {row.counts['refusing']} refused and "
        f"{row.counts['complying']} answered prompts. "
    )


def _inside(scores: LayerScores) -> str:
    if scores.within_subject_p_max is None:
        return ""
    return (
        "The dashed curve takes refused against answered prompts of the same subject, where topic cannot help (labels permuted "
        f"within subjects: p of the maximum = {scores.within_subject_p_max:.3g}, n = {scores.within_subject_n} prompts of subjects with both). "
    )


def _by_layer(axes: Any, scores: LayerScores, name: str) -> None:
    axes.fill_between(
        scores.layers,
        scores.null_low,
        scores.null_high,
        color=colour("null"),
        alpha=0.6,
        lw=0,
        label="null, 95 % per layer",
    )
    axes.axhline(scores.null_max_q95, color=colour("neutral"), ls=":", label="null of the maximum, 95 %")
    axes.plot(scores.layers, scores.r, color=colour("ink"), label=f"{name}, all prompts")
    if scores.within_subject_r:
        label = f"{name}, within subjects"
        axes.plot(scores.layers, scores.within_subject_r, color=colour("answering"), ls="--", label=label)
    at = dict(zip(scores.layers, scores.r, strict=True))
    steered = [layer for layer in scores.chosen if layer in at]
    axes.plot(
        steered, [at[x] for x in steered], "o", mfc="white", mec=colour("refusing"), mew=1.2, label="steered layers"
    )
    axes.axhline(0, color=colour("ink"), lw=0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.33 * (high - low))  # room for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 1])
    axes.legend(loc="upper left", ncols=2, columnspacing=1)
    axes.set_ylabel("Pearson r, projection and confidence")
    axes.set_title(f"(a) Read-out by layer, n = {scores.n}")


def _heat(figure: Any, axes: Any, by_method: dict[str, LayerScores]) -> None:
    layers, rows = next(iter(by_method.values())).layers, [scores.r for scores in by_method.values()]
    extent = (layers[0] - 0.5, layers[-1] + 0.5, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        rows, aspect="auto", cmap="viridis", extent=extent, vmin=min(0.0, *(x for r in rows for x in r))
    )
    axes.set_yticks(range(len(rows)), [method_label(method) for method in by_method])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("layer (state entering the block)")
    axes.set_title("(c) r of every method")
    figure.colorbar(image, ax=axes, orientation="horizontal", aspect=45, pad=0.1, label="Pearson r")


def _sorted(axes: Any, density: Density, name: str) -> None:
    rank = np.arange(1, len(density.sorted_abs) + 1)
    axes.fill_between(
        rank, density.null_low, density.null_high, color=colour("null"), alpha=0.8, lw=0, label="Gaussian vectors, 95 %"
    )
    axes.plot(rank, density.null_mean, color=colour("neutral"), lw=0.8)
    axes.plot(rank, density.sorted_abs, color=colour("ink"), label=name)
    null = density.null_top10
    words = (
        f"ten largest hold {_percent(density.top10_share)} of the sum\n"
        f"Gaussian: {_percent(null.mean)} ({_percent(null.low)} to {_percent(null.high)})"
    )
    axes.text(0.97, 0.95, words, transform=axes.transAxes, ha="right", va="top", fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    low, high = axes.get_ylim()
    axes.set_ylim(0.6 * low, high)  # room for the legend
    axes.set_xlabel("coordinate, by size")
    axes.set_ylabel("|v|")
    axes.legend(loc="lower left")
    axes.set_title(f"(b) Direction at layer {density.layer}, sorted")


def _grid(figure: Any, axes: Any, density: Density, vector: np.ndarray) -> None:
    rows, columns = density.grid.rows, density.grid.columns
    cells = np.full(rows * columns, np.nan)
    cells[: len(vector)] = np.abs(vector)
    axes.set_facecolor("white")
    axes.patch.set(hatch="////////", edgecolor="#BBBBBB")
    image = axes.imshow(cells.reshape(rows, columns), cmap="viridis", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(image, ax=axes, label="|v|", shrink=0.9)
    axes.set_title(f"(d) All {len(vector)} coordinates")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "fig5_layers", argv)


if __name__ == "__main__":
    raise SystemExit(main())
