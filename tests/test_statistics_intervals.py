"""Intervals cover what they say, over clusters too: simulated truths, independent formulas, hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Estimate, Rate, effective_n

RUNS = 1500
SLACK = 3 * np.sqrt(0.05 * 0.95 / RUNS)  # of a coverage measured in so many runs


def test_a_rate_without_clusters_is_wilsons() -> None:
    for count, n in ((0, 5), (3, 40), (57, 57), (81, 340)):
        ours = Rate.from_count(count, n)
        theirs = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert ours.units == n and str(ours).startswith(f"{count}/{n} = ")


def test_copies_of_a_prompt_count_once() -> None:
    flags = np.array([True] * 12 + [False] * 8)
    for copies in (2, 80):
        many = Rate.of(np.repeat(flags, copies), clusters=np.repeat(np.arange(20), copies))
        once = Rate.of(flags)
        assert (
            many.low <= once.low + 1e-9 and many.high >= once.high - 1e-9
        )  # few clusters: a little wider, never narrower
        assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.12)
    assert effective_n([True] * 80, clusters=["one prompt"] * 80) == 1


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.98])
@pytest.mark.parametrize(("groups", "size", "alike"), [(12, 8, 0.3), (20, 5, 0.1), (33, 3, 0.5)])
def test_a_rate_over_clusters_covers(rate: float, groups: int, size: int, alike: float) -> None:
    rng = np.random.default_rng(3)
    share = 1 / alike - 1
    hits = naive = 0
    members = np.repeat(np.arange(groups), size)
    for _ in range(RUNS):
        own = rng.beta(rate * share, (1 - rate) * share, groups)
        flags = rng.random((groups, size)) < own[:, None]
        found, plain = Rate.of(flags.ravel(), clusters=members), Rate.of(flags.ravel())
        hits += found.low <= rate <= found.high
        naive += plain.low <= rate <= plain.high
    assert hits / RUNS > 0.93 - SLACK
    if alike * size > 1.2:
        assert naive / RUNS < 0.92  # what prompts counted one by one would have covered


def test_a_rate_of_vectors_by_prompts_covers_where_pairs_do_not() -> None:
    rng = np.random.default_rng(4)
    hits = naive = 0
    for _ in range(RUNS):
        logit = rng.normal(0, 1.2, (24, 1)) + rng.normal(0, 1.2, (1, 24))
        flags = rng.random((24, 24)) < 1 / (1 + np.exp(-logit))
        found, plain = Rate.crossed(flags), Rate.of(flags.ravel())
        hits += found.low <= 0.5 <= found.high
        naive += plain.low <= 0.5 <= plain.high
    assert hits / RUNS > 0.93 and naive / RUNS < 0.75


@pytest.mark.parametrize("n", [3, 10, 16, 29, 40])
def test_a_mean_covers_at_every_n(n: int) -> None:
    rng = np.random.default_rng(n)
    runs = RUNS if n < 30 else 300  # the bootstrap is slow
    found = [Estimate.of(rng.normal(size=n), n_draws=800) for _ in range(runs)]
    assert np.mean([e.low <= 0 <= e.high for e in found]) > 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs) - 0.005 * (n >= 30)


def test_a_mean_over_clusters_covers_and_is_students_for_equal_ones() -> None:
    rng = np.random.default_rng(5)
    members, hits = np.repeat(np.arange(12), 6), 0
    for _ in range(RUNS):
        x = (rng.normal(size=(12, 1)) + rng.normal(size=(12, 6))).ravel()
        found = Estimate.of(x, clusters=members)
        hits += found.low <= 0 <= found.high
    assert abs(hits / RUNS - 0.95) < SLACK + 0.005
    x = rng.normal(size=(12, 6))
    by_hand = stats.ttest_1samp(x.mean(1), 0).confidence_interval()
    found = Estimate.of(x.ravel(), clusters=members)
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high))


def test_a_mean_of_two_ways_covers() -> None:
    rng, hits = np.random.default_rng(6), 0
    for _ in range(RUNS):
        x = rng.normal(size=(10, 1)) + rng.normal(size=(1, 14)) + rng.normal(size=(10, 14))
        found = Estimate.crossed(x)
        hits += found.low <= 0 <= found.high
    assert hits / RUNS > 0.93


def test_a_difference_of_means_is_welchs() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(1, 1, 9), rng.normal(0, 3, 21)
    by_scipy = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    found = Estimate.difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((a.mean() - b.mean(), by_scipy.low, by_scipy.high))


def test_two_ways_cover_where_prompts_share_subjects() -> None:
    rng, subject, hits, naive = np.random.default_rng(10), np.repeat(np.arange(14), 4), 0, 0
    for _ in range(RUNS):
        x = rng.normal(size=(20, 1)) + rng.normal(0, 1.5, 14)[None, subject] + rng.normal(size=(20, 56))
        flags = x > 0
        found, mean = Rate.crossed(flags, clusters=subject), Estimate.crossed(x, clusters=subject)
        plain = Rate.crossed(flags)
        hits += (found.low <= 0.5 <= found.high) and (mean.low <= 0 <= mean.high)
        naive += plain.low <= 0.5 <= plain.high
    assert hits / RUNS > 0.91 and naive / RUNS < 0.9 and found.units == 14
    assert Rate.crossed(flags, clusters=np.arange(56)) == plain


def test_what_is_asked_of_nothing_is_refused() -> None:
    for wrong in (
        lambda: Rate.of([]),
        lambda: Estimate.of([1.0]),
        lambda: Estimate.of([1.0, float("nan")]),
        lambda: Estimate.of([1.0, 2.0, 3.0], clusters=["a", "a", "a"]),
        lambda: Rate.of([True, False], clusters=["a"]),
        lambda: Estimate.crossed([[1.0, 2.0]]),
    ):
        with pytest.raises(UserError):
            wrong()


def test_a_difference_over_clusters_covers_whether_they_lie_on_one_side_or_on_both() -> None:
    """Subjects that have refused and answered prompts, and subjects that have one kind alone."""
    rng = np.random.default_rng(8)
    subject, kind = np.repeat(np.arange(14), 6), np.arange(84) % 2 == 0
    only = np.where(np.repeat(np.arange(14) % 3, 6) == 0, True, kind)  # a third of the subjects: refused prompts alone
    hits, naive = {"both": 0, "some": 0}, 0
    for _ in range(RUNS):
        x = rng.normal(0, 2, 14)[subject] + rng.normal(size=84)
        for name, first in (("both", kind), ("some", only)):
            found = Estimate.difference(x[first], x[~first], clusters=(subject[first], subject[~first]))
            hits[name] += found.low <= 0 <= found.high
        plain = Estimate.difference(x[only], x[~only])
        naive += plain.low <= 0 <= plain.high
    assert min(hits.values()) / RUNS > 0.93 - SLACK and naive / RUNS < 0.9
    once = Estimate.difference([1.0, 2, 4], [0.0, 7], clusters=([0, 1, 2], [3, 4]))
    assert once == Estimate.difference([1.0, 2, 4], [0.0, 7])


def test_the_jackknife_of_a_mean_is_students() -> None:
    x = np.random.default_rng(9).normal(size=11)
    by_hand, left_out = stats.ttest_1samp(x, 0).confidence_interval(), [np.delete(x, i).mean() for i in range(11)]
    found = Estimate.jackknife(float(x.mean()), left_out, 11)
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high))


def test_a_rate_says_over_how_many_clusters_it_is() -> None:
    assert "4 clusters" in str(Rate.of([True, False] * 6, clusters=np.repeat(np.arange(4), 3)))
    assert "clusters" not in str(Rate.of([True, False]))
