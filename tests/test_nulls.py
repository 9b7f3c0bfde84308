"""Intervals and nulls: known values, coverage, uniform p under the null, small p under a planted effect."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import (
    cosine,
    cosine_null,
    false_discovery,
    max_correlation_null,
    random_unit_vectors,
    split_half,
)
from rsteer_interp.statistics.intervals import Estimate, Rate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- rates and means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n", "low", "high"), [(81, 340, 19.6, 28.6), (99, 100, 94.6, 99.8)])
def test_wilson_intervals_of_the_paper(count: int, n: int, low: float, high: float) -> None:
    rate = Rate.from_count(count, n)
    assert (100 * rate.low, 100 * rate.high) == pytest.approx((low, high), abs=0.05)
    assert Rate.of([True] * count + [False] * (n - count)) == rate
    assert Rate.of(torch.arange(n) < count) == rate
    assert asdict(rate).keys() == {"count", "n", "rate", "low", "high", "units"}


def test_a_rate_prints_with_its_denominator() -> None:
    assert str(Rate.from_count(81, 340)) == "81/340 = 24 % (20 to 29)"
    assert Rate.from_count(0, 20).low == 0
    assert Rate.from_count(0, 20).high > 0.1
    with pytest.raises(UserError, match="no prompts"):
        Rate.of([])


@pytest.mark.parametrize("n", [6, 40])
def test_mean_intervals_cover_the_truth(n: int) -> None:
    found = [Estimate.of(2 + normal(n, seed=seed), n_draws=300) for seed in range(100)]
    assert 88 <= sum(e.low <= 2 <= e.high for e in found) <= 100
    assert all(e.low < e.value < e.high and e.n == n for e in found)


def test_mean_interval_by_hand_and_at_the_edges() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert (found.value, found.high) == pytest.approx((2, 2 + stats.t.ppf(0.975, 2) / math.sqrt(3)))
    assert Estimate.of([5] * 30) == Estimate(5.0, 5.0, 5.0, 30)
    assert Estimate.of(normal(30)) == Estimate.of(normal(30))
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="two finite values"):
            Estimate.of(bad)


# -- random vectors and cosines ------------------------------------------------------------------------------------


def test_random_vectors_are_unit_isotropic_and_repeatable() -> None:
    v = random_unit_vectors(4000, 16, seed=1)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close(v.T @ v / 4000, torch.eye(16, dtype=torch.float64) / 16, rtol=0, atol=6e-3)
    assert torch.equal(v, random_unit_vectors(4000, 16, seed=1))
    assert not torch.equal(v, random_unit_vectors(4000, 16, seed=2))


@pytest.mark.parametrize("n", [9, 500])
def test_matched_random_vectors_follow_the_covariance(n: int) -> None:
    states = normal(n, 12) * torch.linspace(0.05, 1, 12)
    moments = Moments.of(states)
    v = random_unit_vectors(4000, 12, seed=0, like=moments)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    leading, trailing = (torch.linalg.eigh(moments.covariance)[1][:, i] for i in (-1, 0))
    assert float((v @ leading).square().mean()) > 2 / 12
    assert float((v @ trailing).square().mean()) < (1e-12 if n < 12 else 0.1 / 12)


def test_cosine_of_vectors_of_any_length() -> None:
    a, b = normal(50), normal(50, seed=1)
    assert cosine(1e-12 * a, 1e9 * b) == pytest.approx(cosine(a, b))
    assert cosine(a, -a) == pytest.approx(-1)


def test_cosine_null_equals_simulation_and_is_calibrated() -> None:
    d = 40
    v = random_unit_vectors(4000, d, seed=0)
    cosines = (v[:2000] * v[2000:]).sum(1)
    found = cosine_null(v[0], v[1])
    assert found.high == pytest.approx(float(cosines.abs().quantile(0.95)), rel=0.06)
    assert found.high == pytest.approx(1.96 / math.sqrt(d), rel=0.05)
    ps = [cosine_null(a, b).p for a, b in zip(v[:300], v[300:600], strict=True)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert cosine_null(v[0], v[0]).p < 1e-12
    assert cosine_null(v[0], v[1]).disattenuated is None


def test_disattenuation_undoes_estimation_noise() -> None:
    """Two directions with cosine 0.6, each estimated with noise: the corrected cosine is near 0.6, the raw one is not."""
    d, n = 400, 40
    a = torch.nn.functional.one_hot(torch.tensor(0), d).double()
    b = 0.6 * a + 0.8 * torch.nn.functional.one_hot(torch.tensor(1), d).double()
    noise = 0.3
    x, y = (u + noise * normal(n, d, seed=seed) for seed, u in enumerate((a, b)))
    reliability = [split_half(lambda i, h=h: h[i].mean(0), n).full for h in (x, y)]
    found = cosine_null(x.mean(0), y.mean(0), *reliability)
    assert found.cosine < 0.45
    assert found.disattenuated == pytest.approx(0.6, abs=0.08)


# -- split halves -----------------------------------------------------------------------------------------------------


def test_split_half_of_signal_and_of_noise() -> None:
    d, n = 300, 60
    signal = torch.nn.functional.one_hot(torch.tensor(0), d).double()
    strong = split_half(lambda i: (5 * signal + 0.1 * normal(n, d))[i].mean(0), n)
    nothing = split_half(lambda i: normal(n, d)[i].mean(0), n)
    assert strong.low > 0.98
    assert abs(nothing.cosine) < 0.1
    assert nothing.full == 0 or nothing.full < 0.2
    weak = normal(n, d) * 0.35 + signal
    found = split_half(lambda i: weak[i].mean(0), n)
    expected = 1 / (1 + 0.35**2 * d / (n / 2))
    assert found.cosine == pytest.approx(expected, abs=0.06)
    assert found.full == pytest.approx(1 / (1 + 0.35**2 * d / n), abs=0.06)
    assert found == split_half(lambda i: weak[i].mean(0), n)


def test_halves_are_disjoint_balanced_and_keep_subjects_together() -> None:
    subjects = [f"s{i // 4}" for i in range(48)]
    classes = torch.tensor([1 if i < 24 else -1 for i in range(48)])
    halves: list[Tensor] = []

    def fit(index: Tensor) -> Tensor:
        halves.append(index)
        return torch.ones(3)

    split_half(fit, 48, groups=subjects, strata=classes, n_splits=5)
    for a, b in zip(halves[::2], halves[1::2], strict=True):
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(48))
        assert not {subjects[i] for i in a} & {subjects[i] for i in b}
        assert int((classes[a] == 1).sum()) == int((classes[a] == -1).sum()) == 12
    with pytest.raises(UserError, match="two clusters"):
        split_half(fit, 4, groups=["same"] * 4)


def test_subjects_in_both_halves_would_look_reliable() -> None:
    """States that differ by subject only: splitting subjects over both halves (the fault) repeats their noise."""
    by_subject = normal(6, 200)
    subjects = [str(i // 10) for i in range(60)]
    states = by_subject.repeat_interleave(10, 0)
    honest = split_half(lambda i: states[i].mean(0), 60, groups=subjects)
    fault = split_half(lambda i: states[i].mean(0), 60)
    assert abs(honest.cosine) < 0.3
    assert fault.cosine > 0.6


# -- permutation null of the best layer ----------------------------------------------------------------------------


def test_observed_correlations_equal_numpy_and_flat_layers_are_zero() -> None:
    x, c = normal(50, 6).float(), normal(50, seed=1)
    x[:, 2] = 3.14159
    found = max_correlation_null(x, c, 50)
    for layer in (0, 1, 3, 4, 5):
        assert found.r[layer] == pytest.approx(np.corrcoef(x[:, layer], c)[0, 1])
    assert found.r[2] == 0
    assert abs(found.r[found.best]) == max(abs(r) for r in found.r)
    assert found == max_correlation_null(x, c, 50)


def test_p_is_uniform_without_an_effect_and_the_maximum_matters() -> None:
    ps, naive = [], []
    for seed in range(100):
        x, c = normal(30, 12, seed=seed), normal(30, seed=1000 + seed)
        found = max_correlation_null(x, c, 99, seed)
        ps.append(found.p)
        naive.append(stats.pearsonr(x[:, found.best], c).pvalue)
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert float(np.mean(np.asarray(naive) < 0.05)) > 0.3  # fault: the best layer's own p


def test_p_is_small_for_a_planted_layer() -> None:
    c = normal(60, seed=1)
    x = normal(60, 12)
    x[:, 7] += c
    found = max_correlation_null(x, c, 999)
    assert (found.best, found.p) == (7, 1 / 1000)
    assert found.r[7] > found.null_max_quantile(0.99) > found.null_max_quantile(0.5)
    assert found.high[7] < found.r[7]
    for low, high in zip(found.low, found.high, strict=True):
        assert (low, high) == pytest.approx((-1.96 / math.sqrt(59), 1.96 / math.sqrt(59)), abs=0.06)


def test_a_topic_effect_vanishes_inside_topics() -> None:
    topics = ["a"] * 40 + ["b"] * 40
    topic = torch.tensor([1.0] * 40 + [-1.0] * 40)
    c, x = topic + 0.3 * normal(80, seed=1), topic[:, None] + 0.3 * normal(80, 4)
    assert max_correlation_null(x, c, 199).p == 1 / 200
    within = max_correlation_null(x, c, 199, groups=topics)
    assert within.p > 0.05
    assert max(abs(r) for r in within.r) < 0.35
    by_hand = [np.corrcoef(x[i, 0], c[i])[0, 1] for i in (slice(0, 40), slice(40, 80))]
    assert min(by_hand) - 1e-9 <= within.r[0] <= max(by_hand) + 1e-9


def test_scores_stay_inside_their_topic() -> None:
    """Topic a has the spread of the projections, topic b that of the scores: inside topics nothing can correlate."""
    x = torch.cat([normal(40, 3), 1e-6 * normal(40, 3, seed=1)])
    c = torch.cat([torch.zeros(40, dtype=torch.float64), normal(40, seed=2)])
    within = max_correlation_null(x, c, 99, groups=["a"] * 40 + ["b"] * 40)
    assert max(within.null_max) < 1e-4
    assert max(max_correlation_null(x, c, 99).null_max) > 0.1  # fault: scores moved between topics


def test_permutation_errors_name_the_remedy() -> None:
    with pytest.raises(UserError, match="n = 2"):
        max_correlation_null(normal(2, 3), normal(2))


def test_false_discovery_by_hand() -> None:
    assert false_discovery([0.01, 0.04, 0.03, 0.5]) == pytest.approx((0.04, 0.16 / 3, 0.16 / 3, 0.5))
