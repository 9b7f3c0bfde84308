"""Nulls of an edit that move every state as far as the edit does, at the same sites, positions and rows, in random directions.

    delta(h) = edit(h) - h      null:  h + |delta| u,  u a unit vector per site

`Redirected` takes |delta| from the state it meets, `Replayed` from a run of the edit itself. They are the same for an addition.
An ablation takes away what later sites would take, a random push does not, so that only `Replayed` is of equal dose there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Around, At, Site

Sizes = dict[Any, Float[Tensor, "row pos 1"]]


@dataclass(frozen=True, eq=False)
class Redirected(Around):
    """h + |edit(h) - h| u; sites without a u (where a gate reads and nothing is changed) are as the edit leaves them."""

    towards: Mapping[Site, Float[Tensor, " d"]]

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        edited = self.edit(x, at)
        if at.site not in self.towards:
            return edited
        return _moved(x, _size(x, edited), self.towards[at.site])


@dataclass(frozen=True, eq=False)
class Recorded(Around):
    """The edit itself, with |edit(h) - h| of every state of the prompt pass kept for `Replayed`."""

    sizes: Sizes = field(default_factory=dict)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        edited = self.edit(x, at)
        if at.phase != "decode":
            self.sizes[id(at.batch), at.site, at.phase] = _size(x, edited)
        return edited


@dataclass(frozen=True, eq=False)
class Replayed(Around):
    """h + |delta| u in the prompt pass, |delta| as `Recorded` found it: for the same batches (see `Batching.prepare`)."""

    sizes: Sizes
    towards: Mapping[Site, Float[Tensor, " d"]]

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return _moved(x, self.sizes[id(at.batch), at.site, at.phase], self.towards[at.site])


def _size(x: Tensor, edited: Tensor) -> Float[Tensor, "row pos 1"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    size: Tensor = (edited.to(wide) - x.to(wide)).norm(dim=-1, keepdim=True)
    return size


def _moved(x: Tensor, size: Tensor, towards: Tensor) -> Tensor:
    return (x.to(size.dtype) + size * towards.to(x.device, size.dtype)).to(x.dtype)
