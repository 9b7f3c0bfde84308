"""A prompt as one vector at a site: the state of its last token, or the mean over its instruction's tokens."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import At

Pooling = Literal["last", "instruction"]
POOLINGS: tuple[Pooling, ...] = ("last", "instruction")


def pooled(x: Float[Tensor, "row pos d"], at: At, pooling: Pooling) -> Float[Tensor, "row d"]:
    """In the prompt pass of a run that shares at most the template prefix. The mean is over the user's own words, without
    template tokens, special tokens, padding or answer."""

    def end(span: str) -> Tensor:
        return at.batch.span_end(span).to(x.device)[at.rows][:, None]

    if pooling == "last":
        column = (at.mask & (at.positions == end("prompt") - 1)).long().argmax(-1)
        return x[torch.arange(len(x), device=x.device), column]
    own = (at.mask & (at.positions >= end("prefix")) & (at.positions < end("instruction"))).to(x.dtype)
    return torch.einsum("rpd,rp->rd", x, own) / own.sum(1, keepdim=True)
