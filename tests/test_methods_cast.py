"""CAST as a method: behaviour vectors from suffixes, the condition in the first half, and prompts that do not meet it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import add
from rsteer_interp.methods import Method
from rsteer_interp.methods.cast import ANSWERS, REFUSALS, Cast, KeepNorm, matched, suffix_directions
from rsteer_interp.methods.depth import layers_between
from tests.conditional_material import REFUSAL_TOKENS as TOKENS
from tests.conditional_material import material
from tests.tiny_models import KINDS, Kind, tiny_backend

REFUSE, ANSWER = ("i do not .", "no a river"), ("yes i can tell you about the river", "what")


class Watch:
    """Keeps the whole stream of a prompt pass at one site."""

    pointwise = False

    def __init__(self, site: Site) -> None:
        self.sites, self.seen = frozenset({site}), torch.empty(0)

    def __call__(self, x: torch.Tensor, at: At) -> torch.Tensor:
        self.seen = x.clone()
        return x


def moved(backend: Backend, edit: Edit, rows: list[Tokens], site: Site) -> torch.Tensor:
    before, after = Watch(site), Watch(site)
    backend.run(backend.batch(rows), compose(before, edit, after))  # type: ignore[arg-type]
    return after.seen - before.seen


@pytest.mark.parametrize("kind", KINDS)
def test_behaviour_is_the_svd_of_differences_of_suffix_means(kind: Kind) -> None:
    """Each pair run alone, its suffix's own tokens averaged; the top right singular vector of refusing minus answering."""
    backend, site = tiny_backend("llama", kind), Site(2)
    prompts = ["why", "tell me about the city", "write a poem about the river ?"]
    got = suffix_directions(backend, backend.template(), prompts, [site], refusals=REFUSE, answers=ANSWER)[site]
    differences = []
    for prompt in prompts:
        for pair in zip(REFUSE, ANSWER, strict=True):
            means = []
            for suffix in pair:
                row, watch = backend.template().encode(prompt, suffix), Watch(site)
                backend.run(backend.batch([row]), watch)
                means.append(watch.seen[0, row.prompt :].double().mean(0))
            differences.append((means[0] - means[1]).numpy())
    top = np.linalg.svd(np.stack(differences))[2][0]
    top *= np.sign(np.mean(differences, axis=0) @ top)
    np.testing.assert_allclose(got.numpy(), top, atol=1e-4)
    centred = suffix_directions(
        backend, backend.template(), prompts, [site], refusals=REFUSE, answers=ANSWER, centring="global"
    )[site]
    assert abs(float(centred @ got)) < 0.99  # the fault: what the pairs share is not taken away
    swapped = suffix_directions(backend, backend.template(), prompts, [site], refusals=ANSWER, answers=REFUSE)[site]
    torch.testing.assert_close(swapped, -got, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="one answer per refusal"):
        suffix_directions(backend, backend.template(), prompts, [site], refusals=REFUSE, answers=ANSWER[:1])


def test_the_shipped_suffixes_are_pairs_of_like_length() -> None:
    assert len(REFUSALS) == len(ANSWERS) == len({*REFUSALS, *ANSWERS}) / 2
    for refusal, answer in zip(REFUSALS, ANSWERS, strict=True):
        assert abs(len(refusal.split()) - len(answer.split())) <= 2


def test_keeping_the_norm_scales_back_what_has_grown_and_nothing_else() -> None:
    backend, site = tiny_backend("llama"), Site(2)
    rows = backend.template().encode_all(["tell me about the city", "why"])
    v = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(0))
    edit = add({site: v}, {site: 2.0})
    watch = [Watch(site) for _ in range(3)]
    backend.run(backend.batch(rows), compose(watch[0], edit, watch[1]))  # type: ignore[arg-type]
    backend.run(backend.batch(rows), compose(KeepNorm(edit), watch[2]))  # type: ignore[arg-type]
    mask = backend.batch(rows).mask
    before, plain, kept = (w.seen[mask] for w in watch)
    grown = plain.norm(dim=-1) > before.norm(dim=-1)
    assert bool(grown.any()) and bool((~grown).any())
    torch.testing.assert_close(kept[~grown], plain[~grown], atol=1e-5, rtol=0)
    torch.testing.assert_close(kept[grown].norm(dim=-1), before[grown].norm(dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(kept, plain), torch.ones(len(kept)), atol=1e-5, rtol=0
    )
    assert KeepNorm(edit).pointwise and KeepNorm(edit).sites == edit.sites


def test_pairs_by_index_repeat_the_shorter_side() -> None:
    a, b = torch.arange(2.0)[:, None], torch.arange(5.0)[:, None]
    first, second = matched(a, b)
    assert first[:, 0].tolist() == [0, 1, 0, 1, 0] and second[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(matched(b, a)[1], first)


def test_layers_as_fractions_of_another_models_depth() -> None:
    assert list(layers_between(32, 10 / 32, 19 / 32)) == list(range(10, 20))
    assert list(layers_between(24, 15 / 32, 23 / 32)) == list(range(11, 18))
    assert list(layers_between(4, 0.9, 0.99)) == [3]
    with pytest.raises(UserError, match="fractions"):
        layers_between(32, 0.6, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_do_not_meet_the_condition_are_as_without_the_method(kind: Kind) -> None:
    """On select: the edit where the condition holds, by the dose asked for; the base on all other rows; nothing at dose 0."""
    backend = tiny_backend("llama", kind)
    assert isinstance(Cast(), Method)
    data = material(backend)
    fitted = Cast(n_prompts=4).fit(data)
    condition = fitted.search.chosen
    assert sorted(fitted.directions) == [Site(2), Site(3)] and condition.site <= Site(2)
    assert fitted.search.sites == (Site(1), Site(2))
    assert fitted.search.f1_fit >= 0.8 and fitted.search.f1_held > fitted.search.f1_always
    names = ("political", "harmful", "harmless", "general")
    rows = [row for name in names for row in data.template.encode_all(data.select[name].texts)]
    base = log_odds(backend, rows, TOKENS)
    torch.testing.assert_close(log_odds(backend, rows, TOKENS, fitted(0.0).edit), base, atol=1e-5, rtol=0)
    edit = fitted(0.3).edit
    assert edit is not None
    change = moved(backend, edit, rows, Site(2))[:, -1]
    held = change.norm(dim=-1) > 0
    assert 0 < int(held.sum()) < len(rows)
    lengths = change[held].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3 * fitted.norms[Site(2)]), rtol=1e-3, atol=0)
    assert bool((change[held].double() @ fitted.directions[Site(2)] < 0).all())  # away from refusal
    got = log_odds(backend, rows, TOKENS, edit)
    torch.testing.assert_close(got[~held], base[~held], atol=1e-4, rtol=0)
    assert float((got[held] - base[held]).abs().min()) > 1e-4
    alone = torch.cat([log_odds(backend, [row], TOKENS, edit) for row in rows])
    torch.testing.assert_close(alone, got, atol=1e-4, rtol=0)


def test_the_condition_tells_the_set_to_free_from_the_others() -> None:
    data = material(tiny_backend("llama"))
    search = Cast(n_prompts=4).fit(data).search
    assert search.roc.area.low > 0.5 and search.roc.area.value > search.roc.null[1]
    assert bool((search.saturation >= 0).all()) and bool((search.saturation <= 1).all())


def test_behaviour_from_states_of_refused_and_answered_prompts() -> None:
    """The mean along it is higher for refused than for answered prompts; without refused ones it says what to do."""
    data = material(tiny_backend("llama"))
    fitted = Cast(behaviour="states").fit(data)
    political = data.fit["political"]
    for site, v in fitted.directions.items():
        a, b = matched(
            political.states[site][political.refused],
            torch.cat([political.states[site][political.answered], data.fit["matched"].states[site]]),
        )
        assert float((a - b).double().mean(0) @ v) > 0
        top = np.linalg.svd((a - b).double().numpy())[2][0]
        assert abs(top @ v.numpy()) == pytest.approx(1, abs=1e-6)
    none = replace(political, confidence=-torch.ones(len(political.texts)))
    with pytest.raises(UserError, match=r"0 refused.*behaviour='suffixes'"):
        Cast(behaviour="states").fit(replace(data, fit={**data.fit, "political": none}))


def test_the_options_reach_the_edit() -> None:
    data = material(tiny_backend("llama"))
    edit = Cast(behaviour="states", first_pass=False, renormalise=True, tanh=False, pooling="last").fit(data).edit(0.1)
    assert not edit.first_pass and isinstance(edit.edit, KeepNorm)
    chosen = next(iter(edit.gate.conditions))
    assert chosen.pooling == "last" and not chosen.tanh  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="steer deeper layers"):
        Cast(behaviour="states", first=0.0, last=0.5).fit(data)
