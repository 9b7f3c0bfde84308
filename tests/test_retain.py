"""Retain-constrained directions: what they must leave alone, and the limits in which they are the plain ones."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.directions.retain import null_space, opposite_pair, retain_ridge
from rsteer_interp.directions.ridge import ridge_solve
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments


def _cos(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_null_space_is_orthogonal_to_all_and_nearest_to_the_direction() -> None:
    g = torch.Generator().manual_seed(0)
    delta, retain = torch.randn(20, generator=g).double(), torch.randn(3, 20, generator=g).double()
    v = null_space(delta, [*retain, retain[0] + retain[1]])  # a dependent row changes nothing
    assert float((retain @ v).abs().max()) < 1e-10
    q = torch.linalg.qr(retain.T).Q
    torch.testing.assert_close(v, delta - q @ (q.T @ delta))
    with pytest.raises(UserError, match="nothing of it is left"):
        null_space(retain[0] - 2 * retain[1], retain)


def test_the_pair_subtracts_one_and_adds_the_other() -> None:
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 0.5, 0])
    torch.testing.assert_close(opposite_pair(a, b, 0.5), torch.tensor([1.0, -0.5, 0]).double())
    assert _cos(opposite_pair(a, b, 0.0), a) == pytest.approx(1)


@pytest.mark.parametrize("n", [12, 400])
def test_retain_ridge_shuns_the_kept_prompts_and_is_ridge_without_them(n: int) -> None:
    """Removed refusal lies along u + z, kept refusal along z: what is left is u."""
    g = torch.Generator().manual_seed(1)
    d = 30
    u, z = torch.eye(d, dtype=torch.float64)[:2]
    complying = Moments.of(torch.randn(n, d, generator=g))
    kept = Moments.of(0.1 * torch.randn(n, d, generator=g) + complying.mean.float() + 6 * z.float())
    delta = u + z
    plain = retain_ridge(delta, complying, kept, retain=0.0)
    sigma = complying.scatter / complying.weight
    torch.testing.assert_close(plain, ridge_solve(sigma, delta, sigma.trace / d))
    strict = retain_ridge(delta, complying, kept, retain=1e4)
    gap = kept.mean - complying.mean
    assert abs(_cos(strict, gap)) < 0.01 < abs(_cos(plain, gap))
    assert abs(_cos(strict, z)) < 0.2 * _cos(strict, u)
