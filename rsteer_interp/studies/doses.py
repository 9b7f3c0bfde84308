"""Doses of edits: |edit| / |resid| as an edit is really applied, and what ablating a basis would move of the unedited stream.

Averages are over the prompts' own tokens, as in `activations.mean_norms`: the template prefix is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.edits import Around, At, Site

Totals = dict[Site, tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class Dosed(Around):
    """An edit that keeps account of its relative size per site."""

    totals: Totals = field(default_factory=dict)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        out = self.edit(x, at)
        if at.phase != "decode":
            _count(self.totals, at, (out.float() - x.float()).norm(dim=-1, keepdim=True), x)
        return out


@dataclass(frozen=True, eq=False)
class RecordShares:
    """Changes nothing; keeps |B_k h| / |h| per site and k, B_k the first k rows of the site's basis."""

    bases: Mapping[Site, Float[Tensor, "k d"]]
    totals: Totals = field(default_factory=dict)

    pointwise = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.bases)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "decode":
            parts = x.float() @ self.bases[at.site].to(x.device, torch.float32).T
            _count(self.totals, at, parts.square().cumsum(-1).sqrt(), x)
        return x


def mean_doses(totals: Totals) -> dict[Site, Float[Tensor, " k"]]:
    """Mean relative size per site."""
    return {site: total / count for site, (total, count) in totals.items()}


def _count(totals: Totals, at: At, sizes: Float[Tensor, "row pos k"], x: Float[Tensor, "row pos d"]) -> None:
    own: Bool[Tensor, "row pos"] = at.mask & (
        at.positions >= at.batch.span_end("prefix")[at.rows][:, None].to(x.device)
    )
    relative = (sizes / x.float().norm(dim=-1, keepdim=True))[own].double().cpu()
    rows = len(at.batch) if at.phase == "prefix" else 1  # words that all rows begin with are run once for all
    total, count = totals.get(at.site, (torch.zeros(sizes.shape[-1], dtype=torch.float64), 0))
    totals[at.site] = (total + rows * relative.sum(0), count + rows * len(relative))
