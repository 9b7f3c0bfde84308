"""Layers by depth: a published list of layers of one model, as fractions of the depth of another."""

from __future__ import annotations

from rsteer_interp.errors import UserError


def layers_between(n_layers: int, first: float, last: float) -> range:
    """Blocks from `first` to `last`, both included, given as fractions of the number of blocks (10 / 32 is 10 of 32)."""
    if not 0 <= first <= last < 1:
        raise UserError(f"layers from {first:g} to {last:g} of the depth; give fractions 0 <= first <= last < 1")
    return range(min(round(first * n_layers), n_layers - 1), min(round(last * n_layers), n_layers - 1) + 1)
