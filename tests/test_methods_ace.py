"""ACE: one affine operator, the same component for every prompt; and whether it evens out what a model then says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import At, Edit, Site
from rsteer_interp.batch import Tokens, make_batch
from rsteer_interp.directions import MeanDifference, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import Affine, ablate, set_component
from rsteer_interp.methods import Method, ace
from rsteer_interp.methods.ace import ACE, ace_edit, caa_edit, standardisation, variance_ratio
from rsteer_interp.methods.refusal_steering import best_layers, evidence
from rsteer_interp.selection import steerable_layers
from tests.planted_material import planted_material
from tests.pushes import equal_dose, pushes
from tests.tiny_models import KINDS, Kind, tiny_backend, tiny_rows

S, D, ROWS, POS = Site(2), 24, 5, 4


def at(rows: int = ROWS) -> At:
    batch = make_batch([Tokens(tuple(range(POS)), 1, 2, 4)] * rows, 0)
    return At(S, "prompt", 0, batch.positions, batch.mask, torch.arange(rows), batch)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States to edit, and class means r+ and r-, none of unit length or centred."""
    return 3 * draw(ROWS, POS, D, seed=seed) + 1, 2 * draw(D, seed=seed + 100), 4 * draw(D, seed=seed + 200)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0])
def test_the_component_is_the_same_for_every_state_and_the_rest_is_left(seed: int, alpha: float) -> None:
    h, plus, minus = classes(seed)
    r = plus - minus
    unit = r / r.norm()
    edit = ace_edit({S: r}, {S: minus}, alpha)
    out = edit(h, at())
    torch.testing.assert_close(out @ unit, (minus @ unit + alpha * r.norm()).expand(ROWS, POS), atol=1e-10, rtol=0)
    # alpha = 0 is the average complying component, alpha = 1 the average refused one.
    torch.testing.assert_close(out @ unit, ((1 - alpha) * minus + alpha * plus).expand_as(h) @ unit, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        out - (out @ unit)[..., None] * unit, h - (h @ unit)[..., None] * unit, atol=1e-10, rtol=0
    )
    torch.testing.assert_close(edit(out, at()), out, atol=1e-10, rtol=0)  # idempotent


def _reference_forgotten(h: Tensor, plus: Tensor, minus: Tensor, alpha: float) -> Tensor:
    return ace_edit({S: plus - minus}, {S: torch.zeros(D)}, alpha)(h, at())


def _harmful_reference(h: Tensor, plus: Tensor, minus: Tensor, alpha: float) -> Tensor:
    return ace_edit({S: plus - minus}, {S: plus}, alpha)(h, at())


def _length_forgotten(h: Tensor, plus: Tensor, minus: Tensor, alpha: float) -> Tensor:
    return set_component({S: plus - minus}, {S: minus}, {S: alpha})(h, at())


def _length_twice(h: Tensor, plus: Tensor, minus: Tensor, alpha: float) -> Tensor:
    return ace_edit({S: plus - minus}, {S: minus}, alpha * float((plus - minus).norm()))(h, at())


@pytest.mark.parametrize("fault", [_reference_forgotten, _harmful_reference, _length_forgotten, _length_twice])
def test_the_constant_catches_seeded_faults(fault: Callable[..., Tensor]) -> None:
    h, plus, minus = classes(0)
    r = plus - minus
    unit = r / r.norm()
    wrong = fault(h, plus, minus, 0.5) @ unit - (minus @ unit + 0.5 * r.norm())
    assert float(wrong.abs().min()) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_each_row_of_the_affine_table_is_its_papers_own_formula(seed: int) -> None:
    """methods: one operator covers most edits; here through the functions by which each is called, formulas in numpy."""
    h, plus, minus = classes(seed)
    r, alpha, s, target = plus - minus, -0.75, 1.9, 2.2
    x, v, o = h.numpy(), r.numpy(), minus.numpy()
    u = v / np.sqrt(v @ v)
    project = np.outer(u, u)
    rows: dict[str, tuple[Edit, np.ndarray]] = {
        "directional ablation": (ablate({S: r}), x - x @ project),
        "reposition": (set_component({S: r}, {S: minus}, {S: alpha * s}), x - (x - o) @ project + alpha * s * u),
        "ACE": (ace_edit({S: r}, {S: minus}, alpha), x - x @ project + o @ project + alpha * v),
        "target projection": (Affine(S, r, kappa=1.0, amount=target), x + (target - x @ u)[..., None] * u),
        "first step of DBDI": (Affine(S, r, kappa=0.6), x - 0.6 * (x @ u)[..., None] * u),
        "addition": (caa_edit({S: r}, alpha), x + alpha * v),
    }
    for name, (edit, formula) in rows.items():
        np.testing.assert_allclose(edit(h, at()).numpy(), formula, atol=1e-10, err_msg=name)


def test_ablation_and_reposition_are_cases_of_it() -> None:
    h, plus, minus = classes(1)
    r, alpha = plus - minus, -0.4
    zero = torch.zeros(D, dtype=torch.float64)
    torch.testing.assert_close(ace_edit({S: r}, {S: zero}, 0.0)(h, at()), ablate({S: r})(h, at()), atol=1e-12, rtol=0)
    reposition = set_component({S: r}, {S: minus}, {S: alpha * float(r.norm())})
    torch.testing.assert_close(ace_edit({S: r}, {S: minus}, alpha)(h, at()), reposition(h, at()), atol=1e-12, rtol=0)


def test_orthogonal_erasure_with_a_bias_and_then_alpha_r_is_the_same() -> None:
    """The authors' code: an affine eraser x -> (x - m) Q + m with Q = I - u u^T and m = r-, then alpha r is added."""
    h, plus, minus = classes(2)
    r = plus - minus
    q = torch.eye(D, dtype=torch.float64) - torch.outer(r, r) / (r @ r)
    torch.testing.assert_close(
        ace_edit({S: r}, {S: minus}, 0.7)(h, at()), (h - minus) @ q + minus + 0.7 * r, atol=1e-10, rtol=0
    )


def test_alphas_by_row_are_those_of_single_runs() -> None:
    h, plus, minus = classes(0)
    r = plus - minus
    alphas = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.25])
    together = ace_edit({S: r}, {S: minus}, alphas)
    assert not together.pointwise and ace_edit({S: r}, {S: minus}, 0.5).pointwise
    for row, alpha in enumerate(alphas.tolist()):
        alone = ace_edit({S: r}, {S: minus}, alpha)(h, at())[row]
        torch.testing.assert_close(together(h, at())[row], alone, atol=1e-5, rtol=0)


def test_the_ratio_of_variances_and_its_interval() -> None:
    a, b = draw(400, seed=1), 2 * draw(400, seed=2)
    got = variance_ratio(a, b)
    assert got.value == pytest.approx(float(a.var() / b.var())) and got.n == 400
    assert 0.2 < got.low < got.value < got.high < 0.4
    assert variance_ratio(b, b).low == variance_ratio(b, b).high == 1  # paired: nothing is left to chance
    assert variance_ratio(a, b) == got != variance_ratio(a, b, seed=1)
    covered = 0
    for seed in range(60):
        x, y = draw(80, seed=3 * seed + 7), 2 * draw(80, seed=3 * seed + 8)
        interval = variance_ratio(x, y, n_draws=300)
        covered += interval.low <= 0.25 <= interval.high
    assert covered >= 50  # of 60 at 95 %, the percentile interval being a little short
    for x, y in ((a[:2], b[:2]), (a, torch.ones(400))):
        with pytest.raises(UserError, match="add prompts"):
            variance_ratio(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_one_component_is_evened_out_by_ace_alone(kind: Kind) -> None:
    """The planted token reads the difference of two subjects: ACE along it narrows the log-odds of prompts of both, CAA does
    not, and random directions give a ratio of about one."""
    material = planted_material(kind=kind)
    rows = material.template.encode_all(material.select["political"].texts + material.select["plain"].texts)
    site = Site(material.n_layers)  # what the final norm reads: no later layer adds a spread of its own
    seen = evidence(material, [site])[site]
    r, minus = seen.refusing.mean - seen.complying.mean, seen.complying.mean
    got = standardisation(
        material.backend, rows, material.refusal_tokens, {site: r}, {site: minus}, 0.5, n_random=8, n_draws=500
    )
    assert got.ratio.n == len(rows) and got.ratio.value == pytest.approx(got.ace_variance / got.caa_variance)
    assert got.ratio.high < 0.6 < min(got.null) and max(got.null) < 1.4
    same = log_odds(material.backend, rows, material.refusal_tokens, caa_edit({site: r}, 0.5))
    assert got.caa_variance == pytest.approx(float(same.var()))


def test_the_null_of_several_sites_is_of_equal_dose_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, asked = tiny_backend("llama"), list[Edit]()
    monkeypatch.setattr(ace, "log_odds", lambda *a: asked.append(a[3]) or log_odds(*a))
    rows, v = tiny_rows(backend), draw(3, backend.d_model, seed=3)
    directions = {Site(1): v[0], Site(2): 2 * v[0] + v[1], Site(3): v[1]}
    standardisation(backend, rows, (5,), directions, dict.fromkeys(directions, v[2]), 0.5, n_random=3)
    own, *nulls = pushes(backend, rows, *asked[1::2])  # CAA's
    assert len(nulls) == 3 and all(equal_dose(own, null) for null in nulls)


@pytest.mark.parametrize("kind", KINDS)
def test_the_method_gives_every_prompt_the_component_of_the_answered_ones(kind: Kind) -> None:
    material = planted_material(kind=kind)
    assert isinstance(ACE(), Method)
    fitted = ACE().fit(material)
    found = fit_directions(MeanDifference(), evidence(material, [Site(x) for x in steerable_layers(material.n_layers)]))
    (layer,) = best_layers(material, found, 1)
    site = Site(layer)
    seen = evidence(material, [site])[site]
    r = seen.refusing.mean - seen.complying.mean
    unit = r / r.norm()
    rows = material.template.encode_all([t for x in material.select.values() for t in x.texts[:3]])
    for strength in ACE.strengths:
        edit = fitted(strength).edit
        assert edit is not None and edit.sites == frozenset({site})
        after = last_states(material.backend, rows, [site], edit)[site].double() @ unit
        wanted = seen.complying.mean @ unit + (1 - strength) * r.norm()
        torch.testing.assert_close(after, wanted.expand(len(rows)), atol=1e-4, rtol=0)
    odds = [
        log_odds(
            material.backend,
            material.template.encode_all(material.select["political"].texts),
            material.refusal_tokens,
            edit,
        ).mean()
        for edit in (None, *(fitted(s).edit for s in ACE.strengths))
    ]
    assert bool((torch.stack(odds).diff() < 0).all()), odds


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoding_step_is_edited_and_neighbours_do_not_matter(kind: Kind) -> None:
    material = planted_material(kind=kind)
    edit = ACE().fit(material)(2.0).edit
    assert edit is not None
    (site,) = edit.sites
    phases: list[str] = []

    class Watch:
        sites, pointwise = frozenset({site}), True

        def __call__(self, x: Tensor, at: At) -> Tensor:
            out: Tensor = edit(x, at)
            assert not torch.equal(out, x)
            phases.append(at.phase)
            return out

    rows = material.template.encode_all([x.texts[0] for x in material.select.values()])
    material.backend.generate(material.backend.batch(rows), 3, Watch())
    assert phases.count("decode") == 2 and "prompt" in phases
    together = log_odds(material.backend, rows, material.refusal_tokens, edit)
    alone = torch.cat([log_odds(material.backend, [row], material.refusal_tokens, edit) for row in rows])
    torch.testing.assert_close(alone, together, atol=2e-4, rtol=0)
