"""Collect activations: an edit that changes nothing and records what passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.pooling import pooled


@dataclass(frozen=True, eq=False)
class RecordLast:
    """Keeps each row's state at the last prompt token (the paper's position), sliced inside the hook, as float32 on CPU."""

    sites: frozenset[Site]
    states: dict[Site, Float[Tensor, "row d"]] = field(default_factory=dict)

    pointwise = True  # it changes nothing, so a shared prefix may be computed once

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            # A copy, not a view: later code must not see what an in-place change does to the stream.
            self.states[at.site] = x[:, -1].detach().to("cpu", torch.float32, copy=True)
        return x


def last_states(
    backend: Backend,
    rows: Sequence[Tokens],
    sites: Sequence[Site],
    edit: Edit | None = None,
    on_batch: Callable[[int], None] = lambda n: None,
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """States of every prompt's last token at the given sites, in the order of the prompts.

    One pass of the body of the model (no LM head, stops after the last site). With an `edit`, states are what a reader
    at the site sees after it. Memory: prompts x sites x d_model x 4 bytes; for more, stream into Moments by batches.
    """
    out = {site: torch.empty(len(rows), backend.d_model) for site in sites}

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = RecordLast(frozenset(sites))
        both = compose(edit, record)
        assert both is not None
        backend.run(batch, both)
        return record.states

    for group, states in backend.batches(rows, run):
        for site, value in states.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(f"activations at {site} are not finite; use a wider dtype (bfloat16 or float32)")
            out[site][group] = value
        on_batch(len(group))
    return out


@dataclass(frozen=True, eq=False)
class RecordInstruction:
    """Keeps the mean state over each prompt's instruction tokens, as float32 on CPU."""

    sites: frozenset[Site]
    states: dict[Site, Float[Tensor, "row d"]] = field(default_factory=dict)

    pointwise = False
    leaves_prefix = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            self.states[at.site] = pooled(x, at, "instruction").detach().to("cpu", torch.float32, copy=True)
        return x


def instruction_means(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site], on_batch: Callable[[int], None] = lambda n: None
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """Mean state over every prompt's instruction tokens at the given sites, in the order of the prompts."""
    out = {site: torch.empty(len(rows), backend.d_model) for site in sites}

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = RecordInstruction(frozenset(sites))
        backend.run(batch, record)
        return record.states

    for group, states in backend.batches(rows, run):
        for site, value in states.items():
            out[site][group] = value
        on_batch(len(group))
    return out


@dataclass(frozen=True, eq=False)
class RecordSuffix:
    """Keeps each row's states at its last `n` prompt tokens, in their order, as float32 on CPU; an answer is not among them."""

    sites: frozenset[Site]
    n: int
    states: dict[Site, Float[Tensor, "row pos d"]] = field(default_factory=dict)

    pointwise = False
    leaves_prefix = True  # with the template prefix alone shared, the suffix is always among the columns that pass

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            first = at.batch.span_end("prompt").to(x.device)[at.rows] - self.n
            columns = (first - at.positions[:, -1] + x.shape[1] - 1)[:, None] + torch.arange(self.n, device=x.device)
            wanted = x[torch.arange(len(x), device=x.device)[:, None], columns]
            self.states[at.site] = wanted.detach().to("cpu", torch.float32, copy=True)
        return x


def suffix_states(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site], on_batch: Callable[[int], None] = lambda n: None
) -> dict[Site, Float[Tensor, "prompt pos d"]]:
    """States at every template token after the instruction (position -1 is the last), in the order of the prompts.

    Where the last word of an instruction swallows a template token, the suffix of all prompts is the shortest one. Memory:
    prompts x suffix x sites x d_model x 4 bytes. UserError for a template that ends with the instruction.
    """
    n = min(row.prompt - row.instruction for row in rows)
    if n == 0:
        raise UserError("the chat template has no token after the instruction; directions need one at least")
    out = {site: torch.empty(len(rows), n, backend.d_model) for site in sites}

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = RecordSuffix(frozenset(sites), n)
        backend.run(batch, record)
        return record.states

    for group, states in backend.batches(rows, run):
        for site, value in states.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(f"activations at {site} are not finite; use a wider dtype (bfloat16 or float32)")
            out[site][group] = value
        on_batch(len(group))
    return out


@dataclass(frozen=True, eq=False)
class RecordNorm:
    """Running mean of the residual norm |h| over real prompt tokens, per site: the denominator of the relative dose."""

    sites: frozenset[Site]
    totals: dict[Site, list[float]] = field(default_factory=dict)

    pointwise = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            total = self.totals.setdefault(at.site, [0.0, 0.0])
            own = at.mask & (at.positions >= at.batch.span_end("prefix")[at.rows][:, None].to(x.device))
            norms = x.detach().double().norm(dim=-1)[own]
            total[0] += float(norms.sum())
            total[1] += norms.numel()
        return x


def mean_norms(backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site]) -> dict[Site, float]:
    """Mean |h| at each site over the prompts' own tokens after the template prefix (which is left out, and with it the first
    token, whose norm is an outlier in most models)."""
    record = RecordNorm(frozenset(sites))
    for _ in backend.batches(rows, lambda batch: backend.run(batch, record)):
        pass
    return {site: total / count for site, (total, count) in record.totals.items()}
