"""Random rotations: the null of an edit turns every direction that it uses by one rotation, the same at every site.

Directions learned at neighbouring sites agree, so their pushes add up; independent random ones add in quadrature and are a smaller
push. One rotation keeps every length and every inner product between sites, and so the dose at each site and in the sum.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.errors import UserError

K = TypeVar("K", bound=Hashable)
_ROUNDING = 1e-12  # of the largest singular value: what is smaller is no dimension of its own


def rotated(vectors: Mapping[K, Float[Tensor, "*k d"]], seed: int) -> dict[K, Float[Tensor, "*k d"]]:
    """The vectors (or stacks of vectors) under one rotation of all d dimensions, uniform over rotations (Haar). float64.

    Only the images of their span are drawn: V = U S W^T becomes U S F with F a random orthonormal frame of as many rows as V's rank.
    """
    rows = torch.cat([_finite(v).reshape(-1, v.shape[-1]) for v in vectors.values()])
    coordinates, basis = _span(rows)
    turned: Tensor = coordinates @ random_frame(len(basis), rows.shape[1], seed)
    parts = torch.split(turned, [v.numel() // v.shape[-1] for v in vectors.values()])
    return {key: part.reshape(v.shape) for (key, v), part in zip(vectors.items(), parts, strict=True)}


def rotations(vectors: Mapping[K, Float[Tensor, "*k d"]], n: int, seed: int) -> list[dict[K, Float[Tensor, "*k d"]]]:
    """n draws of `rotated`."""
    return [rotated(vectors, each) for each in draw_seeds(n, seed)]


def draw_seeds(n: int, seed: int) -> list[int]:
    """Seeds of n draws: the first of them do not depend on n, and those of neighbouring seeds have nothing in common."""
    return [int(each) for each in np.random.SeedSequence(seed).generate_state(n)]


def nearest_turn(
    vectors: Float[Tensor, "n d"], targets: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]:
    """The turn of the vectors' span that brings each as near as can be to its target: (basis, images), orthonormal rows. float64.

    x becomes (x basis^T) images. Lengths and angles are kept, so that the targets give no more than where the span goes: it
    minimises sum |turned v_i - u_i|^2 (orthogonal Procrustes; Schoenemann 1966). UserError where targets have too small a span.
    """
    coordinates, basis = _span(_finite(vectors))
    p, s, r = torch.linalg.svd(coordinates.T @ _finite(targets), full_matrices=False)
    if not float(s[-1]) > _ROUNDING * float(s[0]):
        raise UserError(f"{len(basis)} independent directions cannot be turned into a smaller span; draw other targets")
    return basis, p @ r


def random_frame(k: int, d: int, seed: int) -> Float[Tensor, "k d"]:
    """k orthonormal rows in d dimensions, uniform; k = d is a random rotation or reflection (Mezzadri 2007). float64."""
    gaussian = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    frame: Tensor = (q * r.diagonal().sign()).T  # without the signs QR's own convention would show
    return frame.contiguous()


def _finite(vectors: Tensor) -> Tensor:
    found = vectors.detach().double().cpu()
    if not bool(torch.isfinite(found).all()):
        raise UserError("a vector to be rotated is not finite; was it fitted on an empty class?")
    return found


def _span(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k d"]]:
    """Coordinates and orthonormal basis of the rows, as many dimensions as their rank (one at least)."""
    u, s, w = torch.linalg.svd(rows, full_matrices=False)
    rank = max(int((s > _ROUNDING * s[0]).sum()), 1)
    return u[:, :rank] * s[:rank], w[:rank]
