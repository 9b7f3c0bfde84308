"""Run a backend over prompts for a number: refusal log-odds, log-probability of answers and replies, KL on benign text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Rows
from rsteer_interp.backends.each import Each, stacked, together
from rsteer_interp.backends.edits import Edit
from rsteer_interp.batch import Batch, Tokens, length_groups
from rsteer_interp.measures import kl_divergence, masked_mean, refusal_log_odds, token_log_probs

ANSWER_ROWS = 4  # rows at once where logits of a whole answer are held: rows x answer x vocabulary x 4 bytes


def log_odds(
    backend: Backend,
    rows: Rows,
    token_ids: Sequence[int],
    edit: Edit | None = None,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Float[Tensor, " prompt"]:
    """First-token refusal log-odds of every prompt: one pass, nothing is generated."""
    return log_odds_of_each(backend, rows, token_ids, [edit], on_batch)[0]


def log_odds_of_each(
    backend: Backend,
    rows: Rows,
    token_ids: Sequence[int],
    edits: Sequence[Edit | None],
    on_batch: Callable[[int], None] = lambda n: None,
) -> Float[Tensor, "edit prompt"]:
    """The same under every edit. With few prompts, several edits share a pass: as many rows of it as the batch size allows."""
    out = torch.zeros(len(edits), len(rows), dtype=torch.float64)

    def run(batch: Batch) -> Tensor:
        found = []
        for part in together(edits, backend.batch_size // len(batch)):
            alone = len(part) == 1
            logits = backend.logits(*((batch, part[0]) if alone else (stacked(batch, len(part)), Each(part))))
            found.append(refusal_log_odds(logits[:, -1], token_ids).view(len(part), len(batch)).cpu())
        return torch.cat(found)

    for group, values in backend.spread(rows, run):
        out[:, group] = values
        on_batch(len(group))
    return out


def answer_log_probs(
    backend: Backend, rows: Rows, edit: Edit | None = None, on_batch: Callable[[int], None] = lambda n: None
) -> Float[Tensor, " prompt"]:
    """Mean log-probability per token of each row's given answer, in nats: s(x) of the paper's L_g (section 3.4)."""
    out = torch.zeros(len(rows), dtype=torch.float64)
    for group, value in backend.spread(
        rows, lambda batch: _mean_log_prob(batch, _answer_logits(backend, batch, edit)).cpu(), ANSWER_ROWS
    ):
        out[group] = value
        on_batch(len(group))
    return out


def reply_log_probs(
    backend: Backend, rows: Sequence[Tokens], replies: Sequence[Sequence[int]]
) -> Float[Tensor, " reply"]:
    """Mean log-probability per token of given replies (token ids) to the prompts, under the model as it is, in nats.

    NaN for a reply of no tokens: it says nothing, so that nothing is likely or unlikely. `measures.fluency` counts those apart.
    """
    out = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    said = [i for i, reply in enumerate(replies) if reply]
    if said:
        answered = [replace(rows[i], ids=rows[i].ids[: rows[i].prompt] + tuple(replies[i])) for i in said]
        out[said] = answer_log_probs(backend, answered)
    return out


@dataclass(frozen=True)
class AnswerEffects:
    """What an edit does to given benign answers, per conversation, in nats per token."""

    shift: Float[Tensor, " prompt"]  # |s_g(x) - s(x)|; its mean is the paper's L_g
    kl: Float[Tensor, " prompt"]  # mean KL(base || edited) over the answer's tokens


def answer_effects(
    backend: Backend, rows: Rows, edit: Edit | None, on_batch: Callable[[int], None] = lambda n: None
) -> AnswerEffects:
    """Shift and KL of one edit; see `effects_of_each`."""
    return effects_of_each(backend, rows, [edit], on_batch)[0]


def effects_of_each(
    backend: Backend,
    rows: Rows,
    edits: Sequence[Edit | None],
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[AnswerEffects]:
    """Shift and KL of every edit, from one base pass and a pass per edit and batch (full distributions are never kept)."""
    out = torch.zeros(len(edits), 2, len(rows), dtype=torch.float64)

    def run(batch: Batch) -> Tensor:
        base = _answer_logits(backend, batch, None)
        return torch.stack([_effects(batch, base, batch, _answer_logits(backend, batch, edit)) for edit in edits]).cpu()

    for group, values in backend.spread(rows, run, ANSWER_ROWS):
        out[..., group] = values
        on_batch(len(group))
    return [AnswerEffects(shift, kl) for shift, kl in out]


def prompted_effects(
    backend: Backend, rows: Sequence[Tokens], prompted: Sequence[Tokens], edit: Edit | None
) -> AnswerEffects:
    """Shift and KL of the same answers under other prompts, such as with a system prompt, and an edit."""
    out = torch.zeros(2, len(rows), dtype=torch.float64)
    for group in length_groups(rows, ANSWER_ROWS):
        base, other = (backend.batch([each[i] for i in group]) for each in (rows, prompted))
        edited = _answer_logits(backend, other, edit)
        out[:, group] = _effects(base, _answer_logits(backend, base, None), other, edited).cpu()
    return AnswerEffects(out[0], out[1])


def _effects(batch: Batch, base: Tensor, other: Batch, edited: Tensor) -> Tensor:
    """(2, row): shift and KL between the logits of the same answers; answers end both batches, so their columns agree."""
    shift = (_mean_log_prob(other, edited) - _mean_log_prob(batch, base)).abs()
    return torch.stack([shift, masked_mean(kl_divergence(base, edited), _answer_columns(batch.answer_mask, batch))])


def _answer_logits(backend: Backend, batch: Batch, edit: Edit | None) -> Tensor:
    """Logits that predict the answer's tokens: one column earlier than the tokens."""
    return backend.logits(batch, edit, keep=_longest_answer(batch) + 1)[:, :-1]


def _mean_log_prob(batch: Batch, logits: Tensor) -> Tensor:
    return masked_mean(
        token_log_probs(logits, _answer_columns(batch.ids, batch)), _answer_columns(batch.answer_mask, batch)
    )


def _answer_columns(values: Tensor, batch: Batch) -> Tensor:
    return values[:, -_longest_answer(batch) :]


def _longest_answer(batch: Batch) -> int:
    return max(row.answer_length for row in batch.rows)
