"""Nulls of directions: random vectors, permuted labels, split halves, and the exact null of a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.statistics.draws import p_value, percentiles, upper
from rsteer_interp.statistics.intervals import Clusters, membership
from rsteer_interp.statistics.resampling import halves, permutations


def random_unit_vectors(n: int, d: int, seed: int, like: Moments | None = None) -> Float[Tensor, "n d"]:
    """n random unit vectors in float64: uniform on the sphere, or with the covariance of `like` before normalising."""
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        draws = torch.randn(n, d, generator=generator, dtype=torch.float64)
    elif like.scatter.rows is not None:
        rows = like.scatter.rows
        draws = torch.randn(n, len(rows), generator=generator, dtype=torch.float64).to(rows) @ rows
    else:
        values, vectors = torch.linalg.eigh(like.scatter.dense)
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64).to(values)
        draws = (noise * values.clamp(min=0).sqrt()) @ vectors.T
    return draws.div(draws.norm(dim=1, keepdim=True))


def cosine(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> float:
    """<a, b> / (|a| |b|) in float64, for vectors of any length (torch's own takes lengths under 1e-8 for 1e-8)."""
    x, y = a.double(), b.double()
    return float((x / x.norm()) @ (y / y.norm()))


@dataclass(frozen=True)
class CorrelationNull:
    """Pearson r of projection and score per layer, the band of r under permuted scores, and the null of max |r|.

    `p` is (1 + #{null max >= observed max}) / (1 + permutations): it accounts for having picked the best layer.
    """

    r: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    null_max: tuple[float, ...]
    n: int
    p: float

    @property
    def best(self) -> int:
        """Index of the layer with the largest |r|."""
        return max(range(len(self.r)), key=lambda layer: abs(self.r[layer]))

    def null_max_quantile(self, q: float = 0.95) -> float:
        return float(upper(self.null_max, q))


def max_correlation_null(
    projections: Float[Tensor, "n layer"],
    scores: Float[Tensor, " n"],
    n_permutations: int = 1000,
    seed: int = 0,
    *,
    groups: Clusters = None,
    confidence: float = 0.95,
) -> CorrelationNull:
    """Permutation null of r per layer and of its maximum over layers (Westfall and Young's max statistic).

    `groups` (subjects) are centred, and scores move only inside them: what is left is not what differs between subjects. Groups that
    hold several subjects (prompt sets) would leave those in. The projections must be of prompts the directions were not fitted on,
    else r is large under any labels. A constant projection has r = 0.
    """
    x, y = projections.double().cpu(), scores.double().cpu()
    n = len(y)
    if n < 3 or not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
        raise UserError(f"a correlation needs finite values of three prompts or more (n = {n})")
    member = torch.from_numpy(membership(groups)) if groups is not None else torch.zeros(n, dtype=torch.long)
    x, y = _standardised(x, member), _standardised(y[:, None], member)[:, 0]
    null = y[permutations(n, n_permutations, seed, within=groups)] @ x
    observed, null_max = y @ x, null.abs().amax(1)
    low, high = percentiles(null, confidence)
    return CorrelationNull(
        tuple(observed.tolist()),
        tuple(low.tolist()),
        tuple(high.tolist()),
        tuple(null_max.tolist()),
        n,
        float(p_value(float(observed.abs().max()), null_max, "greater")),
    )


def _standardised(x: Float[Tensor, "n k"], member: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """Columns centred within groups and scaled to unit length; constant columns become 0."""
    sizes = member.bincount().double()[:, None]
    means = torch.zeros(len(sizes), x.shape[1], dtype=torch.float64).index_add(0, member, x) / sizes
    centred = x - means[member]
    norms = centred.norm(dim=0)
    return centred.div(norms.where(norms > 1e-12 * x.norm(dim=0), torch.inf))


@dataclass(frozen=True)
class Reliability:
    """How repeatable a direction is: the cosine of two fits on disjoint halves, over random splits.

    `low`, `high`: 2.5 and 97.5 % of the splits (not of new samples). `full` is the Spearman-Brown value 2 r / (1 + r) of the mean
    cosine r, for a fit on all prompts; 0 when r is not positive.
    """

    cosine: float
    low: float
    high: float
    full: float
    n: int
    n_splits: int


def split_half(
    fit: Callable[[Int[Tensor, " half"]], Float[Tensor, " d"]],
    n: int,
    *,
    groups: Clusters = None,
    strata: Sequence[int] | Tensor | None = None,
    n_splits: int = 20,
    seed: int = 0,
) -> Reliability:
    """Split-half reliability of `fit`, which maps indices of prompts to a vector; see `resampling.halves`."""
    kinds = None if strata is None else [int(s) for s in strata]
    drawn = torch.from_numpy(halves(n, n_splits, seed, clusters=groups, strata=kinds))
    cosines = [cosine(fit(first.nonzero()[:, 0]), fit((~first).nonzero()[:, 0])) for first in drawn]
    mean = float(np.mean(cosines))
    low, high = percentiles(cosines)
    full = 2 * mean / (1 + mean) if mean > 0 else 0.0
    return Reliability(mean, float(low), float(high), full, n, n_splits)


@dataclass(frozen=True)
class CosineNull:
    """Cosine of two directions beside what two random ones give in d dimensions (standard deviation 1 / sqrt(d)).

    `p` is two-sided. `disattenuated` is cosine / sqrt(reliability_a reliability_b), what the cosine would be without estimation
    noise (Spearman 1904); None when a reliability is missing or not positive, and it may exceed 1 in small samples.
    """

    cosine: float
    low: float
    high: float
    p: float
    d: int
    disattenuated: float | None


def cosine_null(
    a: Float[Tensor, " d"],
    b: Float[Tensor, " d"],
    reliability_a: float = 0.0,
    reliability_b: float = 0.0,
    confidence: float = 0.95,
) -> CosineNull:
    """The cosine of a and b with its exact null: cos^2 of two random vectors is Beta(1/2, (d - 1)/2).

    The reliabilities are those of the vectors given, `Reliability.full` when they were fitted on all prompts.
    """
    value, d = cosine(a, b), len(a)
    null = stats.beta(0.5, (d - 1) / 2)
    bound = math.sqrt(float(null.ppf(confidence)))
    known = reliability_a > 0 and reliability_b > 0
    corrected = value / math.sqrt(reliability_a * reliability_b) if known else None
    return CosineNull(value, -bound, bound, float(null.sf(min(value**2, 1.0))), d, corrected)


def false_discovery(p_values: Sequence[float]) -> tuple[float, ...]:
    """Benjamini-Hochberg adjusted p-values (q-values), in the given order: reject those at or under the wanted rate."""
    return tuple(float(q) for q in stats.false_discovery_control(list(p_values), method="bh"))
