"""Agreement: hand-worked tables, coverage of the AUC interval, cases without a defined value."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from rsteer_interp.agreement import Agreement, auc_estimate, auc_p, auc_within
from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Rate


def test_a_table_by_hand() -> None:
    # 20 both, 5 only the judge, 10 only the reference, 15 neither: accuracy 0.7, chance 0.5, kappa 0.4.
    judge = [True] * 25 + [False] * 25
    reference = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = Agreement.of(judge, reference)
    assert found.accuracy == Rate.from_count(35, 50)
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.4)
    assert found.kappa.low == pytest.approx(0.15, abs=0.04)  # 0.4 - 1.96 times Cohen's standard error 0.13
    assert found.kappa.high == pytest.approx(0.65, abs=0.04)
    assert found.auc is None
    assert found == Agreement.of(torch.tensor(judge), torch.tensor(reference))
    assert asdict(found)["accuracy"]["n"] == 50


def test_auc_at_its_limits() -> None:
    perfect = auc_estimate([1.0, 2, 3, 4, 5, 6], [False] * 3 + [True] * 3)
    assert perfect is not None
    assert (perfect.value, perfect.high) == (1, 1)
    assert 0.3 < perfect.low < 0.8
    reversed_ = auc_estimate([6.0, 5, 4, 3, 2, 1], [False] * 3 + [True] * 3)
    assert reversed_ is not None
    assert (reversed_.value, reversed_.low) == (0, 0)
    assert reversed_.high == pytest.approx(1 - perfect.low, abs=1e-6)
    ties = auc_estimate([1.0] * 6, [False] * 3 + [True] * 3)
    assert ties is not None
    assert ties.value == 0.5
    assert auc_estimate([1.0, 2.0], [True, True]) is None


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_the_auc_interval_covers_the_truth(shift: float) -> None:
    truth = stats.norm.cdf(shift / np.sqrt(2))
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        y = np.arange(40) < 20
        found = auc_estimate(rng.normal(size=40) + shift * y, y)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 200


def test_over_clusters_the_auc_and_kappa_cover_where_items_do_not() -> None:
    """Subjects with refused and answered prompts whose scores share what the subject adds; kappa of copies is that of one each."""
    rng, subject = np.random.default_rng(1), np.repeat(np.arange(16), 6)
    truth, hits, naive = stats.norm.cdf(1 / np.sqrt(1 + 1 + 4 + 4)), 0, 0
    for _ in range(300):
        y = np.repeat(rng.permutation(16) < 8, 6)  # a subject's prompts are refused, or answered
        s = rng.normal(0, 2, 16)[subject] + rng.normal(size=96) + y
        found, plain = auc_estimate(s, y, clusters=subject), auc_estimate(s, y)
        assert found is not None and plain is not None
        hits += found.low <= truth <= found.high
        naive += plain.low <= truth <= plain.high
    assert hits / 300 > 0.92 and naive / 300 < 0.85
    judge, reference = rng.random(60) < 0.5, rng.random(60) < 0.5
    once = Agreement.of(judge, reference)
    copies = Agreement.of(judge.repeat(9), reference.repeat(9), clusters=np.arange(60).repeat(9))
    assert once.kappa is not None and copies.kappa is not None
    assert copies.kappa.high - copies.kappa.low == pytest.approx(once.kappa.high - once.kappa.low, rel=0.1)
    perfect = auc_estimate([0.0] * 40 + [1.0] * 40, [False] * 40 + [True] * 40, clusters=np.repeat(np.arange(8), 10))
    assert perfect is not None and perfect.high == 1 and perfect.low < 0.8  # as of eight items


def test_the_auc_p_agrees_with_its_interval_and_is_uniform_over_clusters() -> None:
    rng, subject, fired, naive = np.random.default_rng(2), np.repeat(np.arange(18), 5), 0, 0
    for _ in range(300):
        y = np.repeat(rng.permutation(18) < 9, 5)
        s = rng.normal(0, 2, 18)[subject] + rng.normal(size=90)
        found, p = auc_estimate(s, y, clusters=subject), auc_p(s, y, clusters=subject)
        assert found is not None and (p <= 0.05) == (not found.low <= 0.5 <= found.high)
        fired += p <= 0.05
        naive += auc_p(s, y) <= 0.05
    assert fired / 300 < 0.08 and naive / 300 > 0.2


def test_inside_subjects_the_area_is_blind_to_what_subjects_are() -> None:
    rng, subject, fired = np.random.default_rng(3), np.repeat(np.arange(12), 8), 0
    for seed in range(300):
        rate = 1 / (1 + np.exp(-rng.normal(0, 2, 12)))
        y = rng.random(96) < rate[subject]
        s = 10 * rate[subject] + rng.normal(size=96)  # the score knows how often a subject is refused
        fired += auc_within(s, y, subject, 199, seed)[1] <= 0.05
    assert fired / 300 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert auc_p(s, y) < 1e-3
    found, p = auc_within(s + 4 * y, y, subject)
    assert found.value > 0.95 and found.low > 0.5 and p == 1 / 1000
    mixed = [g for g in range(12) if 0 < y[subject == g].sum() < 8]
    assert found.n == 8 * len(mixed)
    wins = [(s[(subject == g) & y][:, None] > s[(subject == g) & ~y] - 4).ravel() for g in mixed]
    assert found.value == pytest.approx(np.concatenate(wins).mean())
    with pytest.raises(UserError):
        auc_within([1.0, 2, 3, 4], [True, True, False, False], ["a", "a", "b", "b"])


def test_undefined_values_are_none() -> None:
    same = Agreement.of([True] * 5, [True] * 5, [0.5] * 5)
    assert (same.kappa, same.auc) == (None, None)
    assert same.accuracy.rate == 1
    with pytest.raises(UserError, match="same items"):
        Agreement.of([True], [True, False])
