"""Paired comparisons: exact tests by hand, Newcombe's published interval, calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.paired import PairedRates, paired_permutation


def flags(both: int, only_before: int, only_after: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * (both + only_before) + [False] * (only_after + neither)
    after = [True] * both + [False] * only_before + [True] * only_after + [False] * neither
    return before, after


def test_mcnemar_by_hand() -> None:
    found = PairedRates.of(*flags(20, 9, 1, 30))
    assert (found.only_before, found.only_after) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert found.difference.value == pytest.approx(-8 / 60)
    assert PairedRates.of(*flags(5, 0, 0, 5)).p == 1


def test_the_interval_of_newcombe_1998() -> None:
    """Cells 36, 12, 2, 0 of his worked table: method 10 gives 0.0569 to 0.3404."""
    found = PairedRates.of(*flags(36, 12, 2, 0)).difference
    assert (-found.value, -found.high, -found.low) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-4)
    # 20, 12, 2, 16: phi is positive, and its correction for continuity shows (method 8 gives 0.0618 to 0.3242).
    other = PairedRates.of(*flags(20, 12, 2, 16)).difference
    assert (-other.high, -other.low) == pytest.approx((0.0562, 0.3292), abs=5e-4)
    nothing = PairedRates.of(*flags(0, 0, 0, 20)).difference
    assert nothing.low < 0 < nothing.high
    assert (nothing.value, nothing.n) == (0, 20)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    cells = rng.multinomial(60, [0.4, 0.3, 0.05, 0.25], size=300)
    found = [PairedRates.of(*flags(*row.tolist())).difference for row in cells]
    assert 0.92 <= np.mean([e.low <= -0.25 <= e.high for e in found]) <= 0.99


def test_permutation_is_exact_for_few_prompts() -> None:
    # All six differences positive: 2 of the 64 sign patterns are as extreme.
    assert paired_permutation([0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(2 / 64)


def test_permutation_p_is_uniform_without_an_effect_and_small_with_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 100, 20, generator=generator)
    ps = [paired_permutation(a, b, 199, seed) for seed, (a, b) in enumerate(zip(x, y, strict=True))]
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert paired_permutation(x[0], x[0] + 1, 199) == pytest.approx(2 / 200)
    assert paired_permutation(x[0], y[0], 199) == paired_permutation(x[0], y[0], 199)


def test_different_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="same prompts"):
        PairedRates.of([True], [True, False])
    with pytest.raises(UserError, match="one order"):
        paired_permutation([1.0, 2.0], [1.0])


def _coverage(p_lost: float, p_gained: float, base: float, n: int, runs: int) -> float:
    rng = np.random.default_rng(8)
    cells = rng.multinomial(n, [base - p_lost, p_lost, p_gained, 1 - base - p_gained], size=runs)
    hits = 0
    for a, b, c, d in cells:
        x = np.repeat([True, True, False, False], [a, b, c, d])
        y = np.repeat([True, False, True, False], [a, b, c, d])
        found = PairedRates.of(x, y).difference
        hits += found.low <= p_gained - p_lost <= found.high
    return hits / runs


@pytest.mark.parametrize("lost", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("base", [0.58, 0.9])
def test_paired_difference_covers_rare_losses(lost: float, base: float) -> None:
    """Method 10's own coverage here, summed over all tables, is 0.929 to 1.000; method 8's falls to 0.79."""
    assert _coverage(lost, 0.0, base, 100, 2000) > 0.929 - 3 * np.sqrt(0.07 * 0.93 / 2000)


def test_paired_difference_over_clusters_is_wider_and_one_way_flips_in_one_cluster_prove_little() -> None:
    before = np.array([True] * 40)
    after = before.copy()
    after[:8] = False  # eight prompts, one subject
    subjects = np.repeat(np.arange(5), 8)
    apart, together = PairedRates.of(before, after), PairedRates.of(before, after, clusters=subjects)
    assert together.difference.low < apart.difference.low and together.difference.high > apart.difference.high
    assert apart.p < 0.01 and together.p == 1.0  # one cluster flipped, of five: swapping it gives both signs alike


def test_swapping_clusters_is_uniform_without_an_effect() -> None:
    rng = np.random.default_rng(9)
    p = []
    for seed in range(400):
        x = (rng.normal(size=(8, 1)) + 0.2 * rng.normal(size=(8, 5))).ravel()
        p.append(paired_permutation(np.zeros(40), x, 255, seed, clusters=np.repeat(np.arange(8), 5)))
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert stats.kstest(p, "uniform").pvalue > 0.01
