"""Study: in which layers refusal can be read, and in which it is caused; `analyses/layer_concentration.py` is its command line.

Directions come from the fit split, the read-out's layer from select, every number from report. Depth is layer / n_layers,
so that models of different depth share an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.directions import (
    ESTIMATORS,
    CannotFit,
    Direction,
    Evidence,
    checked_methods,
    fit_directions,
    is_weighted,
)
from rsteer_interp.directions.diagnosis import diagnose
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.interventions import Displace, add
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.report.directions import directions_table
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.reproduction.vectors import States
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.rotation import rotations
from rsteer_interp.studies.layer_curves import causal_curve, read_out, significant
from rsteer_interp.studies.reader_checks import checks_table, checks_words, judged_subsample
from rsteer_interp.studies.study import NotApplicable, Study, interval
from rsteer_interp.style import method_label

if TYPE_CHECKING:
    from analyses.layer_concentration import Config

KIND = "layer_concentration"
EDITS = ("ablate", "add")
JUDGED_LAYERS = 6  # layers, at most, at which replies under either edit are judged
LEAST = 4  # fewest refusing report prompts for a causal curve
QUESTION = "In which layers can refusal be read, and in which is it caused?"
SETS = (POLITICAL, MATCHED)
_SPLITS: tuple[Split, ...] = ("fit", "select", "report")


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    named = checked_methods(config.methods)
    if config.random < 4:
        raise UserError(f"--random is {config.random}; the null needs at least 4 directions per layer")
    study.check_applicable()
    fit, select, report = (study.scored(s, *SETS) for s in _SPLITS)
    if not LEAST <= len(report.refusing) < len(report.texts):
        raise NotApplicable(f"not applicable: {len(report.refusing)} of {len(report.texts)} report prompts are refused")
    states = {s: study.states(s, *SETS) for s in _SPLITS}
    evidence = _evidence(fit, states["fit"])
    fitted, left_out = _fitted(study, named, evidence, states["fit"])
    methods = list(fitted)
    units = {method: {site: d.unit for site, (_, d) in of.items()} for method, of in fitted.items()}
    readouts = {
        method: read_out(
            _project(of_method, states["select"]),
            select.confidence,
            _project(of_method, states["report"]),
            report.confidence,
            report.groups,
            config.seed,
        )
        for method, of_method in units.items()
    }
    causal = _causal(study, config, units[methods[0]], report, evidence)
    directions = {m: _diagnosis(study, m, fitted[m], readouts[m]) for m in methods}
    data = {
        "base_rates": study.rates("report", *SETS),
        "n_fit": fit_counts(fit),
        "refusal_tokens": [study.backend.tokenizer.decode([t]) for t in study.refusal_tokens],
        "methods": methods,
        "left_out": left_out,
        "directions": directions,
        "readouts": readouts,
        "causal": causal,
    }
    return {**data, "finding": finding(data, study.n_layers)}, None


Fitted = dict[Site, tuple[Evidence, Direction]]


def _evidence(fit: Scored, states: States) -> dict[Site, Evidence]:
    return {site: Evidence(x, fit.confidence, site=site, subjects=fit.groups) for site, x in states.items()}


def _fitted(
    study: Study, methods: Sequence[str], evidence: dict[Site, Evidence], states: States
) -> tuple[dict[str, Fitted], dict[str, str]]:
    """Each method's directions with what they were fitted on: graded confidence for those that weigh by it, the greedy replies'
    verdicts for the others; and why some methods cannot be fitted. UserError when none can."""
    out: dict[str, Fitted] = {}
    left_out = {}
    for method in methods:
        estimator = ESTIMATORS[method]()
        seen = _evidence(study.graded("fit", *SETS), states) if is_weighted(estimator) else evidence
        try:
            out[method] = {site: (seen[site], d) for site, d in fit_directions(estimator, seen).items()}
        except CannotFit as reason:
            left_out[method] = str(reason)
    if not out:
        raise UserError(next(iter(left_out.values())))
    return out, left_out


def _diagnosis(study: Study, method: str, fitted: Fitted, readout: Mapping[str, Any]) -> dict[str, Any]:
    """Beside the method's direction at its read-out's layer: how repeatable it is, and what it reads inside subjects."""
    layer = readout["chosen_on_select"]["layer"]
    evidence, direction = fitted[Site(layer)]
    estimator, seed = ESTIMATORS[method](), study.config.seed

    def compute() -> tuple[dict[str, Any], None]:
        return asdict(diagnose(estimator, evidence, direction, seed=seed)), None

    key = {"estimator": estimator, "direction": direction, "seed": seed}
    key |= {"scores": evidence.scores, "subjects": evidence.subjects}
    found = study.stage(f"2_directions_{method}", key, compute).data
    r = readout["within_subject_r"][readout["layers"].index(layer)]
    inside = {"r": r, "p_max": readout["within_subject_p_max"], "n": readout["within_subject_n"]}
    return {**found, "layer": layer, "within_subject": inside}


def fit_counts(fit: Scored) -> dict[str, int]:
    z = fit.confidence.sign()
    return {"refused": int((z > 0).sum()), "answered": int((z < 0).sum()), "undecided": int((z == 0).sum())}


def _project(units: dict[Site, Tensor], states: States) -> Float[Tensor, "prompt site"]:
    return torch.stack([states[site].double() @ v.double() for site, v in units.items()], 1)


def _causal(
    study: Study,
    config: Config,
    units: dict[Site, Tensor],
    report: Scored,
    evidence: dict[Site, Evidence],
) -> dict[str, Any]:
    backend, tokens = study.backend, study.refusal_tokens
    refusing = report.refusing[: config.refusing]
    texts, subjects = ([each[i] for i in refusing] for each in (report.texts, report.subjects))
    rows, sites = study.template.encode_all(texts), [s for s in units if s.layer < backend.n_layers]
    key = {"prompts": texts, "sites": sites, "tokens": tokens}

    def base() -> tuple[dict[str, Any], None]:
        norms = mean_norms(backend, rows, sites)
        return {"norms": [norms[s] for s in sites], "log_odds": log_odds(backend, rows, tokens).tolist()}, None

    start = study.stage("3_base", key, base).data
    effects, draws = [], null_directions(config, {s: units[s] for s in sites}, evidence)
    with progress("one block input at a time", len(sites)) as advance:
        for site, norm in zip(sites, start["norms"], strict=True):
            random = draws[site]

            def compute(site: Site = site, norm: float = norm, random: Tensor = random) -> tuple[dict[str, Any], Any]:
                odds = single_site(backend, rows, tokens, site, units[site], random, config.dose * norm)
                return {}, {"log_odds": odds}

            edits = {"direction": units[site], "random": random, "amount": config.dose * norm}
            found = study.stage(f"3_layer_{site.layer:02d}", {**key, **edits}, compute)
            effects.append(torch.tensor(start["log_odds"], dtype=torch.float64) - found.tensors["log_odds"].double())
            advance(1)
    x = torch.stack(effects, -1)  # edit, direction (ours, random ...), prompt, layer
    layers = [site.layer for site in sites]
    judged = dict(list(zip(sites, start["norms"], strict=True))[:: -(-len(sites) // JUDGED_LAYERS)])
    kinds: dict[str, list[Edit | None]] = {
        "ablation at one layer": [Displace(site, units[site], units[site]) for site in judged],
        "addition at one layer": [add({s: units[s]}, {s: -config.dose * norm}) for s, norm in judged.items()],
    }
    vectors = {"vectors": {site: units[site] for site in judged}}
    return {
        "read_out": judged_subsample(study, "3_judged", {**key, **vectors}, kinds, texts, subjects),
        "layers": layers,
        "n": len(texts),
        "n_random": config.random,
        "dose": config.dose,
        "null": config.null,
        "base_log_odds": asdict(Estimate.of(start["log_odds"], clusters=subjects)),
        **{
            edit: causal_curve(x[i, 0], x[i, 1:].mean(1), layers, backend.n_layers, subjects)
            for i, edit in enumerate(EDITS)
        },
    }


def null_directions(
    config: Config, units: Mapping[Site, Float[Tensor, " d"]], evidence: Mapping[Site, Evidence]
) -> dict[Site, Float[Tensor, "draw d"]]:
    """Random unit vectors by layer. Draw i is one null of the whole curve: all layers' directions under one rotation, or one
    combination of the answered prompts' states."""
    if config.null == "covariance":
        n, d = config.random, len(next(iter(units.values())))
        return {s: random_unit_vectors(n, d, config.seed, evidence[s].complying).float() for s in units}
    turned = rotations(units, config.random, config.seed)
    return {s: torch.stack([each[s] for each in turned]).float() for s in units}


def single_site(
    backend: Backend, rows: Any, tokens: tuple[int, ...], site: Site, v: Tensor, random: Tensor, amount: float
) -> Float[Tensor, "edit direction prompt"]:
    """Log-odds under ablation and under adding -amount, of v and then of every random direction (equal norm)."""
    prepared = backend.prepare(rows, site.layer)
    directions = [v, *random]
    edits: list[Edit] = [
        *(Displace(site, v, u) for u in directions),
        *(add({site: u}, {site: -amount}) for u in directions),
    ]
    return log_odds_of_each(backend, prepared, tokens, edits).view(len(EDITS), len(directions), len(prepared))


def finding(data: dict[str, Any], n_layers: int) -> str:
    """The answer in one paragraph; what is not distinguishable from random is said to be so, with its p."""
    causal, parts = data["causal"], []
    for method in data["methods"]:
        read = data["readouts"][method]
        chosen = read["chosen_on_select"]
        r = chosen["r"]
        null = "not distinguishable from random, " if read["p_max"] > 0.05 else ""
        parts.append(
            f"Read-out of {method_label(method)} at layer {chosen['layer']} of {n_layers} (chosen on select): r = {r['value']:.2f} "
            f"({r['low']:.2f} to {r['high']:.2f}, n = {r['n']}), {null}p of the maximum {read['p_max']:.2g}; "
            f"inside subjects, where topic cannot help, p = {read['within_subject_p_max']:.2g} (n = {read['within_subject_n']}). "
            f"{_halves(data['directions'][method])}"
        )
    first = method_label(data["methods"][0])
    for edit, words in (("ablate", f"Ablating {first}"), ("add", f"Adding -{causal['dose']:g} |resid| of {first}")):
        curve = causal[edit]
        hits = significant(curve, causal["layers"])
        at = curve["at_peak"]
        size = (
            f"{at['value']:.2f} nats ({at['low']:.2f} to {at['high']:.2f}, n = {at['n']}) at its best layer, held out"
        )
        if not hits:
            parts.append(
                f"{words}: {size}; no layer distinguishable from random directions (smallest q = {min(curve['q']):.2g})."
            )
            continue
        spread = curve["concentration"]["effective_layers"]
        parts.append(
            f"{words}: {size}; peak at layer {curve['peak_layer']}, {len(hits)} of {len(causal['layers'])} layers beyond random "
            f"(q <= 0.05), spread over {spread['value']:.1f} ({spread['low']:.1f} to {spread['high']:.1f}) effective layers."
        )
    return " ".join([*parts, checks_words(causal["read_out"])])


def _halves(row: Mapping[str, Any]) -> str:
    own, topic = row["split_half"], row["split_half_topic"]
    if own is None or topic is None:
        return "Halves of the subjects are too few to fit it twice."
    return (
        f"Fits to halves of the subjects agree at cosine {interval(own)}, with verdicts permuted inside subjects, by topic alone, at "
        f"{interval(topic)}."
    )


def tables(data: dict[str, Any]) -> list[Table]:
    """Concentration of every curve; and whether log-odds under such edits mean refusal."""
    causal, readouts = data["causal"], data["readouts"]
    table = Table(title=f"Where refusal concentrates, {data['model']['name']} (95 % intervals over subjects)")
    for column in ("", "n", "effective layers", "under the null", "Gini", "peak depth", "centre depth"):
        table.add_column(column)
    for name, curve, n in (
        *((f"read-out r², {m}", readouts[m], readouts[m]["n"]) for m in data["methods"]),
        *((f"{edit}, {data['methods'][0]}", causal[edit], causal["n"]) for edit in EDITS),
    ):
        found, null = curve["concentration"], curve["null_effective_layers"]
        under = "" if null is None else f"{null['median']:.1f} ({null['low']:.1f} to {null['high']:.1f})"
        names = ("effective_layers", "gini", "peak", "centre")
        cells = [interval(found[k]) for k in names] if found else ["no positive effect", "", "", ""]
        table.add_row(name, str(n), cells[0], under, *cells[1:])
    trust = directions_table(
        data, "How far the directions can be trusted (fit split, each at its layer chosen on select)"
    )
    return [table, trust, checks_table(causal["read_out"])]
