"""Spectra: PCA against numpy, participation ratios at their limits, the random-vector table of methods 1.1, angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.spectrum import (
    coordinate_density,
    energy_shares,
    participation_ratio,
    principal_angles,
    random_angles,
    spectrum,
    top_share,
    vector_participation,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (300, 40)])
def test_spectrum_equals_numpy_and_rebuilds_the_covariance(n: int, d: int) -> None:
    x, w = normal(n, d) * torch.linspace(1e-4, 3, d) + 5, torch.rand(n, dtype=torch.float64) + 0.1
    found = spectrum(Moments.of(x, w))
    covariance = np.cov(x.numpy().T, aweights=w.numpy(), ddof=0)
    expected = np.linalg.eigvalsh(covariance)[::-1][: min(n - 1, d)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-12)
    rank = len(found.values)
    assert rank == min(n - 1, d)
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(rank, dtype=torch.float64))
    rebuilt = (found.components.T * found.values) @ found.components
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-10)
    assert float(found.shares.sum()) == pytest.approx(1)


def test_participation_from_rank_one_to_isotropic() -> None:
    line = torch.outer(normal(50), normal(20, seed=1))
    assert spectrum(Moments.of(line)).participation == pytest.approx(1)
    assert spectrum(Moments.of(torch.cat([torch.eye(20), -torch.eye(20)]))).participation == pytest.approx(20)
    assert spectrum(Moments.of(normal(20_000, 20))).participation == pytest.approx(20, rel=0.01)
    assert participation_ratio([3.0] * 7) == pytest.approx(7)
    assert participation_ratio([0.0, 5.0, 0.0]) == 1
    massive = normal(500, 50)
    massive[:, 0] *= 100
    assert spectrum(Moments.of(massive)).participation < 1.1


def test_participation_of_a_vector() -> None:
    one = torch.zeros(64)
    one[3] = -5
    assert vector_participation(one) == pytest.approx(1 / 64)
    assert vector_participation(torch.full((64,), 0.2)) == pytest.approx(1)
    assert vector_participation(normal(200_000)) == pytest.approx(1 / 3, rel=0.02)
    assert vector_participation(7 * normal(64)) == pytest.approx(vector_participation(normal(64)))


@pytest.mark.parametrize(
    ("d", "mean", "low", "high"),
    [
        (576, 5.87, 5.3, 6.5),
        (896, 3.98, 3.6, 4.3),
        (960, 3.74, 3.4, 4.1),
        (1024, 3.53, 3.3, 3.9),
        (1536, 2.46, 2.3, 2.7),
        (2048, 1.90, 1.75, 2.05),
    ],
)
def test_the_table_of_random_top_ten_shares(d: int, mean: float, low: float, high: float) -> None:
    density = coordinate_density(normal(d), n_draws=400)
    assert 100 * density.share_null == pytest.approx(mean, abs=0.03)
    assert 100 * density.share_low == pytest.approx(low, abs=0.1)
    assert 100 * density.share_high == pytest.approx(high, abs=0.1)


def test_density_curve_of_width_2048_and_its_band() -> None:
    density = coordinate_density(normal(2048), n_draws=400)
    null = density.null_mean
    assert (float(null[0]), float(null[99]), float(null[499])) == pytest.approx((0.080, 0.0435, 0.0257), abs=6e-4)
    inside = (density.sizes >= density.null_low) & (density.sizes <= density.null_high)
    assert float(inside.double().mean()) > 0.8
    assert density.share_low < density.share < density.share_high
    sparse = normal(2048)
    sparse[:10] *= 30
    peaked = coordinate_density(sparse, n_draws=400)
    assert peaked.share > peaked.share_high
    assert float(peaked.sizes[0]) > float(peaked.null_high[0])
    assert torch.equal(
        coordinate_density(sparse, n_draws=40).null_mean, coordinate_density(sparse, n_draws=40).null_mean
    )
    short = coordinate_density(normal(8), n_top=500, n_draws=10)
    assert short.sizes.shape == (8,)
    assert short.share == pytest.approx(1)


def test_top_share_by_hand() -> None:
    assert top_share(torch.tensor([4.0, -3.0, 2.0, 1.0]), k=2) == pytest.approx(0.7)


@pytest.mark.parametrize("n", [20, 200])
def test_energy_shares_find_the_mean_and_the_massive_coordinate(n: int) -> None:
    x = normal(n, 30)
    x[:, 4] += 100
    shares = energy_shares(Moments.of(x), k=1)
    direct = x.square().sum()
    assert shares.coordinates == (4,)
    assert shares.top == pytest.approx(float(x[:, 4].square().sum() / direct))
    assert shares.mean == pytest.approx(float(n * x.mean(0).square().sum() / direct))


def test_principal_angles() -> None:
    basis = torch.eye(5, dtype=torch.float64)
    tilted = torch.stack([basis[0], math.cos(0.3) * basis[1] + math.sin(0.3) * basis[2]])
    assert principal_angles(basis[:2], 7 * tilted) == pytest.approx((0, 0.3), abs=1e-7)
    assert principal_angles(basis[:2], basis[3:]) == pytest.approx((math.pi / 2, math.pi / 2))
    low, high = random_angles(1, 1, 400, n_draws=100)
    assert math.pi / 2 - 4 / 20 < low < high <= math.pi / 2


def test_errors_name_the_remedy() -> None:
    with pytest.raises(UserError, match=r"\(n = 1\)"):
        spectrum(Moments.of(normal(1, 4)))
    with pytest.raises(UserError, match="nonnegative"):
        participation_ratio([1.0, -1.0, 3.0])
