"""Push: the edit of a random audit, an addition that spares special tokens, and the guard on its dose.

    h' = h + c mu_l v-hat          (The Rogue Scalpel, arXiv 2509.22067, section 3)

A dose counts only while benign conversations stay coherent: mean KL(base || pushed) per token of their answers at most a bound.
The paper takes MMLU for that (c up to 0.5 or 0.75, by family).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Around, At, Edit, Site
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.evaluation import ANSWER_ROWS
from rsteer_interp.interventions import Affine
from rsteer_interp.measures import kl_divergence, masked_mean

DOSES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # the paper's grid and, for small models, one dose below it
COHERENT_KL = 0.5  # nats per token of benign answers


@dataclass(frozen=True, eq=False)
class ExceptTokens(Around):
    """An edit at every token but the given ones (special tokens); generated tokens, which end a reply if special, are edited.

    It is as pointwise as the edit it holds: rows that share a prefix share its tokens.
    """

    token_ids: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        ids = at.batch.ids
        positions, lengths = at.positions.to(ids.device), at.batch.lengths[at.rows.to(ids.device)][:, None]
        column = (ids.shape[1] - lengths + positions).clamp(0, ids.shape[1] - 1)
        tokens = ids[at.rows.to(ids.device)].gather(1, column)
        left_alone = torch.isin(tokens, torch.tensor(self.token_ids, device=ids.device)) & (positions < lengths)
        return torch.where(left_alone[..., None].to(x.device), x, self.edit(x, at))


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer calls special: named ones (end, padding, ...) and added ones with that flag."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {int(i) for i, token in added.items() if getattr(token, "special", False)}
    return tuple(sorted(flagged | {int(i) for i in getattr(tokenizer, "all_special_ids", [])}))


def push(backend: Backend, layer: int, vector: Float[Tensor, " d"], amount: float) -> Edit:
    """h' = h + amount v-hat at the input of block `layer`, at every token that is not special. Amount in units of |h|."""
    return ExceptTokens(Affine(Site(layer), vector, amount=amount), special_tokens(backend.tokenizer))


@dataclass(frozen=True)
class Guard:
    """A relative dose with its price on benign conversations: mean KL(base || pushed), nats per token, and the verdict on it."""

    dose: float
    kl: float
    coherent: bool


def coherence(
    backend: Backend,
    conversations: Sequence[Tokens],
    layer: int,
    mu: float,
    vectors: Float[Tensor, "vector d"],
    doses: Sequence[float] = DOSES,
    bound: float = COHERENT_KL,
) -> tuple[Guard, ...]:
    """KL of benign answers under pushes of rising dose, up to and including the first dose beyond the bound.

    The same numbers as `evaluation.answer_effects`, with one base pass for all pushes and from the layer on where the backend can.
    """
    prepared = backend.prepare(conversations, layer, ANSWER_ROWS)
    bases = [_answer_logits(backend, batch, None) for _, batch in prepared.batches]
    found: list[Guard] = []
    for dose in sorted(doses):
        values: list[float] = []
        for vector in vectors.float():
            edit = push(backend, layer, vector, dose * mu)
            for base, (_, batch) in zip(bases, prepared.batches, strict=True):
                divergence = kl_divergence(base, _answer_logits(backend, batch, edit))
                values += masked_mean(divergence, batch.answer_mask[:, -base.shape[1] :]).tolist()
        kl = max(float(np.mean(values)), 0.0)  # rounding may take a KL of nothing below 0
        found.append(Guard(dose, kl, kl <= bound))
        if kl > bound:
            break
    return tuple(found)


def _answer_logits(backend: Backend, batch: Batch, edit: Edit | None) -> Tensor:
    longest = max(row.answer_length for row in batch.rows)
    return backend.logits(batch, edit, keep=longest + 1)[:, :-1]
