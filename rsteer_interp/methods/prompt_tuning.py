"""Prompt tuning: a written system prompt whose embeddings are trained on, so that one set is answered and another stays refused.

The soft prompt of Lester et al. (arXiv 2104.08691), started, as DRO (arXiv 2401.18018) does, from the embeddings of a sentence.
With theta the vectors in place of its tokens, and the refusal log-odds and replies of the model without it as what is kept:

    L(theta) = CE(refused prompts of `remove` -> compliance) + KL(plain || prompted) on ordinary replies
             + w mean max(0, plain log-odds - prompted log-odds) of refused prompts of `keep`

DRO's own loss moves states along a refusal direction; this one is ours, the terms of RDO (`rdo.RefusalLoss`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Batch, Tokens, length_groups
from rsteer_interp.errors import UserError
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.methods.prompting import OPEN
from rsteer_interp.methods.rdo import with_own_replies
from rsteer_interp.soft_prompt import SoftPrompt, positions_of, prompt_vectors
from rsteer_interp.training import Descent, Trained, answer_mean, cross_entropy, target_logits, train


@dataclass(frozen=True, eq=False)
class PromptLoss:
    """L(theta) as a `training.Loss`, a minibatch of every term per step, in turn.

    `refused` end with the compliance opener, `ordinary` with the model's own first tokens under its own template, whose logits
    there are `plain_logits`; `plain_odds` are the log-odds of `kept` there. Rows stand in one order with and without the prompt.
    """

    backend: Backend
    positions: Int[Tensor, " k"]
    refusal_tokens: tuple[int, ...]
    refused: tuple[Batch, ...]
    ordinary: tuple[Batch, ...]
    kept: tuple[Batch, ...]
    plain_logits: tuple[Float[Tensor, "row pos vocab"], ...]
    plain_odds: tuple[Float[Tensor, " row"], ...]
    retain: float

    def __call__(self, vectors: Float[Tensor, "k d"], step: int) -> Iterator[Float[Tensor, ""]]:
        edit = SoftPrompt(self.positions, vectors)
        batch = self.refused[step % len(self.refused)]
        yield cross_entropy(target_logits(self.backend, batch, edit, grad=True), batch).mean()
        i = step % len(self.ordinary)
        logits = target_logits(self.backend, self.ordinary[i], edit, grad=True)
        yield answer_mean(kl_divergence(self.plain_logits[i], logits), self.ordinary[i]).mean()
        if self.kept:
            i = step % len(self.kept)
            odds = refusal_log_odds(self.backend.logits(self.kept[i], edit, grad=True)[:, -1], self.refusal_tokens)
            yield self.retain * (self.plain_odds[i] - odds).relu().mean()


@dataclass(frozen=True)
class PromptTuning:
    """The open system prompt, trained. Strength: how far along the line from its embeddings (0) to the trained vectors (1)."""

    name: ClassVar[str] = "prompt_tuned"
    label: ClassVar[str] = "System prompt: trained"
    source: ClassVar[str] = "Lester et al., arXiv 2104.08691; from a written prompt as DRO, arXiv 2401.18018"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 1.5)

    text: str = OPEN
    compliance: str = "Sure, here"
    reply_tokens: int = 4  # of the model's own replies to ordinary prompts
    n_prompts: int = 32  # at most, for each term
    batch: int = 8
    steps: int = 20
    rate: float = 0.1
    """Learning rate of AdamW in units of the embeddings' root mean square: about the step of a coordinate."""
    retain: float = 1.0

    def fit(self, material: Material) -> Fitted:
        positions = positions_of(material.backend.template(system=self.text), self.text)
        start = prompt_vectors(material.backend, material.backend.template(system=self.text), positions)
        trained = self.train(material, positions, start).value.float()

        def treatment(strength: float) -> Treatment:
            return Treatment(SoftPrompt(positions, start + strength * (trained - start)), system=self.text)

        return treatment

    def train(self, material: Material, positions: Int[Tensor, " k"], start: Float[Tensor, "k d"]) -> Trained:
        """The vectors, in float64, with their losses."""
        lr = self.rate * float(start.double().square().mean().sqrt())
        return train(start, self.loss(material, positions), Descent(steps=self.steps, lr=lr), "free")

    def loss(self, material: Material, positions: Int[Tensor, " k"]) -> PromptLoss:
        """L(theta) on the material's fit split. UserError where nothing is refused of `remove`, or nothing ordinary answered."""
        backend, plain = material.backend, material.template
        prompted = backend.template(system=self.text)
        remove, keep = material.fit[material.remove], material.fit[material.keep]
        sets = [material.fit[name] for name in (material.contrast, *material.ordinary)]
        refused, kept = (self._draw(x.where(x.refused).texts, material) for x in (remove, keep))
        answered = self._draw([text for x in sets for text in x.where(x.answered).texts], material)
        if not refused or not answered:
            raise UserError(
                f"{len(refused)} refused prompts of '{material.remove}' and {len(answered)} answered ordinary ones; "
                "prompt tuning needs both, use larger sets"
            )
        replied = with_own_replies(backend, plain.encode_all(answered), self.reply_tokens)
        groups = self._groups(replied, material.seed)
        own = [row.ids[row.prompt :] for row in replied]
        ordinary = [
            replace(row, ids=(*row.ids, *ids)) for row, ids in zip(prompted.encode_all(answered), own, strict=True)
        ]
        kept_groups = self._groups(plain.encode_all(kept), material.seed)
        with_opener = prompted.encode_all(refused, [self.compliance] * len(refused))
        return PromptLoss(
            backend,
            positions,
            material.refusal_tokens,
            _batches(backend, with_opener, self._groups(with_opener, material.seed)),
            _batches(backend, ordinary, groups),
            _batches(backend, prompted.encode_all(kept), kept_groups),
            # Clones, because what inference mode makes cannot be kept for a backward pass.
            tuple(target_logits(backend, b, None, grad=False).clone() for b in _batches(backend, replied, groups)),
            tuple(
                refusal_log_odds(backend.logits(b)[:, -1], material.refusal_tokens).clone()
                for b in _batches(backend, plain.encode_all(kept), kept_groups)
            ),
            self.retain,
        )

    def _draw(self, texts: Sequence[str], material: Material) -> list[str]:
        return random.Random(material.seed).sample(list(texts), min(self.n_prompts, len(texts)))

    def _groups(self, rows: Sequence[Tokens], seed: int) -> list[list[int]]:
        groups = [list(group) for group in length_groups(rows, self.batch)]
        random.Random(seed).shuffle(groups)
        return groups


def _batches(backend: Backend, rows: Sequence[Tokens], groups: Sequence[Sequence[int]]) -> tuple[Batch, ...]:
    return tuple(backend.batch([rows[i] for i in group]) for group in groups)
