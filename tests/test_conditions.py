"""CAST's condition: its algebra, rules as truth tables, the threshold search, and prompts that decide for themselves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from rsteer_interp import gates
from rsteer_interp.activations import last_states, pooled_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site
from rsteer_interp.conditions import FIRES, AllOf, AnyOf, Fires, Not, Similarity, f1_scores, search_condition
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.gates import Gate, Gated, Rule
from rsteer_interp.interventions import AtPositions, add
from rsteer_interp.pooling import Pooling
from tests.tiny_models import KINDS, Kind, tiny_backend

SITE = Site(1)
TEXTS = ["tell me about the city", "why is the river in the city ?", "write", "what can you tell me ?"]
TOKENS = (5, 9, 30)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- algebra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_condition_is_its_formula(seed: int, tanh: bool) -> None:
    """s(h) = cos(h, tanh(c c^T h / (c . c))), worked row by row in numpy with the matrix itself."""
    states, c = normal(20, 8, seed=seed), 3 * normal(8, seed=seed + 10)
    projector = np.outer(c, c) / (c.numpy() @ c.numpy())
    expected = []
    for h in states.numpy():
        p = projector @ h
        p = np.tanh(p) if tanh else p
        expected.append(h @ p / (np.linalg.norm(h) * np.linalg.norm(p)))
    got = Similarity(SITE, c, 0.0, tanh=tanh).similarity(states)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tanh", [True, False])
def test_blind_to_the_sign_and_length_of_its_vector(tanh: bool) -> None:
    states, c = normal(50, 8), normal(8, seed=1)
    s = Similarity(SITE, c, 0.0, tanh=tanh).similarity(states)
    assert torch.equal(s, Similarity(SITE, -c, 0.0, tanh=tanh).similarity(states))
    torch.testing.assert_close(Similarity(SITE, -7 * c, 0.0, tanh=tanh).similarity(states), s, rtol=1e-10, atol=1e-12)


def test_without_tanh_it_is_the_absolute_cosine_and_that_of_a_gate() -> None:
    states, c = normal(50, 8), normal(8, seed=1)
    plain = Similarity(SITE, c, 0.3, tanh=False)
    cosine = torch.nn.functional.cosine_similarity(states, c[None])
    torch.testing.assert_close(plain.similarity(states), cosine.abs(), rtol=1e-10, atol=1e-12)
    assert torch.equal(plain.holds(states), Gate(SITE, c, 0.3, "cosine").holds(states))
    assert float((Similarity(SITE, c, 0.3).similarity(states) - cosine.abs()).abs().max()) > 0.01


def test_the_two_comparisons_fire_on_complements_of_each_other() -> None:
    states, c = normal(50, 8), normal(8, seed=1)
    threshold = float(Similarity(SITE, c, 0.0).similarity(states)[7])  # a state right on the threshold counts once too
    above, below = (Similarity(SITE, c, threshold, fires) for fires in FIRES)
    assert torch.equal(above.holds(states), ~below.holds(states))
    assert bool(below.holds(states)[7]) and 0 < int(above.holds(states).sum()) < 50
    # Named after when it fires, not after the side on which the threshold lies.
    assert bool((above.similarity(states)[above.holds(states)] > threshold).all())


def test_not_blind_to_a_shift_and_with_tanh_not_to_a_rotation() -> None:
    states, c = normal(50, 8), normal(8, seed=1)
    rotation = torch.linalg.qr(normal(8, 8, seed=2))[0]
    for tanh in (True, False):
        s = Similarity(SITE, c, 0.0, tanh=tanh).similarity(states)
        turned = Similarity(SITE, c @ rotation, 0.0, tanh=tanh).similarity(states @ rotation)
        shifted = Similarity(SITE, c, 0.0, tanh=tanh).similarity(states + 2)
        assert (float((s - turned).abs().max()) > 1e-3) == tanh
        assert float((s - shifted).abs().max()) > 0.1


def test_saturation_counts_coordinates_and_turns_the_vector_into_its_signs() -> None:
    c = torch.tensor([1.0, -1.0, 1e-6, 0.0])
    condition = Similarity(SITE, c, 0.0)
    assert condition.saturated(1e4 * c[None]).tolist() == [0.5]
    assert condition.saturated(0.1 * c[None]).tolist() == [0.0]
    h = normal(1, 200, seed=3)
    v = h[0] + normal(200, seed=4)
    signs = torch.nn.functional.cosine_similarity(h, v.sign()[None])
    torch.testing.assert_close(Similarity(SITE, v, 0.0).similarity(1e6 * h), signs, rtol=1e-3, atol=0)


def test_no_overlap_is_zero_and_a_vector_without_length_is_refused() -> None:
    c = torch.tensor([1.0, 0.0])
    assert Similarity(SITE, c, 0.0).similarity(torch.tensor([[0.0, 3.0], [0.0, 0.0]])).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match=r"condition vector at blocks\.1.*length 0"):
        Similarity(SITE, torch.zeros(2), 0.0)
    with pytest.raises(UserError, match="cannot fire 'larger'"):
        Similarity(SITE, c, 0.0, "larger")  # type: ignore[arg-type]


# -- rules -------------------------------------------------------------------------------------------------------------


def test_rules_are_truth_tables() -> None:
    a, b, c = (Similarity(Site(x), normal(4, seed=x), 0.0) for x in (1, 2, 3))
    values = list(product([False, True], repeat=3))
    held = {one: torch.tensor([row[i] for row in values]) for i, one in enumerate((a, b, c))}
    tables: list[tuple[Rule, list[bool]]] = [
        (a & b, [x and y for x, y, _ in values]),
        (a | b, [x or y for x, y, _ in values]),
        (~a, [not x for x, _, _ in values]),
        (a & (b | ~c), [x and (y or not z) for x, y, z in values]),
        (~(a & b), [not x or not y for x, y, _ in values]),
        (AnyOf((a, b, c)), [any(row) for row in values]),
        (AllOf((a, b, c)), [all(row) for row in values]),
        (~a | ~b, Not(a & b).decide(held).tolist()),
    ]
    for rule, expected in tables:
        assert rule.decide(held).tolist() == expected
    assert (a & (b | ~c)).conditions == {a, b, c}
    assert held[a].tolist() == [row[0] for row in values]  # nothing written back


# -- search ------------------------------------------------------------------------------------------------------------


def _states(n: int, overlap: dict[Site, float], seed: int) -> dict[Site, torch.Tensor]:
    """States of 16 dimensions whose overlap with the first axis is as given."""
    noise = normal(n, 16, seed=seed)
    axis = torch.eye(16, dtype=torch.float64)[0]
    return {site: noise + 4 * share * axis for site, share in overlap.items()}


@pytest.mark.parametrize("fires", FIRES)
def test_the_search_finds_the_planted_layer_and_comparison(fires: Fires) -> None:
    """At layer 2 the two sides differ along c; at the others they do not."""
    sites = [Site(x) for x in (1, 2, 3)]
    c = torch.eye(16, dtype=torch.float64)[0]
    high, low = dict.fromkeys(sites, 1.0), dict.fromkeys(sites, 1.0) | {Site(2): 0.0}
    inside, outside = (high, low) if fires == "above" else (low, high)
    fit, select = ((_states(60, inside, s), _states(90, outside, s + 1)) for s in (0, 2))
    found = search_condition(dict.fromkeys(sites, c), fit, select, thresholds=101)
    assert (found.chosen.site, found.chosen.fires) == (Site(2), fires)
    assert found.sites == tuple(sites) and found.thresholds.shape == (3, 101)
    assert {key: tuple(surface.shape) for key, surface in found.f1.items()} == dict.fromkeys(FIRES, (3, 101))
    assert found.f1_fit == max(float(surface.max()) for surface in found.f1.values()) > 0.9
    assert found.f1_held > 0.85 > found.f1_always == 2 * 60 / (2 * 60 + 90)
    assert found.roc.area.low > 0.9 > 0.65 > found.roc.null[1] > 0.5 > found.roc.null[0] > 0.35
    held = [found.chosen.holds(side[Site(2)]) for side in select]
    assert float(held[0].float().mean()) > 0.8 > 0.2 > float(held[1].float().mean())


def test_the_surface_is_scikit_learns_f1_at_every_point() -> None:
    inside, outside = normal(13).round(decimals=1), normal(29, seed=1).round(decimals=1) - 0.5
    grid = torch.linspace(-2, 2, 41, dtype=torch.float64)  # ties with scores are on it
    labels = np.r_[np.ones(13), np.zeros(29)]
    scores = torch.cat([inside, outside]).numpy()
    for fires in FIRES:
        for threshold, got in zip(grid, f1_scores(inside, outside, grid, fires), strict=True):
            above = scores > threshold.numpy()
            expected = f1_score(labels, above if fires == "above" else ~above, zero_division=0)
            assert float(got) == pytest.approx(expected, abs=1e-12)


def test_the_middle_of_the_longest_run_of_best_points_is_taken() -> None:
    """Between two sides that do not overlap, any threshold is perfect on fit; the middle one is not at a prompt."""
    c = torch.tensor([1.0, 0.0])
    inside = {SITE: torch.tensor([[0.9, 0.4], [1.0, 0.4]])}
    outside = {SITE: torch.tensor([[0.1, 1.0], [0.0, 1.0]])}
    found = search_condition({SITE: c}, (inside, outside), (inside, outside), tanh=False, thresholds=1000)
    top, bottom = (found.chosen.similarity(side[SITE]) for side in (inside, outside))
    assert found.f1_fit == 1.0
    assert found.chosen.threshold == pytest.approx(float(top.min() + bottom.max()) / 2, abs=2e-3)
    own = search_condition({SITE: c}, (inside, outside), (inside, outside), tanh=False, thresholds=[0.2, 0.5, 0.6])
    assert own.chosen.threshold == 0.5 and own.thresholds.tolist() == [[0.2, 0.5, 0.6]]


def test_labels_that_mean_nothing_have_an_area_of_one_half() -> None:
    states = _states(400, {SITE: 0.5}, 5)[SITE]
    halves = ({SITE: states[:100]}, {SITE: states[100:200]}), ({SITE: states[200:300]}, {SITE: states[300:]})
    found = search_condition({SITE: normal(16, seed=9)}, *halves)
    low, high = found.roc.null
    assert low <= found.roc.area.value <= high and found.f1_held < found.f1_always + 0.1


# -- in a model --------------------------------------------------------------------------------------------------------


def _behaviour(backend: Backend) -> AtPositions:
    vectors = {Site(x): normal(backend.d_model, seed=x).float() for x in (2, 3)}
    return AtPositions(add(vectors, dict.fromkeys(vectors, 3.0)), frozenset({"instruction", "suffix", "generated"}))


def _halving(backend: Backend, site: Site, seed: int, pooling: Pooling = "prompt") -> tuple[Similarity, torch.Tensor]:
    """A condition that holds for two of TEXTS, and for which."""
    states = pooled_states(backend, backend.template().encode_all(TEXTS), [site], pooling)[site]
    c = normal(backend.d_model, seed=seed)
    middle = Similarity(site, c, 0.0).similarity(states).sort().values[1:3].mean()
    condition = Similarity(site, c, float(middle), pooling=pooling)
    return condition, condition.holds(states)


def check_rows_decide(backend: Backend, gated: Edit, edit: Edit, held: torch.Tensor) -> None:
    """Where the gate holds, the edit; elsewhere the base; in the prompt pass and while decoding."""
    rows = backend.template().encode_all(TEXTS)
    base, edited, got = (log_odds(backend, rows, TOKENS, e) for e in (None, edit, gated))
    assert float((edited - base).abs().min()) > 1e-3
    torch.testing.assert_close(got, torch.where(held, edited, base), atol=1e-4, rtol=0)
    batch = backend.batch(rows)
    replies = [backend.generate(batch, 4, e).ids for e in (None, edit, gated)]
    assert torch.equal(replies[2], torch.where(held[:, None], replies[1], replies[0]))


def check_no_leak(backend: Backend, gated: Edit, fresh: Edit) -> None:
    """What one prompt decided is forgotten before the next: row by row, in both orders, as by a gate never used before."""
    rows = backend.template().encode_all(TEXTS)
    expected = log_odds(backend, rows, TOKENS, fresh)
    for order in (range(4), reversed(range(4))):
        for i in order:
            torch.testing.assert_close(log_odds(backend, [rows[i]], TOKENS, gated)[0], expected[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_conditions_at_two_layers_decide_row_by_row_before_the_behaviour(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    (a, in_a), (b, in_b) = _halving(backend, Site(1), 1), _halving(backend, Site(2), 5, "last")
    assert not torch.equal(in_a, in_b)
    edit = _behaviour(backend)
    for rule, held in ((a, in_a), (a & b, in_a & in_b), (a | b, in_a | in_b), (a & ~b, in_a & ~in_b)):
        check_rows_decide(backend, Gated(edit.edit, rule), edit, held)
    check_no_leak(backend, Gated(edit.edit, a | b), Gated(edit.edit, a | b))


class RowZero(Gated):
    """The fault of code that looks at row 0 of the batch only."""

    def __call__(self, x: torch.Tensor, at: At) -> torch.Tensor:
        out = super().__call__(x, at)
        if self in at.memory:
            at.memory[self] = at.memory[self][:1].expand(len(at.batch))
            return super().__call__(x, at)
        return out


class Leaking(Gated):
    """The fault of a decision kept in the object."""

    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012 - the fault itself

    def __call__(self, x: torch.Tensor, at: At) -> torch.Tensor:
        if self.kept:
            at.memory[self] = self.kept["held"][:1].expand(len(at.batch))
        out = super().__call__(x, at)
        if self in at.memory:
            self.kept["held"] = at.memory[self]
        return out


def test_a_gate_of_row_zero_and_a_leaking_one_are_caught() -> None:
    backend = tiny_backend("llama")
    edit, (condition, held) = _behaviour(backend), _halving(backend, SITE, 1)
    with pytest.raises(AssertionError):
        check_rows_decide(backend, RowZero(edit.edit, condition), edit, held)
    with pytest.raises(AssertionError):
        check_no_leak(backend, Leaking(edit.edit, condition), Gated(edit.edit, condition))


def test_padding_in_the_mean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over all columns, as in the authors' extraction code, decides otherwise in a batch than alone."""
    backend = tiny_backend("llama")
    edit, (condition, held) = _behaviour(backend), _halving(backend, SITE, 1)
    check_rows_decide(backend, Gated(edit.edit, condition), edit, held)
    monkeypatch.setattr(gates, "pooled", lambda x, at, pooling: x.mean(1))
    with pytest.raises(AssertionError):
        check_rows_decide(backend, Gated(edit.edit, condition), edit, held)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_pass_can_be_left_out(kind: Kind) -> None:
    """Then the first token is the base's, and only prompts that meet the condition go on otherwise."""
    backend = tiny_backend("llama", kind)
    edit, (condition, held) = _behaviour(backend), _halving(backend, SITE, 1)
    rows = backend.template().encode_all(TEXTS)
    late = Gated(edit.edit, condition, first_pass=False)
    torch.testing.assert_close(
        log_odds(backend, rows, TOKENS, late), log_odds(backend, rows, TOKENS), rtol=0, atol=1e-5
    )
    batch = backend.batch(rows)
    base, got = (backend.generate(batch, 8, e).ids for e in (None, late))
    assert torch.equal(got[:, 0], base[:, 0]) and torch.equal(got[~held], base[~held])
    assert not torch.equal(got[held], base[held])
    moved = log_odds(backend, rows, TOKENS, Gated(edit.edit, condition)) - log_odds(backend, rows, TOKENS)
    assert torch.equal(moved.abs() > 1e-4, held)


def test_every_condition_is_read_before_the_first_edit() -> None:
    backend = tiny_backend("llama")
    early, late = (Similarity(Site(x), torch.ones(backend.d_model), 0.0) for x in (1, 3))
    with pytest.raises(UserError, match=r"reads blocks\.3.*after the first edit at blocks\.2"):
        Gated(_behaviour(backend).edit, early | late)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_the_prompt_mean_is_that_of_a_prompt_alone_without_template_prefix_padding_or_answer(family: str) -> None:
    backend = tiny_backend(family)
    answers = ["yes", "i can tell you about the river .", "why", "no"]
    rows = backend.template().encode_all(TEXTS, answers)
    got = {pooling: pooled_states(backend, rows, [SITE], pooling)[SITE] for pooling in ("prompt", "answer", "last")}
    padded = []
    for i, row in enumerate(rows):
        seen: list[torch.Tensor] = []

        class Record:
            sites, pointwise = frozenset({SITE}), False

            def __call__(self, x, at):  # type: ignore[no-untyped-def]
                seen.append(x)  # noqa: B023
                return x

        backend.run(backend.batch([row]), Record())
        stream = seen[0][0]
        torch.testing.assert_close(got["prompt"][i], stream[row.prefix : row.prompt].mean(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(got["answer"][i], stream[row.prompt :].mean(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(got["last"][i], stream[row.prompt - 1], atol=1e-4, rtol=0)
        padded.append(stream.mean(0))
    assert float((torch.stack(padded) - got["prompt"]).abs().max()) > 1e-2
    with pytest.raises(UserError, match="no tokens in its answer"):
        pooled_states(backend, backend.template().encode_all(TEXTS), [SITE], "answer")


def test_last_states_and_last_pooling_agree() -> None:
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    torch.testing.assert_close(
        pooled_states(backend, rows, [SITE], "last")[SITE], last_states(backend, rows, [SITE])[SITE]
    )
