"""Arditi et al.'s selector: scores are what the paper says, a planted direction is found where it was planted, nulls are not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import suffix_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import Affine, ablate, add
from rsteer_interp.methods import trials as trials_module
from rsteer_interp.methods.arditi import Arditi, ArditiAddition, Score, Selection
from rsteer_interp.methods.base import Examples, Material, Method
from rsteer_interp.methods.candidates import Search
from rsteer_interp.methods.trials import Trials, trials
from rsteer_interp.nulls import random_unit_vectors
from tests.planted_refusal import N_LAYERS, REFUSAL, Planted, planted_material, planted_refusal
from tests.tiny_models import Kind

PLANTS = [(1, -2, 0), (2, -3, 1), (1, -1, 2), (3, -2, 3)]  # block, position, seed
EVERYTHING = Search(stride=1)


@cache
def planted(block: int, position: int, seed: int, kind: Kind = "hooks") -> tuple[Planted, Material]:
    model = planted_refusal(block, position, seed, kind)
    return model, planted_material(model.backend, seed=seed)


@cache
def chosen(block: int, position: int, seed: int) -> Selection:
    return Arditi(search=EVERYTHING).select(planted(block, position, seed)[1])


def place(selection: Selection) -> tuple[int, int]:
    return selection.chosen.position, selection.chosen.layer


@pytest.mark.parametrize("plant", PLANTS)
def test_the_planted_layer_and_position_win(plant: tuple[int, int, int]) -> None:
    model, _ = planted(*plant)
    found = chosen(*plant)
    assert place(found) == model.place and found.filters_met
    assert float(torch.cosine_similarity(found.chosen.vector, model.u, 0)) > 0.99
    assert found.refusing > 1 and found.score.ablation < -3 and found.score.addition > 3
    assert sum(not score.failed for score in found.scores) < len(found.scores)


def test_both_backends_choose_alike() -> None:
    first, second = chosen(*PLANTS[0]), Arditi(search=EVERYTHING).select(planted(*PLANTS[0], kind="transformerlens")[1])
    assert place(first) == place(second)
    for a, b in zip(first.scores, second.scores, strict=True):
        assert (a.ablation, a.addition, a.kl) == pytest.approx((b.ablation, b.addition, b.kl), abs=2e-3)


def test_a_direction_read_one_layer_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(backend: Backend, rows: Any, sites: list[Site]) -> dict[Site, Tensor]:
        states = suffix_states(backend, rows, [Site(site.layer + 1) for site in sites])
        return {Site(site.layer - 1): x for site, x in states.items()}

    model, material = planted(*PLANTS[0])
    monkeypatch.setattr(trials_module, "suffix_states", late)
    assert place(Arditi(search=EVERYTHING).select(replace(material))) != model.place


def test_a_coarse_grid_finds_the_layer_between() -> None:
    for plant in PLANTS:
        model, material = planted(*plant)
        found = Arditi(search=Search(stride=2)).select(material)
        assert place(found) == model.place
        assert len(found.scores) < len(chosen(*plant).scores)


def test_selection_is_stable_under_resampling() -> None:
    model, material = planted(*PLANTS[1])
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def again(sets: Mapping[str, Examples], generator: torch.Generator = generator) -> dict[str, Examples]:
            out = {}
            for name, one in sets.items():
                draw = torch.randint(len(one.texts), (len(one.texts),), generator=generator)
                states = {site: x[draw] for site, x in one.states.items()}
                texts = [one.texts[i] for i in draw.tolist()]
                out[name] = Examples(texts, one.confidence[draw], states, texts)
            return out

        drawn = replace(material, fit=again(material.fit), select=again(material.select), seed=seed)
        assert place(Arditi(search=EVERYTHING).select(drawn)) == model.place


def test_scores_are_those_of_plain_runs() -> None:
    """Ablation at every block input and output, r added unscaled at its block, KL over the vocabulary: written again here."""
    _, material = planted(*PLANTS[0])
    backend, found = material.backend, trials(material, EVERYTHING)
    candidate = found.candidates[-1, 4]
    effects = found.effects([(-1, 4)], "linear")[-1, 4]
    points = ("resid_pre", "attn_out", "mlp_out")
    everywhere = ablate({Site(x, point): candidate.vector for x in range(N_LAYERS) for point in points})
    once = add({Site(4): candidate.vector}, {Site(4): candidate.length})
    torch.testing.assert_close(
        effects.removed, log_odds(backend, found.refusing, [REFUSAL], everywhere), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(effects.added, log_odds(backend, found.complying, [REFUSAL], once), atol=1e-3, rtol=0)
    for row, kl in zip(found.ordinary, effects.kl, strict=True):
        base, edited = (backend.logits(backend.batch([row]), e)[0, -1].double().softmax(0) for e in (None, everywhere))
        assert float(kl) == pytest.approx(float((base * (base / edited).log()).sum()), abs=1e-4)
    assert float(found.base.kl.abs().max()) < 1e-5


def test_filters_are_as_stated() -> None:
    _, material = planted(*PLANTS[0])
    found = trials(material, EVERYTHING)
    candidate, effects = found.candidates[-2, 2], found.effects([(-2, 2)], "linear")[-2, 2]
    base = replace(found.base, added=torch.full((4,), -5.0).double())

    def score(kl: float, addition: float) -> Score:
        changed = replace(effects, kl=torch.full((4,), kl), added=torch.full((4,), addition).double())
        return Arditi()._score(candidate, changed, base)

    assert score(0.0999, 0.0).failed == () and score(0.1001, 0.5).failed == ("kl",)
    assert score(0.0, -1e-6).failed == ("addition",) and score(0.2, -1.0).failed == ("kl", "addition")
    assert score(float("nan"), 1.0).failed == ("kl",)
    assert score(0.05, 2.0).violation == 0 and score(float("nan"), 1.0).violation == float("inf")
    assert score(0.25, -1.0).violation == pytest.approx(1.5 + 1 / 5)  # 0.15 of 0.1 nats, 1 of the 5 nats to go
    assert Search().layers(24) == range(1, 19) and Search().layers(18) == range(1, 14)
    with pytest.raises(UserError, match="max_kl is 0; choose a positive number"):
        Arditi(max_kl=0)


def test_without_a_passing_candidate_the_least_violating_is_chosen_and_says_so() -> None:
    model, material = planted(*PLANTS[0])
    found = Arditi(min_addition=100.0, search=EVERYTHING).select(material)
    assert not found.filters_met and all("addition" in score.failed for score in found.scores)
    assert found.score.violation == min(score.violation for score in found.scores) > 0
    assert place(found) == model.place


def test_ablation_is_blind_to_length_and_sign_and_addition_is_not() -> None:
    _, material = planted(*PLANTS[0])
    found = trials(material, EVERYTHING)
    candidate = found.candidates[-2, 2]
    base, longer, turned = found.measure(
        [replace(candidate, vector=factor * candidate.vector) for factor in (1.0, 0.3, -1.0)], "linear"
    )
    for other in (longer, turned):
        torch.testing.assert_close(other.removed, base.removed, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.kl, base.kl, atol=1e-4, rtol=0)
        assert float((other.added - base.added).abs().min()) > 0.5


@pytest.mark.parametrize("plant", PLANTS)
def test_the_choice_is_necessary_and_sufficient_where_random_directions_are_not(plant: tuple[int, int, int]) -> None:
    found, kept = chosen(*plant), trials(planted(*plant)[1], EVERYTHING)
    length = found.chosen.length
    units = random_unit_vectors(20, len(found.chosen.vector), 5).float()
    nulls = kept.measure([replace(found.chosen, vector=length * unit) for unit in units], "linear")
    removed = torch.tensor([float(one.removed.mean()) for one in nulls])
    added = torch.tensor([float(one.added.mean()) for one in nulls])
    assert found.score.ablation < removed.min() - 1 and found.score.addition > added.max() + 1
    assert (found.score.ablation - removed.mean()) / removed.std() < -3


@pytest.mark.parametrize("method", [Arditi, ArditiAddition])
def test_methods_take_refusal_away_and_leave_ordinary_prompts(method: type[Arditi]) -> None:
    _, material = planted(*PLANTS[0])
    one = method(search=EVERYTHING)
    assert isinstance(one, Method) and list(one.strengths) == sorted(one.strengths) and min(one.strengths) > 0
    fitted = one.fit(material)
    backend, encode = material.backend, material.template.encode_all
    rows = {name: encode(material.select[name].texts) for name in ("remove", "ordinary")}
    edits = [None, *(fitted(strength).edit for strength in (0.5, 1.0, max(one.strengths)))]
    means = [float(log_odds(backend, rows["remove"], [REFUSAL], edit).mean()) for edit in edits]
    assert means[0] - 0.5 > means[1] > means[2] + 0.5 and means[0] > 1 and max(means[2:]) < -3
    assert all(float(log_odds(backend, rows["ordinary"], [REFUSAL], edit).max()) < 0 for edit in edits)


def test_subtraction_is_at_one_block_input_with_the_directions_length() -> None:
    _, material = planted(*PLANTS[0])
    found = chosen(*PLANTS[0])
    edit = ArditiAddition(search=EVERYTHING).fit(material)(1.5).edit
    assert isinstance(edit, Affine) and edit.sites == {found.chosen.site} and edit.pointwise
    h = torch.randn(2, 3, material.backend.d_model)
    torch.testing.assert_close(edit(h, None), h - 1.5 * found.chosen.vector, atol=1e-5, rtol=0)  # type: ignore[arg-type]


def test_trials_are_run_once_for_all_who_ask_and_go_with_their_material(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_refusal(seed=7)
    material = planted_material(model.backend, n=6, seed=7)
    Arditi(search=EVERYTHING).select(material)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backend), "_forward", None)  # any run would fail
        ArditiAddition(search=EVERYTHING).fit(material)(1.0)
        with pytest.raises(TypeError):
            trials(material, Search()).effects([(-1, 2)], "linear")
    kept: weakref.ref[Trials] = weakref.ref(trials(material, EVERYTHING))
    del material
    gc.collect()
    assert kept() is None


def test_what_is_missing_is_named() -> None:
    _, material = planted(*PLANTS[0])
    with pytest.raises(UserError, match="no refused prompt of contrast or ordinary in the fit split"):
        Arditi().select(replace(material, remove="contrast", contrast="ordinary"))
    with pytest.raises(UserError, match="no answered prompt of keep in the select split"):
        Arditi().select(replace(material, ordinary=("keep",)))
    with pytest.raises(UserError, match=r"no candidate at positions \(-9,\)"):
        Arditi(search=Search(positions=(-9,))).select(material)
    with pytest.raises(UserError, match="no layer to choose among 8 blocks at depth"):
        Arditi(search=Search(depth=0.1)).select(material)
