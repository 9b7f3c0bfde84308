"""Random rotations: the null of an edit turns every direction that it uses by one rotation, the same at every site.

Directions learned at neighbouring sites agree, so their pushes add up; independent random ones add in quadrature and are a smaller
push. One rotation keeps every length and every inner product between sites, and so the dose at each site and in the sum.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.errors import UserError

K = TypeVar("K", bound=Hashable)


def rotated(vectors: Mapping[K, Float[Tensor, "*k d"]], seed: int) -> dict[K, Float[Tensor, "*k d"]]:
    """The vectors (or stacks of vectors) under one rotation of all d dimensions, uniform over rotations (Haar). float64.

    Only the images of their span are drawn: V = U S W^T becomes U S F with F a random orthonormal frame of as many rows as V's rank.
    """
    rows = torch.cat([v.detach().double().cpu().reshape(-1, v.shape[-1]) for v in vectors.values()])
    if not bool(torch.isfinite(rows).all()):
        raise UserError("a vector to be rotated is not finite; was it fitted on an empty class?")
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    rank = max(int((s > 1e-12 * s[0]).sum()), 1)
    turned = u[:, :rank] * s[:rank] @ random_frame(rank, rows.shape[1], seed)
    parts = turned.split([v.numel() // v.shape[-1] for v in vectors.values()])
    return {key: part.reshape(v.shape) for (key, v), part in zip(vectors.items(), parts, strict=True)}


def random_frame(k: int, d: int, seed: int) -> Float[Tensor, "k d"]:
    """k orthonormal rows in d dimensions, uniform; k = d is a random rotation or reflection (Mezzadri 2007). float64."""
    gaussian = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    frame: Tensor = (q * r.diagonal().sign()).T  # without the signs QR's own convention would show
    return frame.contiguous()
