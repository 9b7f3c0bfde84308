"""Removal against safety: what the finder saw of every setting, what either update costs at equal removal, and the outcome.

Left: removal against the shift of ordinary answers on the select split; the finder takes the lowest point right of the target.
Middle: harmful prompts refused at the setting of each method and update nearest the target. Right: the report split. All by
judged replies. Good lies high in the middle, at the upper left on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.report.schema import (
    HARMFUL,
    POLITICAL,
    Estimate,
    Finder,
    Matched,
    Rate,
    Reproduced,
    Reproduction,
    Row,
)
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, method_label, style


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Reproduced) -> Drawing:
    """Three panels: the search, the updates at matched removal, the report split."""
    data, finder = result.data, result.data.finder
    if finder is None or not finder.trials:
        raise result.missing("settings")
    from matplotlib.figure import Figure

    reported = [row for row in data.table if POLITICAL in row.rates and HARMFUL in row.rates]
    methods = list(dict.fromkeys(trial.method for trial in finder.trials))
    with style():
        figure = Figure(figsize=(DOUBLE, 3.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _search(left, finder)
        _updates(middle, data.matched, finder.target)
        _report(right, reported, data)
        figure.legend(handles=_handles(methods, data), loc="outside lower center", ncols=5, columnspacing=1)
    judged = sum(trial.complete for trial in finder.trials)
    ruled_out = sum(trial.removal is not None and not trial.complete for trial in finder.trials)
    random = (
        f"grey: {len(data.null.random)} random edits of the same size" if data.null else "no random directions were run"
    )
    caption = (
        f"Left: {judged} of {len(finder.trials)} settings judged on all {finder.fresh.n} refusing prompts, {ruled_out} ruled "
        f"out by the first of them (small), the others not needed (not shown); rings are chosen, the line is the target. Removal is "
        f"counted from fresh replies of the unsteered model (mean c {finder.fresh.value:.2f}; {finder.scored.value:.2f} by the replies "
        "that chose the prompts). Middle: harmful prompts refused at the settings nearest the target (dashed: with no edit). Hollow is "
        f"reposition. Right: the chosen settings on held-out prompts ({random}, select split). Judged replies, 95 % intervals."
    )
    plotted = {
        "search": finder,
        "matched": data.matched,
        "report": [{"label": r.label, "method": r.method, "rates": r.rates} for r in reported],
        "null": data.null,
    }
    return Drawing(figure, "Removal against safety", caption, plotted)


def _search(axes: Any, finder: Finder) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for t in finder.trials:
        if t.removal is None:
            continue
        if t.chosen:
            _cross(axes, t.removal, t.answer_shift, t.method, hollow=t.reposition)
            axes.plot(
                t.removal.value, t.answer_shift.value, "o", ms=9.5, mfc="none", mec=colour("ink"), mew=0.9, zorder=4
            )
        face = "white" if t.reposition else colour(t.method)
        size = 4.5 if t.complete else 2.0
        axes.plot(
            t.removal.value, t.answer_shift.value, marker(t.method), ms=size, mfc=face, mec=colour(t.method), mew=0.7
        )
    axes.axvline(finder.target, color=colour("neutral"), ls=":", lw=0.9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Search (select)")
    axes.set_xlabel(f"removal, fall of mean c  (n={finder.fresh.n})")
    axes.set_ylabel("shift of ordinary answers, nats")


def _updates(axes: Any, matched: list[Matched], target: float) -> None:
    for row in matched:
        _cross(axes, row.removal, row.harmful.after, row.method, hollow=row.reposition, percent=True)
    axes.axvline(target, color=colour("neutral"), ls=":", lw=0.9)
    if matched:
        before = matched[0].harmful.before
        axes.axhline(100 * before.rate, color=colour("base"), lw=0.8, ls="--")
        axes.set_ylabel(f"harmful refused, %  (n={before.n})")
    axes.set_ylim(-4, 104)
    axes.set_title("Equal removal (select)")
    axes.set_xlabel("removal, fall of mean c")


def _report(axes: Any, reported: list[Row], data: Reproduction) -> None:
    for point in data.null.random if data.null else []:
        axes.plot(100 * point[POLITICAL].rate, 100 * point[HARMFUL].rate, "o", ms=3, color=colour("null"), mew=0)
    for row in reported:
        _cross(axes, row.rates[POLITICAL], row.rates[HARMFUL], row.method or "base", percent=True)
    axes.set(xlim=(-4, 104), ylim=(-4, 104))
    axes.set_title("Outcome (report)")
    if reported:
        axes.set_xlabel(f"political, %  (n={_ns(r.rates[POLITICAL].n for r in reported)})")
        axes.set_ylabel(f"harmful refused, %  (n={_ns(r.rates[HARMFUL].n for r in reported)})")


def _cross(
    axes: Any, x: Estimate | Rate | None, y: Estimate | Rate, name: str, *, hollow: bool = False, percent: bool = False
) -> None:
    """A point with both its intervals; rates in percent."""
    if x is None:
        return
    (px, *bars_x), (py, *bars_y) = (_scaled(value, percent) for value in (x, y))
    axes.errorbar(
        px, py, xerr=[[b] for b in bars_x], yerr=[[b] for b in bars_y], fmt=marker(name), color=colour(name), ms=5.5, lw=0.8,
        mfc="white" if hollow else colour(name), mec=colour(name) if hollow else "white", mew=1 if hollow else 0.5,
    )  # fmt: skip


def _scaled(value: Estimate | Rate, percent: bool) -> tuple[float, float, float]:
    """Middle, and how far the interval reaches down and up."""
    middle = value.rate if isinstance(value, Rate) else value.value
    scale = 100.0 if percent and isinstance(value, Rate) else 1.0
    return scale * middle, scale * max(0.0, middle - value.low), scale * max(0.0, value.high - middle)


def _ns(counts: Any) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _handles(methods: list[str], data: Reproduction) -> list[Any]:
    from matplotlib.lines import Line2D

    out = [Line2D([], [], ls="", marker=marker("base"), color=colour("base"), label="base")]
    out += [Line2D([], [], ls="", marker=marker(m), color=colour(m), label=method_label(m)) for m in methods]
    out.append(Line2D([], [], ls="", marker="o", ms=8, mfc="none", mec=colour("ink"), label="chosen"))
    if any(row.reposition for row in data.matched):
        out.append(Line2D([], [], ls="", marker="s", mfc="none", mec=colour("neutral"), label="reposition"))
    out.append(Line2D([], [], ls=":", color=colour("neutral"), label="target"))
    if data.null:
        out.append(Line2D([], [], ls="", marker="o", color=colour("null"), label="random edit"))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "frontier", argv)


if __name__ == "__main__":
    raise SystemExit(main())
