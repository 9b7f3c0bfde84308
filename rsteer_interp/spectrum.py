"""Spectra: PCA from moments, participation ratios, coordinate density with its Gaussian null, principal angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.statistics.draws import percentiles


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a covariance, largest first, and its unit components as rows; zero eigenvalues are left out.

    Units: squared activations. `n` is the number of states: with n <= d the participation ratio cannot exceed n - 1.
    """

    values: Float[Tensor, " r"]
    components: Float[Tensor, "r d"]
    n: int

    @property
    def shares(self) -> Float[Tensor, " r"]:
        """Explained variance per component; sums to 1."""
        return self.values.div(self.values.sum())

    @property
    def participation(self) -> float:
        return participation_ratio(self.values)


def spectrum(moments: Moments) -> Spectrum:
    """Principal components of weighted states. The sign of a component is arbitrary. UserError for fewer than two states."""
    if moments.count < 2 or moments.scatter.trace == 0:
        raise UserError(f"a spectrum needs two different states or more (n = {moments.count}); add prompts")
    sigma = moments.scatter / moments.weight
    gram = sigma.rows @ sigma.rows.T if sigma.rows is not None else sigma.dense
    values, vectors = torch.linalg.eigh(gram)
    keep = (values > len(gram) * torch.finfo(torch.float64).eps * values[-1]).nonzero()[:, 0].flip(0)
    values, vectors = values[keep], vectors[:, keep]
    if sigma.rows is None:
        return Spectrum(values, vectors.T, moments.count)
    # Z^T u / sqrt(value) loses orthogonality among tiny eigenvalues; QR in order of size leaves the large ones as they are.
    components, triangle = torch.linalg.qr(sigma.rows.T @ vectors)
    return Spectrum(values, (components * triangle.diagonal().sign()).T, moments.count)


def participation_ratio(values: Sequence[float] | Tensor) -> float:
    """(sum v)^2 / sum v^2 of nonnegative values: how many of them carry the sum. k equal values give k."""
    x = torch.as_tensor(values, dtype=torch.float64)
    if bool((x < 0).any()) or not bool(x.sum() > 0):
        raise UserError("a participation ratio needs nonnegative values with a positive sum; clip noise below 0 first")
    return float(x.sum().square() / x.square().sum())


def vector_participation(vector: Float[Tensor, " d"]) -> float:
    """1 / (d sum v_i^4) of the unit vector, in [1/d, 1]; 1/3 for a random direction of any width. Depends on the basis."""
    return participation_ratio(vector.double().square()) / len(vector)


def top_share(vector: Float[Tensor, " d"], k: int = 10) -> float:
    """Share of sum |v_i| in the k largest coordinates (the paper's "top 10 dims: 1.9 % of total")."""
    sizes = vector.double().abs()
    return float(sizes.topk(min(k, len(sizes))).values.sum() / sizes.sum())


@dataclass(frozen=True, eq=False)
class CoordinateDensity:
    """|v_i| of a unit vector, largest first, beside the same curve of random directions (mean, 2.5 % and 97.5 % per rank).

    `share` is the L1 share of the ten largest coordinates, `share_low` and `share_high` the 95 % interval of one random draw.
    Inside the band a vector is as spread out as a random one, which is all that the curve can say.
    """

    sizes: Float[Tensor, " top"]
    null_mean: Float[Tensor, " top"]
    null_low: Float[Tensor, " top"]
    null_high: Float[Tensor, " top"]
    share: float
    share_null: float
    share_low: float
    share_high: float
    participation: float


def coordinate_density(
    vector: Float[Tensor, " d"], n_top: int = 500, n_draws: int = 1000, seed: int = 0, k: int = 10
) -> CoordinateDensity:
    """Sorted coordinates with their Gaussian null of the same width (Refusal Steering, fig. 5 b, has no null)."""
    d = len(vector)
    n_top = min(n_top, d)
    unit = vector.double() / vector.double().norm()
    generator = torch.Generator().manual_seed(seed)
    curves, shares = torch.empty(n_draws, n_top, dtype=torch.float64), torch.empty(n_draws, dtype=torch.float64)
    for start in range(0, n_draws, 100):  # by hundreds: bounded memory at any width
        draws = torch.randn(min(100, n_draws - start), d, generator=generator, dtype=torch.float64).abs()
        rows = slice(start, start + len(draws))
        largest = draws.topk(max(n_top, min(k, d)), dim=1).values
        curves[rows] = largest[:, :n_top] / draws.norm(dim=1, keepdim=True)
        shares[rows] = largest[:, :k].sum(1) / draws.sum(1)
    low, high = (torch.from_numpy(end) for end in percentiles(curves))
    share_low, share_high = (float(end) for end in percentiles(shares))
    sizes = unit.abs().topk(n_top).values
    return CoordinateDensity(
        sizes,
        curves.mean(0).to(sizes),
        low.to(sizes),
        high.to(sizes),
        top_share(unit, k),
        float(shares.mean()),
        share_low,
        share_high,
        vector_participation(unit),
    )


@dataclass(frozen=True)
class EnergyShares:
    """Where E|h|^2 sits: share of the mean state, and of the k largest coordinates (massive activations), which are named.

    Large shares mean that uncentred statistics are about those and little else.
    """

    mean: float
    top: float
    coordinates: tuple[int, ...]


def energy_shares(moments: Moments, k: int = 10) -> EnergyShares:
    """Shares of the uncentred second moment E|h|^2 of a group of states."""
    by_coordinate = moments.mean.square() + moments.scatter.diagonal / moments.weight
    total = by_coordinate.sum()
    top = by_coordinate.topk(min(k, moments.d))
    return EnergyShares(
        float(moments.mean.square().sum() / total), float(top.values.sum() / total), tuple(top.indices.tolist())
    )


def principal_angles(a: Float[Tensor, "j d"], b: Float[Tensor, "k d"]) -> tuple[float, ...]:
    """Principal angles in radians, smallest first, between the spans of the rows of a and of b (need not be orthonormal)."""
    angles = subspace_angles(a.double().cpu().numpy().T, b.double().cpu().numpy().T)
    return tuple(float(angle) for angle in np.sort(angles))


def random_angles(j: int, k: int, d: int, n_draws: int = 200, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the smallest principal angle between random j- and k-dimensional subspaces, in radians."""
    generator = torch.Generator().manual_seed(seed)
    smallest = [
        principal_angles(*(torch.randn(m, d, generator=generator, dtype=torch.float64) for m in (j, k)))[0]
        for _ in range(n_draws)
    ]
    low, high = percentiles(smallest)
    return (float(low), float(high))
