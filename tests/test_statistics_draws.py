"""Draws of a null: p is uniform without an effect and counts ties against us; rotations keep what the edit is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.statistics.draws import Beside, next_draw, next_draw_p, p_value, percentiles
from rsteer_interp.statistics.resampling import bootstrap_counts, halves, permutations
from rsteer_interp.statistics.rotation import random_frame, rotated


@pytest.mark.parametrize("side", ["two", "greater", "less"])
@pytest.mark.parametrize("skewed", [False, True])
def test_p_is_uniform_under_the_null(side: str, skewed: bool) -> None:
    """Also of a null that is neither centred at 0 nor symmetric."""
    rng = np.random.default_rng(1)
    x = rng.exponential(size=(40, 4000)) + 3 if skewed else rng.normal(size=(40, 4000))
    p = p_value(x[0], x[1:], side)
    for level in (0.05, 0.25, 0.5):
        assert abs(float(np.mean(p <= level)) - level) < 3 * np.sqrt(level * (1 - level) / 4000) + 1e-9


def test_ties_count_against_the_value() -> None:
    assert p_value(0.3, [0.1 + 0.2, 0.0, 0.0], "greater") == 0.5
    assert p_value(1.0, [1.0] * 9) == 1.0
    assert p_value(2.0, [0.0] * 19, "greater") == Beside.of(2.0, [0.0] * 19).least_p == 0.05
    assert Beside.of(1.0, [1.0, 0.0]).rank == 2


def test_a_band_of_few_draws_is_their_range_and_of_many_their_percentiles() -> None:
    few, many = np.arange(10.0), np.random.default_rng(2).normal(size=1000)
    assert Beside.of(3.0, few).band == (0.0, 9.0)
    assert Beside.of(0.0, many).band == tuple(float(x) for x in percentiles(many))


def test_the_next_draw_lies_in_its_interval_and_its_p_is_uniform() -> None:
    x = np.random.default_rng(3).normal(2, 5, size=(6, 4000))
    low, high = next_draw(x[1:])
    assert abs(float(np.mean((low <= x[0]) & (x[0] <= high))) - 0.95) < 0.011
    assert stats.kstest(next_draw_p(x[0], x[1:]), "uniform").pvalue > 0.01


def test_permutations_stay_within_their_groups_and_reach_all() -> None:
    groups = ["a", "b", "a", "b", "a", "c"]
    orders = permutations(6, 500, 0, within=groups)
    assert all([groups[i] for i in order] == groups for order in orders)
    assert {tuple(order[[0, 2, 4]]) for order in orders} == {
        (0, 2, 4), (0, 4, 2), (2, 0, 4), (2, 4, 0), (4, 0, 2), (4, 2, 0),
    }  # fmt: skip
    assert np.array_equal(np.sort(permutations(7, 20, 1), 1), np.tile(np.arange(7), (20, 1)))


def test_a_bootstrap_draws_whole_clusters_inside_strata() -> None:
    clusters, strata = np.repeat([5, 6, 7, 8], 3), np.repeat(["x", "y"], 6)
    counts = bootstrap_counts(12, 400, 0, clusters=clusters, strata=strata)
    assert (counts.reshape(400, 4, 3).std(2) == 0).all()  # a cluster's items come together
    assert (counts[:, :6].sum(1) == 6).all() and (counts[:, 6:].sum(1) == 6).all()
    assert counts.mean() == pytest.approx(1, abs=1e-12)


def test_resampled_variance_of_few_clusters_is_right_with_one_fewer() -> None:
    x = np.random.default_rng(4).normal(size=5)
    for fewer, factor in ((0, 4 / 5), (1, 1.0)):
        counts = bootstrap_counts(5, 20_000, 0, fewer=fewer)
        means = counts @ x / counts.sum(1)
        assert float(means.var()) == pytest.approx(factor * x.var(ddof=1) / 5, rel=0.04)


def test_halves_keep_clusters_whole_and_strata_even() -> None:
    clusters, strata = np.repeat(np.arange(10), 3), np.repeat(["x", "y"], 15)
    first = halves(30, 300, 0, clusters=clusters, strata=strata)
    units = first.reshape(300, 10, 3)
    assert (units.all(2) == units.any(2)).all()
    for part in (units[:, :5, 0], units[:, 5:, 0]):
        assert set(part.sum(1)) == {2, 3}  # an odd one falls to either side
    assert abs(first.mean() - 0.5) < 0.05 and len({tuple(row) for row in first}) > 100
    with pytest.raises(UserError):
        halves(4, 2, 0, clusters=[1, 1, 1, 1])


def test_a_rotation_keeps_lengths_and_angles_between_sites_and_nothing_else() -> None:
    torch.manual_seed(0)
    vectors = {Site(i): torch.randn(64) + 2 for i in range(5)}
    before = torch.stack(list(vectors.values())).double()
    after = [torch.stack(list(rotated(vectors, seed).values())) for seed in range(200)]
    for x in after:
        assert torch.allclose(x @ x.T, before @ before.T, atol=1e-9)
    cosines = torch.stack([torch.cosine_similarity(x[0], before[0], dim=0) for x in after])
    assert abs(float(cosines.mean())) < 4 / 64**0.5 / 200**0.5
    assert float(cosines.std()) == pytest.approx(1 / 64**0.5, rel=0.2)  # of random vectors
    independent = torch.randn(5, 64, dtype=torch.float64)
    summed = float(before.sum(0).norm())
    assert float(after[0].sum(0).norm()) == pytest.approx(summed)  # the push in the sum, which independent draws miss
    assert (
        float((independent / independent.norm(dim=1, keepdim=True) * before.norm(dim=1, keepdim=True)).sum(0).norm())
        < 0.7 * summed
    )


def test_a_rotation_of_bases_and_of_what_is_not_finite() -> None:
    basis = torch.linalg.qr(torch.randn(32, 4))[0].T
    turned = rotated({"one": basis, "same": basis}, 3)
    assert torch.allclose(turned["one"], turned["same"], atol=1e-12) and turned["one"].shape == (4, 32)
    assert torch.allclose(turned["one"] @ turned["one"].T, torch.eye(4, dtype=torch.float64), atol=1e-6)
    frame = random_frame(32, 32, 1)
    assert torch.allclose(frame @ frame.T, torch.eye(32, dtype=torch.float64), atol=1e-12)
    with pytest.raises(UserError):
        rotated({"bad": torch.tensor([float("nan"), 1.0])}, 0)


def test_values_that_do_not_belong_together_are_refused() -> None:
    for value, draws in ((1.0, []), ([1.0, 2.0], [[1.0], [2.0]]), (float("nan"), [1.0, 2.0])):
        with pytest.raises(UserError):
            p_value(value, draws)
    with pytest.raises(UserError):
        next_draw([1.0])
