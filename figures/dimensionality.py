"""How many dimensions have to be removed for refusal to go, and whether they are the same ones at every site.

(a) Refusal log-odds removed by ablating K dimensions at all block inputs, each input's own; (b) the same family with its own rows at
each input, with one layer's at all, and with one global basis at all; (c) how many dimensions the inputs' own rows have together;
(d) judged replies beside log-odds under these ablations; (e) what they do to answered prompts; (f) the best push at one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.studies.dimension_results import (
    Ablation,
    AblationCurve,
    Basis,
    Check,
    Control,
    Curve,
    Dimensions,
    UnionRank,
    read_dimensions,
)
from rsteer_interp.studies.dimension_words import by_basis
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result
    from rsteer_interp.statistics.intervals import Estimate, Rate

KIND = "dimensionality"
LOOKS = {  # colour, marker, line, words
    "pairs": (colour("refusing"), "o", "-", "paired differences"),
    "subjects": (colour("md"), "s", "-", "differences inside subjects"),
    "ridge": (colour("rmd"), "v", "-", "ridge"),
    "topics": (colour("neutral"), "^", "--", "topics of answered prompts"),
    "covariance": (colour("neutral"), "x", ":", "random, covariance of answered prompts"),
}
BASES: dict[Basis, tuple[str, str, str]] = {  # colour, marker, words
    "site": (colour("refusing"), "o", "per-site"),
    "layer": (colour("answering"), "D", "one layer's"),
    "global": (colour("general"), "P", "global"),
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Removal by K and by basis, the rank of the union, judged replies, side effects, and the push by K."""
    data = study_data(result)
    if "ablation" not in data or "addition" not in data:
        raise UserError(f"'{result.folder}' holds no sweeps; run analyses/dimensionality.py again")
    found = read_dimensions(result)
    everywhere, pushed = found.ablation.all, found.addition
    lead, sites = everywhere.families[found.lead], len(everywhere.layers)
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 7.6), layout="constrained")
        (a, b), (c, d), (e, f) = figure.subplots(3, 2)
        _by_k(a, {**everywhere.families, **everywhere.controls}, lead)
        a.axhline(everywhere.gap, color=colour("ink"), ls=":", lw=0.8)
        a.set_title(f"(a) Own rows at each of {sites} block inputs, n = {lead.n}")
        _by_basis(b, everywhere, found)
        b.set_title(f"(b) {LOOKS[found.lead][3].capitalize()}: whose rows")
        _union(c, found.union, sites)
        c.set_title("(c) Dimensions of all inputs' own rows together")
        _judged(d, found.check, found.shared_layer)
        d.set_title(f"(d) Judged replies to {found.check.n_refused} refused prompts")
        _by_cost(e, everywhere)
        e.set_title(f"(e) Side effect at matched removal, n = {lead.kl[0].n}")
        _by_k(f, {**pushed.families, **pushed.controls}, pushed.families[found.lead])
        f.axhline(pushed.whole_gradient.value, color=colour("ink"), ls=":", lw=0.8)
        f.set_title(f"(f) Best push at layer {pushed.layer}, {pushed.dose:g} of |resid|")
        figure.legend(handles=_handles(everywhere), loc="outside lower center", ncols=3, columnspacing=1.5)
    return Drawing(figure, "How many dimensions carry refusal", _caption(found, data["finding"]), _plotted(data))


def _caption(found: Dimensions, finding: str) -> str:
    everywhere, pushed = found.ablation.all, found.addition
    lead = everywhere.families[found.lead]
    return (
        f"(a) Refusal log-odds removed on n = {lead.n} refusing report prompts ({everywhere.n_subjects} subjects, none of which any subspace "
        f"has seen), by ablating nested K-dimensional subspaces, each block input's own; bars are 95 % intervals over subjects. Grey band: "
        f"the first family's edit turned by one random rotation for all inputs, which keeps every displacement's length and their inner products "
        f"between inputs (95 % for one more of {lead.n_null} draws). Large open marker: smallest K that removes {100 * found.share:.0f} % of the "
        f"removable refusal beyond the rotations, dotted: the gap to answered prompts, which bounds it; no marker where no K is distinguishable from "
        f"the rotations (q ≤ 0.05) or none removes as much. (b) The first family with each input's own rows, with those of layer "
        f"{found.shared_layer} (chosen on select) at all inputs, and with the leading directions of all inputs at all of them; bands: their own "
        f"rotations. (c) Fewest dimensions that hold 90 % of the energy of all inputs' first K rows, stacked; bars: 95 % over resampled "
        f"subjects; dashed: random rows, drawn apart for each input; dotted: one subspace for all. (d) Replies of up to {found.check.tokens} tokens: "
        f"share judged a refusal (filled, 95 % intervals over subjects) and share with log-odds above {found.check.threshold:.2f}, the threshold fitted without an edit (open); grey: judged under one random "
        f"rotation of the edit. (e) KL of the first token's distribution on answered prompts; grey lines: the rotations. (f) The best constant push "
        f"inside K dimensions, learned on select; grey band: inside {pushed.families[found.lead].n_null} random subspaces; dotted: along the "
        f"whole gradient. {finding}"
    )


def _plotted(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ablation": data["ablation"]["all"],
        "addition": data["addition"],
        "union": data["union"],
        "check": data["check"],
        "n": data["ablation"]["all"]["families"][data["lead"]]["n"],
    }


def _by_k(axes: Any, curves: Mapping[str, Curve | Control], null_of: Curve) -> None:
    axes.fill_between(null_of.ks, null_of.null_low, null_of.null_high, color=colour("null"), alpha=0.6, lw=0)
    for name, curve in curves.items():
        ink, mark, line, _ = LOOKS[name]
        _curve(axes, curve, ink, mark, line)
    axes.axhline(0, color=colour("ink"), lw=0.5)
    _k_axis(axes, max((curve.ks for curve in curves.values()), key=len))


def _by_basis(axes: Any, everywhere: Ablation, found: Dimensions) -> None:
    curves = by_basis(everywhere, found.lead)
    for basis, curve in curves.items():
        ink, mark, _ = BASES[basis]
        axes.fill_between(curve.ks, curve.null_low, curve.null_high, color=ink, alpha=0.12, lw=0)
        _curve(axes, curve, ink, mark, "-")
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.axhline(everywhere.gap, color=colour("ink"), ls=":", lw=0.8)
    _k_axis(axes, max((curve.ks for curve in curves.values()), key=len))


def _curve(axes: Any, curve: Curve | Control, ink: str, mark: str, line: str) -> None:
    y, errors = _bars(curve.removed)
    axes.errorbar(curve.ks, y, errors, color=ink, marker=mark, ls=line, lw=1.0, elinewidth=0.6)
    if isinstance(curve, Curve) and curve.beyond and curve.enough is not None and curve.enough.k is not None:
        at = curve.ks.index(curve.enough.k)
        axes.plot(curve.ks[at], y[at], mark, ms=9, mfc="none", mec=ink, mew=1.0)


def _k_axis(axes: Any, ks: Sequence[int], y: str = "log-odds removed, nats") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("dimensions K")
    axes.set_ylabel(y)


def _union(axes: Any, union: Mapping[str, Sequence[UnionRank]], sites: int) -> None:
    longest = max(union.values(), key=len)
    ks = [rank.k for rank in longest]
    axes.plot(ks, [rank.null_dims_90 for rank in longest], color=colour("null"), ls="--", lw=1.0)
    axes.plot(ks, ks, color=colour("ink"), ls=":", lw=0.8)
    for name, ranks in union.items():
        ink, mark, line, _ = LOOKS[name]
        axes.plot([rank.k for rank in ranks], [rank.dims_90 for rank in ranks], color=ink, marker=mark, ls=line, lw=1.0)
        banded = [(rank.k, *rank.dims_90_band) for rank in ranks if rank.dims_90_band is not None]
        if banded:
            at, low, high = zip(*banded, strict=True)
            axes.vlines(at, low, high, color=ink, lw=0.6)
    axes.set_yscale("log", base=2)
    top = max(rank.null_dims_90 for rank in longest)
    ticks = [2**i for i in range(0, 12, 2) if 2**i <= 2 * top]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    _k_axis(axes, ks, f"dimensions for 90 % of {sites} inputs")


def _judged(axes: Any, check: Check, layer: int) -> None:
    shown = [row for row in check.rows if not row.turned]
    names = []
    for place, row in enumerate(shown):
        ink, mark, words = BASES[row.basis] if row.basis is not None else (colour("base"), "s", "no edit")
        rate = row.judged
        axes.errorbar(rate.rate, place, xerr=_span(rate), color=ink, marker=mark, elinewidth=0.6, ls="none")
        axes.plot(row.by_log_odds.rate, place, mark, mfc="white", mec=ink, zorder=3, ms=3)
        for null in check.rows:
            if null.turned and (null.basis, null.k) == (row.basis, row.k):
                axes.errorbar(
                    null.judged.rate,
                    place + 0.3,
                    xerr=_span(null.judged),
                    color=colour("null"),
                    marker=mark,
                    elinewidth=0.6,
                )
        name = f"layer {layer}'s" if row.basis == "layer" else words
        names.append(f"{name}, K = {row.k}" if row.basis is not None else name)
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.3, -0.6)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xlabel("share that refuses")


def _span(rate: Rate) -> list[list[float]]:
    return [[rate.rate - rate.low], [rate.high - rate.rate]]


def _by_cost(axes: Any, found: Ablation) -> None:
    curves: dict[str, AblationCurve | Control] = {**found.families, **found.controls}
    for name, curve in curves.items():
        ink, mark, line, _ = LOOKS[name]
        y, errors = _bars(curve.kl or ())
        removed = [each.value for each in curve.removed]
        axes.errorbar(removed, y, errors, color=ink, marker=mark, ls=line, lw=1.0, elinewidth=0.6)
    for own in found.families.values():
        axes.plot(own.null_mean, [e.value for e in own.null_kl], color=colour("null"), lw=1.0, zorder=0)
    axes.set_xlabel("log-odds removed on refused prompts, nats")
    axes.set_ylabel("KL on answered prompts, nats")


def _bars(estimates: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    y = [e.value for e in estimates]
    return y, [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def _handles(found: Ablation) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = []
    for name in (*found.families, *found.controls):
        ink, mark, line, words = LOOKS[name]
        lines.append(Line2D([], [], color=ink, marker=mark, ls=line, lw=1.0, label=words))
    for ink, mark, words in list(BASES.values())[1:]:
        lines.append(Line2D([], [], color=ink, marker=mark, lw=1.0, label=f"{words} rows at all inputs"))
    return [*lines, Patch(color=colour("null"), alpha=0.6, lw=0, label="random, same dose")]


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "dimensionality", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
