"""What is measured of one treatment on given prompts: first-token log-odds, judged replies, effects on benign answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.batching import Rows
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.evaluation import AnswerEffects, effects_of_each, log_odds_of_each, prompted_effects
from rsteer_interp.gates import balanced_threshold
from rsteer_interp.methods import Material, Treatment
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Prompt, Split
from rsteer_interp.refusal_scores import Reply, reply_and_judge
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
        odds = self.odds_of_each([text for part in parts for text in part.texts], [Treatment()])[0]
        confidence = torch.cat([part.confidence for part in parts])
        return balanced_threshold(odds[confidence > 0], {"answered": odds[confidence < 0]})

    def refused_prompts(self, split: Split, n: int) -> dict[str, list[str]]:
        """Prompts of the removed and of the kept set whose unsteered reply refuses, at most n of each."""
        found = {}
        for name in (self.material.remove, self.material.keep):
            base = self.study.replies(split, name)
            found[name] = [t for t, refused in zip(base.texts, base.refused.tolist(), strict=True) if refused][:n]
        return found

    def outcomes(
        self, split: Split, treatments: Sequence[Treatment], n: int
    ) -> list[tuple[Bool[Tensor, " removed"], Bool[Tensor, " kept"]]]:
        """Under every treatment, by log-odds: which of those prompts of the removed set are answered, of the kept set refused."""
        texts, m = self.refused_prompts(split, n), self.material
        edge = len(texts[m.remove])
        return [
            (odds[:edge] <= self.thresholds[m.remove], odds[edge:] > self.thresholds[m.keep])
            for odds in self.odds_of_each([*texts[m.remove], *texts[m.keep]], treatments)
        ]

    def odds_of_each(self, texts: Sequence[str], treatments: Sequence[Treatment]) -> list[Float[Tensor, " prompt"]]:
        """First-token log-odds under every treatment. What no edit among those of one system prompt reaches is run once."""
        backend, found = self.study.backend, dict[int, Tensor]()
        for system in dict.fromkeys(t.system for t in treatments):
            chosen = [i for i, t in enumerate(treatments) if t.system == system]
            tokens = self.template(treatments[chosen[0]]).encode_all(texts)
            edits = {i: treatments[i].edit for i in chosen}
            begin = min((site.layer for edit in edits.values() if edit is not None for site in edit.sites), default=0)
            late = len(chosen) > 1 and begin
            rows: Rows = backend.prepare(tokens, min(begin, backend.n_layers - 1)) if late else tokens
            odds = log_odds_of_each(backend, rows, self.study.refusal_tokens, list(edits.values()))
            found |= zip(edits, odds, strict=True)
        return [found[i] for i in range(len(treatments))]

    def replies(self, texts: Mapping[str, Sequence[str]], treatment: Treatment, label: str) -> dict[str, list[Reply]]:
        """A judged greedy reply to every prompt of every set, decoded together."""
        every = [text for part in texts.values() for text in part]
        with progress(label, len(every)) as advance:
            found = reply_and_judge(
                self.study.backend,
                self.template(treatment).encode_all(every),
                every,
                self.study.judge,
                max_new_tokens=self.study.config.tokens,
                edit=treatment.edit,
                on_batch=advance,
            )
        replies = iter(found)
        return {name: [next(replies)[0] for _ in part] for name, part in texts.items()}

    def effects_of_each(self, talks: Sequence[Prompt], treatments: Sequence[Treatment]) -> list[AnswerEffects]:
        """Shift and KL of given benign answers under every treatment."""
        backend, plain = self.study.backend, [t.edit for t in treatments if t.system is None]
        rows = [self.study.template.encode(talk.prompt, talk.answer) for talk in talks]
        edited = iter(effects_of_each(backend, rows, plain) if plain else ())

        def prompted(treatment: Treatment) -> AnswerEffects:
            other = [self.template(treatment).encode(talk.prompt, talk.answer) for talk in talks]
            return prompted_effects(backend, rows, other, treatment.edit)

        return [next(edited) if t.system is None else prompted(t) for t in treatments]

    def template(self, treatment: Treatment) -> ChatTemplate:
        template = self.study.template
        return template if treatment.system is None else replace(template, system=treatment.system)
