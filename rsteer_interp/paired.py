"""Paired comparisons: the same prompts before and after a change (refusal rates, log-odds)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rsteer_interp.errors import UserError
from rsteer_interp.nulls import Estimate, Rate


@dataclass(frozen=True)
class PairedRates:
    """Two rates on the same n prompts, how many flipped each way, and after minus before with its interval.

    `difference` has Newcombe's (1998, method 10) interval, `p` is McNemar's exact test (two-sided, on the flips alone).
    """

    before: Rate
    after: Rate
    only_before: int
    only_after: int
    difference: Estimate
    p: float

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike, confidence: float = 0.95) -> PairedRates:
        x, y = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
        if len(x) != len(y):
            raise UserError(f"paired rates of {len(x)} and {len(y)} prompts; give the same prompts in the same order")
        old, new = Rate.of(x, confidence), Rate.of(y, confidence)
        lost, gained = int((x & ~y).sum()), int((~x & y).sum())
        p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        spread = old.count * (old.n - old.count) * new.count * (new.n - new.count)
        phi = (int((x & y).sum()) * int((~x & ~y).sum()) - lost * gained) / math.sqrt(spread) if spread else 0.0

        def half(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

        change = new.rate - old.rate
        low = change - half(new.rate - new.low, old.high - old.rate)
        high = change + half(new.high - new.rate, old.rate - old.low)
        return cls(old, new, lost, gained, Estimate(change, low, high, old.n), p)


def paired_permutation(before: ArrayLike, after: ArrayLike, n_permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the mean paired difference when before and after are swapped at random within prompts.

    Exact when 2^n <= n_permutations, else (1 + reached) / (1 + permutations).
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(x) != len(y) or len(x) < 2:
        raise UserError(
            f"paired values of {len(x)} and {len(y)} prompts; give the same two or more prompts in one order"
        )
    return float(
        stats.permutation_test(
            (y, x),
            lambda a, b, axis: (a - b).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=n_permutations,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
    )
