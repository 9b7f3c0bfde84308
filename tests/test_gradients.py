"""Gradients reach an edit's own tensors through any model, whatever the backend shares or keeps; and `train` follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.backends.linear_kernel import use_onednn
from rsteer_interp.batch import Batch
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import AblateSubspace, Affine, Everywhere, ablate, add
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.soft_prompt import SoftPrompt, positions_of, prompt_vectors
from rsteer_interp.training import (
    Descent,
    cross_entropy,
    gram_schmidt,
    tangent,
    target_logits,
    train,
)
from tests.backend_contract import unshared, vector
from tests.tiny_models import FAMILIES, KINDS, Kind, tiny_backend, tiny_model, tiny_rows

TOKENS = (5, 9, 30)
SOME = ["llama", "gemma2", "gpt2", "qwen3_next"]
WIDE = {"gpt2", "gpt_neox"}  # the others' norms and attention round to float32 whatever the model's dtype
CASES = [(family, "hooks") for family in FAMILIES] + [(family, "transformerlens") for family in SOME]


def ablation(backend: Backend, v: Tensor) -> Edit:
    return ablate({Site(layer): v for layer in range(backend.n_layers + 1)})


def odds(backend: Backend, batch: Batch, edit: Edit, *, grad: bool = False) -> Tensor:
    return refusal_log_odds(backend.logits(batch, edit, grad=grad)[:, -1], TOKENS).sum()


def gradient(backend: Backend, batch: Batch, parameter: Tensor, edit: Callable[[Tensor], Edit]) -> Tensor:
    leaf = parameter.clone().requires_grad_(True)
    return torch.autograd.grad(odds(backend, batch, edit(leaf), grad=True), leaf)[0]


def check_slope(
    backend: Backend, batch: Batch, parameter: Tensor, edit: Callable[[Tensor], Edit], step: float = 1e-2
) -> None:
    """The gradient's length is the central difference along it: to 1e-6 in float64, to 1 % in float32."""
    wide = backend.model.dtype == torch.float64
    step = step / 100 if wide else step
    g = gradient(backend, batch, parameter, edit)
    assert bool(torch.isfinite(g).all()) and float(g.norm()) > 1e-3
    e = step * g / g.norm()
    up, down = (float(odds(backend, batch, edit(parameter + sign * e))) for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(float(g.norm()), rel=1e-6 if wide else 1e-2)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_gradient_of_an_ablated_direction_is_a_finite_difference(case: tuple[str, Kind]) -> None:
    """Also through the shared prefix, where the family has one; and the same when nothing is shared."""
    backend = tiny_backend(*case)
    if case[0] in WIDE:
        backend.model.double()
    batch, v = backend.batch(tiny_rows(backend)), vector(1, backend.d_model).double()
    check_slope(backend, batch, v, lambda v: ablation(backend, v))
    shared = gradient(backend, batch, v, lambda v: ablation(backend, v))
    assert abs(float(shared @ v)) < 1e-6 * float(shared.norm() * v.norm())  # no gradient along a direction's length
    if backend.can_share_prefix:
        assert backend._shared_width(batch, ablation(backend, v), 1) >= 4
        with unshared(backend):
            apart = gradient(backend, batch, v, lambda v: ablation(backend, v))
        torch.testing.assert_close(apart, shared, rtol=1e-4, atol=1e-5 * float(shared.norm()))


def test_a_prefix_without_gradients_is_caught() -> None:
    """The comparison above sees a prefix pass that is cut from the graph."""
    backend = tiny_backend("llama")
    batch, v = backend.batch(tiny_rows(backend)), vector(1, backend.d_model)
    whole = gradient(backend, batch, v, lambda v: ablation(backend, v))
    build = backend._prefix_cache

    def cut(*args, **options):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return build(*args, **options)

    backend._prefix_cache = cut  # type: ignore[method-assign]
    part = gradient(backend, batch, v, lambda v: ablation(backend, v))
    assert float((part - whole).norm()) > 1e-2 * float(whole.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_gradients_are_those_of_the_model_without_a_backend(family: str, kind: Kind) -> None:
    """Addition at block 1, by the transformers model and a hook of its own, prompt by prompt."""
    backend, model = tiny_backend(family, kind), tiny_model(family)
    rows, v = tiny_rows(backend), vector(2, backend.d_model)
    got = gradient(backend, backend.batch(rows), v, lambda v: Affine(Site(1), v, amount=2.0))
    leaf = v.clone().requires_grad_(True)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == backend.n_layers)
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 2.0 * leaf / leaf.norm(), *args[1:]))
    total = sum(refusal_log_odds(model(torch.tensor([row.ids])).logits[0, -1], TOKENS) for row in rows)
    assert isinstance(total, Tensor)
    expected = torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorder_sees_the_graph_in_a_run(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    batch, v = backend.batch(tiny_rows(backend)), vector(1, backend.d_model).requires_grad_(True)
    seen: list[Tensor] = []

    class Look:
        sites, pointwise = frozenset({Site(3)}), True

        def __call__(self, x: Tensor, at: At) -> Tensor:
            if at.phase == "prompt":
                seen.append(x[:, -1])
            return x

    both = compose(Affine(Site(1), v, kappa=1.0), Look())
    assert both is not None
    backend.run(batch, both, grad=True)
    (g,) = torch.autograd.grad(seen[0].square().sum(), v)
    assert float(g.norm()) > 1e-3
    backend.run(batch, both)
    assert not seen[1].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plain_pass_leaves_serves_one_with_gradients(kind: Kind) -> None:
    """Copies that fixed edits keep, and a prepared start: made in inference mode, then part of a graph."""
    backend = tiny_backend("llama", kind)
    d, rows = backend.d_model, tiny_rows(backend)
    with torch.inference_mode():
        made_there = gram_schmidt(torch.stack([vector(3, d), vector(4, d)])).float()
    fixed = compose(
        Affine(Site(2), vector(2, d), kappa=0.5, reference=vector(5, d)), AblateSubspace(Site(3), made_there)
    )
    assert fixed is not None

    def edit(v: Tensor) -> Edit:
        return compose(Affine(Site(1), v, amount=1.0), fixed)  # type: ignore[return-value]

    batch, v = backend.batch(rows), vector(1, d)
    backend.logits(batch, edit(v))
    after = gradient(backend, batch, v, edit)
    check_slope(backend, batch, v, edit)
    (_, started), *_ = backend.prepare(rows, 1).batches
    odds(backend, started, edit(v))
    order = [rows.index(row) for row in started.rows]
    assert sorted(order) == list(range(len(rows)))
    torch.testing.assert_close(gradient(backend, started, v, edit), after, rtol=1e-3, atol=1e-4 * float(after.norm()))


def test_a_trained_direction_is_read_anew_and_a_fixed_one_is_not() -> None:
    backend = tiny_backend("llama")
    batch, v = backend.batch(tiny_rows(backend)), vector(1, backend.d_model).requires_grad_(True)
    edit = Affine(Site(1), v, amount=3.0)
    first = backend.logits(batch, edit)
    with torch.no_grad():
        v.copy_(vector(2, backend.d_model))
    assert not torch.equal(backend.logits(batch, edit), first) and not edit._copies
    plain = Affine(Site(1), vector(2, backend.d_model), amount=3.0)
    torch.testing.assert_close(backend.logits(batch, plain), backend.logits(batch, edit))
    assert len(plain._copies) == 1


def test_amounts_references_and_bases_receive_gradients() -> None:
    backend = tiny_backend("gpt2")
    backend.model.double()
    d = backend.d_model
    batch, v = backend.batch(tiny_rows(backend)), vector(1, d).double()
    check_slope(backend, batch, vector(4, d).double(), lambda o: Affine(Site(1), v, kappa=1.0, reference=o))
    amounts = torch.linspace(1, 2, len(batch)).double()
    check_slope(backend, batch, amounts, lambda a: Affine(Site(1), v, amount=a), 1e-1)
    basis = gram_schmidt(torch.stack([v, vector(2, d).double()]))
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    leaf = basis.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(odds(backend, batch, AblateSubspace(Site(1), leaf), grad=True), leaf)
    assert float(g.norm()) > 1e-3
    # Turning the basis inside its span changes nothing.
    assert abs(float((g * (turn @ basis)).sum())) < 1e-6 * float(g.norm())


def test_onednn_layers_have_the_gradient_of_pytorchs() -> None:
    plain, fast = tiny_model("llama"), tiny_model("llama")
    assert use_onednn(fast) > 0
    x = vector(0, 7 * 32).view(1, 7, 32)
    results = []
    for model in (plain, fast):
        leaf = x.clone().requires_grad_(True)
        logits = model(inputs_embeds=leaf).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))
    out = fast.lm_head(x.requires_grad_(True))
    assert type(out.grad_fn).__name__ == "_FrozenBackward"
    fast.lm_head.weight.requires_grad_(True)  # a weight that learns is PyTorch's business
    assert type(fast.lm_head(x).grad_fn).__name__ != "_FrozenBackward"
    fast.lm_head(x).sum().backward()
    assert fast.lm_head.weight.grad is not None


# -- soft prompts -----------------------------------------------------------------------------------------------------

SYSTEM = "tell the law of the water"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_a_soft_prompt_of_the_embeddings_is_the_written_prompt(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    template = backend.template(SYSTEM)
    where = positions_of(template, SYSTEM)
    row = template.encode("why")
    assert backend.tokenizer.decode(torch.tensor(row.ids)[where]) == SYSTEM and int(where.max()) < row.prefix
    vectors = prompt_vectors(backend, template, where)
    assert vectors.shape == (6, backend.d_model)
    rows = template.encode_all(["why", "tell me about the river", "how do i write a poem ?"])
    batch = backend.batch(rows)
    plain = backend.logits(batch)
    torch.testing.assert_close(backend.logits(batch, SoftPrompt(where, vectors)), plain, rtol=1e-4, atol=1e-4)
    edit = SoftPrompt(where, vectors + 0.3 * vector(1, vectors.numel()).view_as(vectors))
    shared = backend.logits(batch, edit)
    assert float((shared - plain).abs().max()) > 1e-2
    alone = torch.cat([backend.logits(backend.batch([row]), edit) for row in rows])
    torch.testing.assert_close(alone, shared, rtol=1e-3, atol=1e-4)
    replies = backend.generate(batch, 3, edit)
    assert torch.equal(replies.ids[:, 0], shared[:, -1].argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_soft_prompt_receives_gradients_inside_and_outside_the_shared_prefix(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    if family in WIDE:
        backend.model.double()
    template = backend.template(SYSTEM)
    batch = backend.batch(template.encode_all(["why do you", "tell me about the river", "how do i write a poem ?"]))
    where = torch.cat([positions_of(template, SYSTEM), torch.tensor([batch.shared_prefix])])
    vectors = 0.3 * vector(1, 7 * backend.d_model).view(7, -1).double()
    check_slope(backend, batch, vectors, lambda x: SoftPrompt(where, x))
    g = gradient(backend, batch, vectors, lambda x: SoftPrompt(where, x))
    assert bool((g.norm(dim=1) > 1e-4 * g.norm()).all())  # every vector has a share
    with unshared(backend):
        apart = gradient(backend, batch, vectors, lambda x: SoftPrompt(where, x))
    torch.testing.assert_close(apart, g, rtol=1e-4, atol=1e-5 * float(g.norm()))


def test_a_soft_prompt_can_be_trained() -> None:
    """Free vectors: what the written prompt does not say, the trained one does."""
    backend = tiny_backend("llama")
    template = backend.template(SYSTEM)
    where = positions_of(template, SYSTEM)
    rows = template.encode_all(["why do you", "tell me about the river"], ["bread", "bread"])
    batch = backend.batch(rows)

    def loss(vectors: Tensor, step: int) -> list[Tensor]:
        return [cross_entropy(target_logits(backend, batch, SoftPrompt(where, vectors), grad=True), batch).mean()]

    start = prompt_vectors(backend, template, where)
    trained = train(start, loss, Descent(steps=25, lr=0.05), "free")
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert not trained.value.requires_grad and trained.value.shape == start.shape


def test_a_soft_prompt_that_has_no_place_is_refused() -> None:
    backend = tiny_backend("llama")
    with pytest.raises(UserError, match="a vector for each position"):
        SoftPrompt(torch.tensor([1, 1]), torch.zeros(2, 4))
    with pytest.raises(UserError, match="does not stand exactly once"):
        positions_of(backend.template(), "no such words")
    with pytest.raises(UserError, match="not in the template prefix"):
        prompt_vectors(backend, backend.template(), torch.tensor([60]))


# -- training ---------------------------------------------------------------------------------------------------------


def test_gram_schmidt_is_the_textbooks() -> None:
    rows = vector(0, 40).view(4, 10).double()
    basis: list[Tensor] = []
    for row in rows:
        left = row - sum(((row @ b) * b for b in basis), torch.zeros(10))
        basis.append(left / left.norm())
    torch.testing.assert_close(gram_schmidt(rows), torch.stack(basis))
    with pytest.raises(UserError, match="not linearly independent"):
        gram_schmidt(torch.stack([rows[0], 2 * rows[0]]))


def test_unit_vectors_descend_to_a_planted_one_and_stay_unit() -> None:
    u = vector(0, 50).double()
    u = u / u.norm()
    seen: list[Tensor] = []

    def loss(rows: Tensor, step: int) -> list[Tensor]:
        seen.append(rows.detach().clone())
        near = rows[0] @ u
        return [-near.square(), 0.5 * near.square()]  # in parts of one graph

    start = vector(1, 50) + u.float()
    trained = train(3 * start[None], loss, Descent(steps=300, patience=50))
    assert abs(float(trained.value[0] @ u)) > 0.999
    assert all(float((rows.norm() - 1).abs()) < 1e-12 for rows in seen)
    torch.testing.assert_close(seen[0][0], start.double() / start.double().norm())
    first = -0.5 * float(seen[0][0] @ u) ** 2
    assert trained.losses[0] == pytest.approx(first)
    assert train(start[None], loss, Descent(steps=5)).losses == train(start[None], loss, Descent(steps=5)).losses


def test_the_step_is_tangent_and_an_untouched_gradient_is_not() -> None:
    rows = gram_schmidt(vector(0, 60).view(3, 20))
    g = vector(1, 60).view(3, 20).double()
    along = tangent(g, rows)
    assert float((along * rows).sum(1).abs().max()) < 1e-12 < float((g * rows).sum(1).abs().max())
    torch.testing.assert_close(g - along, (g * rows).sum(1, keepdim=True) * rows)


def test_rows_stay_orthonormal() -> None:
    def loss(rows: Tensor, step: int) -> list[Tensor]:
        torch.testing.assert_close(rows.detach() @ rows.detach().T, torch.eye(3).double(), rtol=0, atol=1e-12)
        return [(rows @ torch.linspace(0, 1, 20).double()).square().sum() + rows[0, 0] * rows[1, 1]]

    value = train(vector(0, 60).view(3, 20), loss, Descent(steps=40)).value
    torch.testing.assert_close(value @ value.T, torch.eye(3).double(), rtol=0, atol=1e-12)


def test_patience_cuts_the_rate_and_then_ends() -> None:
    """A loss that never falls: 1 + patience steps to each cut, two cuts, and the end."""
    moves: list[Tensor] = []

    def loss(rows: Tensor, step: int) -> list[Tensor]:
        moves.append(rows.detach().clone())
        return [1.0 + 0 * rows.sum() + (rows - rows.detach()).sum()]  # value 1, slope 1

    descent = Descent(steps=100, patience=4, cuts=2, cut=0.1, lr=0.1)
    trained = train(torch.zeros(1, 6), loss, descent, "free")
    assert len(trained.losses) == 1 + 4 * 3
    sizes = [float((b - a).abs().max()) for a, b in pairwise(moves)]
    assert sizes[0] == pytest.approx(0.1, rel=1e-3) and sizes[6] == pytest.approx(0.01, rel=1e-3)
    assert sizes[-1] == pytest.approx(0.001, rel=1e-3)
    assert len(train(torch.zeros(1, 6), loss, replace(descent, steps=3), "free").losses) == 3


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        train(torch.ones(1, 4), lambda rows, step: [rows.sum() * float("nan")])


def test_everywhere_takes_one_trained_direction_at_many_sites() -> None:
    """The gradients of its sites add up."""
    backend = tiny_backend("gpt2")
    backend.model.double()
    batch, d = backend.batch(tiny_rows(backend)), backend.d_model
    v = vector(1, d).double()
    leaves = {Site(layer): v.clone().requires_grad_(True) for layer in range(4)}
    apart = torch.autograd.grad(odds(backend, batch, ablate(leaves), grad=True), list(leaves.values()))
    whole = gradient(backend, batch, v, lambda v: Everywhere({s: Affine(s, v, kappa=1.0) for s in leaves}))
    torch.testing.assert_close(torch.stack(apart).sum(0), whole)


def test_states_and_edits_without_gradients_are_as_before() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    v = vector(1, backend.d_model)
    edit = add({Site(1): v}, {Site(1): 2.0})
    with_grad = backend.logits(backend.batch(rows), edit, grad=True)
    assert not with_grad.requires_grad  # nothing here takes one
    torch.testing.assert_close(with_grad, backend.logits(backend.batch(rows), edit), rtol=1e-4, atol=1e-5)
    assert not last_states(backend, rows, [Site(2)], edit)[Site(2)].requires_grad
