"""The paper's own vectors, selective steering and the random null as methods: their configuration, and what they do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.edits import Compose, Edit, Site, compose
from rsteer_interp.directions import ESTIMATORS
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.gates import Gated, discriminant
from rsteer_interp.interventions import AtPositions, add
from rsteer_interp.methods import Material, Method
from rsteer_interp.methods.random_direction import RandomDirections
from rsteer_interp.methods.refusal_steering import (
    MeanDifferenceReposition,
    MeanDifferenceSteering,
    WeightedRidgeReposition,
    WeightedRidgeSteering,
    evidence,
)
from rsteer_interp.methods.selective import Selective, band
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import cosine
from rsteer_interp.selection import steerable_layers
from tests.planted_material import planted_material
from tests.pushes import equal_dose, pushes
from tests.tiny_models import KINDS, Kind

PAPER = (MeanDifferenceSteering, MeanDifferenceReposition, WeightedRidgeSteering, WeightedRidgeReposition)
ALL = (*PAPER, RandomDirections, Selective)


def odds(material: Material, name: str, edit: Edit | None) -> torch.Tensor:
    rows = material.template.encode_all(material.select[name].texts)
    return log_odds(material.backend, rows, material.refusal_tokens, edit)


@pytest.mark.parametrize("method", ALL)
def test_each_is_a_method(method: type[Method]) -> None:
    one = method()
    assert isinstance(one, Method)
    assert list(one.strengths) == sorted(set(one.strengths)) and one.strengths[0] > 0
    with pytest.raises(FrozenInstanceError):
        one.k = 3  # type: ignore[attr-defined]


def test_names_are_unique() -> None:
    assert len({m.name for m in ALL}) == len({m.label for m in ALL}) == len(ALL)


@pytest.mark.parametrize("method", PAPER)
def test_layers_vectors_and_scales_are_the_papers(method: type[MeanDifferenceSteering]) -> None:
    """An independent account, in numpy: score r - RMSE by layer, the best of them, scale |Q5(p) / Q5(c)|."""
    material, k = planted_material(), 1
    steering = method(k=k).configure(material)(-0.5)
    c = np.r_[[material.select[n].confidence.numpy() for n in ("political", "plain")]].ravel()
    scored = {}
    for layer in steerable_layers(material.n_layers):
        seen = evidence(material, [Site(layer)])[Site(layer)]
        vector = ESTIMATORS[method.name.split("_")[0]]().fit(seen).numpy()
        offset = seen.offset.numpy()
        h = torch.cat([material.select[n].states[Site(layer)] for n in ("political", "plain")]).double().numpy()
        p = (h - offset) @ (vector / np.linalg.norm(vector))
        wrong = np.where(np.sign(p) != np.sign(c), c, 0)
        scored[layer] = np.corrcoef(p, c)[0, 1] - np.sqrt((wrong**2).mean()), p, vector, offset
    best = max(scored, key=lambda layer: scored[layer][0])
    _, p, vector, offset = scored[best]
    assert steering.sites == (Site(best),)
    assert cosine(steering.directions[0], torch.from_numpy(vector)) > 1 - 1e-9
    np.testing.assert_allclose(steering.references[0], offset, atol=1e-5)
    scale = abs(np.quantile(p[c < 0], 0.05) / np.quantile(c[c < 0], 0.05))
    assert steering.amounts[Site(best)] == pytest.approx(-0.5 * scale, rel=1e-5)
    assert steering.reposition == method().reposition
    assert not steering.method.startswith("wrmd") or cosine(vector_of(material, best), torch.from_numpy(vector)) < 0.999


def vector_of(material: Material, layer: int) -> torch.Tensor:
    return ESTIMATORS["md"]().fit(evidence(material, [Site(layer)])[Site(layer)])


def test_fitting_does_not_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    material = planted_material()

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(material.backend), "_forward", fail)
    for method in (*PAPER, RandomDirections):
        assert method().fit(material)(0.5).edit is not None


@pytest.mark.parametrize("kind", KINDS)
def test_addition_moves_the_projection_by_alpha_s_and_reposition_sets_it(kind: Kind) -> None:
    material = planted_material(kind=kind)
    rows = material.template.encode_all(material.select["political"].texts)
    for method in PAPER:
        steering = method(k=1).configure(material)(-1.5)
        (site,), v, o = steering.sites, steering.directions[0].double(), steering.references[0].double()
        before, after = (
            last_states(material.backend, rows, [site], e)[site].double() @ v for e in (None, steering.edit())
        )
        amount = steering.amounts[site]
        assert amount < 0
        wanted = (o @ v + amount).expand(len(rows)) if method().reposition else before + amount
        torch.testing.assert_close(after, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [MeanDifferenceSteering, WeightedRidgeSteering, Selective])
def test_more_strength_removes_more_of_a_planted_refusal(method: type[Method], kind: Kind) -> None:
    material = planted_material(kind=kind)
    fitted = method().fit(material)
    curve = [odds(material, "political", fitted(s).edit).mean() for s in method.strengths]
    means = torch.stack([odds(material, "political", None).mean(), *curve])
    assert bool((means.diff() < 0).all()), means


def test_random_directions_are_the_null_of_the_mean_difference() -> None:
    """Same sites and amounts, and the same push in the sum; nearly orthogonal to it; little effect next to it, without a sign."""
    material = planted_material()
    rows = material.template.encode_all(material.select["political"].texts[:3])
    md = MeanDifferenceSteering().configure(material)(-1.0)
    effects = []
    base = odds(material, "political", None)
    for draw in range(12):
        fitted = RandomDirections(draw=draw).fit(material)
        edit = fitted(1.0).edit
        assert edit is not None and edit.sites == frozenset(md.sites)
        own, null = pushes(material.backend, rows, md.edit(), edit)  # type: ignore[arg-type]
        assert equal_dose(own, null)
        for site in md.sites:
            assert abs(cosine(null[site][0], own[site][0])) < 0.75  # 4 standard deviations at d = 32
        effects.append(float((odds(material, "political", edit) - base).mean()))
    effect = float((odds(material, "political", md.edit()) - base).mean())
    assert effect < min(effects)
    assert min(effects) < 0 < max(effects)
    assert len({round(e, 6) for e in effects}) == len(effects)


def test_random_draws_repeat_and_depend_on_both_seeds() -> None:
    material = planted_material()
    x = torch.zeros(1, 1, material.backend.d_model)

    def drawn(draw: int, seed: int) -> torch.Tensor:
        edit = RandomDirections(draw).fit(replace(material, seed=seed))(1.0).edit
        assert edit is not None
        return torch.stack([edit.edits[s](x, None)[0, 0] for s in sorted(edit.sites)])  # type: ignore[attr-defined]

    assert torch.equal(drawn(0, 0), drawn(0, 0))
    for other in (drawn(1, 0), drawn(0, 1)):
        assert not torch.allclose(drawn(0, 0), other, atol=0.1)
    assert not torch.allclose(*drawn(0, 0), atol=0.1), "layers share one direction"


def test_the_condition_tells_the_planted_subjects_apart() -> None:
    material = planted_material()
    gate = Selective().condition(material)
    assert gate.site in band(material.n_layers, Selective().gate_depth)
    for examples in (material.fit, material.select):
        held = {name: float(gate.holds(x.states[gate.site]).double().mean()) for name, x in examples.items()}
        assert held["political"] >= 0.8 and max(held["harm"], held["kitchen"], held["arts"]) <= 0.15, held
    moments = {n: Moments.of(x.states[gate.site]) for n, x in material.fit.items()}
    w = discriminant([moments["political"]], [moments[n] for n in ("harm", "kitchen", "arts")], 0.3)
    torch.testing.assert_close(gate.direction, w)


@pytest.mark.parametrize("kind", KINDS)
def test_selective_edits_whom_the_condition_holds_for_and_nobody_else(kind: Kind) -> None:
    """Elsewhere the base, to the last bit of the replies; there the dose, after the prefix, and no decoding step."""
    material = planted_material(kind=kind)
    method, strength = Selective(), 0.3
    edit, gate = method.fit(material)(strength).edit, method.condition(material)
    assert isinstance(edit, Gated)
    texts = material.select["political"].texts[:4] + material.select["harm"].texts[:4]
    rows = material.template.encode_all(texts)
    held = gate.holds(last_states(material.backend, rows, [gate.site])[gate.site])
    assert 0 < int(held.sum()) < len(texts)
    sites = band(material.n_layers, method.depth)
    fit = material.fit["political"]
    sizes = mean_norms(material.backend, material.template.encode_all(fit.where(fit.refused).texts), sites)
    plain = add({s: vector_of(material, s.layer) for s in sites}, {s: -strength * sizes[s] for s in sites})
    plain = AtPositions(plain, frozenset({"instruction", "suffix"}))
    base, everywhere, got = (log_odds(material.backend, rows, material.refusal_tokens, e) for e in (None, plain, edit))
    assert float((everywhere - base).abs().min()) > 1e-3
    torch.testing.assert_close(got, torch.where(held, everywhere, base), atol=1e-4, rtol=0)
    batch = material.backend.batch(rows)
    replies = [material.backend.generate(batch, 5, e).ids for e in (None, plain, edit)]
    assert torch.equal(replies[2], torch.where(held[:, None], replies[1], replies[0]))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    material = planted_material()
    texts = [t for x in material.select.values() for t in x.texts[:3]]
    rows = material.template.encode_all(texts)
    for method in ALL:
        edit = method().fit(material)(method.strengths[-1]).edit
        together = log_odds(material.backend, rows, material.refusal_tokens, edit)
        alone = torch.cat([log_odds(material.backend, [row], material.refusal_tokens, edit) for row in rows])
        torch.testing.assert_close(alone, together, atol=2e-4, rtol=0)


def test_dose_of_the_selective_edit_is_its_strength() -> None:
    """|edit| / mean |resid| over the tokens after the prefix. (Words that all prompts begin with are in the mean once less.)"""
    material = planted_material()
    method = Selective(depth=(0.5, 0.5))
    (site,) = band(material.n_layers, method.depth)
    edit = method.fit(material)(0.1).edit
    fit = material.fit["political"]
    rows = material.template.encode_all(fit.where(fit.refused).texts)
    seen: list[torch.Tensor] = []

    class Watch:
        sites, pointwise, leaves_prefix = frozenset({site}), False, True

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            if at.phase == "prompt":
                ends = at.batch.span_end("prefix")[at.rows][:, None]
                seen.append(x[at.mask & (at.positions >= ends)])
            return x

    both = compose(Watch(), edit, Watch())
    assert isinstance(both, Compose)
    material.backend.run(material.backend.batch(rows), both)
    before, after = seen
    moved = (after - before).norm(dim=-1)
    edited = moved > 0
    assert float(edited.double().mean()) > 0.8
    assert float(moved[edited].mean() / before.norm(dim=-1).mean()) == pytest.approx(0.1, rel=0.03)


def test_bands_are_shares_of_the_depth_and_never_empty() -> None:
    assert band(24, (0.5, 0.67)) == [Site(layer) for layer in range(12, 17)]
    assert band(40, (0.0, 0.1)) == [Site(layer) for layer in range(1, 5)]  # not the first
    assert band(4, (0.57, 0.7)) == [Site(3)] and band(4, (0.51, 0.6)) == [Site(2)]
    assert band(2, (0.5, 0.67)) == band(2, (0.9, 0.95)) == [Site(1)]


def test_what_is_missing_is_named() -> None:
    material = planted_material()
    with pytest.raises(UserError, match="use a deeper model"):
        band(1, (0.5, 0.67))
    answered = {**material.fit, "political": material.fit["political"].where(material.fit["political"].answered)}
    answered["plain"] = material.fit["plain"].where(material.fit["plain"].answered)
    with pytest.raises(UserError, match="no refusing prompts"):
        MeanDifferenceSteering().fit(replace(material, fit=answered))
