"""The causal steps of the dimensionality study: ablation at some sites, the best push at one; every sweep is a stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
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
from rsteer_interp.studies.dimension_results import (
    Ablation,
    AblationCurve,
    Basis,
    Control,
    Curve,
    Push,
    PushCurve,
    UnionRank,
)
from rsteer_interp.studies.dimension_runs import Bases, ablation_sweep, control_sweep, push_sweep, reach
from rsteer_interp.studies.dimension_sweep import Swept, sweep_curves, to_match
from rsteer_interp.studies.log_odds_gradient import log_odds_gradients
from rsteer_interp.studies.subspace_union import union_ranks
from rsteer_interp.studies.subspaces import Contrast, resampled

Sweep = tuple[list[int], dict[str, Tensor]]
CONTRASTS: tuple[Contrast, ...] = ("pairs", "subjects")


def union(inputs: Inputs) -> dict[str, tuple[UnionRank, ...]]:
    """Rank of the union of the sites' own subspaces, per family; bands where a family is a mean over subjects."""
    found, config = {}, inputs.config
    for name, bases in inputs.families.items():
        ks = reach(bases, inputs.ks)
        states = {s: inputs.states[s] for s in inputs.sites}
        again = [
            resampled(states, inputs.groups, each, max(ks), config.resamples, config.seed)
            for each in CONTRASTS
            if each == name
        ]
        found[name] = union_ranks(bases, ks, again[0] if again else (), config.seed)
    return found


def ablation(inputs: Inputs, where: str, sites: list[Site], shared: Mapping[Basis, Bases]) -> Ablation:
    """Sweeps of every family, of the `shared` bases and of every control over these sites, and what they say."""
    bench = cache(lambda: inputs.bench(sites[0].layer))
    learned: dict[str, Bases] = {**inputs.families} | dict(shared.items())
    raw: dict[str, Sweep] = {}
    with progress(f"ablating, {where}", len(learned) + len(inputs.controls)) as advance:
        for name, bases in learned.items():
            own: Bases = {s: bases[s] for s in sites}
            ks = reach(own, inputs.ks)

            def sweep(own: Bases = own, ks: list[int] = ks) -> dict[str, Tensor]:
                return ablation_sweep(bench(), own, ks, inputs.rotations)

            raw[name] = ks, _stage(inputs, f"3_{where}_{name}", sweep, own, ks)
            advance(1)
        for name, draws in inputs.controls.items():
            here: list[Bases] = [{s: bases[s] for s in sites} for bases in draws]
            ks = min((reach(bases, inputs.ks) for bases in here), key=len)

            def control(here: list[Bases] = here, ks: list[int] = ks) -> dict[str, Tensor]:
                return control_sweep(bench(), here, ks)

            raw[name] = ks, _stage(inputs, f"3_{where}_{name}", control, here, ks)
            advance(1)
    swept = {name: _swept(inputs, *raw[name]) for name in learned}
    curves, removable = sweep_curves(swept, inputs.base, inputs.config.share, inputs.config.seed)
    curve = {
        name: AblationCurve(
            **_fields(curves[name]),
            dose=tuple(found["dose"][:, 0].tolist()),
            kl=_kl(inputs, found["outcome"][:, :1]),
            null_kl=_kl(inputs, found["outcome"][:, 1:]),
        )
        for name, (_, found) in raw.items()
        if name in learned
    }
    target = curves[inputs.lead].removed[0].value
    base = inputs.base
    return Ablation(
        layers=tuple(s.layer for s in sites),
        n_subjects=len(set(base.refused_subjects)),
        base_log_odds=_estimate(base.refused, base.refused_subjects),
        answered_log_odds=_estimate(base.answered, base.answered_subjects),
        gap=base.gap,
        removable=removable,
        families={name: curve[name] for name in inputs.families},
        shared={name: curve[name] for name in shared},
        controls={name: _control(inputs, *raw[name], target, measured=True) for name in inputs.controls},
    )


def addition(inputs: Inputs) -> Push:
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
    every |= {"random": inputs.frames, "gradient": [whole]}
    raw: dict[str, Sweep] = {}
    with progress("adding the best push", len(every)) as advance:
        for name, draws in every.items():
            ks = min((reach({site: basis}, inputs.ks) for basis in draws), key=len)

            def sweep(draws: list[Tensor] = draws, ks: list[int] = ks) -> dict[str, Tensor]:
                return push_sweep(bench(), site, gradient, draws, ks, amount)

            raw[name] = ks, _stage(inputs, f"4_push_{name}", sweep, site, gradient, draws, ks, amount)
            advance(1)
    null = dict(zip(raw["random"][0], _removed(inputs, raw["random"][1]["outcome"]), strict=True))
    swept = {}
    for name in inputs.families:
        ks, found = raw[name]
        swept[name] = Swept(ks, _removed(inputs, found["outcome"])[:, 0], torch.stack([null[k] for k in ks]))
    curves, removable = sweep_curves(swept, inputs.base, config.share, config.seed)
    share = {name: [float((every[name][0][:k] @ whole[0]).norm()) for k in curve.ks] for name, curve in curves.items()}
    target = curves[inputs.lead].removed[0].value
    return Push(
        layer=site.layer,
        dose=config.dose,
        n_select=len(rows),
        removable=removable,
        families={
            name: PushCurve(**_fields(curve), gradient_share=tuple(share[name])) for name, curve in curves.items()
        },
        controls={name: _control(inputs, *raw[name], target, measured=False) for name in inputs.controls},
        whole_gradient=_estimate(_removed(inputs, raw["gradient"][1]["outcome"])[0, 0], inputs.refused.subjects),
    )


def _stage(inputs: Inputs, name: str, sweep: Callable[[], dict[str, Tensor]], *more: Any) -> dict[str, Tensor]:
    return dict(inputs.study.stage(name, inputs.key(*more), lambda: ({}, sweep())).tensors)


def _swept(inputs: Inputs, ks: list[int], found: Mapping[str, Tensor]) -> Swept:
    removed = _removed(inputs, found["outcome"])
    return Swept(ks, removed[:, 0], removed[:, 1:])


def _removed(inputs: Inputs, outcome: Float[Tensor, "k draw measure prompt"]) -> Float[Tensor, "k draw prompt"]:
    """Log-odds of refusal removed on the refused prompts, nats."""
    refused = inputs.base.refused
    return refused - outcome[:, :, 0, : len(refused)]


def _kl(inputs: Inputs, outcome: Float[Tensor, "k draw measure prompt"]) -> tuple[Estimate, ...]:
    """KL of the first token on the answered prompts per K, mean over draws."""
    rows = outcome[:, :, 1, len(inputs.refused.texts) :].mean(1)
    return tuple(_estimate(row, inputs.answered.subjects) for row in rows)


def _control(inputs: Inputs, ks: list[int], found: Mapping[str, Tensor], target: float, measured: bool) -> Control:
    """`target`: what one dimension of the leading family removes; `measured`: with dose and KL."""
    removed = _removed(inputs, found["outcome"])
    means = removed.mean(2)
    return Control(
        ks=tuple(ks),
        n_draws=removed.shape[1],
        removed=tuple(_estimate(row, inputs.refused.subjects) for row in removed.mean(1)),
        least=tuple(means.min(1).values.tolist()),
        most=tuple(means.max(1).values.tolist()),
        to_match_one=to_match(target, means.mean(1).tolist(), ks),
        dose=tuple(found["dose"].mean(1).tolist()) if measured else None,
        kl=_kl(inputs, found["outcome"]) if measured else None,
    )


def _fields(curve: Curve) -> dict[str, Any]:
    return {field.name: getattr(curve, field.name) for field in fields(curve)}


def _estimate(values: Tensor, subjects: Sequence[Hashable]) -> Estimate:
    return Estimate.of(values.tolist(), clusters=subjects)
