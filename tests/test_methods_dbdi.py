"""DBDI: the order identity, sparse supports against random ones, and layers by separability."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import Tokens, make_batch
from rsteer_interp.errors import UserError
from rsteer_interp.methods.base import Examples, Method
from rsteer_interp.methods.dbdi import (
    Dbdi,
    aligned_pairs,
    coordinate_ranks,
    dbdi_edit,
    nearest_pairs,
    order_gap,
    random_support,
    sparsify,
    support_size,
)
from rsteer_interp.methods.separability import cross_validated_accuracy
from rsteer_interp.nulls import cosine
from rsteer_interp.prompts import load_prompts
from rsteer_interp.statistics.draws import p_value
from rsteer_interp.statistics.resampling import permutations
from tests.tiny_models import KINDS, Kind, tiny_backend, tiny_rows
from tests.two_direction_material import DETECTION, EXECUTION, LAYER, planted_material

S = Site(LAYER)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(rows: int, pos: int) -> At:
    batch = make_batch([Tokens(tuple(range(pos)), 1, 2, pos)] * rows, 0)
    return At(S, "prompt", 0, batch.positions, batch.mask, torch.arange(rows), batch)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_matters_through_the_overlap_alone(seed: int) -> None:
    h, r, g = draw(3, 4, 16, seed=seed), 5 * draw(16, seed=seed + 10), draw(16, seed=seed + 20)
    alpha, beta = 0.7, 2.5
    first, second = (
        dbdi_edit(S, r, g, alpha=alpha, beta=beta, order=order)(h, at(3, 4))
        for order in ("project_first", "shift_first")
    )
    gap = order_gap(r, g, alpha=alpha, beta=beta)
    torch.testing.assert_close(first - second, gap.expand_as(h), rtol=1e-10, atol=1e-12)
    assert float((second - first - gap).norm()) > 0.1  # the other sign is wrong
    unit = r / r.norm()
    by_hand = h - alpha * (h @ unit)[..., None] * unit - beta * g / g.norm()
    torch.testing.assert_close(first, by_hand, rtol=1e-10, atol=1e-12)
    apart = g - (g @ unit) * unit
    torch.testing.assert_close(
        order_gap(r, apart, alpha=alpha, beta=beta), torch.zeros(16).double(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_identity_in_a_model(kind: Kind) -> None:
    backend = tiny_backend("gemma3", kind)
    rows, r, g = tiny_rows(backend), draw(backend.d_model, seed=1), draw(backend.d_model, seed=2)
    states = [
        last_states(backend, rows, [S], dbdi_edit(S, r, g, beta=3.0, order=order))[S].double()
        for order in ("project_first", "shift_first")
    ]
    gap = order_gap(r, g, alpha=1.0, beta=3.0)
    torch.testing.assert_close(states[0] - states[1], gap.expand_as(states[0]), atol=2e-5, rtol=0)
    torch.testing.assert_close(states[1] @ r, torch.zeros(len(rows)).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kept", [0.01, 0.1, 0.5, 1.0])
def test_sparsifying_keeps_so_many_coordinates_and_unit_length(kept: float) -> None:
    direction = draw(64, seed=3)
    support = random_support(64, support_size(64, kept), 0)
    sparse = sparsify(direction, support)
    assert int((sparse != 0).sum()) == support_size(64, kept) == max(1, round(64 * kept))
    assert float(sparse.norm()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(sparse[support] / sparse[support].norm(), direction[support] / direction[support].norm())
    if kept == 1.0:
        torch.testing.assert_close(sparse, direction / direction.norm())


def test_bad_supports_are_refused() -> None:
    for kept in (0.0, -0.1, 1.5):
        with pytest.raises(UserError, match="share of the coordinates"):
            support_size(10, kept)
    with pytest.raises(UserError, match="zero on all of its 2 kept"):
        sparsify(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 2]))


def test_random_supports_repeat_with_the_seed() -> None:
    assert torch.equal(random_support(50, 9, 4), random_support(50, 9, 4))
    assert not torch.equal(random_support(50, 9, 4), random_support(50, 9, 5))
    assert len(set(random_support(50, 9, 4).tolist())) == 9


def test_ranks_do_not_depend_on_the_scale_of_a_coordinate() -> None:
    """A coordinate a thousand times as large and without a difference stays behind; weights alone or differences would err."""
    a, b = draw(60, 20, seed=1), draw(60, 20, seed=2)
    a[:, [2, 7]] += 4.0
    assert set(coordinate_ranks(a, b)[:2].tolist()) == {2, 7}
    scale = torch.ones(20).double()
    scale[11], scale[7] = 1000.0, 0.001
    assert set(coordinate_ranks(a * scale, b * scale)[:2].tolist()) >= {2}
    assert 11 not in coordinate_ranks(a * scale, b * scale)[:2].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_planted_directions_come_back_and_the_random_support_finds_less(seed: int) -> None:
    material = planted_material(seed=seed)
    found = Dbdi(layer=LAYER, kept=0.1).directions(material)
    control = Dbdi(layer=LAYER, kept=0.1, support="random").directions(material)
    for vector, truth, other in (
        (found.execution, EXECUTION, control.execution),
        (found.detection, DETECTION, control.detection),
    ):
        assert cosine(vector, truth) > 0.9
        assert int((vector != 0).sum()) == int((other != 0).sum()) == support_size(len(truth), 0.1)
        assert cosine(other, truth) < 0.75
    assert found.overlap == pytest.approx(float(found.execution @ found.detection))


def test_the_layer_is_the_separable_one_unless_given() -> None:
    material = planted_material()
    found = Dbdi().directions(material)
    assert found.site == S and found.accuracy[LAYER] > 0.9
    assert all(0.2 < value < 0.8 for layer, value in found.accuracy.items() if layer != LAYER)
    fixed = Dbdi(layer=1).directions(material)
    assert fixed.site == Site(1) and fixed.accuracy == {}
    with pytest.raises(UserError, match=r"no states at blocks\.9"):
        Dbdi(layer=9).directions(material)


def test_of_a_plateau_the_earliest_layer_and_without_slack_the_best() -> None:
    """The block input before has the planted states too, but for one refused prompt, which looks answered there."""
    material = planted_material(strength=3.0)
    early, removed = Site(LAYER - 1), material.fit["removed"]
    states = removed.states[S].clone()
    states[removed.refused.nonzero()[0]] = states[removed.answered.nonzero()[0]]
    fit = {name: replace(x, states={**x.states, early: x.states[S]}) for name, x in material.fit.items()}
    fit["removed"] = replace(removed, states={**removed.states, early: states})
    plateau = replace(material, fit=fit)
    accuracy = Dbdi().directions(plateau).accuracy
    assert accuracy[LAYER] > accuracy[early.layer] > 0.8
    assert Dbdi(slack=2).directions(plateau).site == early and Dbdi(slack=0).directions(plateau).site == S
    assert Dbdi(slack=2).directions(material).site == S  # noise alone at the early one is no plateau


def test_too_few_prompts_are_named() -> None:
    material = planted_material()
    answered = replace(
        material, fit={**material.fit, "removed": material.fit["removed"].where(material.fit["removed"].answered)}
    )
    with pytest.raises(UserError, match="no refused prompts in the fit split of 'removed'"):
        Dbdi().fit(answered)
    refused = {name: x.where(x.refused) for name, x in material.fit.items()}
    with pytest.raises(UserError, match="no answered prompts in the fit splits of 'removed' and 'contrast'"):
        Dbdi().fit(replace(material, fit=refused))
    few = {name: x.where(torch.arange(40) < 4) for name, x in material.fit.items()}
    with pytest.raises(UserError, match="5 folds"):
        Dbdi().fit(replace(material, fit=few))


@pytest.mark.parametrize("sizes", [(60, 60), (90, 25), (12, 12)])
def test_accuracy_is_high_for_planted_classes_and_a_half_for_permuted_labels(sizes: tuple[int, int]) -> None:
    a, b = draw(sizes[0], 30, seed=5), draw(sizes[1], 30, seed=6)
    a[:, 0] += 6.0
    found, both = cross_validated_accuracy(a, b), torch.cat([a, b])
    shuffled = [both[torch.from_numpy(order)].split(sizes) for order in permutations(len(both), 60, 0)]
    null = [cross_validated_accuracy(x, y) for x, y in shuffled]
    assert found > 0.9 and float(p_value(found, null, "greater")) == pytest.approx(1 / 61)
    assert abs(sum(null) / len(null) - 0.5) < 0.06 and min(null) < 0.5 < max(null)
    nothing = cross_validated_accuracy(draw(sizes[0], 30, seed=7), draw(sizes[1], 30, seed=8))
    assert float(p_value(nothing, null, "greater")) > 0.02 and nothing < 0.8


def test_accuracy_on_the_fitted_prompts_would_be_no_test() -> None:
    """With more dimensions than prompts any labels can be fitted: only the folds left out show that there is nothing."""
    a, b = draw(20, 200, seed=1), draw(20, 200, seed=2)
    assert cross_validated_accuracy(a, b) < 0.75
    both = cross_validated_accuracy(torch.cat([a, a]), torch.cat([b, b]))  # each prompt also in the training folds
    assert both > 0.9


def test_nearest_pairs_are_the_nearest() -> None:
    a, b = draw(7, 5, seed=1), draw(9, 5, seed=2)
    first, second = nearest_pairs(a, b)
    assert torch.equal(first, a)
    for x, y in zip(a, second, strict=True):
        best = min(range(9), key=lambda j: float((x - b[j]).norm()))
        assert torch.equal(y, b[best])


def test_aligned_pairs_are_requests_of_one_form() -> None:
    """Rows of the two built-in sets, shuffled and thinned, find their partners by place; refused with answered only."""
    sets = [load_prompts(name) for name in ("political_sensitive", "political_matched")]
    place = [i for i, prompt in enumerate(sets[0]) if prompt.split == "fit"]
    generator = torch.Generator().manual_seed(0)

    def examples(which: int, confidence: float) -> Examples:
        chosen = [place[i] for i in torch.randperm(len(place), generator=generator)[:60].tolist()]
        labels = torch.where(torch.rand(60, generator=generator) < 0.8, confidence, -confidence)
        texts = [sets[which].texts[i] for i in chosen]
        return Examples(texts, labels, {S: torch.tensor(chosen)[:, None].float()}, texts)

    material = planted_material()
    removed, contrast = examples(0, 1.0), examples(1, -1.0)
    names = {"remove": "political_sensitive", "contrast": "political_matched"}
    built_in = replace(material, fit={names["remove"]: removed, names["contrast"]: contrast}, **names)
    pairs = aligned_pairs(built_in, S)
    assert pairs is not None
    assert torch.equal(*pairs)  # the one state of a row is its place
    expected = set(removed.states[S][removed.refused, 0].tolist()) & set(
        contrast.states[S][contrast.answered, 0].tolist()
    )
    assert set(pairs[0][:, 0].tolist()) == expected and len(expected) >= 8
    few = replace(built_in, fit={**built_in.fit, names["remove"]: removed.where(torch.arange(60) < 4)})
    assert aligned_pairs(few, S) is None
    assert aligned_pairs(material, S) is None  # made-up sets have no places
    assert Dbdi().directions(material).pairing == "nearest"


def test_the_treatment_removes_execution_and_shifts_by_the_dose() -> None:
    material = planted_material()
    method = Dbdi()
    assert isinstance(method, Method)
    found, fitted = method.directions(material), method.fit(material)
    rows = tiny_rows(material.backend)
    norm = mean_norms(material.backend, material.template.encode_all(material.fit["harmless"].texts[:16]), [S])[S]
    base = last_states(material.backend, rows, [S])[S].double()
    for strength in method.strengths:
        treatment = fitted(strength)
        assert treatment.system is None and treatment.edit is not None and treatment.edit.sites == {S}
        after = last_states(material.backend, rows, [S], treatment.edit)[S].double()
        r, g, beta = found.execution, found.detection, strength * norm
        torch.testing.assert_close(after, base - (base @ r)[:, None] * r - beta * g, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            after @ r, (-beta * found.overlap) * torch.ones(len(rows)).double(), atol=1e-4, rtol=0
        )
    partial = replace(method, alpha=0.25, order="shift_first").fit(material)(0.1).edit
    after = last_states(material.backend, rows, [S], partial)[S].double()
    shifted = base - 0.1 * norm * found.detection
    expected = shifted - 0.25 * (shifted @ found.execution)[:, None] * found.execution
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
