"""Random audits: the push is as long as it says and spares special tokens, the guard is the KL it says, nulls are fair."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, log_odds
from rsteer_interp.gates import Gate, Gated
from rsteer_interp.interventions import Affine, add
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.random_audit import (
    LayerAudit,
    RandomAudit,
    Standing,
    aggregation,
    audited_layers,
    push_changes,
    random_audit,
)
from rsteer_interp.random_push import Guard, coherence, push, special_tokens
from rsteer_interp.studies.random_audit import _halves
from rsteer_interp.studies.study import BaseReplies
from tests.tiny_models import PROMPTS, Kind, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)
ANSWERS = ["the city is in the law", "water", "i can write a poem about bread"]


def _talks(backend: Backend) -> list:  # type: ignore[type-arg]
    return backend.template().encode_all(PROMPTS[:3], ANSWERS)


@dataclass(frozen=True, eq=False)
class Trace:
    """Token id and state of every position of every pass, read at one site; generated tokens have no id."""

    sites: frozenset[Site]
    seen: list[tuple[str, int, int, Tensor]] = field(default_factory=list)

    pointwise = False  # each row is to be seen whole

    def __call__(self, x: Tensor, at: At) -> Tensor:
        for r, row in enumerate(at.rows.tolist()):
            tokens = at.batch.rows[row].ids
            for p, position in enumerate(at.positions[r].tolist()):
                if bool(at.mask[r, p]):
                    token = tokens[position] if position < len(tokens) else -1
                    self.seen.append((at.phase, row, token, x[r, p].double().clone()))
        return x


@pytest.mark.parametrize(("family", "kind"), [("llama", "hooks"), ("llama", "transformerlens"), ("gemma3", "hooks")])
def test_every_token_but_special_ones_moves_by_c_mu(family: str, kind: Kind) -> None:
    """Read before and after the push at its own site, in the prompt pass and while decoding."""
    backend = tiny_backend(family, kind)
    batch = backend.batch(tiny_rows(backend))
    site, c, mu = Site(2), 0.75, 3.0
    v = random_unit_vectors(1, backend.d_model, 4)[0].float()
    before, after = Trace(frozenset({site})), Trace(frozenset({site}))
    backend.generate(batch, 3, compose(before, push(backend, 2, v, c * mu), after))
    special = special_tokens(backend.tokenizer)
    moved = {True: 0, False: 0}
    for (phase, _, token, x), (_, _, again, y) in zip(before.seen, after.seen, strict=True):
        assert token == again
        if token in special:
            assert torch.equal(x, y)
        else:
            assert float((y - x).norm()) / mu == pytest.approx(c, rel=1e-5)
            assert float((y - x) @ v.double()) > 0
        moved[token in special] += 1
        assert phase in ("prompt", "decode")
    assert moved[True] >= len(batch) and moved[False] > moved[True]
    assert {phase for phase, *_ in before.seen} == {"prompt", "decode"}


def test_the_plain_addition_would_move_special_tokens() -> None:
    """The fault that the test above must see."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    v = random_unit_vectors(1, backend.d_model, 4)[0].float()
    spared = log_odds(backend, rows, TOKENS, push(backend, 2, v, 2.0))
    plain = log_odds(backend, rows, TOKENS, Affine(Site(2), v, amount=2.0))
    assert float((spared - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_neighbours_and_shared_work_change_nothing(family: str) -> None:
    """Also with a template prefix, and words of the instruction, that all rows share."""
    backend = tiny_backend(family)
    rows = backend.template().encode_all(
        ["tell me about the city", "tell me about the river", "tell me about you , why"]
    )
    vectors = random_unit_vectors(3, backend.d_model, 0)
    base, change = push_changes(backend, backend.prepare(rows, 2), TOKENS, 2, 1.5, vectors)
    for i, row in enumerate(rows):
        alone = log_odds(backend, [row], TOKENS)
        assert float(alone) == pytest.approx(float(base[i]), abs=1e-4)
        for v, moved in zip(vectors.float(), change, strict=True):
            pushed = log_odds(backend, [row], TOKENS, push(backend, 2, v, 1.5))
            assert float(pushed - alone) == pytest.approx(float(moved[i]), abs=2e-4)
    assert float(change.abs().max()) > 1e-2


def test_no_dose_changes_nothing_but_rounding() -> None:
    backend = tiny_backend("llama")
    audit = random_audit(backend, tiny_rows(backend), TOKENS, _talks(backend), n_vectors=3, dose=0.0)
    for one in audit.layers:
        assert float(one.change.abs().max()) < 1e-5
        assert one.guard == (Guard(0.0, 0.0, True),) and one.coherent
        assert not bool(one.flipped(float(one.base.median()) - 1e-4).any())


def test_the_layers_are_the_papers() -> None:
    assert audited_layers(32) == (10, 16, 21)
    assert audited_layers(24) == (8, 12, 16)
    assert audited_layers(4) == (1, 2)
    assert audited_layers(2) == (1,)


def test_the_guard_is_the_kl_of_benign_answers_and_rises() -> None:
    backend = tiny_backend("llama")
    talks = _talks(backend)
    vectors = random_unit_vectors(2, backend.d_model, 1)
    found = coherence(backend, talks, 2, 4.0, vectors, (0.5, 0.1, 0.0), bound=1e9)
    assert [g.dose for g in found] == [0.0, 0.1, 0.5]
    for guard in found:
        edits = [push(backend, 2, v, guard.dose * 4.0) for v in vectors.float()]
        plain = torch.stack([answer_effects(backend, talks, edit).kl for edit in edits])
        assert guard.kl == pytest.approx(max(float(plain.mean()), 0.0), abs=1e-6)
    assert found[0].kl < 1e-9 < found[1].kl < found[2].kl
    # A small dose's KL grows as its square.
    small = coherence(backend, talks, 2, 4.0, vectors, (0.02, 0.04), bound=1e9)
    assert small[1].kl / small[0].kl == pytest.approx(4, rel=0.25)


def test_the_dose_is_the_largest_that_passes_and_others_are_marked() -> None:
    backend = tiny_backend("llama")
    rows, talks = tiny_rows(backend), _talks(backend)
    free = random_audit(backend, rows, TOKENS, talks, n_vectors=2, layers=[2], doses=(0.1, 0.3, 0.9), bound=1e9)
    kls = [g.kl for g in free.layers[0].guard]
    bound = (kls[0] + kls[1]) / 2
    guarded = random_audit(backend, rows, TOKENS, talks, n_vectors=2, layers=[2], doses=(0.1, 0.3, 0.9), bound=bound)
    (one,) = guarded.layers
    assert one.dose == 0.1 and one.coherent
    assert [g.coherent for g in one.guard] == [True, False], "no dose is run beyond the first that fails"
    given = random_audit(backend, rows, TOKENS, talks, n_vectors=2, layers=[2], dose=0.9, bound=bound).layers[0]
    assert given.dose == 0.9 and not given.coherent
    none = random_audit(backend, rows, TOKENS, talks, n_vectors=2, layers=[2], doses=(0.3, 0.9), bound=kls[0]).layers[0]
    assert none.dose == 0.3 and not none.coherent


def test_standing_counts_as_written() -> None:
    found = Standing.of(3.0, [0.0, 1.0, 2.0, 3.0])
    assert (found.rank, found.n, found.p) == (2, 4, 2 / 5)
    assert found.z == pytest.approx((3 - 1.5) / np.std([0, 1, 2, 3], ddof=1))
    assert Standing.of(9.0, [0.0, 1.0, 2.0]).p == 1 / 4
    with pytest.raises(UserError, match="no spread"):
        Standing.of(1.0, [2.0, 2.0])
    draws = np.random.default_rng(0).standard_normal((400, 20))
    p = np.array([Standing.of(float(row[0]), row[1:]).p for row in draws])
    assert (p <= 0.05).mean() <= 0.08 and 0.45 < p.mean() < 0.6, "a random direction among random ones is unremarkable"


def test_a_planted_direction_stands_out_and_a_random_one_does_not() -> None:
    """Minus the unembedding of the refusal tokens, pushed just before the last block."""
    backend = tiny_backend("llama")
    towards = backend.model.get_output_embeddings().weight[list(TOKENS)].mean(0).detach()
    learned = {"planted": -towards, "other": random_unit_vectors(1, backend.d_model, 77)[0].float()}
    layer = backend.n_layers - 1
    audit = random_audit(
        backend, tiny_rows(backend), TOKENS, _talks(backend), n_vectors=24, layers=[layer], dose=0.5, learned=learned
    )
    (one,) = audit.layers
    torch.testing.assert_close(audit.vectors.norm(dim=1), torch.ones(24).double())
    planted, other = one.standing("planted"), one.standing("other")
    assert planted.rank == 1 and planted.p == 1 / 25 and planted.z > 2.5
    assert other.p > 0.05
    data = audit.data()["layers"][0]
    assert data["learned"]["planted"]["rank"] == 1 and data["fall"]["n"] == len(one.base)


def test_a_treatment_can_be_in_place() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    gate = Gate(Site(1), torch.ones(backend.d_model), 0.0)
    vector = random_unit_vectors(1, backend.d_model, 3).float()
    treatments: list[Edit] = [
        add({Site(1): vector[0]}, {Site(1): 1.0}),
        Gated(add({Site(2): vector[0]}, {Site(2): 2.0}), gate),
    ]
    for edit in treatments:
        base, change = push_changes(backend, backend.prepare(rows, 2), TOKENS, 2, 1.0, vector, edit)
        torch.testing.assert_close(base, log_odds(backend, rows, TOKENS, edit), atol=1e-4, rtol=0)
        both = log_odds(backend, rows, TOKENS, compose(edit, push(backend, 2, vector[0], 1.0)))
        torch.testing.assert_close(base + change[0], both, atol=1e-4, rtol=0)


def _layer(layer: int, change: Tensor, base: float = 1.0) -> LayerAudit:
    return LayerAudit(layer, 1.0, 0.5, (Guard(0.5, 0.1, True),), torch.full((change.shape[1],), base).double(), change)


def test_the_profile_bootstrap_finds_a_peak_only_where_there_is_one() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 16, 12, generator=g, dtype=torch.float64)
    vectors = random_unit_vectors(16, 8, 0)
    flat = RandomAudit(vectors, 0.0, tuple(_layer(i, noise[i]) for i in range(3))).peak_shares()
    assert sum(flat.values()) == pytest.approx(1) and max(flat.values()) < 0.95
    peaked = RandomAudit(
        vectors, 0.0, (_layer(0, noise[0]), _layer(1, noise[1] - 2), _layer(2, noise[2]))
    ).peak_shares()
    assert peaked[1] > 0.99


def test_the_aggregate_is_the_mean_of_the_vectors_that_flip_a_prompt() -> None:
    """Flips are read from one prompt; on the others their mean removes more than single vectors do."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    audit = random_audit(backend, rows[:2], TOKENS, _talks(backend), n_vectors=40, layers=[3], dose=0.4)
    (one,) = audit.layers
    # A random model's prompts lie anywhere; the threshold is put where a fifth of the vectors cross it.
    threshold = float(one.base[0] + one.change[:, 0].quantile(0.2))
    audit = replace(audit, threshold=threshold)
    found = aggregation(backend, audit, 3, rows[2:], TOKENS, n_null=24)
    assert found is not None and len(found.members) >= 8
    assert bool(one.flipped(threshold)[list(found.members), found.prompt].all())
    mean = audit.vectors[list(found.members)].mean(0)
    direct = log_odds(backend, rows[2:], TOKENS, push(backend, 3, mean.float(), 0.4 * one.mu))
    torch.testing.assert_close(found.base + found.change, direct, atol=1e-4, rtol=0)
    assert found.standing.z > 1.5
    assert found.null.shape == (24, len(rows) - 2)
    assert aggregation(backend, replace(audit, threshold=-1e9), 3, rows[2:], TOKENS) is None


def test_nothing_refused_is_an_error() -> None:
    backend = tiny_backend("llama")
    with pytest.raises(UserError, match="refused prompts"):
        random_audit(backend, [], TOKENS, _talks(backend))


def test_what_is_aggregated_is_measured_on_other_subjects() -> None:
    """No subject lies in both halves, and no prompt is lost but those over the number asked for."""
    subjects = [f"subject {i // 3}" for i in range(20)]
    texts = [f"prompt {i}" for i in range(20)]
    refused = BaseReplies(texts, subjects, torch.ones(20, dtype=torch.bool), torch.zeros(20))
    first, second = _halves(refused, 100)
    assert not set(first.subjects) & set(second.subjects)
    assert sorted([*first.texts, *second.texts]) == sorted(texts)
    assert [len(x.texts) for x in _halves(refused, 4)] == [4, 4]
