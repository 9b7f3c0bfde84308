"""Study: which heads and MLPs write the refusal direction; `analyses/component_attribution.py` is its command line.

Heads are read through TransformerLens. Where the study's own backend is another one, a second copy of the model is loaded for
it, so that judged prompts stay shared with the other studies. TransformerLens's `direct_logit_attribution` is not used: it
needs folded norms and asks about logits; the direction is one of the raw stream, which its residual decomposition splits.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, Evidence, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.prompts import Split
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.studies.component_shares import Component, differences, random_heads, top_heads
from rsteer_interp.studies.component_steps import Reader, ablation, attention, indices, take_apart
from rsteer_interp.studies.layer_curves import correlations
from rsteer_interp.studies.reader_checks import checks_table, checks_words
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.component_attribution import Config

KIND = "component_attribution"
QUESTION = "Which heads and MLPs write the refusal direction, and does removing just those heads remove refusal?"
SETS = (POLITICAL, MATCHED)
_SPLITS: tuple[Split, ...] = ("fit", "select", "report")
_LEAST = 4  # fewest report prompts of each class


def compute(study: Study, config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if config.random < 4 or config.heads < 1 or config.prompts < _LEAST:
        raise UserError(f"--random and --prompts are {_LEAST} or more, --heads 1 or more")
    study.check_applicable()
    tokens = study.refusal_tokens
    fit, select, report = (study.scored(s, *SETS) for s in _SPLITS)
    groups = {"refused": indices(report, 1)[: config.prompts], "answered": indices(report, -1)[: config.prompts]}
    if min(map(len, groups.values())) < _LEAST:
        found = " and ".join(f"{len(g)} {name}" for name, g in groups.items())
        raise NotApplicable(f"not applicable: {found} report prompts; {_LEAST} of each are needed")
    layer, v = _direction(study, config, fit, select)
    reader = Reader(study)
    parts = {
        s: take_apart(study, reader, s, scored, layer, v) for s, scored in (("select", select), ("report", report))
    }
    components = [Component.parse(name) for name in parts["report"][1]]
    shares = {
        s: _differences(parts[s][0], scored, config.seed) for s, scored in (("select", select), ("report", report))
    }
    n_heads = {i: sum(c.kind == "head" and c.layer == i for c in components) for i in range(layer)}
    if config.heads * 2 > sum(n_heads.values()):
        raise UserError(
            f"--heads is {config.heads} of {sum(n_heads.values())} before layer {layer}; take half of them at most"
        )
    chosen = top_heads(shares["select"]["value"], components, config.heads)
    draws = random_heads(chosen, n_heads, config.random, config.seed)
    asked = {name: report.subset(members) for name, members in groups.items()}
    effects = ablation(study, reader, fit, asked, chosen, draws, tokens)
    looks = attention(study, reader, config.example, asked["refused"], chosen, draws, n_heads)
    data = {
        "base_rates": study.rates("report", *SETS),
        "refusal_tokens": [study.backend.tokenizer.decode([t]) for t in tokens],
        "layer": layer,
        "n_heads": max(n_heads.values()),
        "components": [asdict(c) for c in components],
        "report": shares["report"],
        "select_value": shares["select"]["value"],
        "total": _total(parts["report"][0], report),
        "chosen": chosen,
        "ablation": effects,
        "attention": looks,
        "n": shares["report"]["n"],
    }
    return {**data, "finding": finding(data)}, {"direction": v.float()}


def _direction(study: Study, config: Config, fit: Scored, select: Scored) -> tuple[int, Float[Tensor, " d"]]:
    """Mean difference at the given layer, else at the one whose projection correlates most with the verdict on select."""
    states = {s: study.states(s, *SETS) for s in ("fit", "select")}
    if config.layer is not None and not 1 <= config.layer <= study.n_layers:
        raise UserError(f"--layer is {config.layer}; choose 1 to {study.n_layers}")
    sites = study.sites if config.layer is None else [Site(config.layer)]
    evidence = {site: Evidence(states["fit"][site], fit.confidence, site=site) for site in sites}
    units = {site: d.unit for site, d in fit_directions(ESTIMATORS["md"](), evidence).items()}
    read = torch.stack([states["select"][site].double() @ v.double() for site, v in units.items()], 1)
    best = sites[int(correlations(read[None], select.confidence[None])[0].argmax())]
    return best.layer, units[best]


def _differences(parts: Tensor, scored: Scored, seed: int) -> dict[str, Any]:
    keep = sorted(indices(scored, 1) + indices(scored, -1))
    return differences(parts[keep], scored.confidence[keep] > 0, [scored.groups[i] for i in keep], seed)


def _total(parts: Tensor, scored: Scored) -> dict[str, Any]:
    """The whole difference along the direction, and the shares of heads and MLPs in it, come from the same sums."""
    whole = parts.sum(1, keepdim=True)
    found = _differences(whole, scored, 0)
    return {name: found[name][0] for name in ("value", "low", "high", "p")} | {"n": found["n"]}


def finding(data: dict[str, Any]) -> str:
    """The answer in one paragraph; what is not distinguishable from its null is said to be so, with its p."""
    report, components, total = data["report"], data["components"], data["total"]
    of = {
        kind: sum(v for v, c in zip(report["value"], components, strict=True) if c["kind"] == kind) / total["value"]
        for kind in ("head", "mlp")
    }
    place = {(c["layer"], c["head"]): i for i, c in enumerate(components) if c["kind"] == "head"}
    mine = sum(report["value"][place[tuple(h)]] for h in data["chosen"]) / total["value"]
    hits, inside = (sum(q <= 0.05 for q in report[name]) for name in ("q", "within_subject_q"))
    heads, ablated, answered = len(data["chosen"]), data["ablation"]["refused"], data["ablation"]["answered"]
    parts = [
        f"Refused and answered prompts lie {interval(total)} apart along the mean difference at layer {data['layer']} "
        f"(n = {total['n']}, permuted labels p = {total['p']:.2g}); heads write {100 * of['head']:.0f} % of it, MLPs "
        f"{100 * of['mlp']:.0f} %, at the last token.",
        f"{hits} of {len(components)} components are beyond permuted labels (q <= 0.05), {inside} with labels permuted inside "
        f"subjects (n = {report['n_within']}); the {heads} heads chosen on select write {100 * mine:.0f} %.",
    ]
    effect = ablated["effect"]
    verdict = "" if ablated["p"] <= 0.05 else "not distinguishable from random, "
    parts.append(
        f"Setting these heads to their mean at the last token removes {interval(effect)} of {ablated['base']['value']:.2f} nats of "
        f"refusal log-odds from refused prompts (n = {effect['n']}; {ablated['n_random']} random sets from the same layers "
        f"{ablated['random_low']:.2f} to {ablated['random_high']:.2f}, {verdict}rank {ablated['rank']}, p = {ablated['p']:.2g}); "
        f"from answered ones {interval(answered['effect'])} (random {answered['random_low']:.2f} to {answered['random_high']:.2f}, "
        f"p = {answered['p']:.2g})."
    )
    look = data["attention"]["spans"]["instruction"]
    beside = f"random heads {100 * look['random_low']:.0f} to {100 * look['random_high']:.0f} %, p = {look['p']:.2g}"
    parts.append(
        f"From the last token they give {100 * look['effect']['value']:.0f} % ({100 * look['effect']['low']:.0f} to "
        f"{100 * look['effect']['high']:.0f}) of their attention to the instruction ({beside}, n = {look['effect']['n']})."
    )
    return " ".join([*parts, checks_words(data["ablation"]["read_out"])])


def tables(data: dict[str, Any]) -> list[Table]:
    """The chosen heads and the MLPs that write most."""
    report, components, whole = data["report"], data["components"], data["total"]["value"]
    table = Table(
        title=f"What writes the direction of layer {data['layer']}, share of the difference, n = {report['n']}"
    )
    for column in ("component", "share, report", "null, 95 %", "q", "q inside subjects", "share, select"):
        table.add_column(column)
    chosen = {tuple(h) for h in data["chosen"]}
    heads = [i for i, c in enumerate(components) if (c["layer"], c["head"]) in chosen and c["kind"] == "head"]
    mlps = sorted((i for i, c in enumerate(components) if c["kind"] == "mlp"), key=lambda i: -data["select_value"][i])
    before = sum(data["select_value"])
    for i in [*sorted(heads, key=lambda i: -data["select_value"][i]), *mlps[:4]]:
        c, e = components[i], {k: report[k][i] / whole for k in ("value", "low", "high", "null_low", "null_high")}
        table.add_row(
            f"head {c['layer']}.{c['head']}" if c["kind"] == "head" else f"MLP {c['layer']}",
            interval(e),
            f"{e['null_low']:.2f} to {e['null_high']:.2f}",
            f"{report['q'][i]:.2g}",
            f"{report['within_subject_q'][i]:.2g}",
            f"{data['select_value'][i] / before:.2f}",
        )
    return [table, checks_table(data["ablation"]["read_out"])]
