"""Activation patching: put states recorded on one prompt into the run of another, one place at a time.

Donor and recipient have as many tokens in every span, so that position p of one is position p of the other. Attention is
causal: a patch at position p changes nothing before it, and with a common template prefix the prefix's states are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Start, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.measures import refusal_log_odds

_BLOCKS_AT_ONCE = 4  # cells of so many neighbouring blocks share a pass, which begins at the first of them


@dataclass(frozen=True, eq=False)
class Patch:
    """h[rows[i], positions[i]] becomes values[i] at one site in the prompt pass; positions count tokens, without padding.

    With `leaves_prefix` no position may lie in the template prefix. Source: activation patching (Vig et al. 2020; Meng et
    al. 2022).
    """

    site: Site
    rows: Int[Tensor, " i"]
    positions: Int[Tensor, " i"]
    values: Float[Tensor, "i d"]
    leaves_prefix: bool = False

    pointwise = False

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "prompt":
            return x
        rows, positions = self.rows.to(x.device), self.positions.to(x.device)
        columns = positions - at.positions[rows, -1] + x.shape[1] - 1  # padding is on the left
        if bool((columns < 0).any()) or bool((columns >= x.shape[1]).any()):
            raise UserError(f"patch at {self.site} names a position that this pass does not run; is it in the prefix?")
        out = x.clone()
        out[rows, columns] = self.values.to(x)
        return out


@dataclass(frozen=True, eq=False)
class PatchLast:
    """The last prompt token's state at a site becomes a given one, for every row; a patch of one place that can also be generated under."""

    site: Site
    value: Float[Tensor, " d"]

    pointwise = False
    rowwise = True
    leaves_prefix = True  # the last prompt token is never in the template prefix

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "prompt":
            return x
        return torch.cat([x[:, :-1], self.value.to(x).expand(len(x), 1, -1)], 1)


@dataclass(frozen=True, eq=False)
class RecordAll:
    """Keeps all states of a prompt pass at its sites."""

    sites: frozenset[Site]
    states: dict[Site, Float[Tensor, "row pos d"]] = field(default_factory=dict)

    pointwise = False  # so that every column is run

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        self.states[at.site] = x.detach().clone()
        return x


def all_states(
    backend: Backend, rows: Sequence[Tokens], sites: Iterable[Site]
) -> dict[Site, Float[Tensor, "prompt pos d"]]:
    """States of equally long prompts at every token. Memory: prompts x tokens x sites x d_model."""
    if len({len(row.ids) for row in rows}) != 1:
        raise UserError(f"prompts of {sorted({len(row.ids) for row in rows})} tokens; all_states needs equal lengths")
    record = RecordAll(frozenset(sites))
    backend.run(backend.batch(rows), record)
    return record.states


@dataclass(frozen=True)
class Cell:
    """One place to patch: a site and the token positions first, ..., stop - 1."""

    site: Site
    first: int
    stop: int


def patched_log_odds(
    backend: Backend,
    row: Tokens,
    donors: Mapping[Site, Float[Tensor, "donor pos d"]],
    cells: Sequence[Cell],
    token_ids: Sequence[int],
) -> Float[Tensor, "donor cell"]:
    """First-token refusal log-odds of one prompt with each donor's states put in at each cell, in nats.

    Many cells are rows of one batch. What comes before a cell is run once: tokens before it as a shared prefix, and, where the
    backend can (`prepare`), blocks before it as a Start. Both are exact.
    """
    n = len(next(iter(donors.values())))
    out = torch.zeros(n, len(cells), dtype=torch.float64)
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((cell.site.layer // _BLOCKS_AT_ONCE, cell.first < row.instruction), []).append(i)
    for members in groups.values():
        first, layer = min(cells[i].first for i in members), min(cells[i].site.layer for i in members)
        start = _start(backend, row, layer, first)
        every = [(donor, i) for i in members for donor in range(n)]
        for begin in range(0, len(every), backend.batch_size):
            jobs = every[begin : begin + backend.batch_size]
            batch = _copies(backend, row, len(jobs), first, start)
            logits = backend.logits(batch, _patches(donors, [(donor, cells[i]) for donor, i in jobs]))[:, -1]
            where = torch.tensor(jobs)
            out[where[:, 0], where[:, 1]] = refusal_log_odds(logits, token_ids).cpu()
    return out


def _start(backend: Backend, row: Tokens, layer: int, first: int) -> Start | None:
    """The prompt's own states from token `first` on, entering block `layer`; None where the backend can't begin there."""
    start = backend.prepare([row], layer).batches[0][1].start
    return None if start is None else Start(start.layer, start.states[:, first:], start.states[:, :first])


def _copies(backend: Backend, row: Tokens, n: int, first: int, start: Start | None) -> Batch:
    """The prompt n times. All before token `first` counts as prefix: no patch touches it, so it is run once for all."""
    known = replace(row, prefix=first, instruction=max(first, row.instruction))
    batch = backend.batch([known] * n)
    return batch if start is None else replace(batch, start=replace(start, states=start.states.repeat(n, 1, 1)))


def _patches(donors: Mapping[Site, Float[Tensor, "donor pos d"]], jobs: Sequence[tuple[int, Cell]]) -> Edit:
    """Row i patched from donor jobs[i][0] at cell jobs[i][1]."""
    by_site: dict[Site, list[tuple[int, int, int]]] = {}  # row, donor, position
    for i, (donor, cell) in enumerate(jobs):
        by_site.setdefault(cell.site, []).extend((i, donor, p) for p in range(cell.first, cell.stop))
    edits = []
    for site, entries in by_site.items():
        i, donor, p = torch.tensor(entries).T
        states = donors[site]
        edits.append(Patch(site, i, p, states[donor.to(states.device), p.to(states.device)], leaves_prefix=True))
    edit = compose(*edits)
    assert edit is not None
    return edit
