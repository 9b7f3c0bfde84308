"""The causal steps of the dimensionality study: ablation at some sites, the best push at one; every sweep is a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.progress import progress
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.dimension_inputs import Inputs
from rsteer_interp.studies.dimension_runs import Bases, ablation_sweep, control_sweep, push_sweep, reach
from rsteer_interp.studies.dimension_sweep import sweep_curve, to_match
from rsteer_interp.studies.log_odds_gradient import log_odds_gradients

Outcome = Float[Tensor, "k draw measure prompt"]


def ablation(inputs: Inputs, where: str, sites: list[Site]) -> dict[str, Any]:
    """Sweeps of every family and control over these sites, and what they say."""
    bench = cache(lambda: inputs.bench(sites[0].layer))
    swept: dict[str, tuple[list[int], dict[str, Tensor]]] = {}
    every = {name: [bases] for name, bases in inputs.families.items()} | inputs.controls
    with progress(f"ablating, {where}", len(every)) as advance:
        for name, draws in every.items():
            here: list[Bases] = [{s: bases[s] for s in sites} for bases in draws]
            ks = min((reach(bases, inputs.ks) for bases in here), key=len)

            def sweep(name: str = name, here: list[Bases] = here, ks: list[int] = ks) -> dict[str, Tensor]:
                if name in inputs.controls:
                    return control_sweep(bench(), here, ks)
                return ablation_sweep(
                    bench(), here[0], ks, [dict.fromkeys(sites, u) for u in inputs.isotropic_of(name)]
                )

            swept[name] = ks, _stage(inputs, f"3_{where}_{name}", sweep, here, ks, inputs.isotropic)
            advance(1)
    removed = {name: _removed(inputs, raw["outcome"]) for name, (_, raw) in swept.items()}
    own = {name: dict(zip(swept[name][0], removed[name][:, 1:], strict=True)) for name in inputs.families}
    found: dict[str, Any] = {"families": {}, "controls": {}}
    for name, (ks, raw) in swept.items():
        outcome, dose = raw["outcome"], raw["dose"]
        if name in inputs.families:
            # Families have nearly the same dose at the same K, so the random subspaces of each serve all.
            nulls = [torch.cat([draws[k] for draws in own.values() if k in draws]) for k in ks]
            found["families"][name] = _family(inputs, ks, removed[name][:, 0], nulls) | {
                "dose": dose[:, 0].tolist(),
                "own_null_mean": removed[name][:, 1:].mean((1, 2)).tolist(),
                "null_dose": dose[:, 1:].mean(1).tolist(),
                "kl": _kl(inputs, outcome[:, :1]),
                "null_kl": _kl(inputs, outcome[:, 1:]),
            }
        else:
            measured = {"dose": dose.mean(1).tolist(), "kl": _kl(inputs, outcome)}
            found["controls"][name] = _control(ks, removed[name]) | measured
    _match(found)
    refused, answered = inputs.base
    base = {"base_log_odds": _estimate(refused), "answered_log_odds": _estimate(answered)}
    return {"layers": [s.layer for s in sites], **base, "gap": float(refused.mean() - answered.mean()), **found}


def addition(inputs: Inputs) -> dict[str, Any]:
    """The best push inside K dimensions at one layer: where, on select, pushing the mean difference back does most to first order."""
    backend, config = inputs.study.backend, inputs.config
    rows = inputs.study.template.encode_all(inputs.pushed)

    def gradients() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with progress("gradients of the log-odds", len(rows)) as advance:
            slopes = log_odds_gradients(backend, rows, inputs.study.refusal_tokens, inputs.sites, advance)
        norms = mean_norms(backend, rows, inputs.sites)
        return {"norms": [norms[s] for s in inputs.sites]}, {str(s): g.mean(0) for s, g in slopes.items()}

    step = inputs.study.stage("4_gradients", inputs.key() | {"select": inputs.pushed}, gradients)
    norms = dict(zip(inputs.sites, step.data["norms"], strict=True))
    site = max(inputs.sites, key=lambda s: norms[s] * float(step.tensors[str(s)].double() @ inputs.gap(s)))
    gradient, amount = step.tensors[str(site)].double(), config.dose * norms[site]
    whole = (gradient / gradient.norm())[None]
    bench = cache(lambda: inputs.bench(site.layer))
    every = {name: [bases[site]] for name, bases in inputs.families.items()}
    every |= {name: [bases[site] for bases in draws] for name, draws in inputs.controls.items()}
    every |= {"isotropic": inputs.isotropic, "gradient": [whole]}
    removed: dict[str, tuple[list[int], Tensor]] = {}
    with progress("adding the best push", len(every)) as advance:
        for name, draws in every.items():
            ks = min((reach({site: basis}, inputs.ks) for basis in draws), key=len)

            def sweep(draws: list[Tensor] = draws, ks: list[int] = ks) -> dict[str, Tensor]:
                return push_sweep(bench(), site, gradient, draws, ks, amount)

            raw = _stage(inputs, f"4_push_{name}", sweep, site, gradient, draws, ks, amount)
            removed[name] = ks, _removed(inputs, raw["outcome"])
            advance(1)
    null = dict(zip(*removed["isotropic"], strict=True))
    found: dict[str, Any] = {"families": {}, "controls": {}}
    for name in inputs.families:
        ks, values = removed[name]
        share = [float((every[name][0][:k] @ whole[0]).norm()) for k in ks]
        found["families"][name] = _family(inputs, ks, values[:, 0], [null[k] for k in ks]) | {"gradient_share": share}
    for name in inputs.controls:
        found["controls"][name] = _control(*removed[name])
    _match(found)
    found["whole_gradient"] = _estimate(removed["gradient"][1][0, 0])
    return {"layer": site.layer, "dose": config.dose, "n_select": len(rows), **found}


def _stage(inputs: Inputs, name: str, sweep: Callable[[], dict[str, Tensor]], *more: Any) -> dict[str, Tensor]:
    return dict(inputs.study.stage(name, inputs.key(*more), lambda: ({}, sweep())).tensors)


def _removed(inputs: Inputs, outcome: Outcome) -> Float[Tensor, "k draw prompt"]:
    """Log-odds of refusal removed on the refused prompts, nats."""
    refused = inputs.base[0]
    return refused - outcome[:, :, 0, : len(refused)]


def _kl(inputs: Inputs, outcome: Outcome) -> list[dict[str, Any]]:
    """KL of the first token on the answered prompts per K, mean over draws."""
    return [_estimate(row) for row in outcome[:, :, 1, len(inputs.refused) :].mean(1)]


def _family(inputs: Inputs, ks: list[int], removed: Float[Tensor, "k prompt"], nulls: list[Tensor]) -> dict[str, Any]:
    return sweep_curve(removed.T, nulls, inputs.base, ks, inputs.config.share, inputs.config.seed)


def _control(ks: list[int], removed: Float[Tensor, "k draw prompt"]) -> dict[str, Any]:
    means = removed.mean(2)
    return {
        "ks": ks,
        "n_draws": removed.shape[1],
        "removed": [_estimate(row) for row in removed.mean(1)],
        "least": means.min(1).values.tolist(),
        "most": means.max(1).values.tolist(),
    }


def _match(found: dict[str, Any]) -> None:
    """For each control, the smallest K that removes as much as one dimension of the first family."""
    target = next(iter(found["families"].values()))["removed"][0]["value"]
    for control in found["controls"].values():
        control["to_match_one"] = to_match(target, [e["value"] for e in control["removed"]], control["ks"])


def _estimate(values: Tensor) -> dict[str, Any]:
    return asdict(Estimate.of(values.tolist()))
