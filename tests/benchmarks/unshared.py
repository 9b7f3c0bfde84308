"""Prompts with nothing in common."""

from __future__ import annotations

import torch

from rsteer_interp.batch import Tokens


def unshared(n: int, length: int, vocabulary: int, seed: int = 0) -> list[Tokens]:
    """Rows of random tokens of one length that begin differently, so that no prefix can be shared."""
    ids = torch.randint(10, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = torch.arange(n) + 10
    return [Tokens(tuple(row), 0, length - 1, length) for row in ids.tolist()]
