"""Gradient of refusal log-odds with respect to a push at a block input: what a small addition there would do, to first order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.measures import refusal_log_odds

ROWS = 8  # rows at once: activations of every layer are kept for the backward pass


@dataclass(frozen=True, eq=False)
class Push:
    """Adds a vector of its own to every position of each row; the vectors are zero and take the gradient."""

    deltas: Mapping[Site, Float[Tensor, "row 1 d"]]

    pointwise = False  # each row has its own

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.deltas)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return x + self.deltas[at.site].to(x.device, x.dtype)[at.rows.to(x.device)]


def log_odds_gradients(
    backend: Backend,
    rows: Sequence[Tokens],
    token_ids: Sequence[int],
    sites: Sequence[Site],
    on_batch: Callable[[int], None] = lambda n: None,
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """d log-odds / d push of every prompt at every site, the push alike at all its positions; one backward pass for all sites."""
    out = {site: torch.empty(len(rows), backend.d_model, dtype=torch.float64) for site in sites}

    def run(batch: Batch) -> list[Tensor]:
        deltas = {s: torch.zeros(len(batch), 1, backend.d_model, requires_grad=True) for s in sites}
        odds = refusal_log_odds(backend.logits(batch, Push(deltas), grad=True)[:, -1], token_ids)
        return [g[:, 0].double() for g in torch.autograd.grad(odds.sum(), list(deltas.values()))]

    for group, gradients in backend.batches(rows, run, ROWS):
        for site, gradient in zip(sites, gradients, strict=True):
            out[site][group] = gradient
        on_batch(len(group))
    return out
