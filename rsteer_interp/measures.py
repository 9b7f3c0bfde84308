"""Measures: pure functions of logits and log-probabilities. Refusal log-odds, KL, perplexity, and where refusal tokens come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Estimate

_EPSILON = 1e-8
LEAST_PAIRS = 6  # answers with a partner from which a ratio of perplexities is made


def refusal_log_odds(logits: Float[Tensor, "*rows vocab"], token_ids: Sequence[int]) -> Float[Tensor, "*rows"]:
    """log(p_R + 1e-8) - log(1 - p_R + 1e-8), p_R = summed softmax probability of the refusal tokens; in nats, float64.

    Arditi et al. (arXiv 2406.11717), section 2.4 and their code. Bounded by about +/- 18.4. Logits of -inf are probabilities
    of 0; UserError for a row with a NaN or +inf, or with -inf alone.
    """
    if not token_ids:
        raise UserError("no refusal tokens given; find them from judged replies with `refusal_tokens`")
    p = logits.double().softmax(-1)[..., list(token_ids)].sum(-1)
    return _finite((p + _EPSILON).log() - (1 - p + _EPSILON).log(), "refusal log-odds")


def refusal_tokens(
    first_tokens: Sequence[int], refused: Sequence[bool], *, least: int = 3, ratio: float = 3.0
) -> tuple[int, ...]:
    """Tokens with which refusals begin, from judged replies: at least `least` refusals begin with the token, and it is
    `ratio` times likelier to open a refusal than an answer (counts smoothed by 1/2). Most frequent first.

    Replaces the per-family lists of Arditi et al. (`I` for Llama, `I` and `As` for Qwen).
    """
    refusing = Counter(t for t, r in zip(first_tokens, refused, strict=True) if r)
    answering = Counter(t for t, r in zip(first_tokens, refused, strict=True) if not r)
    n_refused, n_answered = sum(refusing.values()), sum(answering.values())
    chosen = [
        token
        for token, count in refusing.most_common()
        if count >= least and (count + 0.5) / (n_refused + 1) >= ratio * (answering[token] + 0.5) / (n_answered + 1)
    ]
    if not chosen:
        raise UserError(
            f"no token opens refusals more often than answers ({n_refused} refusals among {n_refused + n_answered} replies); "
            "score more prompts that the model refuses"
        )
    return tuple(chosen)


def token_log_probs(logits: Float[Tensor, "row pos vocab"], ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
    """Log-probability of each id under the logits at its own position (shift them before), in nats."""
    return logits.float().gather(-1, ids[..., None])[..., 0] - logits.float().logsumexp(-1)


def masked_mean(values: Float[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """Mean over the true positions of each row, in float64. UserError where it is not finite, or there is no such position."""
    return _finite(torch.where(mask, values.double(), 0.0).sum(-1) / mask.sum(-1), "a mean over tokens")


def _finite(values: Float[Tensor, "*rows"], what: str) -> Float[Tensor, "*rows"]:
    if not bool(values.detach().isfinite().all()):
        raise UserError(
            f"{what} is not a finite number; a prompt has no such token, or the model's logits are not finite "
            "(try --dtype float32, or a smaller edit)"
        )
    return values


def kl_divergence(
    base: Float[Tensor, "row pos vocab"], edited: Float[Tensor, "row pos vocab"]
) -> Float[Tensor, "row pos"]:
    """KL(base || edited) at each position over the vocabulary, in nats; from log-softmax, no epsilon. Never negative
    but for rounding. NaN where logits are; infinite where the edit forbids a token (-inf) that the base allows."""
    return torch.stack([_kl(p, q) for p, q in zip(base, edited, strict=True)])  # by rows: a vocabulary is wide


def _kl(base: Float[Tensor, "pos vocab"], edited: Float[Tensor, "pos vocab"]) -> Float[Tensor, " pos"]:
    log_p, log_q = base.float().log_softmax(-1), edited.float().log_softmax(-1)
    # A token of probability zero under the base adds nothing, also where its log-probability is minus infinity.
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def perplexity(log_probs: Float[Tensor, " text"], subjects: Sequence[str]) -> Estimate:
    """exp of minus the mean log-probability per token over texts, with its interval over subjects; NaN (no text) is left out.

    Of differences after - before it is the ratio of the two perplexities.
    """
    x, clusters = _known(log_probs, subjects)
    mean = Estimate.of((-x).tolist(), clusters=clusters)
    return Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)


@dataclass(frozen=True)
class Fluency:
    """How likely the model as it is finds the replies that answer: perplexity per token, with intervals over subjects.

    Refusals are formulas and likelier than answers, so that the two are never mixed. `ratio` is to the model's own answer to
    the same prompt, over the prompts that both answer; None with fewer than 6 of them or one subject. Empty replies say
    nothing: they are counted, and are no answers.
    """

    perplexity: Estimate | None
    ratio: Estimate | None
    answered: int
    empty: int
    n: int


def fluency(
    log_probs: Float[Tensor, " prompt"],
    refused: Bool[Tensor, " prompt"],
    own_log_probs: Float[Tensor, " prompt"],
    own_refused: Bool[Tensor, " prompt"],
    subjects: Sequence[str],
) -> Fluency:
    """Of replies beside the model's own (unsteered) ones to the same prompts; log-probabilities per token as of
    `evaluation.reply_log_probs`, NaN for an empty reply."""
    answers = log_probs.where(~refused, torch.nan)
    change = answers - own_log_probs.where(~own_refused, torch.nan)

    def over(x: Tensor, least: int) -> Estimate | None:
        _, clusters = _known(x, subjects)
        return perplexity(x, subjects) if len(clusters) >= least and len(set(clusters)) > 1 else None

    said, empty = int((~answers.isnan()).sum()), int(log_probs.isnan().sum())
    return Fluency(over(answers, 2), over(change, LEAST_PAIRS), said, empty, len(log_probs))


def _known(x: Float[Tensor, " text"], subjects: Sequence[str]) -> tuple[Float[Tensor, " known"], list[str]]:
    known = ~x.isnan()
    return x[known], [s for s, k in zip(subjects, known.tolist(), strict=True) if k]
