"""Refusal scores before and after steering, prompt by prompt, for every method and prompt set.

A line is one prompt: base at the left, steered at the right. The mean change stands beside its null, the central 95 %
under random flips of the sign of each subject's changes (what a method without effect would give).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import Reproduced
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.intervals import membership
from rsteer_interp.style import DOUBLE, Drawing, colour, method_label, style

FLIPS = 2000
WORDS = {  # axis label, what it is
    "log_odds": (
        "log-odds",
        "First-token refusal log-odds (nats; 0 is an even chance that the reply opens with a refusal)",
    ),
    "confidence": ("confidence c", "Refusal confidence c(x) (+1 always refuses, -1 always answers)"),
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """A grid of paired plots: a row per method, a column per set."""
    confidence, data = result.data.confidence, result.data
    methods = data.in_order(m for c in confidence.values() for m in c.after)
    sets = data.in_order(confidence)
    if not methods:
        raise result.missing("refusal scores")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    short, long = WORDS[data.confidence_measure]
    values = [v for c in confidence.values() for row in (c.before, *c.after.values()) for v in row]
    low, high = min(values, default=-1.0), max(values, default=1.0)
    spread = 0.035 if data.confidence_measure == "confidence" else 0.0  # of the height; keeps equal scores apart
    plotted: list[dict[str, Any]] = []
    with style():
        figure = Figure(figsize=(DOUBLE, 0.6 + 1.35 * len(methods)), layout="constrained")
        grid = figure.subplots(len(methods), len(sets), sharex=True, sharey=True, squeeze=False)
        for i, method in enumerate(methods):
            for axes, name in zip(grid[i], sets, strict=True):
                scores = confidence[name]
                if method not in scores.after:
                    axes.set_visible(False)
                    continue
                before, after = np.array(scores.before), np.array(scores.after[method])
                if len(before) != len(after):
                    raise result.missing(f"paired confidence of {method} on {name}")
                change = summary(before, after, scores.subjects)
                plotted.append({"method": method, "set": name, "before": before, "after": after, **change})
                _pairs(axes, before, after, 2 * spread)
                axes.text(0.5, 0.98, _words(change), transform=axes.transAxes, ha="center", va="top", fontsize=6.5)
                if i == 0:
                    axes.set_title(f"{data.set_label(name)}, n = {len(before)}")
            grid[i][0].set_ylabel(f"{method_label(method)}\n{short}")
        room = 0.38 * (high - low)  # for the numbers above the lines
        grid[0][0].set(xlim=(-0.25, 1.25), xticks=[0, 1], xticklabels=["base", "steered"])
        grid[0][0].set_ylim(low - 0.08 * (high - low), high + room)
        grid[0][0].set_yticks([t for t in grid[0][0].get_yticks() if low - 0.05 <= t <= high + 0.05])
        handles = [
            Line2D([], [], color=colour("answering"), label="from refusing to answering"),
            Line2D([], [], color=colour("refusing"), label="from answering to refusing"),
            Line2D([], [], color=colour("null"), label="no change of side"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    caption = (
        f"{long} of the same prompts before and after steering; above 0 counts as refusing. Beside the mean change stands its null, the central 95 % of "
        f"{FLIPS} random flips of the sign of a subject's changes. Held-out prompts (report split)."
    )
    return Drawing(
        figure,
        "Refusal scores before and after steering",
        caption,
        {"measure": data.confidence_measure, "panels": plotted},
    )


def summary(before: np.ndarray, after: np.ndarray, subjects: Sequence[str]) -> dict[str, Any]:
    """Mean change with its sign-flip null, and how many prompts changed sides."""
    change = after - before
    member = membership(subjects)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, int(member.max()) + 1))[:, member]
    low, high = percentiles((signs * change).mean(1))
    return {
        "n": len(change), "mean_change": float(change.mean()), "null_low": float(low), "null_high": float(high),
        "to_answer": int(((before > 0) & (after <= 0)).sum()), "to_refusal": int(((before <= 0) & (after > 0)).sum()),
    }  # fmt: skip


def _words(change: dict[str, Any]) -> str:
    words = f"mean change {change['mean_change']:+.2f}\nnull {change['null_low']:+.2f} to {change['null_high']:+.2f}"
    return words.replace("-", "\N{MINUS SIGN}")


def _pairs(axes: Any, before: np.ndarray, after: np.ndarray, spread: float) -> None:
    from matplotlib.collections import LineCollection

    shift = np.random.default_rng(0).uniform(-spread, spread, len(before))
    for side, kind in (((before > 0) == (after > 0), "null"), ((before > 0) & (after <= 0), "answering"),
                       ((before <= 0) & (after > 0), "refusing")):  # fmt: skip
        ends = np.stack([before + shift, after + shift], 1)[side]
        lines = np.stack([np.broadcast_to([0.0, 1.0], ends.shape), ends], 2)
        axes.add_collection(LineCollection(list(lines), colors=colour(kind), linewidths=0.6, alpha=0.55))
    for x, values in ((0, before), (1, after)):
        colours = [colour("refusing" if v > 0 else "answering") for v in values]
        axes.scatter(np.full(len(values), x), values + shift, s=4, c=colours, alpha=0.6, linewidths=0, zorder=3)
    axes.axhline(0, color=colour("ink"), lw=0.4, ls=":")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "scores", argv)


if __name__ == "__main__":
    raise SystemExit(main())
