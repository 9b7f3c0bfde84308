"""Embedding noise: an edit of the vectors that enter the first block, at the instruction's tokens, and those vectors read.

    e'_t = e_t + c |e_t| u_t            u_t unit, c the relative norm

After SEP (arXiv 2509.06338), which perturbs embedding outputs of chosen tokens; see `embedding_integrity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.interventions import check_finite
from rsteer_interp.nulls import random_unit_vectors

Noise = Literal["sphere", "axis"]


@dataclass(frozen=True, eq=False)
class EmbeddingNoise:
    """Moves the k-th instruction token of every prompt by c |e| along row k mod m of `directions` (unit rows).

    One row (m = 1) is one direction for all tokens. Template and generated tokens are left alone.
    """

    directions: Float[Tensor, "m d"]
    dose: float

    pointwise = False
    leaves_prefix = True
    sites = frozenset({Site(0)})

    def __post_init__(self) -> None:
        check_finite("the dose of an embedding noise", self.dose)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "prompt":
            return x
        start, own = _instruction(x, at)
        which = (at.positions - start).clamp(min=0) % len(self.directions)
        noise = self.directions.to(x.device, torch.float32)[which]
        size = self.dose * x.float().norm(dim=-1, keepdim=True)
        return torch.where(own[..., None], (x + (size * noise).to(x.dtype)).to(x.dtype), x)


def noise_directions(n: int, d: int, seed: int, kind: Noise = "sphere") -> Float[Tensor, "n d"]:
    """Random unit rows: uniform on the sphere, or signed coordinate axes (SEP perturbs single embedding dimensions)."""
    if kind == "sphere":
        return random_unit_vectors(n, d, seed)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randint(d, (n,), generator=generator)
    signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return torch.nn.functional.one_hot(axes, d).double() * signs[:, None]


def _instruction(x: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """First position of each row's instruction, and which positions are in it."""
    start, end = (at.batch.span_end(span).to(x.device)[at.rows][:, None] for span in ("prefix", "instruction"))
    return start, at.mask & (at.positions >= start) & (at.positions < end)


@dataclass(frozen=True, eq=False)
class RecordTokens:
    """Keeps what enters the first block at every instruction token."""

    vectors: list[Tensor] = field(default_factory=list)

    pointwise = False
    leaves_prefix = True
    sites = frozenset({Site(0)})

    def __call__(self, x: Tensor, at: At) -> Tensor:
        if at.phase == "prompt":
            self.vectors.append(x[_instruction(x, at)[1]].detach().to("cpu", torch.float32, copy=True))
        return x


def instruction_embeddings(
    backend: Backend, rows: Sequence[Tokens], edit: Edit | None = None
) -> tuple[Int[Tensor, " token"], Float[Tensor, "token d"]]:
    """Ids of all instruction tokens and the vectors that enter the first block there, in the order of the prompts."""
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)

    def run(batch: Batch) -> tuple[Tensor, ...]:
        record = RecordTokens()
        both = compose(edit, record)
        assert both is not None
        backend.run(batch, both)
        return torch.split(record.vectors[0], [row.instruction - row.prefix for row in batch.rows])

    for group, parts in backend.batches(rows, run):
        for i, part in zip(group, parts, strict=True):
            vectors[i] = part
    ids = [token for row in rows for token in row.ids[row.prefix : row.instruction]]
    return torch.tensor(ids), torch.cat(vectors)
