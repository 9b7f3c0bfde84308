"""Shifted systems from one reduction to band form equal solving each by itself; the reduction is an orthogonal similarity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsteer_interp.directions.band_form import _reduce, solve_shifted
from rsteer_interp.errors import UserError

SHIFTS = (1e-2, 1.0, 300.0)


def _semidefinite(n: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return rows.T @ rows, torch.randn(n, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), rank=st.integers(0, 80), width=st.integers(1, 60), seed=st.integers(0, 5))
def test_equals_solving_each(n: int, rank: int, width: int, seed: int) -> None:
    a, y = _semidefinite(n, rank, seed)
    before = a.clone()
    found = solve_shifted(a, y, SHIFTS, width)
    assert torch.equal(a, before)
    for x, shift in zip(found, SHIFTS, strict=True):
        expected = torch.linalg.solve(a + shift * torch.eye(n, dtype=torch.float64), y)
        torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))


def test_the_reduction_keeps_the_spectrum_and_leaves_only_the_band() -> None:
    a, y = _semidefinite(50, 50, 0)
    reduced, turned = a.clone(), y.clone()
    reflections = _reduce(reduced, turned, 4)
    band = reduced.tril().triu(-4)
    band = band + band.tril(-1).T
    torch.testing.assert_close(torch.linalg.eigvalsh(band), torch.linalg.eigvalsh(a), rtol=1e-10, atol=1e-9)
    q = torch.eye(50, dtype=torch.float64)
    for first, v, t in reflections:
        q[:, first:] -= (q[:, first:] @ v) @ t @ v.T
    torch.testing.assert_close(q.T @ q, torch.eye(50, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.T @ a @ q, band, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.T @ y, turned, rtol=1e-9, atol=1e-10)


def test_a_singular_system_is_refused() -> None:
    a, y = _semidefinite(20, 3, 0)
    with pytest.raises(UserError, match="raise the penalty"):
        solve_shifted(-a, y, [1e-3])
