"""A prompt as one vector at a site: the state of its last token, or the mean over a span of its tokens."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import At
from rsteer_interp.errors import UserError

Pooling = Literal["last", "instruction", "prompt", "answer"]
POOLINGS: tuple[Pooling, ...] = ("last", "instruction")  # where the studies look for a condition


def pooled(x: Float[Tensor, "row pos d"], at: At, pooling: Pooling) -> Float[Tensor, "row d"]:
    """In the prompt pass of a run that shares at most the template prefix. Padding is never read, nor an answer unless asked.

    last: the last prompt token. instruction: mean over the user's own words. prompt: mean over the words and the template
    after them. answer: mean over the given answer. The template prefix is in no mean: its states are the same for all
    prompts, and the first token's, often hundreds of times as long as others, would outweigh the rest. UserError for a row
    without a token in the span.
    """

    def end(span: str) -> Tensor:
        return at.batch.span_end(span).to(x.device)[at.rows][:, None]

    if pooling == "last":
        column = (at.mask & (at.positions == end("prompt") - 1)).long().argmax(-1)
        return x[torch.arange(len(x), device=x.device), column]
    if pooling == "answer":
        inside = at.positions >= end("prompt")
    else:
        inside = (at.positions >= end("prefix")) & (at.positions < end(pooling))
    own = at.mask & inside
    if not bool(own.any(1).all()):
        raise UserError(f"a prompt has no tokens in its {pooling}, so no mean over them; drop it or pool otherwise")
    weights = own.to(x.dtype)
    return torch.einsum("rpd,rp->rd", x, weights) / weights.sum(1, keepdim=True)
