"""Paired comparisons: the same prompts before and after a change (refusal rates, log-odds)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Clusters, Estimate, Rate, effective_n, membership, wilson


@dataclass(frozen=True)
class PairedRates:
    """Two rates on the same n prompts, how many flipped each way, and after minus before with its interval.

    `difference` has Newcombe's (1998) interval by his method 10: Wilson's limits of both rates, squared and added, with the
    correlation phi of the pairs corrected for continuity. `p` is McNemar's exact test (two-sided, on the flips alone); over
    clusters, the test that swaps before and after in whole clusters.
    """

    before: Rate
    after: Rate
    only_before: int
    only_after: int
    difference: Estimate
    p: float

    @classmethod
    def of(
        cls,
        before: ArrayLike,
        after: ArrayLike,
        confidence: float = 0.95,
        *,
        clusters: Clusters = None,
        seed: int = 0,
    ) -> PairedRates:
        """UserError for rates of different prompts. Prompts of one cluster (subject) are not independent."""
        x, y = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
        if len(x) != len(y):
            raise UserError(f"paired rates of {len(x)} and {len(y)} prompts; give the same prompts in the same order")
        old, new = Rate.of(x, confidence, clusters=clusters), Rate.of(y, confidence, clusters=clusters)
        lost, gained = int((x & ~y).sum()), int((~x & y).sum())
        n = min(effective_n(flags, confidence, clusters=clusters) for flags in (x, y, x != y))
        low, high = _square_and_add(x, y, n, confidence)
        change = new.rate - old.rate
        if clusters is not None:
            p = paired_permutation(x, y, seed=seed, clusters=clusters)
        else:
            p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        return cls(old, new, lost, gained, Estimate(change, change - low, change + high, old.n), p)


def _square_and_add(x: NDArray[np.bool_], y: NDArray[np.bool_], n: float, confidence: float) -> tuple[float, float]:
    """How far the interval of rate(y) - rate(x) reaches down and up, for n prompts (an effective number, too)."""
    old, new = float(x.mean()), float(y.mean())
    both, neither = float((x & y).mean()), float((~x & ~y).mean())
    old_low, old_high = wilson(old, n, confidence)
    new_low, new_high = wilson(new, n, confidence)
    # phi's numerator in shares; his correction takes half a prompt of n^2 from a positive one.
    agreement = both * neither - float((x & ~y).mean()) * float((~x & y).mean())
    if agreement > 0:
        agreement = max(agreement - 1 / (2 * n), 0.0)
    spread = math.sqrt(old * (1 - old) * new * (1 - new))
    phi = agreement / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return reach(new - new_low, old_high - old), reach(new_high - new, old - old_low)


def paired_permutation(
    before: ArrayLike,
    after: ArrayLike,
    n_permutations: int = 10_000,
    seed: int = 0,
    *,
    clusters: Clusters = None,
) -> float:
    """Two-sided p of the mean paired difference when before and after are swapped at random within prompts, or clusters of them.

    Exact when 2^n <= n_permutations (n prompts or clusters), else (1 + reached) / (1 + permutations).
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(x) != len(y) or len(x) < 2:
        raise UserError(
            f"paired values of {len(x)} and {len(y)} prompts; give the same two or more prompts in one order"
        )
    return float(sign_flips(y - x, n_permutations, seed, clusters=clusters))


def sign_flips(
    changes: ArrayLike, n_permutations: int = 10_000, seed: int = 0, *, clusters: Clusters = None
) -> NDArray[np.float64]:
    """The same p of each column's mean change [prompt, ...], signs flipped in whole prompts or clusters. UserError for one alone."""
    change = np.asarray(changes, dtype=float)
    sums = change
    if clusters is not None:
        member = membership(clusters)
        sums = np.zeros((int(member.max()) + 1, *change.shape[1:]))
        np.add.at(sums, member, change)
    if len(sums) < 2:
        raise UserError(f"{len(change)} paired prompts of one cluster; a test needs two clusters or more")
    found = stats.permutation_test(
        (sums,),
        lambda a, axis: a.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_permutations,
        batch=500,
        axis=0,
        rng=np.random.default_rng(seed),
    )
    return np.asarray(found.pvalue, dtype=float)
