"""What is measured of one treatment on given prompts: first-token log-odds, judged replies, effects on benign answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.batch import ChatTemplate
from rsteer_interp.evaluation import AnswerEffects, answer_effects, answer_log_probs, log_odds, prompted_effects
from rsteer_interp.gates import balanced_threshold
from rsteer_interp.methods import Material, Treatment
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Prompt
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.studies.study import Study


@dataclass(frozen=True, eq=False)
class Reading:
    """Measures on one study's model, with the thresholds that tell refused from answered prompts by their log-odds."""

    study: Study
    material: Material

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Of the removed set (with its contrast) and of the kept set, from unsteered select prompts."""
        m = self.material
        return {m.remove: self._threshold(m.remove, m.contrast), m.keep: self._threshold(m.keep)}

    def _threshold(self, *sets: str) -> float:
        parts = [self.material.select[name] for name in sets]
        odds = self.odds([text for part in parts for text in part.texts], Treatment())
        confidence = torch.cat([part.confidence for part in parts])
        return balanced_threshold(odds[confidence > 0], {"answered": odds[confidence < 0]})

    def odds(self, texts: Sequence[str], treatment: Treatment) -> Float[Tensor, " prompt"]:
        rows = self._template(treatment).encode_all(texts)
        return log_odds(self.study.backend, rows, self.study.refusal_tokens, treatment.edit)

    def refused(self, name: str, texts: Sequence[str], treatment: Treatment) -> Bool[Tensor, " prompt"]:
        """Whether prompts of the removed or the kept set are read as refused, by their log-odds."""
        return self.odds(texts, treatment) > self.thresholds[name]

    def judged(
        self, texts: Sequence[str], treatment: Treatment, label: str
    ) -> tuple[Bool[Tensor, " prompt"], Float[Tensor, " prompt"]]:
        """Whether greedy replies refuse, and their mean log-probability per token under the unchanged model (nats)."""
        backend, template = self.study.backend, self.study.template
        rows = self._template(treatment).encode_all(texts)
        with progress(label, len(texts)) as advance:
            groups = reply_and_judge(
                backend,
                rows,
                texts,
                self.study.judge,
                max_new_tokens=self.study.config.tokens,
                edit=treatment.edit,
                on_batch=advance,
            )
        replies = [group[0] for group in groups]
        log_prob = torch.zeros(len(texts), dtype=torch.float64)
        said = [i for i, reply in enumerate(replies) if reply.text]
        if said:
            log_prob[said] = answer_log_probs(backend, [template.encode(texts[i], replies[i].text) for i in said])
        return torch.tensor([reply.verdict.refused for reply in replies]), log_prob

    def effects(self, talks: Sequence[Prompt], treatment: Treatment) -> AnswerEffects:
        """Shift and KL of given benign answers."""
        backend = self.study.backend
        rows = [self.study.template.encode(talk.prompt, talk.answer) for talk in talks]
        if treatment.system is None:
            return answer_effects(backend, rows, treatment.edit)
        prompted = [self._template(treatment).encode(talk.prompt, talk.answer) for talk in talks]
        return prompted_effects(backend, rows, prompted, treatment.edit)

    def _template(self, treatment: Treatment) -> ChatTemplate:
        template = self.study.template
        return template if treatment.system is None else replace(template, system=treatment.system)
