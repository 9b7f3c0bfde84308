"""The null of an edit: the edit itself, turned by one random rotation Q of all dimensions, the same at every site.

    delta(h) = edit(h) - h          null:  h + Q delta

Q keeps the size of delta at every state and its inner products between sites, so that the null is of equal dose at each site and
in the sum of all. Directions drawn for each site by itself would add in quadrature, where learned ones add up.

In the prompt pass, given answers included, delta is that of a run of the edit itself over the same prompts: an ablation takes
away what later sites would take, and a random push does not. While decoding, the null's text is its own, and no run of the edit
has it: there delta is the edit's at the state met, as the edit would have left it at the earlier sites l' of the step:

    delta_l = edit(g_l) - g_l          g_l = h_l + sum over l' < l of (delta_l' - Q delta_l')

which is exact for additions, and for other edits up to what the blocks in between make of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Around, At, Edit, Site
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.statistics.rotation import draw_seeds, nearest_turn, random_frame

Run = Callable[[Batch, Edit], None]
"""Runs a batch's prompt pass under an edit: a backend's `run`."""

_IN_THE_STREAM = ("resid_pre", "resid_post")


def rotated_edits(edit: Edit, run: Run, d: int, n: int, seed: int) -> list[Rotated]:
    """n draws of the edit's null, by uniform rotations of d dimensions: d x d x 4 bytes each. They share the edit's own run."""
    own = Own(edit, run)
    return [Rotated(own, random_frame(d, d, each).T.float()) for each in draw_seeds(n, seed)]


def turned_edits(
    edit: Edit, run: Run, vectors: Float[Tensor, "n d"], targets: Sequence[Float[Tensor, "n d"]]
) -> list[Rotated]:
    """Nulls of an edit along known vectors, each turned to lie as near as can be to given targets (`rotation.nearest_turn`)."""
    own, turns = Own(edit, run), [nearest_turn(vectors, each) for each in targets]
    return [Rotated(own, images, basis) for basis, images in turns]


@dataclass(eq=False)
class _Deltas:
    """What an edit added in the prompt pass of one batch, and what it decided there.

    By site: at the columns that the run had, and at the `shared` first positions that it had once for all rows.
    """

    columns: dict[Site, Float[Tensor, "row pos d"]] = field(default_factory=dict)
    prefix: dict[Site, Float[Tensor, "shared d"]] = field(default_factory=dict)
    shared: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)

    def at(self, at: At) -> Float[Tensor, "row pos d"] | None:
        """The deltas of the positions of a pass, which may share another prefix than the recorded one; None where nothing moved."""
        if at.site not in self.columns and at.site not in self.prefix:
            return None
        inside = (at.positions < self.shared)[..., None]
        found = at.positions.new_zeros(1)
        if at.site in self.columns:
            own = self.columns[at.site]
            lengths = at.batch.lengths.to(at.rows.device)[at.rows][:, None]
            column = own.shape[1] - lengths + at.positions  # padding is on the left
            found = torch.where(inside, 0.0, own[at.rows[:, None], column.clamp(0, own.shape[1] - 1)])
        if at.site in self.prefix:
            found = torch.where(inside, self.prefix[at.site][at.positions.clamp(max=self.shared - 1)], found)
        return found


@dataclass(frozen=True, eq=False)
class _Recording(Around):
    """The edit itself, with what it adds kept."""

    deltas: _Deltas

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        edited = self.edit(x, at)
        delta = edited.to(_wide(x)) - x.to(_wide(x))
        self.deltas.memory = at.memory
        if at.phase == "prefix":
            self.deltas.shared = x.shape[1]
        if bool(delta.any()):  # a site where a gate reads moves nothing
            if at.phase == "prefix":
                self.deltas.prefix[at.site] = delta[0]
            else:
                self.deltas.columns[at.site] = delta
        return edited


@dataclass(frozen=True, eq=False)
class Own(Around):
    """An edit that is run by itself over the prompts of its nulls, before they are.

    What it adds is kept for the last batch, by the batch's content, and for batches that are in use: tokens (a shared prefix
    once) x sites at which it acts x d x 4 bytes. UserError for an edit of single heads, whose outputs have other dimensions.
    """

    run: Run = field(repr=False, compare=False)
    _last: dict[tuple[Tokens, ...], _Deltas] = field(default_factory=dict, repr=False, compare=False)
    _in_use: WeakKeyDictionary[Batch, _Deltas] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def __post_init__(self) -> None:
        heads = sorted(site for site in self.edit.sites if site.point == "z")
        if heads:
            raise UserError(f"{heads[0]} holds heads' outputs, which no rotation of the stream turns; edit attn_out")

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return self.edit(x, at)

    def ahead(self, batch: Batch) -> _Deltas:
        """The deltas of a batch's prompt pass; the edit is run over it unless its rows are the last ones'."""
        rows = tuple(replace(row, setting=0) for row in batch.rows)
        if rows not in self._last:
            deltas = _Deltas()
            self.run(batch, _Recording(self.edit, deltas))
            self._last.clear()
            self._last[rows] = deltas
        self._in_use[batch] = self._last[rows]
        return self._last[rows]

    def deltas(self, batch: Batch) -> _Deltas:
        if batch not in self._in_use:
            raise UserError("the edit was not run over these prompts; give Rotated to a backend itself, or composed")
        return self._in_use[batch]


@dataclass(frozen=True, eq=False)
class Rotated(Around):
    """h + Q delta with Q = sum_i images_i basis_i^T, of orthonormal rows each; without a basis that of all dimensions."""

    edit: Own
    images: Float[Tensor, "k d"]
    basis: Float[Tensor, "k d"] | None = None
    _copies: dict[Any, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False, compare=False)
    _gaps: WeakKeyDictionary[Batch, Tensor] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def decide_ahead(self, batch: Batch, memory: dict[Any, Any]) -> None:
        # What gates decided in the edit's own run holds while its null decodes.
        memory.update(self.edit.ahead(batch).memory)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "decode":
            return self._decoding(x, at)
        delta = self.edit.deltas(at.batch).at(at)
        return x if delta is None else _moved(x, self._turned(delta))

    def _decoding(self, x: Float[Tensor, "row 1 d"], at: At) -> Float[Tensor, "row 1 d"]:
        if at.site == min(self.sites):
            self._gaps.pop(at.batch, None)  # of the step before
        gap = self._gaps.get(at.batch)
        # A block's outputs do not hold what was added to the stream before it.
        met = _moved(x, gap) if gap is not None and at.site.point in _IN_THE_STREAM else x
        delta = self.edit(met, at).to(_wide(x)) - met.to(_wide(x))
        turned = self._turned(delta)
        missing = delta - turned
        self._gaps[at.batch] = missing if gap is None else missing + gap.to(missing)
        return _moved(x, turned)

    def _turned(self, delta: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        key = (delta.device, delta.dtype)
        if key not in self._copies:
            self._copies[key] = (self.images.to(*key), None if self.basis is None else self.basis.to(*key))
        images, basis = self._copies[key]
        return (delta if basis is None else delta @ basis.T) @ images


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _moved(x: Tensor, delta: Tensor) -> Tensor:
    return (x.to(delta.dtype) + delta.to(x.device)).to(x.dtype)
