"""Paper's Figure 3: 2-D PCA of last-prompt-token states at the chosen layer, coloured by what the model did.

Refused, answered and neutral prompts by colour, prompt sets by marker. Beside it the null: the distance between the
middles of refused and answered prompts, against the same distance when the labels are permuted, over all prompts and
within each subject (so that a difference of topic cannot make it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import Reproduced
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.resampling import permutations
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, style

PERMUTATIONS = 1000


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """The scatter and, right of it, the distance between the two middles with its permutation null."""
    pca, points, data = result.data.pca, result.pca, result.data
    if pca is None or points is None:
        raise result.missing("PCA")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    labels, sets = np.array(pca.label), np.array(pca.set)
    shown = data.in_order(pca.set)
    rows = distances(points, labels, sets, pca.subject, shown)
    with style():
        figure = Figure(figsize=(DOUBLE, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
        for label in ("neutral", "answered", "refused"):
            for name in shown:
                chosen = (labels == label) & (sets == name)
                left.scatter(
                    *points[chosen].T, s=13, marker=marker(name), color=colour(label), alpha=0.7, linewidths=0, zorder=2
                )
        left.set_xlabel(f"first component ({100 * pca.explained[0]:.0f} % of the variance)")
        left.set_ylabel(f"second component ({100 * pca.explained[1]:.0f} %)")
        left.set_title(f"States at layer {pca.layer}, n = {len(labels)} prompts")
        by_label = [
            Line2D([], [], ls="", marker="o", color=colour(label), label=f"{label} ({(labels == label).sum()})")
            for label in ("refused", "answered", "neutral")
        ]
        by_set = [
            Line2D([], [], ls="", marker=marker(s), mfc="none", mec=colour("ink"), label=f"{data.set_label(s)} ({n})")
            for s, n in ((s, (sets == s).sum()) for s in shown)
        ]
        figure.legend(
            handles=by_label + by_set, loc="outside lower left", ncols=len(by_label + by_set), columnspacing=1
        )

        for y, row in enumerate(rows):
            right.plot([row["null_low"], row["null_high"]], [y, y], lw=7, color=colour("null"), solid_capstyle="butt")
            right.plot(row["distance"], y, "D", color=colour("ink"), zorder=3)
        right.set_yticks(
            range(len(rows)),
            [
                f"{data.set_label(r['set'])}{_how(r)}\n({r['n_refused']} refused,\n{r['n_answered']} answered)"
                for r in rows
            ],
        )
        right.set_ylim(len(rows) - 0.4, -0.6)
        right.set_xlim(left=0)
        right.set_xlabel("distance of the middles,\nrefused to answered")
        right.set_title("Against permuted labels")
        right.plot([], [], lw=7, color=colour("null"), label="null, 95 % of permutations")
        right.legend(loc="lower right", handlelength=1)
    caption = (
        f"2-D PCA of last-prompt-token states at layer {pca.layer} ({len(labels)} prompts); colour says what the model "
        "did, marker the prompt set. Right: distance between the middles of refused and answered prompts in this plane; "
        f"grey is the central 95 % of {PERMUTATIONS} label permutations, within each subject but for the first row, in which topic counts. "
        "The layer was chosen for how well refusal can be read there, so the separation is an optimistic one."
    )
    plotted = {
        "n": len(labels), "layer": pca.layer, "explained": pca.explained, "points": points, "label": pca.label,
        "set": pca.set, "null": rows,
    }  # fmt: skip
    return Drawing(figure, "States of refused and answered prompts", caption, plotted)


def distances(
    points: np.ndarray, labels: np.ndarray, sets: np.ndarray, subjects: Sequence[str], shown: list[str]
) -> list[dict[str, Any]]:
    """Distance between the middles of refused and answered points, all and by set, with its permutation nulls."""
    rows = []
    for name, within in [("all", False), ("all", True), *((name, True) for name in shown)]:
        chosen = (labels != "neutral") & ((sets == name) | (name == "all"))
        refused, inside = labels[chosen] == "refused", points[chosen]
        if refused.sum() < 2 or (~refused).sum() < 2:
            continue
        groups = [group for group, here in zip(zip(sets, subjects, strict=True), chosen, strict=True) if here]
        orders = permutations(len(inside), PERMUTATIONS, 0, within=groups if within else None)
        low, high = percentiles([_distance(inside, refused[order]) for order in orders])
        rows.append({
            "set": "all sets" if name == "all" else name, "within_subjects": within, "distance": _distance(inside, refused),
            "null_low": float(low), "null_high": float(high), "n_refused": int(refused.sum()), "n_answered": int((~refused).sum()),
        })  # fmt: skip
    return rows


def _how(row: dict[str, Any]) -> str:
    """How the labels of a row that is there twice are permuted."""
    return "" if row["set"] != "all sets" else ", in subjects" if row["within_subjects"] else ", any label"


def _distance(points: np.ndarray, refused: np.ndarray) -> float:
    return float(np.linalg.norm(points[refused].mean(0) - points[~refused].mean(0)))


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "fig3_pca", argv)


if __name__ == "__main__":
    raise SystemExit(main())
