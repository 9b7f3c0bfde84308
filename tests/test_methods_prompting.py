"""Prompting baselines: a system prompt, no edit; the neutral one as long as the others; the question stays the same."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.methods.base import Method
from rsteer_interp.methods.prompt_tuning import PromptTuning
from rsteer_interp.methods.prompting import NEUTRAL, OPEN, SAFE, PromptNeutral, PromptOpen, PromptSafe, SystemPrompt
from rsteer_interp.soft_prompt import positions_of, prompt_vectors
from tests.planted_material import planted_material as planted_refusing_material
from tests.two_direction_material import planted_material

ALL = (PromptOpen, PromptSafe, PromptNeutral)


@pytest.mark.parametrize("kind", ALL)
def test_a_prompt_is_all_that_is_given(kind: type[SystemPrompt]) -> None:
    material = planted_material("llama")
    method = kind()
    assert isinstance(method, Method) and method.strengths == (1.0,)
    treatment = method.fit(material)(1.0)
    assert treatment.edit is None and treatment.system == method.text
    assert kind("be brief").fit(material)(1.0).system == "be brief"


@pytest.mark.parametrize("kind", ALL)
def test_it_stands_before_the_question_and_changes_nothing_of_it(kind: type[SystemPrompt]) -> None:
    material = planted_material("llama")
    system = kind().fit(material)(1.0).system
    question = "tell me about the river"
    plain = material.backend.template().encode(question)
    prompted = material.backend.template(system=system).encode(question)
    assert system in material.backend.template(system=system).render(question)[0]
    assert prompted.ids[prompted.prefix :] == plain.ids[plain.prefix :]
    assert prompted.prefix > plain.prefix + 30
    assert prompted.ids[: plain.prefix] != plain.ids[: plain.prefix]  # the template's own system prompt is gone


def test_the_neutral_prompt_is_as_long_as_the_others_and_names_neither_aim() -> None:
    lengths = [len(text.split()) for text in (NEUTRAL, OPEN, SAFE)]
    assert max(lengths) <= 1.15 * min(lengths)
    aims = (
        "politic",
        "open",
        "frank",
        "safe",
        "harm",
        "hurt",
        "law",
        "decline",
        "refus",
        "careful",
        "answer",
        "direct",
    )
    assert not [word for word in aims if word in NEUTRAL.lower()]
    assert "politic" in OPEN.lower() and "cannot help" in SAFE.lower()
    assert len({kind.name for kind in ALL} | {kind.label for kind in ALL}) == 6


def test_a_template_without_a_system_role_is_refused_when_fitting() -> None:
    material = planted_material("llama")
    material.backend.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[0]['content'] }} assistant "
    )
    with pytest.raises(UserError, match="without a system prompt"):
        PromptOpen().fit(material)


def test_a_tuned_prompt_starts_as_the_written_one_and_its_loss_falls() -> None:
    material = planted_refusing_material()
    method = PromptTuning(text=OPEN, steps=12, n_prompts=8)
    fitted = method.fit(material)
    none, full = fitted(0.0), fitted(1.0)
    assert none.system == full.system == OPEN
    template = material.backend.template(system=OPEN)
    rows = template.encode_all(material.select[material.remove].texts)
    written = log_odds(material.backend, rows, material.refusal_tokens)
    assert torch.allclose(log_odds(material.backend, rows, material.refusal_tokens, none.edit), written, atol=1e-3)
    positions = positions_of(template, OPEN)
    start = prompt_vectors(material.backend, template, positions)
    losses = method.train(material, positions, start).losses
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_tuned_prompt_is_held_to_the_model_without_it() -> None:
    """What is kept is measured against the plain template, row by row, in the same batches."""
    material = planted_refusing_material()
    positions = positions_of(material.backend.template(system=OPEN), OPEN)
    loss = PromptTuning(n_prompts=8, batch=3).loss(material, positions)
    assert len(loss.ordinary) == len(loss.plain_logits) and len(loss.kept) == len(loss.plain_odds) > 1
    for prompted, logits in zip(loss.ordinary, loss.plain_logits, strict=True):
        assert logits.shape[:2] == (len(prompted.rows), max(row.answer_length for row in prompted.rows))
    for batch, odds in zip(loss.kept, loss.plain_odds, strict=True):
        again = []
        for row in batch.rows:
            question = row.ids[row.prefix : row.instruction]
            plain = next(
                r
                for r in material.template.encode_all(material.fit[material.keep].texts)
                if r.ids[r.prefix : r.instruction] == question
            )
            again.append(float(log_odds(material.backend, [plain], material.refusal_tokens)))
        torch.testing.assert_close(odds.double(), torch.tensor(again).double(), atol=1e-4, rtol=1e-4)
