"""Band form: one orthogonal reduction of a symmetric matrix, after which every shifted system costs next to nothing.

    Q^T A Q = B of half bandwidth b,        (A + s I)^-1 y = Q (B + s I)^-1 Q^T y

The first stage of a two-stage eigensolver (Bischof, Lang and Sun 2000, "A framework for symmetric band reduction"): matrix
products only, about 2 n^3 operations, where a full eigendecomposition needs five times as many, half of them memory-bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, solveh_banded
from torch import Tensor

from rsteer_interp.errors import UserError

WIDTH = 48  # half bandwidth: wide enough for matrix products to be fast, narrow enough for the band to be cheap

Reflections = list[tuple[int, Float[Tensor, "m b"], Float[Tensor, "b b"]]]  # first row, V, T of I - V T V^T


def solve_shifted(
    a: Float[Tensor, "n n"], y: Float[Tensor, " n"], shifts: Sequence[float], width: int = WIDTH
) -> Float[Tensor, "shift n"]:
    """(A + s I)^-1 y for every shift s, A symmetric positive semidefinite, in float64 on A's device.

    UserError where A + s I is not positive definite up to rounding.
    """
    a, y = a.double().clone(), y.double().clone()
    reflections = _reduce(a, y, width)
    band = _lower_band(a, min(width, len(a) - 1)).cpu().numpy()
    found = np.stack([_solve_band(band, y.cpu().numpy(), shift) for shift in shifts], axis=1)
    x = torch.from_numpy(found).to(a)
    for first, v, t in reversed(reflections):
        x[first:] -= v @ (t @ (v.T @ x[first:]))
    solved: Tensor = x.T
    return solved


def _reduce(a: Float[Tensor, "n n"], y: Float[Tensor, " n"], width: int) -> Reflections:
    """Turn `a` into its band form and `y` into Q^T y, both in place; returns Q as blocks of reflections."""
    reflections: Reflections = []
    for start in range(0, len(a) - width - 1, width):
        first = start + width
        v, t, upper = _block_reflector(a[first:, start:first])
        a[first:, start:first] = upper
        inner = a[first:, first:]
        # (I - V T V^T)^T S (I - V T V^T) = S - V W^T - W V^T with W = S V T - V (T^T V^T S V T) / 2
        s_v_t = inner @ v @ t
        w = s_v_t - v @ (t.T @ (v.T @ s_v_t)) / 2
        inner.addmm_(torch.cat([v, w], 1), torch.cat([w, v], 1).T, alpha=-1)
        y[first:] -= v @ (t.T @ (v.T @ y[first:]))
        reflections.append((first, v, t))
    return reflections


def _block_reflector(
    panel: Float[Tensor, "m b"],
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k k"], Float[Tensor, "m b"]]:
    """V, T and R of the panel's QR, Q = I - V T V^T; T^-1 = triu(V^T V, 1) + diag(1 / tau) (Puglisi 1992)."""
    packed, tau = torch.geqrf(panel)
    v = packed[:, : len(tau)].tril(-1)
    v.diagonal().fill_(1)
    v = v * (tau != 0)  # tau = 0 is no reflection at all
    inverse = (v.T @ v).triu(1) + torch.diag(torch.where(tau != 0, 1 / tau, 1))
    t = torch.linalg.solve_triangular(inverse, torch.eye(len(tau)).to(inverse), upper=True)
    return v, t, packed.triu()


def _lower_band(a: Float[Tensor, "n n"], width: int) -> Float[Tensor, "k n"]:
    """Row k holds the k-th subdiagonal, as LAPACK's banded solvers read it."""
    band = a.new_zeros(width + 1, len(a))
    for k in range(width + 1):
        band[k, : len(a) - k] = a.diagonal(-k)
    return band


def _solve_band(band: np.ndarray, y: np.ndarray, shift: float) -> np.ndarray:
    shifted = band.copy()
    shifted[0] += shift
    try:
        return np.asarray(solveh_banded(shifted, y, overwrite_ab=True, lower=True, check_finite=False))
    except LinAlgError:
        raise UserError(
            f"the covariance plus ridge penalty {shift:g} is singular in float64; raise the penalty"
        ) from None
