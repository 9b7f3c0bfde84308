"""The causal answers of the dimensionality study in words and tables, from its typed result alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rsteer_interp.reader import UNSTEERED
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.studies.dimension_results import (
    ABLATION,
    Ablation,
    AblationCurve,
    Basis,
    Curve,
    Dimensions,
    Enough,
    Removable,
)

WORDS = {
    "pairs": "paired differences",
    "subjects": "differences inside subjects",
    "ridge": "weighted ridge",
    "topics": "topics of answered prompts",
    "covariance": "random, covariance of answered",
}


def basis_words(basis: Basis, layer: int) -> str:
    """Whose rows are ablated; `layer` is the one whose basis is shared by all sites."""
    return {
        "site": "per-site bases",
        "layer": f"layer {layer}'s basis at all sites",
        "global": "one global basis at all sites",
    }[basis]


def by_basis(ablation: Ablation, lead: str) -> dict[Basis, AblationCurve]:
    """The leading family's curves by whose rows were ablated."""
    return {"site": ablation.families[lead], "layer": ablation.shared["layer"], "global": ablation.shared["global"]}


def causal_finding(found: Dimensions) -> list[str]:
    """One subspace or many, what the sites' rows span together, what judged replies say, and the best push: a sentence each."""
    return [_ablated(found), _together(found), _read_out(found), _pushed(found)]


def _ablated(found: Dimensions) -> str:
    everywhere = found.ablation.all
    curves = by_basis(everywhere, found.lead)
    takes = [f"{_takes(curve)} with {basis_words(basis, found.shared_layer)}" for basis, curve in curves.items()]
    lead = curves["site"]
    matched = [
        f"{WORDS[name]} {f'K = {control.to_match_one}' if control.to_match_one else 'more than any K tried'}"
        for name, control in everywhere.controls.items()
    ]
    return (
        f"Ablating {WORDS[found.lead]} at all {len(everywhere.layers)} block inputs: {_percent(found.share)} of the removable "
        f"refusal, {nats(everywhere.removable.size)} nats (n = {lead.n} prompts of {everywhere.n_subjects} subjects), takes "
        f"{_list(takes)}. K = 1 removes {_list([nats(curve.net[0]) for curve in curves.values()])} nats beyond the same edits under "
        f"{lead.n_null} random rotations (q = {_list([f'{curve.q[0]:.2g}' for curve in curves.values()])})"
        f"{'; to match one dimension per site takes ' if matched else ''}{_list(matched)}."
    )


def _takes(curve: Curve) -> str:
    if curve.enough is None or not curve.beyond:
        return f"no K that is distinguishable from random (smallest q = {min(curve.q):.2g})"
    return f"more than K = {curve.ks[-1]}" if curve.enough.k is None else f"K = {band(curve.enough, curve.ks)}"


def _together(found: Dimensions) -> str:
    rank = found.union[found.lead][0]
    over = _over(rank.dims_90_band, 0, " over subjects")
    return (
        f"The {rank.rows} sites' own directions are {'not one dimension' if rank.dims_90 > 1 else 'one dimension'}: "
        f"{rank.dims_90}{over} hold 90 % of their energy, effective rank {rank.effective:.1f} (random directions, apart for each "
        f"site: {rank.null_dims_90:.0f}, {rank.null_effective:.1f})."
    )


def _read_out(found: Dimensions) -> str:
    check = found.check
    own, null = ([row for row in check.rows if row.k == 1 and row.turned == turned] for turned in (False, True))
    base, under = check.kinds[UNSTEERED], check.kinds[ABLATION]
    return (
        f"Judged replies to {check.n_refused} refused prompts still refuse, with K = 1 of these bases in that order, "
        f"{_list([_counted(row.judged) for row in own])}; log-odds above {check.threshold:.2f}, the threshold without an edit, say "
        f"{_list([_counted(row.by_log_odds) for row in own])}; under one random rotation of each, replies refuse "
        f"{_list([_counted(row.judged) for row in null])}. Log-odds {'tell' if under.valid else 'are not validated to tell'} judged "
        f"refusals under these ablations ({under}; without an edit {base})."
    )


def _counted(rate: Rate) -> str:
    return f"{rate.count} ({_percent(rate.low)} to {_percent(rate.high)})"


def _pushed(found: Dimensions) -> str:
    pushed = found.addition
    curve = pushed.families[found.lead]
    return (
        f"Pushing by {pushed.dose:g} |resid| at layer {pushed.layer}: {_percent(found.share)} of the removable refusal, "
        f"{nats(pushed.removable.size)} nats (n = {curve.n}), takes {_takes(curve)} of {WORDS[found.lead]} (K = 1 removes "
        f"{nats(curve.net[0])} beyond {curve.n_null} random subspaces, q = {curve.q[0]:.2g})."
    )


def causal_tables(found: Dimensions) -> list[Table]:
    """Ablation at all sites by K; the answers of every sweep; the rank of the union; judged replies."""
    return [_sweep(found), _answers(found), _union(found), _judged(found)]


def _sweep(found: Dimensions) -> Table:
    everywhere = found.ablation.all
    table = _table(
        "Refusal log-odds removed by ablating K dimensions at all block inputs, nats (95 % intervals over subjects)",
        ("subspace", "K", "removed", "same edit, rotated", "q", "|edit| / |resid|", "KL of answered, nats"),
    )
    for name, curve in _named(everywhere, found).items():
        for i, k in enumerate(curve.ks):
            null = (f"{curve.null_mean[i]:.2f}", f"{curve.q[i]:.2g}", f"{curve.dose[i]:.3f}")
            table.add_row(name, str(k), nats(curve.removed[i]), *null, nats(curve.kl[i]))
    for name, control in everywhere.controls.items():
        for i, k in enumerate(control.ks):
            dose, kl = (
                ("", "")
                if control.dose is None or control.kl is None
                else (f"{control.dose[i]:.3f}", nats(control.kl[i]))
            )
            table.add_row(WORDS[name], str(k), nats(control.removed[i]), "", "", dose, kl)
    return table


def _answers(found: Dimensions) -> Table:
    everywhere, one, pushed = found.ablation.all, found.ablation.one, found.addition
    table = _table(
        f"Smallest K that removes {_percent(found.share)} of the removable: the most that any K of any subspace removes beyond its "
        f"null, or the gap to answered prompts ({everywhere.gap:.2f} nats) where that is smaller",
        ("edit", "subspace", "K beyond random (band over subjects)", "K, null not subtracted", "removable, nats", "n"),
    )
    edits: dict[str, tuple[dict[str, Curve], Removable]] = {
        "ablation, all sites": ({**_named(everywhere, found)}, everywhere.removable),
        f"ablation, layer {found.read_layer}": ({WORDS[n]: c for n, c in one.families.items()}, one.removable),
        f"best push, layer {pushed.layer}": ({WORDS[n]: c for n, c in pushed.families.items()}, pushed.removable),
    }
    for edit, (curves, removable) in edits.items():
        for name, curve in curves.items():
            beyond = band(curve.enough, curve.ks) if curve.enough and curve.beyond else "not beyond random"
            plain = band(curve.enough_without_null, curve.ks) if curve.enough_without_null else ""
            table.add_row(edit, name, beyond, plain, nats(removable.size), str(curve.n))
    return table


def _union(found: Dimensions) -> Table:
    n = next(iter(found.union.values()))[0].n_null
    table = _table(
        f"Rank of the union of the {len(found.ablation.all.layers)} sites' own K rows (bands over subjects; null: {n} draws of random "
        "rows, apart for each site)",
        ("subspace", "K", "rows", "effective rank", "dimensions for 90 %", "for 99 %", "null: effective, 90 %, 99 %"),
    )
    for name, ranks in found.union.items():
        for rank in ranks:
            null = f"{rank.null_effective:.1f}, {rank.null_dims_90:.0f}, {rank.null_dims_99:.0f}"
            table.add_row(
                WORDS[name], str(rank.k), str(rank.rows),
                f"{rank.effective:.1f}{_over(rank.effective_band, 1)}", f"{rank.dims_90}{_over(rank.dims_90_band, 0)}",
                str(rank.dims_99), null,
            )  # fmt: skip
    return table


def _judged(found: Dimensions) -> Table:
    check = found.check
    table = _table(
        f"Judged greedy replies (up to {check.tokens} tokens) under edits of {WORDS[found.lead]}; log-odds against them: "
        + "; ".join(f"{kind}, {each}" for kind, each in check.kinds.items()),
        ("edit", "K", f"judged refusal, n = {check.n_refused}", f"log-odds above {check.threshold:.2f}",
         f"judged, answered prompts, n = {check.n_answered}", "log-odds, nats", "log-odds minus judge, share"),
    )  # fmt: skip
    for row in check.rows:
        name = "none" if row.basis is None else basis_words(row.basis, found.shared_layer)
        table.add_row(
            f"{name}{', one rotation' if row.turned else ''}", str(row.k or ""), str(row.judged), str(row.by_log_odds),
            str(row.judged_answered), nats(row.log_odds), nats(row.drift),
        )  # fmt: skip
    return table


def _named(ablation: Ablation, found: Dimensions) -> dict[str, AblationCurve]:
    """Every learned curve with its name in a table."""
    named = {f"{WORDS[name]}, per-site bases": curve for name, curve in ablation.families.items()}
    return named | {
        f"{WORDS[found.lead]}, {basis_words(basis, found.shared_layer)}": curve
        for basis, curve in ablation.shared.items()
    }


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    return table


def nats(e: Estimate) -> str:
    return f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})"


def band(enough: Enough, ks: Sequence[int]) -> str:
    """K with its band; what no K of the sweep reaches is over the largest."""
    k, low, high = (f"over {ks[-1]}" if each is None else str(each) for each in (enough.k, enough.low, enough.high))
    return f"{k} ({low} to {high})"


def _over(limits: tuple[float, float] | None, digits: int, what: str = "") -> str:
    return "" if limits is None else f" ({limits[0]:.{digits}f} to {limits[1]:.{digits}f}{what})"


def _list(parts: Sequence[str]) -> str:
    *most, last = parts or ("",)
    return f"{', '.join(most)} and {last}" if most else last


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
