"""Collect activations: an edit that changes nothing and records what passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments, RunningMoments, reduce
from rsteer_interp.pooling import Pooling, pooled


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
    return _collected(backend, rows, out, lambda: RecordLast(frozenset(sites)), edit, on_batch)


class _Recorder(Edit, Protocol):
    """Changes nothing, and keeps what passes."""

    @property
    def states(self) -> dict[Site, Tensor]: ...


def _collected(
    backend: Backend,
    rows: Sequence[Tokens],
    out: dict[Site, Tensor],
    recorder: Callable[[], _Recorder],
    edit: Edit | None = None,
    on_batch: Callable[[int], None] = lambda n: None,
) -> dict[Site, Tensor]:
    """`out` filled with what a fresh recorder keeps of every batch, in the order of the prompts."""

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = recorder()
        both = compose(edit, record)
        assert both is not None
        backend.run(batch, both)
        return record.states

    for group, states in backend.spread(rows, run):
        for site, value in states.items():
            out[site][group] = checked(site, value)
        on_batch(len(group))
    return out


def last_moments(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site], on_batch: Callable[[int], None] = lambda n: None
) -> dict[Site, Moments]:
    """Moments of the last-token states at each site, streamed: memory does not grow with the number of prompts.

    Under torchrun every process streams its share and the moments are merged in the order of the ranks.
    """
    running = {site: RunningMoments(backend.d_model) for site in sites}

    def run(batch: Batch) -> int:
        record = RecordLast(frozenset(sites))
        backend.run(batch, record)
        for site in running:
            running[site].add(checked(site, record.states[site]))
        return len(batch)

    for _, n in backend.spread(rows, run):
        on_batch(n)
    return {site: reduce(running.pop(site).moments()) for site in list(running)}  # one copy at a time


def checked(site: Site, states: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The states, if they are finite; else UserError."""
    if not bool(torch.isfinite(states).all()):
        raise UserError(f"activations at {site} are not finite; use a wider dtype (bfloat16 or float32)")
    return states


@dataclass(frozen=True, eq=False)
class RecordPooled:
    """Keeps each prompt as one vector (see `pooling.pooled`), as float32 on CPU."""

    sites: frozenset[Site]
    pooling: Pooling
    states: dict[Site, Float[Tensor, "row d"]] = field(default_factory=dict)

    pointwise = False
    leaves_prefix = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            self.states[at.site] = pooled(x, at, self.pooling).detach().to("cpu", torch.float32, copy=True)
        return x


def instruction_means(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site], on_batch: Callable[[int], None] = lambda n: None
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """Mean state over every prompt's instruction tokens at the given sites, in the order of the prompts."""
    return pooled_states(backend, rows, sites, "instruction", on_batch)


def pooled_states(
    backend: Backend,
    rows: Sequence[Tokens],
    sites: Sequence[Site],
    pooling: Pooling,
    on_batch: Callable[[int], None] = lambda n: None,
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """Every prompt as one vector per site, in the order of the prompts; one pass that stops after the last site."""
    out = {site: torch.empty(len(rows), backend.d_model) for site in sites}
    return _collected(backend, rows, out, lambda: RecordPooled(frozenset(sites), pooling), on_batch=on_batch)


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
    return _collected(backend, rows, out, lambda: RecordSuffix(frozenset(sites), n), on_batch=on_batch)


@dataclass(frozen=True, eq=False)
class RecordNorm:
    """Sum of the residual norm |h| over the real prompt tokens after the template prefix, and their number, per site."""

    sites: frozenset[Site]
    totals: dict[Site, tuple[float, int]] = field(default_factory=dict)

    pointwise = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "decode":
            own = at.mask & (at.positions >= at.batch.span_end("prefix")[at.rows][:, None].to(x.device))
            norms = x.detach().double().norm(dim=-1)[own]
            rows = len(at.batch) if at.phase == "prefix" else 1  # words that all rows begin with are run once for all
            total, count = self.totals.get(at.site, (0.0, 0))
            self.totals[at.site] = (total + rows * float(norms.sum()), count + rows * norms.numel())
        return x


def mean_norms(backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site]) -> dict[Site, float]:
    """Mean |h| at each site, the denominator of the relative dose, over the prompts' own tokens after the template prefix
    (which is left out, and with it the first token, whose norm is an outlier in most models)."""

    def run(batch: Batch) -> dict[Site, tuple[float, int]]:
        record = RecordNorm(frozenset(sites))
        backend.run(batch, record)
        return record.totals

    found = [totals for _, totals in backend.spread(rows, run)]
    return {site: sum(t[site][0] for t in found) / sum(t[site][1] for t in found) for site in sites}
