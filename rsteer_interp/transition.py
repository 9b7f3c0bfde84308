"""SCANS's gate: does what the model is about to say move its state as it does for unsafe prompts?

SCANS (arXiv 2408.11491; the formulas are those of the authors' code). With an agreeing opening ("Sure") after the prompt,

    t_l = state at the end of the prompt - state at the opening's last token        at the output of block l
    sigma = mean over layers of cos(t_l, mean t_l of unsafe anchors)                unsafe where sigma >= 0.75

The opening stands after the prompt and sigma reads the deepest layers, so no edited pass can decide for itself: sigma is
measured in an unedited pass before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rsteer_interp.activations import checked
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, leaves_prefix, rowwise
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError

Marker = Literal["prompt_end", "instruction_end"]
THRESHOLD = 0.75  # SCANS's default; its authors use 0.65 to 0.70 on two of their sets


@dataclass(frozen=True, eq=False)
class _RecordTransition:
    """Keeps state at the marker minus state at the last token, as float32 on CPU."""

    sites: frozenset[Site]
    marker: Marker
    states: dict[Site, Float[Tensor, "row d"]] = field(default_factory=dict)

    pointwise = False
    leaves_prefix = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            place = at.batch.span_end("prompt") - 1 if self.marker == "prompt_end" else at.batch.span_end("instruction")
            column = (at.mask & (at.positions == place.to(x.device)[at.rows][:, None])).long().argmax(-1)
            before, after = x[torch.arange(len(x), device=x.device), column], x[:, -1]
            self.states[at.site] = (before.float() - after.float()).detach().to("cpu", copy=True)
        return x


def transition(
    backend: Backend,
    rows: Sequence[Tokens],
    sites: Sequence[Site],
    *,
    opening: str = "Sure",
    marker: Marker = "prompt_end",
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """t_l of every prompt at the given sites, from one unedited pass over prompt and opening; given answers are left off.

    `marker` is the last token of the end-of-instruction marker. In the authors' Llama-2 template, whose marker [/INST] is all
    that follows the instruction, it is the last token of the prompt, the default; where a template says more after its
    marker (such as the name of the assistant's turn), `instruction_end` reads the first token after the instruction instead.
    """
    ids = tuple(backend.tokenizer(opening, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"the opening {opening!r} has no tokens; give a word")
    if marker == "instruction_end" and any(row.instruction == row.prompt for row in rows):
        raise UserError("the chat template has nothing after the instruction; use marker='prompt_end'")
    opened = [Tokens(row.ids[: row.prompt] + ids, row.prefix, row.instruction, row.prompt) for row in rows]
    out = {site: torch.empty(len(rows), backend.d_model) for site in sites}

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = _RecordTransition(frozenset(sites), marker)
        backend.run(batch, record)
        return record.states

    for group, states in backend.batches(opened, run):
        for site, value in states.items():
            out[site][group] = checked(site, value)
    return out


@dataclass(frozen=True, eq=False)
class TransitionGate:
    """+1 for an unsafe prompt (sigma >= threshold), -1 for any other: SCANS has no branch that does nothing.

    `dead_band` is ours: a prompt whose sigma is under the threshold by less than it gets 0, and is left alone. sigma depends
    on the prompt's tokens alone; it is measured when a prompt is first seen, and remembered.
    """

    backend: Backend
    reference: Mapping[Site, Float[Tensor, " d"]]
    threshold: float = THRESHOLD
    dead_band: float = 0.0
    opening: str = "Sure"
    marker: Marker = "prompt_end"
    _seen: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dead_band < 0:
            raise UserError(f"dead_band is {self.dead_band:g}; give 0 (SCANS) or more")

    def similarity(self, rows: Sequence[Tokens]) -> Float[Tensor, " prompt"]:
        """sigma of every prompt, in float64; a pass of the model for those not seen before."""
        new = {row.ids[: row.prompt]: row for row in rows if row.ids[: row.prompt] not in self._seen}
        if new:
            t = transition(
                self.backend, list(new.values()), list(self.reference), opening=self.opening, marker=self.marker
            )
            self._seen.update(zip(new, similarity(t, self.reference).tolist(), strict=True))
        return torch.tensor([self._seen[row.ids[: row.prompt]] for row in rows], dtype=torch.float64)

    def signs(self, rows: Sequence[Tokens]) -> Int[Tensor, " prompt"]:
        sigma = self.similarity(rows)
        unsafe, safe = sigma >= self.threshold, sigma < self.threshold - self.dead_band
        return unsafe.long() - safe.long()


def similarity(
    t: Mapping[Site, Float[Tensor, "prompt d"]],
    reference: Mapping[Site, Float[Tensor, " d"]] | Mapping[Site, Float[Tensor, "prompt d"]],
) -> Float[Tensor, " prompt"]:
    """sigma: mean over the reference's sites of the cosine with it, in float64."""
    cosines = [cosine_similarity(t[site].double(), mean.double(), dim=-1) for site, mean in reference.items()]
    return torch.stack(cosines).mean(0)


def without_own(t: Mapping[Site, Float[Tensor, "prompt d"]]) -> dict[Site, Float[Tensor, "prompt d"]]:
    """For each anchor the mean of the others': its own reference, in which it has no part."""
    found = {}
    for site, rows in t.items():
        if len(rows) < 2:
            raise UserError("an anchor's own reference needs two anchors or more; add unsafe prompts")
        wide = rows.double()
        found[site] = (wide.sum(0) - wide) / (len(rows) - 1)
    return found


@dataclass(frozen=True, eq=False)
class SteerBySign:
    """One of two edits per row, by the gate's sign: `toward` for +1, `away` for -1, neither for 0."""

    toward: Edit
    away: Edit
    gate: TransitionGate

    pointwise = False

    def __post_init__(self) -> None:
        if self.toward.sites != self.away.sites:
            raise UserError("the two edits of a sign are at different sites; steer both ways at the same ones")

    @property
    def sites(self) -> frozenset[Site]:
        return self.toward.sites

    @property
    def leaves_prefix(self) -> bool:
        return leaves_prefix(self.toward) and leaves_prefix(self.away)

    @property
    def rowwise(self) -> bool:
        return rowwise(self.toward) and rowwise(self.away)

    def decide_ahead(self, batch: Batch, memory: dict[Any, Any]) -> None:
        memory[self] = self.gate.signs(batch.rows)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prefix" and self.leaves_prefix:
            return x
        if self not in at.memory:
            raise UserError(
                "the sign of these prompts is not decided; give SteerBySign to a backend itself, or composed"
            )
        sign = at.memory[self].to(x.device)[at.rows][:, None, None]
        return torch.where(sign > 0, self.toward(x, at), torch.where(sign < 0, self.away(x, at), x))
