"""Draws of a null: p is uniform without an effect and counts ties against us; rotations keep what the edit is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.statistics.draws import Beside, next_draw, next_draw_p, p_value, percentiles
from rsteer_interp.statistics.resampling import bootstrap_counts, halves, permutations
from rsteer_interp.statistics.rotation import draw_seeds, nearest_turn, random_frame, rotated, rotations


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


def test_p_is_uniform_where_the_learned_family_is_a_random_one_and_not_beside_draws_for_each_site() -> None:
    """A model that reads the sum of ten layers' pushes, and directions that agree (cosine about 0.5), turned at random: nothing
    that it reads is in them. Rotations of the family say so; draws for each site call a third of the families significant."""
    d, n_layers, n_draws, g = 48, 10, 19, torch.Generator().manual_seed(5)
    family = torch.randn(1, d, generator=g) + torch.randn(n_layers, d, generator=g)
    read = torch.randn(d, generator=g, dtype=torch.float64)
    p: dict[str, list[float]] = {"rotations": [], "per site": []}
    for seed in range(400):
        learned = rotated({"family": family}, 10_000 + seed)["family"]
        turned = torch.stack([each["family"] for each in rotations({"family": learned}, n_draws, seed)])
        apart = (
            random_unit_vectors(n_draws * n_layers, d, seed).view(n_draws, n_layers, d) * learned.norm(dim=1)[:, None]
        )
        for name, draws in (("rotations", turned), ("per site", apart)):
            effects = [float((each.sum(0) @ read).abs()) for each in (learned, *draws)]
            p[name].append(Beside.of(effects[0], effects[1:]).p("greater"))
    ranks = np.arange(1, 21) / 20  # p takes these values, each as often
    rates = {name: np.array([np.mean(np.array(x) <= r + 1e-9) for r in ranks]) for name, x in p.items()}
    assert np.abs(rates["rotations"] - ranks).max() < 1.63 / 400**0.5  # Kolmogorov's 1 % bound
    assert rates["rotations"][0] < 0.09 and rates["per site"][0] > 0.3


def test_draws_of_rotations_are_those_of_their_seeds_whatever_their_number() -> None:
    vectors = {"a": torch.randn(3, 16), "b": torch.randn(16)}
    few, many = rotations(vectors, 2, 7), rotations(vectors, 5, 7)
    for one, other in zip(few, many, strict=False):
        assert torch.equal(one["a"], other["a"]) and torch.equal(one["b"], other["b"])
    assert len({*draw_seeds(50, 0), *draw_seeds(50, 1)}) == 100


def test_the_nearest_turn_keeps_the_gram_matrix_and_finds_a_turn_that_was_made() -> None:
    torch.manual_seed(1)
    v = torch.randn(4, 3, dtype=torch.float64) @ torch.randn(3, 24, dtype=torch.float64)  # four vectors of rank 3
    turned = rotated({"v": v}, 3)["v"]
    basis, images = nearest_turn(v, turned)
    assert basis.shape == images.shape == (3, 24)
    torch.testing.assert_close(v @ basis.T @ images, turned)
    target = torch.randn(4, 24, dtype=torch.float64)
    basis, images = nearest_turn(v, target)
    found = v @ basis.T @ images
    torch.testing.assert_close(found @ found.T, v @ v.T)
    inside = torch.linalg.qr(target.T)[0]
    torch.testing.assert_close(found @ inside @ inside.T, found)
    # No other turn is nearer.
    for seed in range(200):
        other = rotated({"v": v}, seed)["v"]
        near = 0.9 * found + 0.1 * other
        b, c = nearest_turn(v, near)
        for each in (other, v @ b.T @ c):
            assert float((found - target).norm()) <= float((each - target).norm()) + 1e-9
    with pytest.raises(UserError, match="smaller span"):
        nearest_turn(v, target[:1].expand(4, -1))


def test_values_that_do_not_belong_together_are_refused() -> None:
    for value, draws in ((1.0, []), ([1.0, 2.0], [[1.0], [2.0]]), (float("nan"), [1.0, 2.0])):
        with pytest.raises(UserError):
            p_value(value, draws)
    with pytest.raises(UserError):
        next_draw([1.0])
