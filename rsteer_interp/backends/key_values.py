"""Key-value caches of plain full attention: when a prefix may be shared, blocks left out, several caches joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad


def share_prefix(cache: Any, notes: list[str]) -> bool:
    """Whether a cache holds plain full attention alone; if not, notes what it holds."""
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
    if kinds == ["DynamicLayer"]:
        return True
    notes.append(
        f"template prefix not shared between prompts: cache layers are {', '.join(kinds) or type(cache).__name__}"
    )
    return False


def fill_blank(cache: Any, n_blocks: int, rows: int, length: int) -> None:
    """Give the first blocks, which were left out and will be again, entries of that length: a cache's length is its first's."""
    for layer in cache.layers[:n_blocks]:
        layer.keys = layer.values = torch.zeros(rows, 1, length, 1)
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True


def joined(
    caches: Sequence[Any], masks: Sequence[Bool[Tensor, "row total"]], rows: Sequence[int]
) -> tuple[Any, Bool[Tensor, "row width"]]:
    """One cache and mask of all rows, `rows[i]` saying which row the i-th of the parts' rows is. Changes the first cache.

    Narrower parts get masked columns on the left. Keys hold their positions already, so where a column stands does not matter.
    """
    width = max(mask.shape[1] for mask in masks)
    missing = [width - mask.shape[1] for mask in masks]
    whole, order = caches[0], torch.tensor(rows).argsort().to(masks[0].device)
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            padded = [pad(getattr(part, name), (0, 0, n, 0)) for part, n in zip(parts, missing, strict=True)]
            setattr(parts[0], name, torch.cat(padded)[order.to(padded[0].device)])
    return whole, torch.cat([pad(mask, (n, 0)) for mask, n in zip(masks, missing, strict=True)])[order]
