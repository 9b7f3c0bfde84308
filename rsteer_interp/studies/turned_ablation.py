"""An ablation that keeps what it takes from every state, and its null: the same displacements under one random rotation R.

    ablation  h - B_s^T c,  c = B_s h          null  h - U_s^T c,  c of the ablation's own run,  U_s = B_s R

At every site and position the null's displacement is the ablation's own times R: of the same length, and with the same inner
products between sites. Bases drawn apart per site, or one for all, would add up less or more than the ablation's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import At, Phase, Site

Bases = Mapping[Site, Float[Tensor, "k d"]]
Parts = dict[tuple[Site, Phase], Float[Tensor, "row pos k"]]


@dataclass(frozen=True, eq=False)
class Ablated:
    """Ablation of the span of each site's orthonormal rows in a prompt pass; `parts` holds B h of every state of the last run."""

    bases: Bases
    parts: Parts = field(default_factory=dict)

    pointwise = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.bases)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        rows = _rows(self.bases, x, at)
        part = self.parts[at.site, at.phase] = x.to(rows.dtype) @ rows.T
        return (x - (part @ rows).to(x.dtype)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Turned:
    """The null of an `Ablated` that has just run on the same batch; `into` are its bases, rotated."""

    ablated: Ablated
    into: Bases

    pointwise = True  # as the ablation is: passes are cut as its own was

    @property
    def sites(self) -> frozenset[Site]:
        return self.ablated.sites

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        rows = _rows(self.into, x, at)
        return (x - (self.ablated.parts[at.site, at.phase] @ rows).to(x.dtype)).to(x.dtype)


def _rows(bases: Bases, x: Tensor, at: At) -> Float[Tensor, "k d"]:
    """The site's rows beside a state, in float32 (float64 for a float64 stream)."""
    return bases[at.site].to(x.device, torch.promote_types(x.dtype, torch.float32))
