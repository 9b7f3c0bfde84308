"""Prompting baselines: a system prompt, no edit; the neutral one as long as the others; the question stays the same."""

from __future__ import annotations

import pytest

from rsteer_interp.errors import UserError
from rsteer_interp.methods.base import Method
from rsteer_interp.methods.prompting import NEUTRAL, OPEN, SAFE, PromptNeutral, PromptOpen, PromptSafe, SystemPrompt
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
