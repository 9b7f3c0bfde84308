"""Study: how many dimensions carry refusal; `analyses/dimensionality.py` is its command line.

Subspaces come from the fit split, layers and pushes from select, every number from report; the subjects of the three are
disjoint, so each report prompt is of a subject that no subspace has seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from rsteer_interp.errors import UserError
from rsteer_interp.studies.dimension_inputs import SETS, Inputs, groups_of
from rsteer_interp.studies.dimension_steps import ablation, addition
from rsteer_interp.studies.dimension_variance import variance
from rsteer_interp.studies.study import Study, interval

if TYPE_CHECKING:
    from analyses.dimensionality import Config

KIND = "dimensionality"
QUESTION = "How many dimensions carry refusal?"
WORDS = {
    "pairs": "paired differences",
    "subjects": "differences inside subjects",
    "ridge": "ridge",
    "topics": "topics of answered prompts",
    "covariance": "random, covariance of answered",
}


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if not config.ks or min(config.ks) != 1 or config.random < 2 or not 0 < config.share <= 1:
        raise UserError("--ks begins with 1, --random is at least 2, --share above 0 and at most 1")
    study.check_applicable()
    inputs = Inputs(study, config)
    data = {
        "base_rates": study.rates("report", *SETS),
        "read_layer": inputs.read_site.layer,
        "share": config.share,
        "variance": _variance(inputs),
        "ablation": {"all": ablation(inputs, "all", inputs.sites), "one": ablation(inputs, "one", [inputs.read_site])},
        "addition": addition(inputs),
    }
    return {**data, "finding": finding(data)}, None


def _variance(inputs: Inputs) -> dict[str, Any]:
    study, config, site, report = inputs.study, inputs.config, inputs.read_site, inputs.report
    states, groups = study.states("report", *SETS)[site], groups_of(report)

    def compute() -> tuple[dict[str, Any], None]:
        sizes = (config.shuffles, config.splits, config.seed)
        return variance(states, groups, inputs.states[site], inputs.groups, inputs.ks, *sizes), None

    key = inputs.key(config.shuffles, config.splits, site.layer, inputs.ks)
    found = study.stage("2_variance", key | {"report": [report.texts, report.confidence.tolist()]}, compute).data
    return {name: value for name, value in found.items() if name != "seconds"}


def finding(data: dict[str, Any]) -> str:
    """The answer in one paragraph; what is not distinguishable from random is said to be so, with its q."""
    everywhere, pushed = data["ablation"]["all"], data["addition"]
    percent = f"{100 * data['share']:.0f} %"
    parts = [
        _answer(f"Ablating at all {len(everywhere['layers'])} block inputs", everywhere, percent),
        _answer(f"Pushing by {pushed['dose']:g} |resid| at layer {pushed['layer']}", pushed, percent),
    ]
    for name, found in data["variance"]["contrasts"].items():
        parts.append(
            f"At layer {data['read_layer']}, the {WORDS[name]} exceed those of shuffled labels in {found['beyond']} leading "
            f"dimension{'' if found['beyond'] == 1 else 's'} (n = {found['n']}, p of the first = {found['p_first']:.2g})."
        )
    return " ".join(parts)


def _answer(edit: str, found: dict[str, Any], percent: str) -> str:
    name = next(iter(found["families"]))
    lead = found["families"][name]
    one, enough = lead["net"][0], lead["enough"]
    if enough is None or not _beyond(lead):
        return (
            f"{edit}: {WORDS[name]} remove {interval(one)} nats with K = 1 beyond random subspaces of equal dose "
            f"(n = {lead['n']}), not distinguishable from random at any K (smallest q = {min(lead['q']):.2g})."
        )
    said = [
        f"{edit}: {percent} of the removable refusal, {interval(enough['removable'])} nats (n = {lead['n']}), takes K = "
        f"{_band(enough)} of {WORDS[name]}; K = 1 removes {interval(one)} beyond random subspaces of equal dose "
        f"(q = {lead['q'][0]:.2g})"
    ]
    matched = []
    for control, curve in found["controls"].items():
        k = curve["to_match_one"]
        matched.append(f"{WORDS[control]} {f'K = {k}' if k else 'more than any K tried'}")
    return "; ".join([*said, f"to match that one dimension takes {', '.join(matched)}"]) + "."


def _band(enough: dict[str, Any]) -> str:
    return f"{enough['k']} ({enough['low']} to {enough['high']})"


def _beyond(curve: dict[str, Any]) -> bool:
    """Whether some K removes more than random subspaces of equal dose, at a false-discovery rate of 5 %."""
    return any(q <= 0.05 and e["value"] > 0 for q, e in zip(curve["q"], curve["net"], strict=True))


def tables(data: dict[str, Any]) -> list[Table]:
    """Ablation at all layers by K; the answers of every sweep; the variance side."""
    sweep = Table(
        title="Refusal log-odds removed by ablating K dimensions at all block inputs, nats (95 % intervals over prompts)"
    )
    for column in ("subspace", "K", "removed", "same dose, random", "q", "|edit| / |resid|", "KL of answered, nats"):
        sweep.add_column(column)
    for name, curve in data["ablation"]["all"]["families"].items():
        for i, k in enumerate(curve["ks"]):
            sweep.add_row(
                WORDS[name], str(k), interval(curve["removed"][i]), f"{curve['null_mean'][i]:.2f}", f"{curve['q'][i]:.2g}",
                f"{curve['dose'][i]:.3f}", interval(curve["kl"][i]),
            )  # fmt: skip
    for name, curve in data["ablation"]["all"]["controls"].items():
        for i, k in enumerate(curve["ks"]):
            cells = (f"{curve['dose'][i]:.3f}", interval(curve["kl"][i]))
            sweep.add_row(WORDS[name], str(k), interval(curve["removed"][i]), "", "", *cells)
    gap = data["ablation"]["all"]["gap"]
    answer = Table(
        title=f"Smallest K that removes {100 * data['share']:.0f} % of the removable: of the best K's, or the gap to answered prompts ({gap:.2f} nats)"
    )
    for column in (
        "edit",
        "subspace",
        "K beyond random (band)",
        "K, null not subtracted",
        "removable beyond random, nats",
        "n",
    ):
        answer.add_column(column)
    edits = {
        "ablation, all layers": data["ablation"]["all"],
        f"ablation, layer {data['read_layer']}": data["ablation"]["one"],
        f"best push, layer {data['addition']['layer']}": data["addition"],
    }
    for edit, found in edits.items():
        for name, curve in found["families"].items():
            enough, plain = curve["enough"], curve["enough_without_null"]
            band = _band(enough) if enough and _beyond(curve) else "not beyond random"
            size = interval(enough["removable"]) if enough else ""
            answer.add_row(edit, WORDS[name], band, _band(plain) if plain else "", size, str(curve["n"]))
    spread = Table(title=f"Variance at layer {data['read_layer']}, report split")
    for column in ("states", "n", "participation ratio", "eigenvalues over the noise edge"):
        spread.add_column(column)
    for name, found in data["variance"]["classes"].items():
        spread.add_row(name, str(found["n"]), interval(found["participation"], 1), str(found["over_edge"]))
    return [sweep, answer, spread]
