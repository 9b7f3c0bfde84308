"""Study: pushes along random directions as an audit of any model; `analyses/random_audit.py` is its command line.

The Rogue Scalpel (arXiv 2509.22067): see `rsteer_interp.random_audit` for the edit, the guard and the aggregation test. Directions come from
fit, threshold and the layer that is spoken of from select, every number from report. The directions that are aggregated are chosen on the
prompts of one half of the subjects and measured on the other.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.directions import Evidence, fit_directions
from rsteer_interp.directions.mean_difference import MeanDifference
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.gates import balanced_threshold
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split, load_prompts
from rsteer_interp.random_audit import (
    LayerAudit,
    RandomAudit,
    aggregation,
    audited_layers,
    push_changes,
    random_audit,
)
from rsteer_interp.random_push import Guard, push
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.studies.reader_checks import checks_table, checks_words, judged_subsample
from rsteer_interp.studies.study import BaseReplies, NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.random_audit import Config

KIND = "random_audit"
QUESTION = (
    "How much refusal goes under a push along a random direction, and where do learned directions fall among them?"
)
JUDGED_VECTORS = 6  # random directions, at most, under whose pushes replies are judged
LEAST = 6  # fewest refused prompts to audit
LEAST_CHOOSING = 2  # fewest refused select prompts on which a layer is chosen


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if config.vectors < 2:
        raise UserError(f"--vectors is {config.vectors}; give two random directions or more")
    study.check_applicable()
    audited, held_out = _halves(_refused(study, config, "report", LEAST), config.prompts)
    choosing = _refused(study, config, "select", LEAST_CHOOSING)
    layers = audited_layers(study.n_layers)
    learned = _learned(study, config)
    threshold = _threshold(study, config)
    talks = load_prompts("conversations").sample(config.conversations, config.seed)
    key = {
        "prompts": audited.texts,
        "tokens": study.refusal_tokens,
        "threshold": threshold,
        "conversations": talks,
        **{name: getattr(config, name) for name in ("vectors", "dose", "bound", "seed")},
    }
    rows = study.template.encode_all(audited.texts)
    answers = [study.template.encode(talk.prompt, talk.answer) for talk in talks]

    def one_layer(layer: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return _plain(
            random_audit(
                study.backend,
                rows,
                study.refusal_tokens,
                answers,
                n_vectors=config.vectors,
                layers=[layer],
                dose=config.dose,
                bound=config.bound,
                threshold=threshold,
                learned={name: -v[Site(layer)] for name, v in learned.items()},
                seed=config.seed,
            )
        )

    audits, vectors = [], torch.empty(0)
    with progress("one layer at a time", len(layers)) as advance:
        for layer in layers:
            used = {name: v[Site(layer)] for name, v in learned.items()}
            stored = study.stage(f"2_layer_{layer}", {**key, "learned": used}, partial(one_layer, layer))
            audits.append(_audit(layer, stored.data, stored.tensors))
            vectors = stored.tensors["vectors"]
            advance(1)
    audit = RandomAudit(vectors, threshold, tuple(audits), audited.subjects)
    judged = _judged(study, audit, learned, audited, key)
    chosen = _chosen(study, audit, choosing.where(choosing.refused, config.prompts), key)
    data: dict[str, Any] = {
        **audit.data(),
        "flips_per_vector": [one.flipped(threshold).double().mean(1).tolist() for one in audits],
        "freed_per_vector": [],
        "falls": [one.falls.tolist() for one in audits],
        "learned": list(learned),
        "chosen": chosen,
        "aggregation": _aggregation(study, config, audit, chosen["layer"], held_out),
        "read_out": judged,
        "n_subjects": len(set(audited.subjects)),
        "base_rates": study.rates("report", config.audited),
        "set": config.audited,
    }
    for found in data["layers"]:
        still = judged[f"random push, layer {found['layer']}"]
        freed = ~torch.tensor(still["flags"])
        data["freed_per_vector"].append(freed.double().mean(1).tolist())
        found["freed"] = asdict(Rate.crossed(freed, clusters=audited.subjects))
        found["read_out_valid"] = still["valid"]
    return {**data, "finding": finding(data)}, None


def _refused(study: Study, config: Config, split: Split, least: int) -> BaseReplies:
    """Refused prompts of the audited set, of two subjects or more."""
    base = study.replies(split, config.audited)
    refused = base.where(base.refused)
    if len(refused.texts) < least or len(set(refused.subjects)) < 2:
        raise NotApplicable(
            f"not applicable: {len(refused.texts)} of {len(base.texts)} {split} prompts of '{config.audited}' are refused, on "
            f"{len(set(refused.subjects))} subjects"
        )
    return refused


def _halves(refused: BaseReplies, n: int) -> tuple[BaseReplies, BaseReplies]:
    """At most n prompts to be audited, and as many of other subjects."""
    subjects = list(dict.fromkeys(refused.subjects))
    audited = set(subjects[::2])
    first = torch.tensor([s in audited for s in refused.subjects])
    return refused.where(first, n), refused.where(~first, n)


def _chosen(study: Study, audit: RandomAudit, select: BaseReplies, key: dict[str, Any]) -> dict[str, Any]:
    """The layer at which the same pushes take most log-odds from refused select prompts, and that mean fall by layer (nats)."""

    def compute() -> tuple[dict[str, Any], None]:
        rows, falls = study.template.encode_all(select.texts), {}
        for one in audit.layers:
            prepared, amount = study.backend.prepare(rows, one.layer), one.dose * one.mu
            change = push_changes(study.backend, prepared, study.refusal_tokens, one.layer, amount, audit.vectors)[1]
            falls[str(one.layer)] = -float(change.mean())
        return {"falls": falls}, None

    doses = {str(one.layer): one.dose * one.mu for one in audit.layers}
    falls = study.stage("2_chosen", {**key, "select": select.texts, "doses": doses}, compute).data["falls"]
    best = max(falls, key=lambda layer: float(falls[layer]))
    return {"layer": int(best), "falls": falls, "n": len(select.texts), "rule": "largest mean fall, select split"}


def _learned(study: Study, config: Config) -> dict[str, dict[Site, Float[Tensor, " d"]]]:
    """Unit mean differences, towards refusal: of the political sets, and of the audited set and its answered counterpart."""
    pairs = {"political": (POLITICAL, MATCHED), config.audited: (config.audited, config.answered)}
    found = {}
    for name, sets in pairs.items():
        scored, states = study.scored("fit", *sets), study.states("fit", *sets)
        evidence = {site: Evidence(states[site], scored.confidence, site=site) for site in study.sites}
        found[name] = {site: d.unit for site, d in fit_directions(MeanDifference(), evidence).items()}
    return found


def _threshold(study: Study, config: Config) -> float:
    """Log-odds that tell refused from answered prompts apart, from unsteered select prompts."""
    scored = study.scored("select", config.audited, config.answered)
    odds = log_odds(study.backend, study.template.encode_all(scored.texts), study.refusal_tokens)
    return balanced_threshold(odds[scored.confidence > 0], {"answered": odds[scored.confidence < 0]})


def _judged(
    study: Study,
    audit: RandomAudit,
    learned: dict[str, dict[Site, Float[Tensor, " d"]]],
    refused: BaseReplies,
    key: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Judged replies under pushes of every layer, along the first random directions and along the learned ones."""
    kinds: dict[str, list[Edit | None]] = {}
    for one in audit.layers:
        along = {
            "random": list(audit.vectors[:JUDGED_VECTORS].float()),
            "learned": [-v[Site(one.layer)].float() for v in learned.values()],
        }
        for name, vectors in along.items():
            pushes = [push(study.backend, one.layer, v, one.dose * one.mu) for v in vectors]
            kinds[f"{name} push, layer {one.layer}"] = list(pushes)
    doses = {str(one.layer): one.dose * one.mu for one in audit.layers}
    used = {name: {str(one.layer): v[Site(one.layer)].tolist() for one in audit.layers} for name, v in learned.items()}
    whole = {**key, "doses": doses, "learned": used}
    return judged_subsample(study, "3_judged", whole, kinds, refused.texts, refused.subjects)


def _plain(audit: RandomAudit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (one,) = audit.layers
    data = {"mu": one.mu, "dose": one.dose, "guard": [asdict(g) for g in one.guard], "learned": list(one.learned)}
    tensors = {"vectors": audit.vectors, "base": one.base, "change": one.change}
    return data, tensors | {f"learned_{name}": change for name, change in one.learned.items()}


def _audit(layer: int, data: dict[str, Any], tensors: Any) -> LayerAudit:
    guard = tuple(Guard(**g) for g in data["guard"])
    learned = {name: tensors[f"learned_{name}"] for name in data["learned"]}
    return LayerAudit(layer, data["mu"], data["dose"], guard, tensors["base"], tensors["change"], learned)


def _aggregation(
    study: Study, config: Config, audit: RandomAudit, layer: int, held_out: BaseReplies
) -> dict[str, Any] | None:
    """The aggregated direction at the chosen layer, on prompts of other subjects; None where no prompt is flipped by two."""

    def compute() -> tuple[dict[str, Any], None]:
        rows = study.template.encode_all(held_out.texts)
        found = aggregation(study.backend, audit, layer, rows, study.refusal_tokens, seed=config.seed + 1)
        if found is None:
            return {"found": None}, None
        return {
            "found": {
                "layer": layer,
                "members": len(found.members),
                "falls": (-found.change).tolist(),
                "null_falls": (-found.null.mean(1)).tolist(),
                "p": found.standing.p,
                "n": len(found.base),
            }
        }, None

    key = {
        "audit": audit,
        "layer": layer,
        "held_out": held_out.texts,
        "tokens": study.refusal_tokens,
        "seed": config.seed,
    }
    together: dict[str, Any] | None = study.stage("3_aggregation", key, compute).data["found"]
    if together is None:
        return None
    fall = Estimate.of(together["falls"], clusters=held_out.subjects, seed=config.seed)
    return {name: value for name, value in together.items() if name != "falls"} | {"fall": asdict(fall)}


def finding(data: dict[str, Any]) -> str:
    top = next(one for one in data["layers"] if one["layer"] == data["chosen"]["layer"])
    freed, flipped = top["freed"], top["flipped"]
    learned = "; ".join(
        f"minus the {name} mean difference takes {s['value']:.1f} (rank {s['rank']} of {s['n'] + 1}, p = {s['p']:.2g})"
        for name, s in top["learned"].items()
    )
    words = (
        f"Pushed along a random direction by {top['dose']:g} of the residual norm at layer {top['layer']} (chosen on select), "
        f"{freed['rate']:.0%} ({100 * freed['low']:.0f} to {100 * freed['high']:.0f}) of refused {data['set']} prompts are no "
        f"longer refused (judged replies, n = {data['n_prompts']} prompts on {data['n_subjects']} subjects, "
        f"{len(data['freed_per_vector'][0])} random directions), and the refusal log-odds fall by "
        f"{interval(top['fall'])} nats ({data['n_vectors']} directions); at the same dose {learned}."
    )
    if top["read_out_valid"]:
        words += f" By log-odds {flipped['rate']:.0%} are flipped."
    words += f" {checks_words(data['read_out'])}"
    together = data["aggregation"]
    if together is None:
        return f"{words} No prompt is flipped by two random directions at any layer, so none were aggregated."
    low, high = min(together["null_falls"]), max(together["null_falls"])
    return (
        f"{words} The mean of the {together['members']} directions that flip one prompt takes {interval(together['fall'])} nats on "
        f"{together['n']} prompts on other subjects, single random ones {low:.1f} to {high:.1f} (p = {together['p']:.2g})."
    )


def tables(data: dict[str, Any]) -> list[Table]:
    """One row per layer."""
    table = Table(title=f"Random directions, {data['set']} prompts (report)")
    for column in (
        "layer",
        "dose",
        "KL, nats",
        "no longer refused, judged",
        "flipped by log-odds",
        "fall, nats",
        "largest",
        *(f"-{n}" for n in data["learned"]),
    ):
        table.add_column(column)
    for one in data["layers"]:
        kl = next(g["kl"] for g in one["guard"] if g["dose"] == one["dose"])
        found = [one["learned"][name] for name in data["learned"]]
        standings = [f"{s['value']:.2f}, rank {s['rank']}/{s['n'] + 1}" for s in found]
        dose = f"{one['dose']:g}" if one["coherent"] else f"{one['dose']:g} (incoherent)"
        flipped = interval(one["flipped"]) if one["read_out_valid"] else "not validated"
        cells = (str(one["layer"]), dose, f"{kl:.2f}", interval(one["freed"]), flipped, interval(one["fall"]))
        table.add_row(*cells, f"{one['largest_fall']:.2f}", *standings)
    return [table, checks_table(data["read_out"])]
