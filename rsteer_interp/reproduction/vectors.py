"""Step 2: directions of every method at every block input, their layer scores, scales and nulls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, CannotFit, Direction, Evidence, fit_directions
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import max_correlation_null
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import NEUTRAL_BAND
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.selection import LayerScore, layer_score, scales, steerable_layers, top_layers
from rsteer_interp.spectrum import coordinate_density, spectrum
from rsteer_interp.statistics.resampling import movable

States = dict[Site, Float[Tensor, "prompt d"]]


@dataclass(frozen=True)
class Vectors:
    """One method's directions at every site, with scores and scales from the select split."""

    method: str
    fitted: dict[Site, Direction]
    scores: dict[int, LayerScore]  # by layer
    scales: dict[Site, tuple[float, float]]

    @cached_property
    def directions(self) -> dict[Site, Float[Tensor, " d"]]:
        """Unit vectors."""
        return {site: d.unit for site, d in self.fitted.items()}

    @cached_property
    def references(self) -> dict[Site, Float[Tensor, " d"]]:
        """Neutral means."""
        return {site: d.offset for site, d in self.fitted.items()}

    def top(self, k: int, n_layers: int) -> list[Site]:
        return [Site(layer) for layer in top_layers(self.scores, k, n_layers)]


def states_of(context: Context, name: str, scored: Scored) -> States:
    """Last-prompt-token states of scored prompts at every site (kept on disk, so that no later step runs them again)."""

    def compute() -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        rows = context.template.encode_all(scored.texts)
        with progress(f"reading states of {name} prompts", len(rows)) as advance:
            states = last_states(context.backend, rows, context.sites, on_batch=advance)
        return {"n": len(rows)}, {str(site): value for site, value in states.items()}

    tensors = context.stage(f"2_states_{name}", {"prompts": scored.texts}, compute).tensors
    return {site: tensors[str(site)] for site in context.sites}


def projections(vectors: Vectors, states: States) -> Float[Tensor, "prompt site"]:
    """p_l = <h_l - o_l, v_l>, centred on the neutral mean."""
    return torch.stack(
        [(states[s].double() - vectors.references[s].double()) @ v.double() for s, v in vectors.directions.items()], 1
    )


def evidence_of(context: Context, fit: Scored, states: States) -> dict[Site, Evidence]:
    """What every estimator is fitted on."""
    return {site: Evidence(states[site], fit.confidence, site=site, subjects=fit.groups) for site in context.sites}


def fit_vectors(
    context: Context, fit: Scored, evidence: Mapping[Site, Evidence], select: Scored, select_states: States
) -> tuple[dict[str, Vectors], dict[str, str]]:
    """Every registered estimator's vectors, fitted on the fit split, scored on the select split; and why some have none."""
    out, left_out = {}, {}
    for method, estimator in ESTIMATORS.items():
        try:
            fitted = fit_directions(
                estimator(), evidence, sets=tuple(sorted(set(fit.sets))), fingerprint=context.backend.fingerprint
            )
        except CannotFit as reason:
            left_out[method] = str(reason)
            continue
        p = projections(Vectors(method, fitted, {}, {}), select_states)
        out[method] = Vectors(
            method,
            fitted,
            {s.layer: layer_score(p[:, i], select.confidence) for i, s in enumerate(context.sites)},
            {site: scales(p[:, i], select.confidence) for i, site in enumerate(context.sites)},
        )
    return out, left_out


def layer_report(context: Context, vectors: Vectors, select: Scored, states: States) -> dict[str, Any]:
    """Read-out curve on the select split with its permutation null, and the same inside each subject (topic-free)."""
    p, c, draws = projections(vectors, states), select.confidence, context.preset.permutations
    null = max_correlation_null(p, c, draws, context.seed)
    # With each subject's mean removed, and confidence permuted inside subjects: what is left is not topic.
    within = max_correlation_null(p, c, draws, context.seed, groups=select.groups)
    steerable = set(steerable_layers(context.backend.n_layers))
    return {
        "layers": [site.layer for site in context.sites],
        "r": list(null.r),
        "rmse": [s.rmse for s in vectors.scores.values()],
        "score": [s.score for s in vectors.scores.values()],
        "excluded": [site.layer for site in context.sites if site.layer not in steerable],
        "within_subject_r": list(within.r),
        "null_low": list(null.low),
        "null_high": list(null.high),
        "null_max_q95": null.null_max_quantile(0.95),
        "p_max": null.p,
        "within_subject_p_max": within.p,
        "within_subject_n": int(movable(c.tolist(), select.groups).sum()),
        "n": len(select.texts),
    }


def best_layer(vectors: Vectors, n_layers: int) -> int:
    return top_layers(vectors.scores, 1, n_layers)[0]


def density_report(context: Context, vectors: Vectors, layer: int) -> tuple[dict[str, Any], Tensor]:
    """Sorted coordinates of the method's vector at a layer beside the Gaussian null, and the vector itself."""
    vector = vectors.directions[Site(layer)]
    density = coordinate_density(vector, n_top=500, seed=context.seed)
    columns = math.isqrt(len(vector) - 1) + 1
    return {
        "layer": layer,
        "method": vectors.method,
        "sorted_abs": density.sizes.tolist(),
        "null_mean": density.null_mean.tolist(),
        "null_low": density.null_low.tolist(),
        "null_high": density.null_high.tolist(),
        "top10_share": density.share,
        "null_top10": {"mean": density.share_null, "low": density.share_low, "high": density.share_high},
        "grid": {"rows": -(-len(vector) // columns), "columns": columns},
        "participation_ratio": density.participation,
    }, vector


def pca_report(fit: Scored, states: States, layer: int) -> tuple[dict[str, Any], Tensor]:
    """First two principal components of the fit prompts' states at a layer, labelled by confidence."""
    moments = Moments.of(states[Site(layer)])
    found = spectrum(moments)
    points = (states[Site(layer)].double() - moments.mean) @ found.components[:2].T
    # A component's sign is arbitrary: refusing prompts lie to the right and up.
    sign = torch.sign(fit.confidence.double() @ points)
    label = [
        "refused" if c > NEUTRAL_BAND else "answered" if c < -NEUTRAL_BAND else "neutral"
        for c in fit.confidence.tolist()
    ]
    data = {
        "layer": layer,
        "explained": found.shares[:2].tolist(),
        "label": label,
        "set": fit.sets,
        "subject": fit.subjects,
    }
    return data, (points * torch.where(sign == 0, 1.0, sign)).float()
