"""Gram matrices in float64: dense, or packed into the half that a symmetric matrix needs, which grows in place.

The packed form is LAPACK's rectangular full packed format (Gustavson, Wasniewski, Dongarra and Langou 2010): d (d + 1) / 2
numbers, and updates at the speed of a matrix product.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import lapack
from torch import Tensor


def gram(x: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """x x^T by NumPy, which computes half of a symmetric product and mirrors it."""
    array = x.numpy()
    return torch.from_numpy(array @ array.T)


def packed_gram(x: Float[Tensor, "m d"]) -> Float[Tensor, " d*(d+1)/2"]:
    """x^T x, packed."""
    d = x.shape[1]
    packed = torch.zeros(d * (d + 1) // 2, dtype=torch.float64)
    add_gram(packed, x)
    return packed


def add_gram(packed: Float[Tensor, " d*(d+1)/2"], x: Float[Tensor, "m d"]) -> None:
    """packed += x^T x, in place: no matrix is made on the way."""
    array, into = x.numpy(), packed.numpy()
    if not array.size:
        return
    found = lapack.dsfrk(array.shape[1], len(array), 1.0, array.T, 1.0, into, overwrite_c=1)
    assert np.shares_memory(found, into), "LAPACK worked on a copy"


def unpacked(packed: Float[Tensor, " d*(d+1)/2"]) -> Float[Tensor, "d d"]:
    upper, _ = lapack.dtfttr(packed_width(packed), packed.numpy())
    return torch.from_numpy(np.triu(upper) + np.triu(upper, 1).T)


def packed_width(packed: Float[Tensor, " d*(d+1)/2"]) -> int:
    """d."""
    return (math.isqrt(8 * packed.numel() + 1) - 1) // 2
