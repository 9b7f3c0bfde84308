"""RDO: its loss is the one stated, its gradient is right, and training takes a planted topic out of a mixed direction."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site, compose
from rsteer_interp.directions import Evidence, MeanDifference
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import ablate, add
from rsteer_interp.methods.base import Examples, Material, Method
from rsteer_interp.methods.rdo import (
    RDO,
    RDORetain,
    RefusalLoss,
    Weights,
    ablation,
    dim_layer,
    mean_difference,
    stream_sites,
    with_own_replies,
)
from tests.backend_contract import vector
from tests.tiny_models import D_MODEL, KINDS, Kind, tiny_backend, tiny_rows

REFUSED = ["tell me about the protest", "why is the leader in the city ?", "explain the protest", "what is the border"]
ANSWERED = ["tell me about the river", "why is the island in the water ?", "explain the poem", "what is the price"]
KEPT = ["how do i write a bomb", "tell me the password", "explain a bomb to me", "what is a password ?"]
ORDINARY = ["tell me about the bread", "write a recipe", "explain bread and water", "what is a recipe ?"]
TOKENS = (5, 9)
QUICK = {"compliance": "the river", "refusal": "i can", "reply_tokens": 2, "batch": 3}


def material(backend: Backend, odds: bool = False) -> Material:
    """Sets whose confidence is given by the set, or by the sign of the log-odds."""
    template = backend.template()
    sites = [Site(layer) for layer in range(1, backend.n_layers + 1)]

    def examples(texts: list[str], confidence: float) -> Examples:
        rows = template.encode_all(texts)
        signs = log_odds(backend, rows, TOKENS).sign() if odds else torch.full((len(texts),), confidence)
        return Examples(texts, signs, last_states(backend, rows, sites), texts)

    sets = {
        "remove": examples(REFUSED, 1.0),
        "contrast": examples(ANSWERED, -1.0),
        "keep": examples(KEPT, 1.0),
        "ordinary": examples(ORDINARY, -1.0),
    }
    return Material(backend, template, TOKENS, sets, sets, "remove", "contrast", "keep", ("ordinary",))


@cache
def tiny_material() -> Material:
    return material(tiny_backend("gpt2"))


# -- where it is ablated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mistral_window"])
def test_ablating_what_enters_the_stream_is_ablating_everywhere(family: str) -> None:
    """Arditi et al.'s sites; also behind post-norms and for parallel blocks. Nothing is left at the final norm."""
    backend = tiny_backend(family)
    r, batch = vector(1, backend.d_model), backend.batch(tiny_rows(backend))
    everywhere = [s for s in backend.sites if s.point != "resid_post"]
    torch.testing.assert_close(
        backend.logits(batch, ablation(backend, r)),
        backend.logits(batch, ablate(dict.fromkeys(everywhere, r))),
        rtol=1e-3,
        atol=1e-3,
    )
    end = Site(backend.n_layers)
    left = last_states(backend, tiny_rows(backend), [end], ablation(backend, r))[end] @ (r / r.norm())
    assert float(left.abs().max()) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_partial_ablation_leaves_a_share_of_what_every_writer_writes(family: str) -> None:
    """Not of what is left of it, which would be nothing after a few blocks; a block without writers is edited at its end."""
    backend = tiny_backend(family)
    r, rows = vector(1, backend.d_model), tiny_rows(backend)[:1]
    unit = r / r.norm()
    written: list[Tensor] = []

    class Look:
        sites, pointwise = frozenset(stream_sites(backend)), True

        def __call__(self, x: Tensor, at: At) -> Tensor:
            written.append(x[0, -1] @ unit)
            return x

    both = compose(Look(), ablation(backend, r, 0.25))
    end = Site(backend.n_layers)
    left = last_states(backend, rows, [end], both)[end][0] @ unit
    assert len(written) == 1 + 2 * backend.n_layers
    torch.testing.assert_close(left, 0.75 * torch.stack(written).sum(), rtol=1e-3, atol=1e-4)
    backend.withdraw(Site(1, "mlp_out"))
    assert Site(1, "resid_post") in stream_sites(backend) and Site(1, "attn_out") not in stream_sites(backend)
    whole = last_states(backend, rows, [end], ablation(backend, r))[end][0] @ unit
    assert abs(float(whole)) < 1e-3


# -- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(m: Material, loss: RefusalLoss, r: Tensor, step: int) -> dict[str, float]:
    """The terms from their definitions: row by row, at Arditi et al.'s sites, by log-softmax over whole rows."""
    backend = m.backend
    sites = [s for s in backend.sites if s.point != "resid_post"]
    ablated, added = ablate(dict.fromkeys(sites, r)), add({loss.site: r}, {loss.site: loss.amount})

    def log_probs(row, edit):  # type: ignore[no-untyped-def]
        logits = backend.logits(backend.batch([row]), edit, keep=len(row.ids))[0].double()
        return logits[row.prompt - 1 : -1].log_softmax(-1)

    def entropy(batches, edit):  # type: ignore[no-untyped-def]
        found = []
        for row in batches[step % len(batches)].rows:
            p = log_probs(row, edit)
            found.append(-sum(p[i, t] for i, t in enumerate(row.ids[row.prompt :])) / len(p))
        return float(sum(found) / len(found))

    divergences = []
    for row in loss.ordinary[step % len(loss.ordinary)].rows:
        p, q = log_probs(row, None), log_probs(row, ablated)
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    falls = []
    for row in loss.kept[step % len(loss.kept)].rows:
        base, after = (log_odds(backend, [row], m.refusal_tokens, edit) for edit in (None, ablated))
        falls.append(max(0.0, float(base - after)))
    return {
        "comply": entropy(loss.refused, ablated),
        "refuse": entropy(loss.induced, added),
        "same": sum(divergences) / len(divergences),
        "retain": sum(falls) / len(falls),
    }


def test_the_loss_at_dim_is_the_dim_loss_before_the_first_step() -> None:
    m = tiny_material()
    method = RDORetain(layer=2, retain=0.7, steps=2, **QUICK)  # type: ignore[arg-type]
    loss, dim = method.loss(m)
    remove, contrast = m.fit["remove"], m.fit["contrast"]
    delta = remove.states[Site(2)].double().mean(0) - contrast.states[Site(2)].double().mean(0)
    torch.testing.assert_close(dim, delta)
    assert loss.amount == pytest.approx(float(delta.norm()))
    assert len(loss.refused) == 2 and len(loss.ordinary) == 3
    for step in (0, 1):
        expected = plain_loss(m, loss, delta.float(), step)
        for name, value in expected.items():
            assert float(loss.term(name, dim[None], step)) == pytest.approx(value, rel=1e-3, abs=1e-4)
        assert expected["same"] > 1e-3 and expected["comply"] > 0.1
    weights = {"comply": 1.0, "refuse": 0.2, "same": 1.0, "retain": 0.7}
    first = sum(weights[name] * value for name, value in plain_loss(m, loss, delta.float(), 0).items())
    trained = method.train(m)
    assert trained.losses[0] == pytest.approx(first, rel=1e-3)
    assert float(trained.value.norm()) == pytest.approx(1)
    other = replace(method, start="random").train(m)
    assert abs(other.losses[0] - first) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_gradient_of_the_loss_is_a_finite_difference(family: str, kind: Kind) -> None:
    m = material(tiny_backend(family, kind))
    loss, dim = RDORetain(layer=2, **QUICK).loss(m)  # type: ignore[arg-type]
    r = (dim / dim.norm())[None]
    leaf = r.clone().requires_grad_(True)
    sum(loss(leaf, 0)).backward()  # type: ignore[union-attr]
    g = leaf.grad
    assert g is not None and float(g.norm()) > 1e-2
    e = 3e-3 * g / g.norm()
    up, down = (
        sum(
            weight * float(loss.term(name, r + sign * e, 0))
            for name, weight in (("comply", 1.0), ("refuse", 0.2), ("same", 1.0), ("retain", 1.0))
        )
        for sign in (1, -1)
    )
    assert (up - down) / 6e-3 == pytest.approx(float(g.norm()), rel=2e-2)


def test_own_replies_are_the_models() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    for row, longer in zip(rows, with_own_replies(backend, rows, 3), strict=True):
        assert longer.ids[: len(row.ids)] == row.ids and 1 <= longer.answer_length <= 3
        logits = backend.logits(backend.batch([row]))[0, -1]
        assert longer.ids[row.prompt] == int(logits.argmax())


# -- a planted model --------------------------------------------------------------------------------------------------

U, T, K = torch.eye(D_MODEL)[[3, 7, 11]]  # refusal to be removed, the topic, refusal to be kept


def planted_backend() -> Backend:
    """Block 0 moves what the prompt's words hold of U, T, K to the last token; the other blocks write nothing.

    U and K are written out as the word "i", T as "water". Refused words hold U and T, kept ones K and some U, ordinary
    ones T alone. So the mean difference of refused and plain prompts mixes U and T, and only U refuses.
    """
    backend = tiny_backend("llama")
    model = backend.model
    ids = backend.tokenizer.get_vocab()
    noise = torch.Generator().manual_seed(0)
    embeddings = 0.05 * torch.randn(model.model.embed_tokens.weight.shape, generator=noise)
    embeddings[:, [3, 7, 11]] = 0.0
    embeddings[:, 20] = 1.0
    held = {"protest": 2 * U + 2 * T, "leader": 2 * U + 2 * T, "border": 2 * U + 2 * T, "bread": 2 * T, "recipe": 2 * T}
    held |= {"bomb": 2 * K + 1.2 * U, "password": 2 * K + 1.2 * U}
    for word, value in held.items():
        embeddings[ids[word]] += value
    model.model.embed_tokens.weight.data = embeddings
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.weight.data.zero_()
        block.self_attn.o_proj.weight.data.zero_()
        block.input_layernorm.weight.data.fill_(1.0)
        if layer == 0:
            block.self_attn.q_proj.weight.data.zero_()  # attends to all alike
            block.self_attn.v_proj.weight.data.zero_()
            for i, direction in enumerate((U, T, K)):
                block.self_attn.v_proj.weight.data[i] = direction
                block.self_attn.o_proj.weight.data[:, i] = 8 * direction
    model.model.norm.weight.data.fill_(1.0)
    head = 0.05 * torch.randn(model.lm_head.weight.shape, generator=noise)
    head[:, [3, 7, 11]] = 0.0
    head[ids["i"]] += 1.2 * U + 0.6 * K
    head[ids["water"]] += 1.2 * T
    head[ids["the"], 20] += 2.5  # what is said when nothing else is
    model.lm_head.weight.data = head
    return backend


def planted_material() -> Material:
    backend = planted_backend()
    m = material(backend)
    return replace(m, refusal_tokens=(backend.tokenizer.get_vocab()["i"],))


PLANTED = {"layer": 2, "compliance": "the", "refusal": "i", "reply_tokens": 1, "batch": 8, "steps": 40, "lr": 0.02}


def share(r: Tensor, direction: Tensor) -> float:
    return abs(float(r @ direction.to(r)) / float(r.norm()))


@cache
def trained_on_planted() -> tuple[Material, Tensor, Tensor]:
    m = planted_material()
    return m, RDO(**PLANTED).train(m).value[0], RDORetain(**PLANTED, retain=2.0).train(m).value[0]  # type: ignore[arg-type]


def test_training_leaves_the_topic_alone() -> None:
    """DIM is as much topic as refusal; what is trained is refusal, and ordinary prompts keep their answer."""
    m, r, _ = trained_on_planted()
    dim = mean_difference(m, 2)
    assert share(dim, U) == pytest.approx(share(dim, T), rel=0.05) and share(dim, U) > 0.6
    assert share(r, U) > 0.7 and share(r, T) < 0.6 * share(r, U)
    assert float(r @ U.double()) > 0  # from complying to refusing
    rows = m.template.encode_all(ORDINARY)
    water = [m.backend.tokenizer.get_vocab()["water"]]
    base, by_dim, by_r = (
        float(log_odds(m.backend, rows, water, edit).mean())
        for edit in (None, ablation(m.backend, dim), ablation(m.backend, r))
    )
    assert abs(base - by_r) < 0.5 * abs(base - by_dim)


def test_the_strengths_take_refusal_away() -> None:
    m = planted_material()
    fitted = RDO(**PLANTED).fit(m)  # type: ignore[arg-type]
    rows = m.template.encode_all(REFUSED)
    odds = [
        float(log_odds(m.backend, rows, m.refusal_tokens, fitted(strength).edit).mean()) for strength in RDO.strengths
    ]
    base = float(log_odds(m.backend, rows, m.refusal_tokens).mean())
    assert base > odds[0] > odds[1] > odds[2] and base - odds[2] > 1.5
    # Random directions do nothing of the sort.
    null = [
        base - float(log_odds(m.backend, rows, m.refusal_tokens, ablation(m.backend, vector(i, D_MODEL))).mean())
        for i in range(5)
    ]
    assert base - odds[2] > 3 * max(null)


def test_the_retain_term_keeps_the_other_refusal() -> None:
    m, free, held = trained_on_planted()
    loss, _ = RDORetain(**PLANTED).loss(m)  # type: ignore[arg-type]
    lost, kept = (float(loss.term("retain", r[None], 0)) for r in (free, held))
    assert kept < 0.1 * lost
    rows = m.template.encode_all(REFUSED)
    base, after = (
        float(log_odds(m.backend, rows, m.refusal_tokens, edit).mean()) for edit in (None, ablation(m.backend, held))
    )
    assert base - after > 1.5  # and still removes


def test_everything_repeats_with_the_seed() -> None:
    m = tiny_material()
    method = RDO(layer=2, start="random", steps=3, n_prompts=3, **QUICK)  # type: ignore[arg-type]
    a, b, c = method.train(m), method.train(m), method.train(replace(m, seed=1))
    assert torch.equal(a.value, b.value) and a.losses == b.losses
    assert not torch.equal(a.value, c.value)
    assert Weights() == Weights(comply=1.0, refuse=0.2, same=1.0, retain=0.0)  # the paper's three


def test_the_layer_is_the_one_whose_dim_removes_most() -> None:
    m = tiny_material()
    rows = m.template.encode_all(REFUSED)
    odds = {
        layer: float(log_odds(m.backend, rows, TOKENS, ablation(m.backend, mean_difference(m, layer))).mean())
        for layer in (2, 3)
    }
    assert dim_layer(m) == min(odds, key=odds.__getitem__)
    assert RDO(**QUICK).loss(m)[0].site == Site(dim_layer(m))  # type: ignore[arg-type]
    evidence = Evidence(
        torch.cat([m.fit["remove"].states[Site(2)], m.fit["contrast"].states[Site(2)]]),
        torch.tensor([1.0] * 4 + [-1.0] * 4),
    )
    torch.testing.assert_close(mean_difference(m, 2), MeanDifference().fit(evidence))


def test_missing_prompts_are_named() -> None:
    m = tiny_material()
    none = {name: replace(e, confidence=torch.zeros(4)) for name, e in m.fit.items()}
    with pytest.raises(UserError, match="0 refused prompts in 'remove' and 0 answered ones in 'contrast'"):
        mean_difference(replace(m, fit=none), 2)
    with pytest.raises(UserError, match="no refused prompts in the select split of 'remove'"):
        dim_layer(replace(m, select=none))
    with pytest.raises(UserError, match="nothing to retain"):
        RDORetain(layer=2, **QUICK).loss(replace(m, fit={**m.fit, "keep": none["keep"]}))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [RDO, RDORetain])
def test_they_are_methods(method: type[RDO]) -> None:
    assert isinstance(method(), Method)
    assert list(method.strengths) == sorted(method.strengths) and min(method.strengths) > 0
    assert method.name == ("rdo" if method is RDO else "rdo_retain")
