"""Starting a sweep at the first edited block gives what running every block gives, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.evaluation import answer_effects, answer_log_probs, effects_of_each, log_odds
from rsteer_interp.interventions import ablate, add
from tests.tiny_models import FAMILIES, tiny_backend

ANSWERS = ["i can tell you", "yes", "the river is in the city ."]
TEXTS = ["tell me about the city", "why is the river ?", "write"]


def _edits(d: int) -> list[Edit | None]:
    v = {Site(layer): torch.randn(d, generator=torch.Generator().manual_seed(layer)) for layer in (2, 3)}
    return [None, add(v, dict.fromkeys(v, 1.5)), ablate({Site(3): v[Site(3)]}), ablate({Site(0): v[Site(2)]})]


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_rows_give_the_same_numbers(family: str) -> None:
    backend = tiny_backend(family)
    rows = backend.template().encode_all(TEXTS, ANSWERS)
    prompts = backend.template().encode_all(TEXTS)
    for edit in _edits(backend.d_model):
        for layer in (0, 1, 2):
            plain = log_odds(backend, prompts, [5, 9], edit)
            torch.testing.assert_close(
                log_odds(backend, backend.prepare(prompts, layer), [5, 9], edit), plain, atol=1e-4, rtol=0
            )
            plain = answer_log_probs(backend, rows, edit)
            torch.testing.assert_close(
                answer_log_probs(backend, backend.prepare(rows, layer, 2), edit), plain, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_base_pass_serves_every_edit(family: str) -> None:
    backend = tiny_backend(family)
    rows, edits = backend.template().encode_all(TEXTS, ANSWERS), _edits(backend.d_model)
    together = effects_of_each(backend, backend.prepare(rows, 2, 2), edits)
    for found, edit in zip(together, edits, strict=True):
        plain = answer_effects(backend, rows, edit)
        torch.testing.assert_close(found.shift, plain.shift, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.kl, plain.kl, atol=1e-4, rtol=0)
    assert float(together[1].kl.min()) > 1e-3


def test_an_edit_before_the_start_runs_the_whole_model() -> None:
    backend = tiny_backend("llama")
    prompts = backend.template().encode_all(TEXTS)
    edit = _edits(backend.d_model)[3]
    started = log_odds(backend, backend.prepare(prompts, 2), [5, 9], edit)
    assert float((started - log_odds(backend, prompts, [5, 9])).abs().max()) > 1e-3
    torch.testing.assert_close(started, log_odds(backend, prompts, [5, 9], edit), atol=1e-4, rtol=0)


def test_blocks_are_whole_again_after_a_sweep_that_failed() -> None:
    class Breaks:
        sites = frozenset({Site(3)})
        pointwise = True

        def __call__(self, x: torch.Tensor, at: object) -> torch.Tensor:
            raise RuntimeError("in the middle")

    backend = tiny_backend("llama")
    prompts = backend.template().encode_all(TEXTS)
    before = log_odds(backend, prompts, [5, 9])
    prepared = backend.prepare(prompts, 2)
    with pytest.raises(RuntimeError, match="in the middle"):
        log_odds(backend, prepared, [5, 9], Breaks())
    assert torch.equal(log_odds(backend, prompts, [5, 9]), before)


def test_answer_effects_are_zero_without_an_edit_and_answers_score_as_alone() -> None:
    backend = tiny_backend("qwen2")
    rows = backend.template().encode_all(TEXTS, ANSWERS)
    effects = answer_effects(backend, rows, None)
    assert float(effects.shift.abs().max()) < 1e-6
    assert float(effects.kl.abs().max()) < 1e-6
    together = answer_log_probs(backend, rows)
    for i, row in enumerate(rows):
        logits = backend.logits(backend.batch([row]), keep=row.answer_length + 1)[0, :-1].log_softmax(-1)
        own = logits.gather(-1, torch.tensor(row.ids[row.prompt :])[:, None]).mean()
        assert float(together[i]) == pytest.approx(float(own), abs=1e-5)
