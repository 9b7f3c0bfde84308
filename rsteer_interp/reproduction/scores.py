"""Step 1: refusal confidence c(x) of the fit and select prompts, and the tokens with which refusals begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.measures import refusal_tokens
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.refusal_scores import NEUTRAL_BAND, REFUSES_ABOVE, confidence_of, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import POLITICAL
from rsteer_interp.statistics.intervals import Rate

LEAST_CLASS = 8  # fewest refusing and complying fit prompts on which a direction is estimated


@dataclass(frozen=True)
class Scored:
    """Prompts of one split with their sets and confidence."""

    texts: list[str]
    sets: list[str]
    subjects: list[str]
    confidence: Float[Tensor, " prompt"]

    def subset(self, index: Sequence[int]) -> Scored:
        """Some of the prompts, in the order given."""
        texts, sets, subjects = ([each[i] for i in index] for each in (self.texts, self.sets, self.subjects))
        return Scored(texts, sets, subjects, self.confidence[list(index)])

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Each prompt's set and subject: what verdicts are permuted inside, where topic is to tell nothing."""
        return list(zip(self.sets, self.subjects, strict=True))

    @property
    def refusing(self) -> list[int]:
        return [i for i, c in enumerate(self.confidence.tolist()) if c > REFUSES_ABOVE]

    @property
    def political(self) -> list[int]:
        """Refusing prompts on sensitive subjects: those from which refusal is to be removed.

        The ordinary ones of which a few replies refused are mostly answered when asked again (demo model, by a beta-binomial fit of
        K = 2 replies: mean c of -0.2, against 0.5 of the sensitive ones), so that there is nothing to remove.
        """
        return [i for i in self.refusing if self.sets[i] == POLITICAL]


def score(context: Context, split: Split) -> tuple[Scored, dict[str, Any]]:
    """Scored prompts of the split, and the step's data (replies are not kept, only what is measured of them)."""
    counts = context.preset.fit if split == "fit" else context.preset.select

    prompts = context.prompts(split, counts)

    def compute() -> tuple[dict[str, Any], None]:
        sampling = Sampling(context.preset.samples, 1.0, context.seed)
        with progress(f"scoring {split} prompts", len(prompts)) as advance:
            replies = reply_and_judge(
                context.backend,
                context.encode(prompts),
                [p.prompt for p in prompts],
                context.judge,
                max_new_tokens=context.preset.tokens,
                sampling=sampling,
                on_batch=advance,
            )
        return {
            "prompts": [p.prompt for p in prompts],
            "sets": [p.set for p in prompts],
            "subjects": [p.subject for p in prompts],
            "confidence": confidence_of(replies).tolist(),
            "first_tokens": [[r.first_token for r in group] for group in replies],
            "refused": [[r.verdict.refused for r in group] for group in replies],
            "undecided": sum(r.verdict.z == 0 for group in replies for r in group),
        }, None

    data = context.stage(f"1_scores_{split}", {"sample": prompts}, compute).data
    scored = Scored(
        data["prompts"], data["sets"], data["subjects"], torch.tensor(data["confidence"], dtype=torch.float64)
    )
    return scored, data


def not_applicable(fit: Scored, select: Scored) -> str | None:
    """Why the experiment cannot be done on this model, with the base refusal rate; None when it can."""
    political = [
        (c > REFUSES_ABOVE, subject)
        for s in (fit, select)
        for c, (name, subject) in zip(s.confidence.tolist(), s.groups, strict=True)
        if name == POLITICAL
    ]
    base = Rate.of([refused for refused, _ in political], clusters=[subject for _, subject in political])
    refusing = int((fit.confidence > NEUTRAL_BAND).sum())
    complying = int((fit.confidence < -NEUTRAL_BAND).sum())
    said = (
        f"base refusal {base.rate:.0%} of {base.n} political prompts (95 % interval {base.low:.0%} to {base.high:.0%})"
    )
    if refusing < LEAST_CLASS or len(select.political) < LEAST_CLASS // 2:
        return (
            f"not applicable: {said}; this model does not refuse often enough for a refusal direction to be estimated"
        )
    if len({select.subjects[i] for i in select.political}) < 2:
        return f"not applicable: {said}; those of the select split are of one subject, which gives no interval"
    if complying < LEAST_CLASS:
        return f"not applicable: {said}; this model answers too few prompts to compare with"
    return None


def opening_tokens(data: dict[str, Any]) -> tuple[int, ...]:
    """Refusal-opening tokens from the fit replies."""
    first = [token for group in data["first_tokens"] for token in group]
    refused = [r for group in data["refused"] for r in group]
    return refusal_tokens(first, refused)
