"""What every method of the comparison keeps, whatever it does; a new line in METHODS is tested without a change here."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from rsteer_interp.evaluation import log_odds
from rsteer_interp.methods import METHODS, Method, Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.methods.candidates import Search
from tests.planted_material import held_out, planted_material, texts

PROMPTS = [*texts("political", "select")[:4], *texts("harm", "select")[:3], *texts("kitchen", "select")[:3]]


@cache
def _fitted(name: str) -> Fitted:
    return METHODS[name]().fit(planted_material())


def _odds(treatment: Treatment, prompts: list[str]) -> torch.Tensor:
    material = planted_material()
    rows = material.backend.template(treatment.system).encode_all(prompts)
    return log_odds(material.backend, rows, material.refusal_tokens, treatment.edit)


@pytest.mark.parametrize("name", METHODS)
def test_says_what_it_is(name: str) -> None:
    method = METHODS[name]()
    assert isinstance(method, Method) and is_dataclass(method) and method.name == name
    assert method.label and method.source
    assert list(method.strengths) == sorted(set(method.strengths)) and min(method.strengths) > 0
    assert METHODS[name]() == method  # its fields alone say what it does
    with pytest.raises(AttributeError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_is_treated_alike_alone_and_among_others(name: str) -> None:
    fitted = _fitted(name)
    treatment = fitted(METHODS[name].strengths[-1])
    together = _odds(treatment, PROMPTS)
    alone = torch.cat([_odds(treatment, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    assert float((together - _odds(Treatment(), PROMPTS)).abs().max()) > 1e-6, "it does something"


@pytest.mark.parametrize("name", METHODS)
def test_leaves_the_model_as_it_was_and_fits_the_same_again(name: str) -> None:
    before = _odds(Treatment(), PROMPTS)
    strength = METHODS[name].strengths[0]
    first = _odds(_fitted(name)(strength), PROMPTS)
    again = _odds(METHODS[name]().fit(planted_material())(strength), PROMPTS)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)
    assert torch.equal(_odds(Treatment(), PROMPTS), before)


@pytest.mark.parametrize("name", METHODS)
def test_generates(name: str) -> None:
    material, treatment = planted_material(), _fitted(name)(METHODS[name].strengths[0])
    rows = material.backend.template(treatment.system).encode_all(PROMPTS[:4])
    replies = material.backend.generate(material.backend.batch(rows), 3, treatment.edit)
    assert replies.ids.shape == (4, 3) and bool(torch.isfinite(replies.log_probs).all())


CHECKED = [name for name, method in METHODS.items() if hasattr(method, "checks")]


@pytest.mark.parametrize("name", CHECKED)
def test_its_own_checks_have_interval_n_and_null(name: str) -> None:
    method: Any = METHODS[name]()
    if hasattr(method, "search"):  # a rank correlation needs all of the few candidates that four layers have
        method = replace(method, search=Search(stride=1))
    found = method.checks(planted_material(), method.strengths[-1], held_out())
    assert found
    for check in found:
        e = check.value
        assert check.what and e.n >= 2 and e.low <= e.value <= e.high
        assert any(c.isdigit() for c in check.null), "the null is in words and numbers"


@pytest.mark.parametrize("name", CHECKED)
def test_its_checks_are_of_held_out_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on no select prompt: with the labels and the texts of select gone after the fit, the numbers stay."""
    method: Any = METHODS[name]()
    if hasattr(method, "search"):
        method = replace(method, search=Search(stride=1))
    material, held = planted_material(), held_out()
    seen: set[str] = set()
    for name_of in ("encode_all", "encode"):
        plain = getattr(type(material.template), name_of)

        def spy(template: Any, prompts: Any, *more: Any, plain: Any = plain) -> Any:
            seen.update([prompts] if isinstance(prompts, str) else prompts)
            return plain(template, prompts, *more)

        monkeypatch.setattr(type(material.template), name_of, spy)
    method.checks(material, method.strengths[-1], held)
    of_fit, of_select, of_held = (
        {text for one in part.values() for text in one.texts} for part in (material.fit, material.select, held)
    )
    assert not of_select & of_held
    if name in ("scans", "ace", "compliance"):  # nothing of theirs is chosen by running select prompts
        assert not seen & (of_select - of_fit)
    if name not in ("dbdi", "alphasteer"):  # whose checks are on prompts of other sets
        assert seen & of_held


def test_checks_are_there_for_the_papers_that_claim_something_to_check() -> None:
    assert {"cosmic", "scans", "cast", "alphasteer", "dbdi", "ace", "compliance"} <= set(CHECKED)
