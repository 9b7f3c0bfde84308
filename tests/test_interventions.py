"""The affine operator's theorems: projections are exact, idempotent, and each edit is its paper's own formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rsteer_interp.backends.edits import At, Compose, Edit, Site
from rsteer_interp.batch import Tokens, make_batch
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine, AtPositions, ablate, add, set_component

S = Site(3)
ROWS, POS, D = 4, 5, 16


def at(rows: int = ROWS, pos: int = POS) -> At:
    batch = make_batch([Tokens(tuple(range(pos)), 1, 2, 4)] * rows, 0)
    return At(S, "prompt", 0, batch.positions, batch.mask, torch.arange(rows), batch)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def h() -> Tensor:
    return draw(ROWS, POS, D)


@pytest.fixture
def v() -> Tensor:
    return 7.3 * draw(D, seed=1)  # not of unit length on purpose


def test_ablation_is_a_projection(h: Tensor, v: Tensor) -> None:
    edit = ablate({S: v})
    once = edit(h, at())
    unit = v / v.norm()
    torch.testing.assert_close(once @ unit, torch.zeros(ROWS, POS, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(edit(once, at()), once, atol=1e-12, rtol=0)
    torch.testing.assert_close(once, h - (h @ unit)[..., None] * unit, atol=1e-12, rtol=0)
    torch.testing.assert_close(ablate({S: -0.01 * v})(h, at()), once, atol=1e-12, rtol=0)


def test_affine_sets_the_component(h: Tensor, v: Tensor) -> None:
    o, unit = draw(D, seed=2), v / v.norm()
    out = set_component({S: v}, {S: o}, {S: -2.5})(h, at())
    torch.testing.assert_close(out @ unit, (o @ unit - 2.5).expand(ROWS, POS), atol=1e-12, rtol=0)
    rest = out - (out @ unit)[..., None] * unit
    torch.testing.assert_close(rest, h - (h @ unit)[..., None] * unit, atol=1e-12, rtol=0)


@pytest.mark.parametrize("paper", ["arditi", "reposition", "ace", "target", "dbdi", "addition"])
def test_each_row_of_the_table_is_the_papers_formula(h: Tensor, v: Tensor, paper: str) -> None:
    u, o, alpha, s = v / v.norm(), draw(D, seed=3), -0.75, 1.9
    p = (h @ u)[..., None] * u
    po = (o @ u) * u
    wanted: dict[str, tuple[Edit, Tensor]] = {
        "arditi": (Affine(S, v, kappa=1.0), h - p),
        "reposition": (Affine(S, v, kappa=1.0, reference=o, amount=alpha * s), h - (p - po) + alpha * s * u),
        "ace": (Affine(S, v, kappa=1.0, reference=o, amount=alpha * float(v.norm())), h - p + po + alpha * v),
        "target": (Affine(S, v, kappa=1.0, amount=s), h + (s - h @ u)[..., None] * u),
        "dbdi": (Affine(S, v, kappa=0.4), h - 0.4 * p),
        "addition": (Affine(S, v, amount=alpha * float(v.norm())), h + alpha * v),
    }
    edit, formula = wanted[paper]
    torch.testing.assert_close(edit(h, at()), formula, atol=1e-12, rtol=0)


def test_order_of_project_and_shift(h: Tensor, v: Tensor) -> None:
    """DBDI: project-then-shift minus shift-then-project is -alpha beta <r, g> r."""
    r, g, alpha, beta = v / v.norm(), draw(D, seed=4), 0.7, -1.3
    g = g / g.norm()
    project, shift = Affine(S, r, kappa=alpha), Affine(S, g, amount=-beta)
    difference = Compose((project, shift))(h, at()) - Compose((shift, project))(h, at())
    torch.testing.assert_close(difference, (-alpha * beta * (r @ g) * r).expand_as(h), atol=1e-12, rtol=0)


def test_edits_never_write_in_place(h: Tensor, v: Tensor) -> None:
    before = h.clone()
    for edit in (ablate({S: v}), add({S: v}, {S: 1.0}), set_component({S: v}, {S: v}, {S: 1.0})):
        edit(h, at())
        assert torch.equal(h, before)


def test_row_coefficients_match_single_runs(h: Tensor, v: Tensor) -> None:
    amounts = torch.tensor([0.0, 1.0, -2.0, 0.5])
    together = Affine(S, v, amount=amounts)
    assert not together.pointwise
    out = together(h, at())
    for row, amount in enumerate(amounts.tolist()):
        alone = Affine(S, v, amount=amount)
        assert alone.pointwise
        torch.testing.assert_close(out[row], alone(h, at())[row], atol=1e-6, rtol=0)


def test_half_precision_streams_are_projected_in_float32(v: Tensor) -> None:
    h = (1000 * draw(ROWS, POS, D)).to(torch.bfloat16)
    out = ablate({S: v})(h, at())
    assert out.dtype == torch.bfloat16
    unit = (v / v.norm()).float()
    assert float((out.float() @ unit).abs().max()) <= 0.01 * float(h.float().norm(dim=-1).max())


@pytest.mark.parametrize("spans", [{"prefix"}, {"instruction"}, {"suffix"}, {"instruction", "suffix"}])
def test_positions_outside_the_spans_are_left_alone(h: Tensor, v: Tensor, spans: set[str]) -> None:
    borders = {"prefix": range(1), "instruction": range(1, 2), "suffix": range(2, 4), "generated": range(4, 5)}
    out = AtPositions(ablate({S: v}), frozenset(spans))(h, at())
    edited = {i for name in spans for i in borders[name]}
    for i in range(POS):
        changed = bool((out[:, i] != h[:, i]).any())
        assert changed == (i in edited)


@pytest.mark.parametrize("length", [0.0, float("inf"), float("nan")])
def test_directions_without_a_length_are_refused(length: float) -> None:
    with pytest.raises(UserError, match="finite, nonzero length"):
        Affine(S, torch.full((D,), length))


def _unnormalised(h: Tensor, v: Tensor) -> Tensor:
    return h - (h @ v)[..., None] * v


def _reference_forgotten(h: Tensor, v: Tensor) -> Tensor:
    u = v / v.norm()
    return h - (h @ u)[..., None] * u


@pytest.mark.parametrize("fault", [_unnormalised, _reference_forgotten])
def test_the_theorems_catch_seeded_faults(h: Tensor, v: Tensor, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    o, u = draw(D, seed=2), v / v.norm()
    wanted = set_component({S: v}, {S: o}, {S: 0.0})(h, at()) @ u
    assert float((fault(h, v) @ u - wanted).abs().max()) > 1e-3
