"""Judged replies under a gated edit: only prompts for which the gate holds are run, all others keep the base's reply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.evaluation import answer_log_probs
from rsteer_interp.nulls import Estimate
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.steering import Steering
from rsteer_interp.studies.selective_steering.condition import holds
from rsteer_interp.studies.study import Study


@dataclass(frozen=True, eq=False)
class Outcome:
    """One set's prompts before and after: refused or not, whether the edit was on, and the mean log-probability per token
    of the reply under the unsteered model (nats)."""

    before: Bool[Tensor, " prompt"]
    after: Bool[Tensor, " prompt"]
    edited: Bool[Tensor, " prompt"]
    log_prob_before: Float[Tensor, " prompt"]
    log_prob_after: Float[Tensor, " prompt"]


def outcome(study: Study, split: Split, name: str, steering: Steering, n: int | None = None) -> Outcome:
    """A gate decides on the prompt alone and leaves the rest of the batch as it is, so a prompt for which it does not hold
    has the base's reply, which is in the scores already."""
    base = study.replies(split, name, n)
    edited = torch.ones(len(base.refused), dtype=torch.bool)
    if steering.gate is not None:
        edited = holds(study, steering.gate, split, name, n)
    after, log_prob = base.refused.clone(), base.log_prob.clone()
    rows = edited.nonzero()[:, 0].tolist()
    if rows:
        texts = [base.texts[i] for i in rows]
        with progress(f"steered replies, {split} {name}", len(texts)) as advance:
            replies = reply_and_judge(
                study.backend,
                study.template.encode_all(texts),
                texts,
                study.judge,
                max_new_tokens=study.config.tokens,
                edit=steering.edit(),
                on_batch=advance,
            )
        after[edited] = torch.tensor([group[0].verdict.refused for group in replies])
        log_prob[edited] = reply_log_probs(study, texts, [group[0].text for group in replies])
    return Outcome(base.refused, after, edited, base.log_prob, log_prob)


def reply_log_probs(study: Study, prompts: Sequence[str], replies: Sequence[str]) -> Float[Tensor, " prompt"]:
    """Mean log-probability per token of given replies under the unsteered model; an empty reply counts as certain (0)."""
    out = torch.zeros(len(prompts), dtype=torch.float64)
    said = [i for i, reply in enumerate(replies) if reply]
    if said:
        rows = [study.template.encode(prompts[i], replies[i]) for i in said]
        out[said] = answer_log_probs(study.backend, rows)
    return out


def perplexity(log_probs: Float[Tensor, " reply"], seed: int = 0) -> Estimate:
    """exp of minus the mean log-probability per token, mean over replies, with its interval."""
    mean = Estimate.of((-log_probs).tolist(), seed=seed)
    return Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)
