"""Diagnosis: how much of a fitted direction its prompts speak for, how repeatable it is, and how much of that is topic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.directions.base import Direction, DirectionEstimator, is_weighted
from rsteer_interp.directions.evidence import Evidence, check
from rsteer_interp.directions.mean_difference import MeanDifference
from rsteer_interp.errors import UserError
from rsteer_interp.nulls import Reliability, cosine, cosine_null, split_half
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.resampling import permutations

N_SPLITS = 20


@dataclass(frozen=True)
class Band:
    """A mean over draws with their central 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Diagnosis:
    """What stands beside a direction; see `diagnose`. Cosines are of vectors in d dimensions."""

    counts: Mapping[str, int]
    d: int
    null_space_share: float
    """Share of |v|^2 where the complying prompts have no variance."""
    effective_rank: float | None
    """tr(A)^2 / tr(A^2) of the matrix that the estimator inverts, from 1 to d; None where none is inverted."""
    relative_penalty: float | None
    """lambda, with what shrinkage adds to it, in mean eigenvalues tr(Sigma) / d."""
    split_half: Band | None
    """Cosine of two fits on disjoint halves of the subjects; None where a half cannot be fitted."""
    split_half_topic: Band | None
    """The same with scores permuted inside subjects: what they have in common is what differs between subjects."""
    n_splits: int
    cosine_md: float
    """With the mean difference."""
    cosine_null: float
    """95 % of two random directions' cosines are no larger than this."""
    cosine_unweighted: float | None
    """With the same estimator's fit to equal weights; None for an estimator without weights."""


def diagnose(
    estimator: DirectionEstimator, evidence: Evidence, direction: Direction, *, n_splits: int = N_SPLITS, seed: int = 0
) -> Diagnosis:
    """The diagnosis of a direction that was fitted on the evidence, which has states and subjects."""
    against = cosine_null(direction.vector, MeanDifference().fit(evidence))
    numbers, equal = direction.diagnostics, _scored(evidence, evidence.labels.double())
    return Diagnosis(
        direction.counts,
        evidence.d,
        numbers["null_space_share"],
        numbers.get("effective_rank"),
        numbers.get("relative_penalty"),
        _reliability(estimator, evidence, n_splits, seed),
        _topic(estimator, evidence, n_splits, seed),
        n_splits,
        against.cosine,
        against.high,
        cosine(direction.vector, estimator.fit(equal)) if is_weighted(estimator) else None,
    )


def _reliability(estimator: DirectionEstimator, evidence: Evidence, n_splits: int, seed: int) -> Band | None:
    found = _halves(estimator, evidence, n_splits, seed)
    return None if found is None else Band(found.cosine, found.low, found.high)


def _topic(estimator: DirectionEstimator, evidence: Evidence, n_draws: int, seed: int) -> Band | None:
    """One pair of halves for each order of the scores inside subjects."""
    cosines = []
    for i, order in enumerate(permutations(len(evidence.states), n_draws, seed, within=evidence.subjects)):
        found = _halves(estimator, _scored(evidence, evidence.scores[torch.from_numpy(order)]), 1, seed + i)
        if found is None:
            return None
        cosines.append(found.cosine)
    low, high = percentiles(cosines)
    return Band(float(np.mean(cosines)), float(low), float(high))


def _halves(estimator: DirectionEstimator, evidence: Evidence, n_splits: int, seed: int) -> Reliability | None:
    """None where a half cannot be fitted."""

    def fit(index: Int[Tensor, " half"]) -> Float[Tensor, " d"]:
        half = evidence.subset(index)
        check(half, half.site)
        return estimator.fit(half)

    n, groups = len(evidence.states), evidence.subjects
    try:
        return split_half(fit, n, groups=groups, strata=evidence.labels, n_splits=n_splits, seed=seed)
    except UserError:
        return None


def _scored(evidence: Evidence, scores: Float[Tensor, " n"]) -> Evidence:
    """The same prompts with other scores."""
    return Evidence(evidence.states, scores, evidence.neutral_band, site=evidence.site, subjects=evidence.subjects)
