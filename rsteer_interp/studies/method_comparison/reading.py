"""What is measured of one treatment on given prompts: judged replies with their log-odds, effects on benign answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rsteer_interp.backends.edits import Edit
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.evaluation import AnswerEffects, effects_of_each, prompted_effects
from rsteer_interp.methods import Material, Treatment
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Prompt, Split
from rsteer_interp.refusal_scores import Reply, replies_of_each
from rsteer_interp.studies.study import BaseReplies, Study


@dataclass(frozen=True, eq=False)
class Reading:
    """Measures on one study's model. Refused or answered is what a judge says of a reply: what first-token log-odds say depends on
    the words that replies begin with, which a treatment may change."""

    study: Study
    material: Material

    def refused_prompts(self, split: Split, n: int) -> dict[str, BaseReplies]:
        """Prompts of the removed and of the kept set whose unsteered reply refuses, at most n of each."""
        base = {name: self.study.replies(split, name) for name in (self.material.remove, self.material.keep)}
        return {name: found.where(found.refused, n) for name, found in base.items()}

    def replies_of_each(
        self, asked: Mapping[str, BaseReplies], treatments: Sequence[Treatment], label: str
    ) -> list[dict[str, list[Reply]]]:
        """A judged greedy reply to every prompt of every set under every treatment; those of one system prompt decode together."""
        texts = [text for base in asked.values() for text in base.texts]
        found: dict[int, list[Reply]] = {}
        with progress(label, len(texts) * len(treatments)) as advance:
            for system in dict.fromkeys(t.system for t in treatments):
                chosen = [i for i, t in enumerate(treatments) if t.system == system]
                edits: list[Edit | None] = [treatments[i].edit for i in chosen]
                replies = replies_of_each(
                    self.study.backend,
                    self.template(treatments[chosen[0]]).encode_all(texts),
                    texts,
                    self.study.judge,
                    edits,
                    max_new_tokens=self.study.config.tokens,
                    refusal_tokens=self.study.refusal_tokens,
                    on_batch=advance,
                )
                found |= zip(chosen, replies, strict=True)
        in_order = (iter(found[i]) for i in range(len(treatments)))
        return [{name: [next(each) for _ in base.texts] for name, base in asked.items()} for each in in_order]

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
