"""Site, At and Edit: where a model can be read or edited, when, and what an edit is. Reading is an edit that changes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.batch import Batch
from rsteer_interp.errors import UserError

Point = Literal["resid_pre", "z", "attn_out", "mlp_out", "resid_post"]
POINTS: tuple[Point, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # of the stream
_ORDER: tuple[Point, ...] = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
Phase = Literal["prefix", "prompt", "decode"]


@total_ordering
@dataclass(frozen=True)
class Site:
    """An address in the residual stream, printed with TransformerLens names (`blocks.12.hook_resid_pre`).

    `resid_pre` of block l is the state entering block l; Site(n_layers, "resid_pre") is what the final norm reads.
    `attn_out` and `mlp_out` are what a block adds to the stream (after a post-norm, where the family has one).
    `z` is no state of the stream but what a block's heads read out before W_O, (row, pos, head, d_head); only a backend
    that lists it in `head_sites` has it.
    """

    layer: int
    point: Point = "resid_pre"

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{'attn.' if self.point == 'z' else ''}hook_{self.point}"

    def __lt__(self, other: Site) -> bool:
        # Where two names mean one place, resid_post of the block comes before resid_pre of the next, as o before r.
        return (self.order, self.point) < (other.order, other.point)

    @property
    def order(self) -> tuple[int, int]:
        """Position in the computation; `resid_post` of block l comes where `resid_pre` of block l+1 does."""
        return (self.layer + 1, 0) if self.point == "resid_post" else (self.layer, _ORDER.index(self.point))

    @classmethod
    def parse(cls, text: str) -> Site:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", text)
        if match is None or match[2] not in POINTS:
            raise UserError(
                f"'{text}' is not a site; write it like blocks.12.hook_resid_pre (points: {', '.join(POINTS)})"
            )
        return cls(int(match[1]), match[2])  # type: ignore[arg-type]


@dataclass(frozen=True)
class At:
    """Where and when an edit is called.

    `rows` maps each current row to its row in `batch`; `memory` is a scratch space of this one run, in which a gate
    can keep what it decided on the prompt (per row of `batch`) for the decoding steps.
    """

    site: Site
    phase: Phase
    step: int  # 0 in the prompt pass, 1, 2, ... while decoding
    positions: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    rows: Int[Tensor, " row"]
    batch: Batch
    memory: dict[Any, Any] = field(default_factory=dict)


@runtime_checkable
class Edit(Protocol):
    """A change of activations: `edit(x, at)` returns a new tensor, never writes into `x`.

    `pointwise`: the new value at a position depends on the value at that position alone (not on the row, the mask or
    other positions). Only then may a backend compute a prefix that all rows share once for all of them; or, up to the end
    of the template prefix, when the edit has `leaves_prefix = True`: it changes nothing there.

    An edit that is not pointwise has `rowwise = True` when what it does to a row depends on that row's tokens and states alone,
    and all that it keeps in memory are tensors with an entry per row of the batch. Then prompts may be run in parts.

    An edit that needs a pass of its own over the prompts, before they are edited, has `decide_ahead(batch, memory)`. It is
    called before the prompt pass, when no hook is set (a pass inside a hook would run through the hooks of the pass around
    it), with the memory that `At` brings.
    """

    @property
    def sites(self) -> frozenset[Site]: ...

    @property
    def pointwise(self) -> bool: ...

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]: ...


@dataclass(frozen=True)
class Compose:
    """Edits one after the other, in the given order, at every site they share."""

    edits: tuple[Edit, ...]

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset().union(*(edit.sites for edit in self.edits))

    @property
    def pointwise(self) -> bool:
        return all(edit.pointwise for edit in self.edits)

    @property
    def leaves_prefix(self) -> bool:
        return all(edit.pointwise or leaves_prefix(edit) for edit in self.edits)

    @property
    def rowwise(self) -> bool:
        return all(map(rowwise, self.edits))

    def decide_ahead(self, batch: Batch, memory: dict[Any, Any]) -> None:
        for edit in self.edits:
            decide_ahead(edit, batch, memory)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        for edit in self.edits:
            if at.site in edit.sites:
                x = edit(x, at)
        return x


@dataclass(frozen=True, eq=False)
class Around:
    """An edit around another, which acts at the same sites and depends on the same things; `__call__` says what it does."""

    edit: Edit

    @property
    def sites(self) -> frozenset[Site]:
        return self.edit.sites

    @property
    def pointwise(self) -> bool:
        return self.edit.pointwise

    @property
    def leaves_prefix(self) -> bool:
        return leaves_prefix(self.edit)

    @property
    def rowwise(self) -> bool:
        return rowwise(self.edit)

    def decide_ahead(self, batch: Batch, memory: dict[Any, Any]) -> None:
        decide_ahead(self.edit, batch, memory)


def leaves_prefix(edit: Edit) -> bool:
    """Whether the edit says that it changes nothing inside the template prefix."""
    return bool(getattr(edit, "leaves_prefix", False))


def rowwise(edit: Edit) -> bool:
    """Whether rows may be run apart from each other: the edit is pointwise, or says so."""
    return edit.pointwise or bool(getattr(edit, "rowwise", False))


def decide_ahead(edit: Edit | None, batch: Batch, memory: dict[Any, Any]) -> None:
    """What the edit wants done before a run, if it wants anything."""
    decide = getattr(edit, "decide_ahead", None)
    if decide is not None:
        decide(batch, memory)


def compose(*edits: Edit | None) -> Edit | None:
    """The edits in order as one edit; None stands for no edit."""
    parts = tuple(edit for edit in edits if edit is not None)
    return Compose(parts) if len(parts) > 1 else (parts[0] if parts else None)
