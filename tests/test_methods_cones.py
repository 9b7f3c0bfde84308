"""Cones hold directions that all mediate what the loss asks for; RepInd sees what cosines do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import ablate
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.methods.cones import (
    ConeLoss,
    bypass_effects,
    cone_directions,
    fit_cones,
    sample_test,
)
from rsteer_interp.methods.independence import RepInd, dependence, independent_direction
from rsteer_interp.methods.rdo import ablation
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.training import Descent, gram_schmidt
from tests.backend_contract import vector
from tests.tiny_models import D_MODEL, KINDS, Kind, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)


# -- cones ------------------------------------------------------------------------------------------------------------


def test_cone_directions_are_unit_and_inside() -> None:
    basis = gram_schmidt(vector(0, 60).view(3, 20))
    drawn = cone_directions(basis, 400, seed=1)
    weights = drawn @ basis.T
    assert float(weights.min()) >= 0
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400).double())
    torch.testing.assert_close(weights @ basis, drawn)  # nothing outside the span
    # Absolute Gaussians, normalised: uniform on an eighth of the sphere, where mean squares are 1/3 and means 1/2.
    torch.testing.assert_close(weights.square().mean(0), torch.full((3,), 1 / 3).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 0.5).double(), atol=0.04, rtol=0)
    assert torch.equal(drawn, cone_directions(basis, 400, seed=1))
    assert not torch.equal(drawn, cone_directions(basis, 400, seed=2))


def test_the_cone_loss_is_the_mean_over_samples_plus_that_over_the_basis() -> None:
    target = vector(5, 20).double()
    seen: list[Tensor] = []

    def one(rows: Tensor, step: int) -> list[Tensor]:
        seen.append(rows.detach()[0])
        return [rows[0] @ target, (rows[0] @ target).square()]

    basis = gram_schmidt(vector(0, 40).view(2, 20))
    total = float(sum(ConeLoss(one, samples=3, seed=4)(basis, 7)))
    values = [float(r @ target + (r @ target) ** 2) for r in seen]
    assert len(seen) == 5
    torch.testing.assert_close(torch.stack(seen[3:]), basis)
    assert total == pytest.approx(sum(values[:3]) / 3 + sum(values[3:]) / 2)
    seen.clear()
    list(ConeLoss(one, samples=3, seed=4)(basis, 8))
    assert not torch.equal(seen[0], cone_directions(basis, 3, 0)[0])  # other samples at another step
    seen.clear()
    assert float(sum(ConeLoss(one)(basis[:1], 0))) == pytest.approx(values[3]) and len(seen) == 1


def test_bases_stay_orthonormal_and_start_from_the_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a planted loss that is lowest in the span of three unit vectors."""
    planted = gram_schmidt(vector(9, 90).view(3, 30))
    starts: dict[int, Tensor] = {}
    steps = ConeLoss.__call__

    def one(rows: Tensor, step: int) -> list[Tensor]:
        return [-(rows @ planted.T).square().sum()]

    def watched(self: ConeLoss, basis: Tensor, step: int) -> Iterator[Tensor]:
        flat = basis.detach()
        torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)).double(), rtol=0, atol=1e-12)
        starts.setdefault(len(flat), flat.clone())
        return steps(self, basis, step)

    monkeypatch.setattr(ConeLoss, "__call__", watched)
    descent = Descent(steps=200, lr=0.02, patience=30)
    found = fit_cones(planted[0] + 0.5 * vector(3, 30), one, 3, descent, seed=2)
    assert [len(trained.value) for trained in found] == [1, 2, 3]
    for k in (2, 3):
        torch.testing.assert_close(starts[k][:-1], found[k - 2].value)
    inside = (found[-1].value @ planted.T).square().sum(1)
    assert float(inside.min()) > 0.85
    random = (random_unit_vectors(3, 30, 0) @ planted.T).square().sum(1)
    assert float(random.max()) < 0.5


def test_samples_of_a_planted_cone_beat_random_vectors_and_noise_does_not() -> None:
    planted = gram_schmidt(vector(9, 90).view(3, 30))

    def effects(r: Tensor, into: Tensor) -> Tensor:
        return (torch.cat([r[None], into]).double() @ planted.T).square().sum(1, keepdim=True)

    test = sample_test(planted, effects, n=16)
    assert len(test.cone) == len(test.random) == 16
    assert test.p < 1e-4 and min(test.cone) == pytest.approx(1, abs=1e-5)
    assert sum(test.random) / 16 == pytest.approx(3 / 30, abs=0.06)
    # An effect that no direction has: p is uniform.
    noise = torch.Generator().manual_seed(0)
    null = [
        sample_test(planted, lambda r, into: torch.randn(1 + len(into), 1, generator=noise), n=12, seed=i).p
        for i in range(60)
    ]
    assert sum(p < 0.05 for p in null) <= 8 and 0.3 < sum(null) / 60 < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_cone_of_a_model_lowers_log_odds_where_random_vectors_do_not(kind: Kind) -> None:
    backend = tiny_backend("gpt2", kind)
    rows = tiny_rows(backend)
    batch = backend.batch(rows)

    def loss(r: Tensor, step: int) -> list[Tensor]:
        logits = backend.logits(batch, ablation(backend, r[0]), grad=True)[:, -1]
        return [refusal_log_odds(logits, TOKENS).mean()]

    found = fit_cones(vector(1, D_MODEL), loss, 2, Descent(steps=12, lr=0.05), samples=2)
    test = sample_test(found[-1].value, bypass_effects(backend, rows, TOKENS), n=8)
    assert test.p < 0.01
    r = cone_directions(found[-1].value, 8, 0)[0].float()
    sites = [site for site in backend.sites if site.point != "resid_post"]
    plain, ablated = (log_odds(backend, rows, TOKENS, e).mean() for e in (None, ablate(dict.fromkeys(sites, r))))
    assert test.cone[0] == pytest.approx(float(plain - ablated), abs=1e-4)


# -- representational independence ------------------------------------------------------------------------------------

V, U, W, X = torch.eye(D_MODEL)[[2, 5, 8, 12]]


@cache
def coupled_backend() -> Backend:
    """Blocks write nothing, but for the MLP of block 1, which writes U where it reads V. Nothing reads or writes W and X."""
    backend = tiny_backend("llama")
    noise = torch.Generator().manual_seed(0)
    model = backend.model.model
    model.embed_tokens.weight.data = torch.randn(model.embed_tokens.weight.shape, generator=noise)
    for block in model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
        block.post_attention_layernorm.weight.data.fill_(1.0)
    mlp = model.layers[1].mlp
    # silu(g) g with g = c <v, h>, for either sign of <v, h>: written along U.
    for row, sign in ((0, 1.0), (1, -1.0)):
        mlp.gate_proj.weight.data[row] = 3 * sign * V
        mlp.up_proj.weight.data[row] = 3 * sign * V
        mlp.down_proj.weight.data[:, row] = 2 * U
    return backend


def many_rows(backend: Backend):  # type: ignore[no-untyped-def]
    """Prompts that differ in their last word: with silent blocks the stream at the last token is the last token's."""
    tokens = backend.template().encode("why")
    return [
        type(tokens)((*tokens.ids[:-1], 20 + i), tokens.prefix, tokens.instruction, tokens.prompt) for i in range(12)
    ]


def test_orthogonal_is_not_independent() -> None:
    """V and U have cosine 0, and ablating V takes U away downstream; W and X, as orthogonal, are independent."""
    backend = coupled_backend()
    rows = many_rows(backend)
    coupled, free = (dependence(backend, rows, *pair, n_random=19) for pair in ((V, U), (W, X)))
    assert coupled.cosine == free.cosine == 0.0
    assert coupled.value > 0.1 and coupled.value > 100 * free.value
    assert coupled.p == 1 / 20 and free.p > 0.05
    # It shows after the block that couples them, and one way: the block does not read U.
    assert max(coupled.there[:1]) < 0.01 < min(coupled.there[1:])
    assert max(coupled.back) < 0.2 * min(coupled.there[1:])
    assert len(coupled.null) == 19 and max(coupled.null) < coupled.value


def test_repind_with_itself_is_the_self_ablation_value() -> None:
    """Ablated, its cosine is 0 at every layer: twice the mean squared cosine of the plain run."""
    backend = tiny_backend("llama")
    rows, r = tiny_rows(backend), vector(1, D_MODEL)
    sites = [Site(layer) for layer in range(1, backend.n_layers)]
    states = last_states(backend, rows, sites)
    expected = [
        float(torch.nn.functional.cosine_similarity(states[site].double(), r.double()[None]).square().mean())
        for site in sites
    ]
    own = RepInd.of(backend, rows, r)
    assert own(r) == pytest.approx(2 * sum(expected) / len(expected), rel=1e-4)
    torch.testing.assert_close(own.by_layer(-2 * r)[0], torch.tensor(expected).double(), rtol=1e-4, atol=1e-8)
    assert own(r) == pytest.approx(RepInd.of(backend, rows, 3 * r)(r), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_statistic_is_its_definition(family: str, kind: Kind) -> None:
    """From states of three plain runs; symmetric; the same however the prompts are batched."""
    backend = tiny_backend(family, kind)
    rows, r, u = tiny_rows(backend), vector(1, D_MODEL), vector(2, D_MODEL)
    everywhere = [s for s in backend.sites if s.point != "resid_post"]
    sites = [Site(2), Site(3)]
    runs = {
        name: last_states(backend, rows, sites, edit)
        for name, edit in (
            ("plain", None),
            ("r", ablate(dict.fromkeys(everywhere, r))),
            ("u", ablate(dict.fromkeys(everywhere, u))),
        )
    }

    def change(ablated: str, read: Tensor) -> float:
        total = 0.0
        for site in sites:
            for before, after in zip(runs["plain"][site], runs[ablated][site], strict=True):
                a, b = (float(h @ read) / math.sqrt(float(h @ h) * float(read @ read)) for h in (before, after))
                total += (a - b) ** 2
        return total / (len(sites) * len(rows))

    value = RepInd.of(backend, rows, u, sites)(r)
    assert value == pytest.approx(change("r", u) + change("u", r), rel=1e-3)
    assert value == pytest.approx(RepInd.of(backend, rows, r, sites)(u), rel=1e-3)
    assert value == pytest.approx(RepInd.of(backend, rows, u, sites, batch_size=1)(r), rel=1e-3)


def test_its_gradient_is_a_finite_difference() -> None:
    backend = tiny_backend("gpt2")
    backend.model.double()
    term = RepInd.of(backend, tiny_rows(backend), vector(2, D_MODEL))
    r = vector(1, D_MODEL).double()
    leaf = r.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(term.loss(leaf, 0), leaf)
    e = 1e-4 * g / g.norm()
    slope = (term(r + e) - term(r - e)) / 2e-4
    assert slope == pytest.approx(float(g.norm()), rel=1e-4)
    assert float(term.loss(r, 0)) == pytest.approx(term(r))


def test_directions_found_one_after_another_are_independent_of_those_before() -> None:
    """On the coupled model a loss that likes V, and U a little, finds V; then with RepInd not U but what is left of it."""
    backend = coupled_backend()
    rows = many_rows(backend)

    def loss(r: Tensor, step: int) -> list[Tensor]:
        return [-(r[0] @ V.double()).square() - 0.5 * (r[0] @ U.double()).square()]

    starts = torch.stack([V + 0.1 * vector(1, D_MODEL), U + 0.1 * vector(2, D_MODEL)])
    descent = Descent(steps=30, lr=0.03)
    first = independent_direction(backend, [], starts[0], loss, rows, descent)
    known = [first.value[0]]
    second = independent_direction(backend, known, starts[1], loss, rows, descent)
    free = independent_direction(backend, known, starts[1], loss, rows, descent, weight=0.0)
    assert abs(float(first.value[0] @ V.double())) > 0.95
    to_first = RepInd.of(backend, rows, first.value[0])
    assert to_first(second.value[0]) < 0.1 * to_first(free.value[0])
    # The start is made orthogonal to what was found.
    assert second.losses[0] > 10 * abs(free.losses[0])


def test_dependent_starts_are_refused() -> None:
    backend = coupled_backend()
    with pytest.raises(UserError, match="not linearly independent"):
        independent_direction(backend, [V], V, lambda r, step: [0 * r.sum()], many_rows(backend), Descent(steps=1))
