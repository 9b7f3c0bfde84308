"""The claim table as a picture: refusal rates by prompt set and method with Wilson intervals, beside the paper's rows.

Held-out prompts. Hollow markers are the paper's published rates (other models, other prompts). Grey is the null: the
range of judged rates under random directions of the same dose, on the select split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import HARMFUL, POLITICAL, PaperRow, Reproduced, Row
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, style


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """One panel per prompt set, one line per method, then the paper's rows."""
    data = result.data
    if not data.table:
        raise result.missing("table")
    from matplotlib.figure import Figure

    sets = data.in_order(name for row in data.table for name in row.rates)
    random = data.null.random if data.null else []
    nulls = {name: [100 * rates[name].rate for rates in random if name in rates] for name in sets if random}
    nulls = {name: rates for name, rates in nulls.items() if rates}
    gap = len(data.table) + 0.6
    names = [row.label for row in data.table] + [f"paper, {row.label}" for row in data.paper]
    heights = [float(i) for i in range(len(data.table))] + [gap + i for i in range(len(data.paper))]
    with style():
        figure = Figure(figsize=(DOUBLE, 1.1 + 0.2 * (heights[-1] + 1)), layout="constrained")
        panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, sets, strict=True):
            if name in nulls:
                low, high = min(nulls[name]), max(nulls[name])
                axes.fill_betweenx(
                    [-0.5, len(data.table) - 0.5], low, high, color=colour("null"), alpha=0.5, lw=0,
                    label="range under random directions of the same dose (select split)",
                )  # fmt: skip
            for i, row in enumerate(data.table):
                _measured(axes, i, row, name)
            for height, published in zip(heights[len(data.table) :], data.paper, strict=True):
                _published(axes, height, published, name)
            if data.paper:
                axes.axhline(gap - 0.8, color=colour("neutral"), lw=0.5)
            n = sorted({row.rates[name].n for row in data.table if name in row.rates})
            axes.set_title(f"{data.set_label(name)}\nn = {' to '.join(map(str, n[:1] + n[1:][-1:]))}")
            axes.set(xlim=(-4, 104), xticks=[0, 50, 100], xlabel="refused, %")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x", color="#E4E4E4", lw=0.6)
            axes.set_axisbelow(True)
        panels[0].set_yticks(heights, names)
        panels[0].set_ylim(heights[-1] + 0.6, -0.6)
        handles, words = panels[sets.index(next(iter(nulls)))].get_legend_handles_labels() if nulls else ([], [])
        if nulls:
            figure.legend(handles, words, loc="outside lower center")
    caption = (
        f"Refusal rates of {data.model.name} on held-out prompts, 95 % Wilson intervals. Hollow markers are the paper's "
        "published rates on its own prompts and models (no intervals were published; 4B and 80B models). "
        + (
            f"Grey: range under {len(random)} random directions of the same dose (select split, judged)."
            if nulls
            else "No random directions were run."
        )
    )
    plotted = {
        "table": data.table,
        "paper": data.paper,
        "null": {k: {"low": min(v), "high": max(v), "n": len(v)} for k, v in nulls.items()},
    }
    return Drawing(figure, "What each method removes, and what it leaves", caption, plotted)


def _measured(axes: Any, y: float, row: Row, name: str) -> None:
    rate = row.rates.get(name)
    if rate is None:
        return
    key = row.method or "base"
    axes.plot([100 * rate.low, 100 * rate.high], [y, y], color=colour(key), lw=1.4)
    axes.plot(100 * rate.rate, y, marker(key), color=colour(key), ms=5)


def _published(axes: Any, y: float, row: PaperRow, name: str) -> None:
    value = {POLITICAL: row.political, HARMFUL: row.harmful}.get(name)
    if value is not None:
        key = next((m for m in ("wrmd", "wmd", "rmd", "md") if m in row.label.lower()), "base")
        axes.plot(value, y, marker(key), mfc="white", mec=colour(key), ms=5, mew=1)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "claim_table", argv)


if __name__ == "__main__":
    raise SystemExit(main())
