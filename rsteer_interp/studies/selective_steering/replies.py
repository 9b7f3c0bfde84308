"""Judged replies under a gated edit: only prompts for which the gate holds are run, all others keep the base's reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.each import Each
from rsteer_interp.evaluation import reply_log_probs
from rsteer_interp.measures import Fluency, fluency
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.steering import Steering
from rsteer_interp.studies.selective_steering.condition import holds
from rsteer_interp.studies.study import Study


@dataclass(frozen=True, eq=False)
class Outcome:
    """One set's prompts before and after: refused or not, whether the edit was on, and the mean log-probability per token
    of the reply under the unsteered model (nats; NaN for an empty reply)."""

    subjects: list[str]
    before: Bool[Tensor, " prompt"]
    after: Bool[Tensor, " prompt"]
    edited: Bool[Tensor, " prompt"]
    log_prob_before: Float[Tensor, " prompt"]
    log_prob_after: Float[Tensor, " prompt"]

    def fluency(self, *, refusing: bool = False) -> Fluency:
        """Of the edited prompts' replies that answer, beside the unsteered answers to the same prompts; or of those that refuse."""
        subjects = [s for s, edited in zip(self.subjects, self.edited.tolist(), strict=True) if edited]
        on = self.edited
        after, own = self.log_prob_after[on], self.log_prob_before[on]
        return fluency(after, self.after[on] != refusing, own, self.before[on] != refusing, subjects)


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
        found.append(
            Outcome(base.subjects, base.refused, base.refused.clone(), edited, base.log_prob, base.log_prob.clone())
        )
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
        said = [() if group[0].empty else group[0].ids for group in replies]
        log_probs = reply_log_probs(study.backend, rows, said)
        for (setting, i), group, log_prob in zip(run, replies, log_probs, strict=True):
            found[setting].after[i] = group[0].verdict.refused
            found[setting].log_prob_after[i] = log_prob
    return found
