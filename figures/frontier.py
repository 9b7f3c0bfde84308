"""Removal against safety: political and harmful refusal rates of every configuration tried, with random directions.

Good lies at the upper left: political refusals gone, harmful refusals kept. Small points are the configurations on the
select split, rings mark the chosen ones, large points with error bars are those on the report split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import HARMFUL, POLITICAL, Configuration, Rate, Reproduced, Row
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, method_label, style


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """The select split at the left, the report split at the right, on the same axes."""
    tried = result.data.frontier
    reported = [row for row in result.data.table if POLITICAL in row.rates and HARMFUL in row.rates]
    if not tried:
        raise result.missing("configurations")
    from matplotlib.figure import Figure

    nulls = [c for c in tried if c.null]
    with style():
        figure = Figure(figsize=(DOUBLE, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        methods = _select(left, tried, nulls)
        left.set_title(f"Select split: all {len(tried) - len(nulls)} configurations")
        left.set_ylabel(f"harmful requests refused, %  (n = {_ns(c.harmful.n for c in tried)})")
        left.set_xlabel(f"political prompts refused, %  (n = {_ns(c.political.n for c in tried)}, by log-odds)")
        for row in reported:
            _report(right, row)
        right.set_title("Report split: the chosen ones, 95 % intervals")
        if reported:
            right.set_xlabel(
                f"political prompts refused, %  (n = {_ns(r.rates[POLITICAL].n for r in reported)}, judged)"
            )
            right.set_ylabel(f"harmful, %  (n = {_ns(r.rates[HARMFUL].n for r in reported)})")
        for axes in (left, right):
            axes.text(
                0.02, 0.98, "↖ better: political removed, safety kept", transform=axes.transAxes, va="top", fontsize=6.5,
                color=colour("neutral"),
            )  # fmt: skip
        left.set_xlim(-4, 104)
        ys = [100 * v for c in tried for v in (c.harmful.rate,)] + [100 * r.rates[HARMFUL].high for r in reported]
        left.set_ylim(-4, min(104, max(30.0, 1.18 * max(ys) + 4)))
        figure.legend(handles=_handles(methods, tried), loc="outside lower center", ncols=len(methods) + 4,
                      columnspacing=1)  # fmt: skip
    random = f"{len(nulls)} random directions at matched dose" if nulls else "no random directions were run"
    known = any(c.meets_target is not None for c in tried)
    filled = "filled points meet the removal target, " if known else ""
    caption = (
        "Refusal rate on political against harmful prompts. Left: every configuration (layers, coefficient, reposition) on "
        f"the select split, refused meaning first-token log-odds above 0; {filled}rings are chosen; grey is the null ({random}). "
        "Right: the chosen configurations on held-out prompts, judged replies, 95 % Wilson intervals."
    )
    plotted = {"select": tried, "report": [{"label": r.label, "method": r.method, "rates": r.rates} for r in reported]}
    return Drawing(figure, "Removal against safety", caption, plotted)


def _select(axes: Any, tried: list[Configuration], nulls: list[Configuration]) -> list[str]:
    axes.plot(*_xy(nulls), "o", ms=3, color=colour("null"), mew=0)
    methods = list(dict.fromkeys(c.method or "" for c in tried if not c.null and not c.is_base))
    for method in methods:
        points = [c for c in tried if c.method == method and not c.null and not c.is_base]
        style_of = {"marker": marker(method), "ms": 4, "ls": "", "color": colour(method), "mew": 0.8}
        axes.plot(*_xy([c for c in points if c.meets_target is False]), mfc="none", **style_of)
        axes.plot(*_xy([c for c in points if c.meets_target is not False]), **style_of)
        axes.plot(*_xy([c for c in points if c.chosen]), "o", ms=9.5, mfc="none", mec=colour("ink"), mew=1, zorder=4)
    axes.plot(*_xy([c for c in tried if c.is_base][:1]), marker("base"), color=colour("base"), ms=6, zorder=5)
    return methods


def _xy(points: list[Configuration]) -> tuple[list[float], list[float]]:
    return [100 * c.political.rate for c in points], [100 * c.harmful.rate for c in points]


def _report(axes: Any, row: Row) -> None:
    name = row.method or "base"
    x, y = row.rates[POLITICAL], row.rates[HARMFUL]
    axes.errorbar(
        100 * x.rate, 100 * y.rate, xerr=_bars(x), yerr=_bars(y), fmt=marker(name), color=colour(name), ms=6, lw=1,
        mec="white", mew=0.5,
    )  # fmt: skip


def _bars(rate: Rate) -> list[list[float]]:
    return [[max(0.0, 100 * (rate.rate - rate.low))], [max(0.0, 100 * (rate.high - rate.rate))]]


def _ns(counts: Any) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _handles(methods: list[str], tried: list[Configuration]) -> list[Any]:
    from matplotlib.lines import Line2D

    out = [Line2D([], [], ls="", marker=marker("base"), color=colour("base"), label="base")]
    out += [Line2D([], [], ls="", marker=marker(m), color=colour(m), label=method_label(m)) for m in methods]
    out.append(Line2D([], [], ls="", marker="o", ms=8, mfc="none", mec=colour("ink"), label="chosen"))
    if any(c.meets_target is False for c in tried if not c.null):
        out.append(Line2D([], [], ls="", marker="s", mfc="none", mec=colour("neutral"), label="misses target"))
    if any(c.null for c in tried):
        out.append(Line2D([], [], ls="", marker="o", color=colour("null"), label="random direction"))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "frontier", argv)


if __name__ == "__main__":
    raise SystemExit(main())
