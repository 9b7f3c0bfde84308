"""Starting a sweep at the first edited block gives what running every block gives, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rsteer_interp.activations import last_states
from rsteer_interp.backends.each import Each, together
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, answer_log_probs, effects_of_each, log_odds, log_odds_of_each
from rsteer_interp.interventions import AtPositions, ablate, add
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_start_serves_edits_that_share_less_than_it_knows_to_be_shared(family: str) -> None:
    """Prompts with words in common: an edit of the instruction's tokens shares the template alone, a row-wise one nothing."""
    backend = tiny_backend(family)
    rows = backend.template().encode_all(
        ["tell me about the city", "tell me about the river and the island", "tell me"]
    )
    v = {Site(2): torch.randn(backend.d_model, generator=torch.Generator().manual_seed(0))}
    edits = [
        add(v, {Site(2): 1.5}),
        AtPositions(add(v, {Site(2): 1.5}), frozenset({"instruction"})),
        add(v, {Site(2): torch.tensor([1.0, -2.0, 3.0])}),
    ]
    ran: list[int] = []
    (_, batch), *rest = backend.prepare(rows, 2, 3).batches
    assert not rest and batch.start is not None and batch.start.prefix.shape[1] > rows[0].prefix
    handles = [
        next(block.children()).register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(backend.blocks)  # type: ignore[attr-defined]
    ]
    plain = replace(batch, start=None)
    for edit in edits:
        ran.clear()
        started = backend.logits(batch, edit)
        assert set(ran) == {2, 3}, "the first blocks are left out, for the prefix too"
        torch.testing.assert_close(started, backend.logits(plain, edit), atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reading_early_runs_no_block_behind_it_for_the_prefix_neither(family: str) -> None:
    backend = tiny_backend(family)
    rows, ran = backend.template().encode_all(TEXTS), list[int]()
    assert backend.can_share_prefix  # asks the model, once
    handles = [
        next(block.children()).register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(backend.blocks)  # type: ignore[attr-defined]
    ]
    early = last_states(backend, rows, [Site(2)])[Site(2)]
    assert set(ran) == {0, 1} and len(ran) > 2, "the prefix was run apart"
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(early, last_states(backend, rows, [Site(2), Site(4)])[Site(2)], atol=1e-5, rtol=1e-5)


def test_one_pass_prepares_several_layers() -> None:
    backend = tiny_backend("qwen2")
    rows = backend.template().encode_all(TEXTS)
    v = {Site(3): torch.randn(backend.d_model, generator=torch.Generator().manual_seed(0))}
    edit = add(v, {Site(3): 1.5})
    plain, before = log_odds(backend, rows, [5, 9], edit), backend.prompts_run
    prepared = backend.prepare_each(rows, [0, 1, 3])
    assert backend.prompts_run == before + len(rows)
    for layer, each in prepared.items():
        assert all((batch.start is None) == (layer == 0) for _, batch in each.batches)
        torch.testing.assert_close(log_odds(backend, each, [5, 9], edit), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_that_share_a_pass_give_what_each_gives(family: str, layer: int, size: int) -> None:
    backend = tiny_backend(family)
    backend.batch_size = size
    prompts, d = backend.template().encode_all(TEXTS), backend.d_model
    rows = torch.randn(d, generator=torch.Generator().manual_seed(0))
    by_place = add({Site(2): rows}, {Site(2): torch.tensor([1.0, -2.0, 3.0][: min(size, 3)])})
    edits = [*_edits(d), *_edits(d)[1:3], *([by_place] if size == 3 else [])]
    apart = torch.stack([log_odds(backend, backend.prepare(prompts, layer), [5, 9], edit) for edit in edits])
    passes = [len(part) for part in together(edits, size // 3)]
    assert sum(passes) == len(edits) and max(passes) == {1: 1, 3: 1, 7: 2, 64: 6}[size]
    before = backend.prompts_run
    found = log_odds_of_each(backend, backend.prepare(prompts, layer), [5, 9], edits)
    torch.testing.assert_close(found, apart, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_odds_of_each(backend, prompts, [5, 9], edits), apart, atol=1e-4, rtol=0)
    assert backend.prompts_run - before >= 2 * len(edits) * len(prompts), "what is charged is what was run"
    assert len({round(float(odds.sum()), 3) for odds in found}) == len(edits) - 2, "but for the two given twice"


def test_an_edit_that_depends_on_other_rows_runs_by_itself() -> None:
    v = {Site(2): torch.ones(4)}
    by_place, plain = add(v, {Site(2): torch.tensor([1.0, 2.0])}), add(v, {Site(2): 1.0})
    assert [len(part) for part in together([None, plain, by_place, by_place, plain, None], 9)] == [2, 1, 1, 2]
    with pytest.raises(UserError, match="depends on other rows"):
        Each((plain, by_place))


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
