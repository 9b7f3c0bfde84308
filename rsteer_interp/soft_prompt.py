"""Soft prompt: vectors of one's own in place of the embeddings of some prompt tokens, which gradients can train.

Used by DRO (Zheng et al., On Prompt-Driven Safeguarding, arXiv 2401.18018), which starts from the embeddings of a written
safety prompt; prompt tuning is of Lester et al. (arXiv 2104.08691).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.errors import UserError


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """The state entering block 0 at token positions[i] of every prompt becomes vectors[i]; `vectors` receives gradients.

    What stands there without the edit is the token's embedding, scaled or with a learned position added where the family
    does so, and the vectors replace all of it. Positions count tokens without padding, from 0, and lie in the prompt.
    """

    positions: Int[Tensor, " k"]
    vectors: Float[Tensor, "k d"]

    # A value depends on the position, but on nothing that rows differ in: a prefix that all rows share, whose positions
    # are theirs, is exact when it is computed once.
    pointwise = True
    sites = frozenset({Site(0)})

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.vectors) or len(set(self.positions.tolist())) != len(self.positions):
            raise UserError(
                f"{len(self.vectors)} vectors for positions {self.positions.tolist()}; give a vector for each position once"
            )

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "decode":
            return x
        here = at.positions[..., None] == self.positions.to(x.device)  # row, pos, k
        # One vector at most per position, so the sum is that vector.
        placed = here.to(x.dtype) @ self.vectors.to(x.device, x.dtype)
        return torch.where(here.any(-1, keepdim=True), placed, x)


def positions_of(template: ChatTemplate, text: str) -> Int[Tensor, " k"]:
    """Positions of the tokens of a stretch of the template before the instruction, such as the system prompt.

    UserError unless the stretch stands there exactly once. Tokens that straddle its ends are left out.
    """
    rendered, end, _ = template.render("x")
    before = rendered[:end]
    if not text or before.count(text) != 1:
        raise UserError(f"{text[:60]!r} does not stand exactly once in the template's prefix; give its system prompt")
    start = before.index(text)
    offsets = template.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may take in the space before it.
    inside = [
        i
        for i, (a, b) in enumerate(offsets)
        if b > a and a + _leading(rendered[a:b]) >= start and b <= start + len(text)
    ]
    if not inside:
        raise UserError(f"no token lies inside {text[:60]!r}; give a longer stretch")
    return torch.tensor(inside)


def _leading(piece: str) -> int:
    return len(piece) - len(piece.lstrip()) if piece.strip() else 0


def prompt_vectors(backend: Backend, template: ChatTemplate, positions: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
    """What stands entering block 0 at positions of the template's prefix: a soft prompt of these changes nothing."""
    row = template.encode("x")
    if int(positions.max()) >= row.prefix:
        raise UserError(f"position {int(positions.max())} is not in the template prefix of {row.prefix} tokens")
    record = _RecordPositions(positions)
    backend.run(backend.batch([row]), record)
    return record.states[0]


@dataclass(frozen=True, eq=False)
class _RecordPositions:
    """Keeps the states entering block 0 at some positions of a single prompt, as float32 on CPU."""

    positions: Int[Tensor, " k"]
    states: list[Tensor] = field(default_factory=list)

    pointwise = False  # so that the pass runs every position
    sites = frozenset({Site(0)})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        with torch.inference_mode(False):
            self.states.append(x[0, self.positions.to(x.device)].detach().to("cpu", torch.float32, copy=True))
        return x
