"""How much of its rivals' time and memory the library needs: ratios with intervals, their goals, and the null.

One row per piece of work and rival. Left of 1 is cheaper than the rival, the tick is the goal; open markers are rivals as
their users get them, filled ones rivals with the same matrix-product kernel. The grey band is the same work timed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "benchmarks"
FLOOR = 0.02  # smaller ratios are drawn here, as an arrowhead


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Rows grouped by work, on one logarithmic axis of ratios."""
    rows, machine = result.data.get("rows"), result.data.get("machine")
    if not rows:
        raise UserError(f"'{result.folder}' holds no comparisons; run `make bench`")
    assert machine is not None
    null = [row["ratio"] for row in rows if row["null"]]
    compared = [row for row in rows if not row["null"]]
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with style():
        lines = len(compared) + len({row["work"] for row in compared})
        figure = Figure(figsize=(DOUBLE, 0.9 + 0.165 * lines), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.axvline(1, color=colour("ink"), lw=0.6)
        if null:
            low, high = min(r["low"] for r in null), max(r["high"] for r in null)
            axes.axvspan(low, high, color=colour("null"), alpha=0.6, lw=0, label="null: ours timed twice")
        names, heights = _rows(axes, compared)
        axes.set_yticks(heights, names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(max(heights) + 0.8, -0.8)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlim(left=FLOOR / 1.15)
        axes.set_xlabel("ours / rival (or limit), ratio of medians")
        figure.legend(*_legend(axes), loc="outside upper left", ncols=5, columnspacing=1.2)
    rounds = sorted({row["n"] for row in compared})
    return Drawing(
        figure,
        "What the library needs of its rivals' time and memory",
        f"Ratio of medians of ours to each rival's cost, bars: 95 % bootstrap interval over n = {rounds[0]} to {rounds[-1]} "
        "alternating rounds (for so few about their range). Red tick: the goal. Open: the rival as its user gets it; filled: "
        "with the same matrix-product kernel as ours, or where no model runs; an arrowhead: below "
        f"{FLOOR:g}. Grey: the null, ours against itself. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['dtype']}. {result.data['finding']}",
        {"rows": compared, "null": null, "machine": machine},
    )


def _rows(axes: Any, rows: list[dict[str, Any]]) -> tuple[list[str], list[float]]:
    names: list[str] = []
    heights: list[float] = []
    y = 0.0
    for work, group in groupby(rows, key=lambda row: row["work"]):
        axes.text(-0.005, y, work, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold", size=7)
        for row in group:
            y += 1
            _point(axes, row, y)
            names.append(f"{row['against']}, plain" if row["kernel"] == "plain" else row["against"])
            heights.append(y)
        y += 1
    return names, heights


def _point(axes: Any, row: dict[str, Any], y: float) -> None:
    found, face = row["ratio"], "white" if row["kernel"] == "plain" else colour("ink")
    value = max(found["value"], FLOOR)
    errors = [[value - max(found["low"], FLOOR)], [max(found["high"], FLOOR) - value]]
    axes.errorbar([value], [y], xerr=errors, color=colour("ink"), lw=0, elinewidth=0.9)
    label = (
        None
        if found["value"] < FLOOR
        else "rival as it comes"
        if row["kernel"] == "plain"
        else "same kernel, or no model"
    )
    shape = "o" if found["value"] >= FLOOR else "<"
    axes.plot([value], [y], shape, color=colour("ink"), mfc=face, zorder=3, label=label)
    if row["goal"] is not None:
        axes.plot([row["goal"]], [y], "|", color=colour("refusing"), ms=8, mew=1.6, zorder=4, label="goal")


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Each label once."""
    found = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "benchmarks", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
