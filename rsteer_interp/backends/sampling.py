"""How replies are drawn: greedy or sampled tokens whose random numbers belong to the prompt, and the replies themselves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.batch import Batch
from rsteer_interp.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature sampling, `n` replies per prompt. The uniform numbers of reply k of a prompt depend only on `seed`,
    the prompt's tokens and k, so neither batch size nor order of the prompts changes a reply (up to float rounding)."""

    n: int = 1
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} draws nothing; give a positive number, or greedy replies")


@dataclass(frozen=True)
class Replies:
    """Generated tokens, prompt-major: row `i * n + k` is reply k of prompt i. `lengths` counts the end token too."""

    ids: Int[Tensor, "reply step"]
    lengths: Int[Tensor, " reply"]
    log_probs: Float[Tensor, "reply step"]  # of the chosen tokens at temperature 1, in nats; 0 past the end
    first: Tensor | None = None  # per prompt: what `read` returned for the logits of the first token

    @property
    def mean_log_prob(self) -> Float[Tensor, " reply"]:
        """Mean log-probability per generated token, the paper's s_k."""
        return self.log_probs.double().sum(-1) / self.lengths.clamp(min=1)


def choose(logits: Tensor, uniform: Tensor | None, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
    """Next token (greedy, or by inverting the cumulative distribution at `uniform`) and its log-prob at temperature 1."""
    logits = logits.float()
    if uniform is None or sampling is None:
        token = logits.argmax(-1)
    else:
        cumulative = (logits / sampling.temperature).softmax(-1).cumsum(-1)
        target = (uniform * cumulative[:, -1])[:, None]
        token = torch.searchsorted(cumulative, target.contiguous(), right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = logits.gather(-1, token[:, None])[:, 0]
    return token, chosen - logits.logsumexp(-1)


def uniform_numbers(batch: Batch, sampling: Sampling, steps: int) -> Tensor:
    """One uniform number per reply and step, from generators seeded by (seed, prompt tokens, reply)."""
    out = []
    for row in batch.rows:
        for k in range(sampling.n):
            key = f"{sampling.seed}|{k}|{','.join(map(str, row.ids))}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            out.append(torch.rand(steps, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(out)
