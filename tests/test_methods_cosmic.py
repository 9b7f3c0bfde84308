"""COSMIC's selector: chosen from activations alone, the planted direction wins, filters and evaluation layers as stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import Point, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.methods.arditi import Arditi
from rsteer_interp.methods.base import Examples, Material, Method
from rsteer_interp.methods.candidates import Candidate, Search, evaluation_layers
from rsteer_interp.methods.cosmic import Agreement, Cosmic, CosmicAffine, Score, Selection, agreement
from rsteer_interp.methods.trials import Effects, trials
from tests.planted_refusal import N_LAYERS, REFUSAL, Planted, planted_material, planted_refusal

PLANTS = [(1, -2, 0), (2, -3, 1), (3, -2, 3)]  # block, position, seed; at the last position COSMIC would see z as well
EVERYTHING = Search(stride=1)
FORMS = [Cosmic, CosmicAffine]


@cache
def planted(block: int, position: int, seed: int) -> tuple[Planted, Material]:
    model = planted_refusal(block, position, seed)
    return model, planted_material(model.backend, seed=seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plant", PLANTS)
def test_the_planted_layer_and_position_win_as_for_behaviour(plant: tuple[int, int, int], form: type[Cosmic]) -> None:
    model, material = planted(*plant)
    found = form(search=EVERYTHING).select(material)
    assert (found.chosen.position, found.chosen.layer) == model.place and found.filters_met
    assert found.score.comply > 0.95 and found.score.refuse > 0.9 and found.unedited < 0.8
    behaviour = Arditi(search=EVERYTHING).select(material)
    assert (behaviour.chosen.position, behaviour.chosen.layer) == model.place
    assert agreement(found, n_permutations=999).n == len(found.scores)
    (check,) = form(search=EVERYTHING).checks(material, 1.0, material.select)
    assert "chosen: the same place" in check.what


def test_a_coarse_grid_finds_the_layer_between() -> None:
    for plant in PLANTS:
        model, material = planted(*plant)
        found = Cosmic(search=Search(stride=2)).select(material)
        assert (found.chosen.position, found.chosen.layer) == model.place


def test_refusal_tokens_have_no_say() -> None:
    _, material = planted(*PLANTS[0])
    own, other = (Cosmic(search=EVERYTHING).select(replace(material, refusal_tokens=t)) for t in ((REFUSAL,), (7,)))
    for a, b in zip(own.scores, other.scores, strict=True):
        assert replace(a, ablation=0.0) == replace(b, ablation=0.0)
    assert own.score.ablation != other.score.ablation


def by_hand(material: Material, candidate: Candidate, sites: list[Site]) -> tuple[float, float]:
    """S_comply and S_refuse of a candidate, with edits written out."""
    kept, unit = trials(material, EVERYTHING), candidate.vector / candidate.length

    @dataclass(frozen=True)
    class Change:
        sites: frozenset[Site]
        function: Callable[[Tensor], Tensor]
        pointwise: bool = True

        def __call__(self, x: Tensor, at: Any) -> Tensor:
            return self.function(x)

    points: tuple[Point, ...] = ("resid_pre", "attn_out", "mlp_out")
    everywhere = frozenset(Site(layer, point) for layer in range(N_LAYERS) for point in points)
    taken = Change(everywhere, lambda x: x - (x @ unit)[..., None] * unit)
    put = Change(frozenset({candidate.site}), lambda x: x + candidate.vector)

    def mean(rows: list[Tokens], edit: Change | None = None) -> Tensor:
        states = last_states(material.backend, rows, sites, edit)
        return torch.cat([states[site].mean(0) for site in sites])

    pairs = (mean(kept.refusing, taken), mean(kept.complying)), (mean(kept.complying, put), mean(kept.refusing))
    comply, refuse = (float(torch.cosine_similarity(a, b, 0)) for a, b in pairs)
    return comply, refuse


def test_scores_are_cosines_of_mean_states_of_plain_runs() -> None:
    _, material = planted(*PLANTS[0])
    search = replace(EVERYTHING, evaluation=0.3)
    found = Cosmic(search=search).select(material)
    assert len(found.layers) == 2
    for score in (s for s in found.scores if s.layer in (2, 3)):
        candidate = trials(material, search).candidates[score.position, score.layer]
        expected = by_hand(material, candidate, [Site(layer) for layer in found.layers])
        assert (score.comply, score.refuse) == pytest.approx(expected, abs=2e-3)


def states_with(cosines: list[float]) -> dict[str, Examples]:
    """Two sets whose means have the given cosine at each block output."""
    refused = {Site(i): torch.tensor([[1.0, 0.0]]) for i in range(1, len(cosines) + 1)}
    answered = {Site(i): torch.tensor([[c, (1 - c**2) ** 0.5]]) * (5 + i) for i, c in enumerate(cosines, 1)}
    return {"a": Examples(["x"], torch.ones(1), refused, ["x"]), "b": Examples(["y"], -torch.ones(1), answered, ["y"])}


def test_evaluation_layers_are_the_least_similar_and_one_at_least() -> None:
    for n_layers, n in ((4, 1), (9, 1), (10, 1), (24, 2), (40, 4)):
        cosines = torch.randperm(n_layers, generator=torch.Generator().manual_seed(n_layers)).double() / n_layers
        got = evaluation_layers(states_with(cosines.tolist()), ("a", "b"), n_layers, 0.1)
        assert got == sorted(Site(int(i) + 1) for i in cosines.argsort()[:n])
    assert len(Cosmic(search=EVERYTHING).select(planted(*PLANTS[0])[1]).layers) == 1


def test_taking_out_is_blind_to_the_length_of_r_and_adding_is_not() -> None:
    _, material = planted(*PLANTS[0])
    kept = trials(material, EVERYTHING)
    candidate = kept.candidates[-2, 2]
    for operator in ("linear", "affine"):
        short, long = kept.measure([replace(candidate, vector=f * candidate.vector) for f in (1.0, 4.0)], operator)  # type: ignore[arg-type]
        torch.testing.assert_close(short.removed_states, long.removed_states, atol=1e-4, rtol=0)
        torch.testing.assert_close(short.kl, long.kl, atol=1e-4, rtol=0)
        assert float((short.added_states - long.added_states).abs().max()) > 0.1


def test_pooling_of_layers() -> None:
    """Side by side, a layer of larger states weighs more and layers cannot cancel; the average of the authors' code lets them."""
    a, b = torch.tensor([[3.0, 0.0], [-3.0, 1.0]]), torch.tensor([[3.0, 0.0], [-3.0, -1.0]])
    side_by_side, average = (Cosmic(pool=pool)._similarity(a, b) for pool in ("concatenate", "average"))  # type: ignore[arg-type]
    assert side_by_side == pytest.approx(17 / 19) and average == pytest.approx(-1.0)


def effects_of(comply: float, refuse: float, kl: float = 0.0) -> Effects:
    """Effects whose S_comply and S_refuse are the given cosines with the base of `hand_made`."""

    def at(c: float) -> torch.Tensor:
        return torch.tensor([[c, (1 - c**2) ** 0.5]])

    return Effects(torch.zeros(1), torch.zeros(1), torch.tensor([kl]), at(comply), at(refuse))


def hand_made(scores: dict[tuple[int, int], Effects]) -> dict[tuple[int, int], Score]:
    ones = {at: Candidate(*at, torch.ones(2), torch.zeros(2)) for at in scores}
    axis = torch.tensor([[1.0, 0.0]])
    return Cosmic()._scores(ones, scores, Effects(torch.zeros(1), torch.zeros(1), torch.zeros(1), axis, axis))


def test_at_the_last_position_layers_deeper_than_both_medians_of_the_other_peaks_are_dropped() -> None:
    """Peaks of S_comply at layers 2, 4, 6, of S_refuse at 1, 3, 9 by position: medians 4 and 3."""
    peaks = {-2: (2, 9), -3: (4, 1), -4: (6, 3)}
    table = {
        (position, layer): effects_of(0.9 if layer == one else 0.5, 0.9 if layer == two else 0.5)
        for position, (one, two) in peaks.items()
        for layer in range(1, 11)
    }
    table |= {(-1, layer): effects_of(0.5, 0.5) for layer in range(1, 11)}
    scores = hand_made(table)
    assert {at for at, score in scores.items() if score.failed} == {(-1, layer) for layer in range(5, 11)}
    assert scores[-1, 5].violation == float("inf") and scores[-1, 4].violation == 0.0
    del table[-4, 6], table[-4, 3]  # without its peaks, position -4 peaks at layer 1: medians 2 and 1
    assert {layer for (_, layer), score in hand_made(table).items() if score.failed} == set(range(3, 11))
    alone = hand_made({at: one for at, one in table.items() if at[0] == -1})
    assert not any(score.failed for score in alone.values())


def test_kl_is_a_filter_and_the_sum_is_what_counts() -> None:
    scores = hand_made({(-2, 1): effects_of(0.9, 0.2, 0.05), (-2, 2): effects_of(0.6, 0.6, 0.1001)})
    assert scores[-2, 1].failed == () and scores[-2, 2].failed == ("kl",)
    assert scores[-2, 2].merit == pytest.approx(1.2) and scores[-2, 1].merit == pytest.approx(1.1)
    assert scores[-2, 1].violation == 0 and scores[-2, 2].violation == pytest.approx(0.001, abs=1e-6)
    with pytest.raises(UserError, match="choose a positive number"):
        Cosmic(max_kl=-1.0)


def test_without_a_passing_candidate_the_least_violating_is_chosen_and_says_so() -> None:
    _, material = planted(*PLANTS[0])
    found = Cosmic(max_kl=1e-9, search=EVERYTHING).select(material)
    assert not found.filters_met and all("kl" in score.failed for score in found.scores)
    assert found.score.violation == min(score.violation for score in found.scores)


@pytest.mark.parametrize("form", FORMS)
def test_methods_take_refusal_away_and_leave_ordinary_prompts(form: type[Cosmic]) -> None:
    _, material = planted(*PLANTS[0])
    one = form(search=EVERYTHING)
    assert isinstance(one, Method) and list(one.strengths) == sorted(one.strengths) and min(one.strengths) > 0
    fitted = one.fit(material)
    rows = {name: material.template.encode_all(material.select[name].texts) for name in ("remove", "ordinary")}
    edits = [None, *(fitted(strength).edit for strength in (0.5, 1.0, max(one.strengths)))]
    means = [float(log_odds(material.backend, rows["remove"], [REFUSAL], edit).mean()) for edit in edits]
    assert means[0] - 0.5 > means[1] > means[2] + 0.5 and means[0] > 1 and max(means[2:]) < -3
    at_one = log_odds(material.backend, rows["ordinary"], [REFUSAL], edits[2])
    assert float(at_one.max()) < 0


def agree(merit: np.ndarray, ablation: np.ndarray) -> Agreement:
    """Of a selection with these scores."""
    candidates = [Candidate(-1, i, torch.ones(2), torch.zeros(2)) for i in range(len(merit))]
    scores = tuple(
        Score(-1, i, 1.0, m, 0.0, 0.0, a, (), 0.0) for i, (m, a) in enumerate(zip(merit, ablation, strict=True))
    )
    return agreement(Selection(candidates[int(merit.argmax())], True, scores, (1,), 0.0), n_permutations=499)


def test_agreement_is_spearmans_and_its_p_is_honest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        merit, ablation = rng.normal(size=(2, 20)).round(1)  # with ties
        got = agree(merit, ablation)
        assert got.rho == pytest.approx(float(stats.spearmanr(merit, -ablation).statistic))
        assert got.low < got.rho < got.high
    order = np.arange(12.0)
    assert agree(order, -order).rho == pytest.approx(1)
    assert agree(order, order).rho == pytest.approx(-1)
    null = [agree(*rng.normal(size=(2, 15))) for _ in range(60)]
    assert 0.3 < float(np.mean([one.p for one in null])) < 0.7
    assert sum(one.low > 0 or one.high < 0 for one in null) <= 8
    with pytest.raises(UserError, match=r"five candidates of different scores \(n = 4\)"):
        agree(np.arange(4.0), np.arange(4.0))
    with pytest.raises(UserError, match="lower the stride"):
        agree(np.ones(9), np.arange(9.0))
