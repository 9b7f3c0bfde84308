"""Judged replies under a gated edit: only prompts for which the gate holds are run, all others keep the base's reply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.each import Each
from rsteer_interp.evaluation import answer_log_probs
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.statistics.intervals import Estimate
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
    """Of one configuration; see `outcomes_of_each`."""
    return outcomes_of_each(study, split, name, [steering], n)[0]


def outcomes_of_each(
    study: Study, split: Split, name: str, steerings: Sequence[Steering], n: int | None = None
) -> list[Outcome]:
    """Replies under every configuration, decoded together. A gate decides on the prompt alone and leaves the rest of the batch
    as it is, so a prompt for which it does not hold has the base's reply, which is in the scores already."""
    base = study.replies(split, name, n)
    found: list[Outcome] = []
    for steering in steerings:
        edited = torch.ones(len(base.refused), dtype=torch.bool)
        if steering.gate is not None:
            edited = holds(study, steering.gate, split, name, n)
        found.append(Outcome(base.refused, base.refused.clone(), edited, base.log_prob, base.log_prob.clone()))
    run = [(setting, i) for setting, got in enumerate(found) for i in got.edited.nonzero()[:, 0].tolist()]
    if run:
        texts = [base.texts[i] for _, i in run]
        rows = [replace(study.template.encode(base.texts[i]), setting=setting) for setting, i in run]
        with progress(f"steered replies, {split} {name}", len(rows)) as advance:
            replies = reply_and_judge(
                study.backend,
                rows,
                texts,
                study.judge,
                max_new_tokens=study.config.tokens,
                edit=Each(tuple(steering.edit() for steering in steerings)),
                on_batch=advance,
            )
        log_probs = reply_log_probs(study, texts, [group[0].text for group in replies])
        for (setting, i), group, log_prob in zip(run, replies, log_probs, strict=True):
            found[setting].after[i] = group[0].verdict.refused
            found[setting].log_prob_after[i] = log_prob
    return found


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
