"""Choosing a strength on select, matching removal, paired tests; the whole study runs in the contract suite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rsteer_interp.evaluation import answer_effects, prompted_effects
from rsteer_interp.studies.method_comparison.outcomes import against, beside_null
from rsteer_interp.studies.method_comparison.selection import WIDENED, Chosen, Trial, beyond, choose
from tests.tiny_models import tiny_backend

TRIALS = (
    Trial(0.0, 0.0, 1.0, 0.0),
    Trial(0.5, 0.4, 1.0, 0.1),
    Trial(1.0, 0.8, 0.9, 0.2),
    Trial(2.0, 1.0, 0.8, 0.9),
)


def test_the_best_strength_separates_the_two_refusals_within_the_bound() -> None:
    assert choose(TRIALS, target=0.6, bound=1.0).best.strength == 2.0  # 0.8 against 0.7 and 0.4
    assert choose(TRIALS, target=0.6, bound=0.5).best.strength == 1.0
    assert choose(TRIALS, target=0.6, bound=0.01).best.strength == 2.0  # none is coherent: all are candidates
    tied = (TRIALS[0], Trial(1.0, 0.5, 1.0, 0.3), Trial(2.0, 0.6, 0.9, 0.1))
    assert choose(tied, target=0.6, bound=1.0).best.strength == 2.0  # as good, and cheaper


def test_matched_removal_is_interpolated_and_never_extrapolated() -> None:
    assert choose(TRIALS, target=0.6, bound=1.0).matched == pytest.approx(0.75)
    assert choose(TRIALS, target=0.4, bound=1.0).matched == pytest.approx(0.5)
    assert choose(TRIALS[:3], target=0.9, bound=1.0).matched is None
    assert choose((TRIALS[0], TRIALS[3]), target=0.6, bound=1.0).matched is None  # no knob


def _grown(strengths: tuple[float, ...], effect: Callable[[float], Trial]) -> Chosen:
    """What `find_strength` does, on planted trials in place of a model."""
    tried = [Trial(0.0, 0.0, 1.0, 0.0), *map(effect, strengths)]
    while (more := beyond(tried, strengths, target=0.7, bound=0.5)) is not None:
        tried.append(effect(more))
    return choose(tried, target=0.7, bound=0.5)


@pytest.mark.parametrize("best", [0.02, 0.3, 3.0])
def test_a_grid_is_widened_until_the_best_is_inside(best: float) -> None:
    """A planted response whose score rises up to `best` and falls from there: below, inside and above the given strengths."""

    def effect(strength: float) -> Trial:
        removed = min(strength / best, 1.0)
        return Trial(strength, removed, 1.0 - max(0.0, 0.2 * (strength / best - 1)), 0.01)

    found = _grown((0.1, 0.2, 0.4, 0.8), effect)
    tried = [t.strength for t in found.trials if t.strength]
    assert not found.edge and min(tried) < found.best.strength < max(tried)
    assert found.best.strength == pytest.approx(best, rel=1.01)
    assert found.matched == pytest.approx(0.7 * best, rel=0.5)


def test_what_is_still_at_the_edge_after_widening_says_so() -> None:
    rising = _grown((0.1, 0.2, 0.4), lambda s: Trial(s, s / 100, 1.0, 0.0))
    assert rising.edge and rising.best.strength == pytest.approx(0.4 * 2**WIDENED) and rising.matched is None
    flat = _grown((0.1, 0.2, 0.4), lambda s: Trial(s, 0.0, 1.0, s))
    assert flat.edge and flat.best.strength == pytest.approx(0.1 / 2**WIDENED)
    breaking = _grown((0.1, 0.2, 0.4), lambda s: Trial(s, s / 100, 1.0, s))  # 0.8 is no longer coherent
    assert not breaking.edge and [t.strength for t in breaking.trials][-1] == pytest.approx(0.8)
    assert not _grown((1.0,), lambda s: Trial(s, 0.5, 1.0, 0.0)).edge, "a method without a knob has no grid"


def test_paired_tests_find_a_planted_difference_and_no_other() -> None:
    flags = {"removed": [False] * 30, "kept": [True] * 30}
    subjects = {share: [str(i) for i in range(30)] for share in flags}
    rows = {
        "null": {"flags": flags, "subjects": subjects},
        "same": {"flags": flags, "subjects": subjects},
        "better": {"flags": {"removed": [True] * 20 + [False] * 10, "kept": [True] * 30}, "subjects": subjects},
    }
    found = against(rows, "null")
    # 10,000 swaps of whole subjects show no p below 2e-4, and there are four tests.
    assert found["better"]["removed"]["q"] < 1e-3 and found["better"]["kept"]["q"] == 1
    assert found["same"]["removed"]["q"] == 1
    assert found["better"]["removed"]["difference"]["value"] == pytest.approx(2 / 3)


def test_an_edit_stands_beside_a_set_of_its_rotations() -> None:
    """No p is below what the number of draws allows, ties count against the method, and a rotation is not beyond rotations."""
    draws = (0.1, 0.2, 0.15)
    rows = {
        "strong": {"removed": 0.9, "null_removed": draws, "kept": 0.15, "null_kept": draws},
        "tied": {"removed": 0.2, "null_removed": draws, "kept": 0.1, "null_kept": draws},
        "prompt": None,
    }
    found = beside_null(rows)
    assert set(found) == {"strong", "tied"}
    assert found["strong"]["removed"]["p"] == found["strong"]["removed"]["least_p"] == 1 / 4
    assert found["tied"]["removed"]["p"] > 1 / 4 and found["strong"]["kept"]["p"] == 1
    assert all(0 <= test["p"] <= test["q"] <= 1 for one in found.values() for test in one.values())
    rng, fired = np.random.default_rng(0), 0
    for _ in range(400):
        x = rng.binomial(24, 0.3, 20) / 24
        one = beside_null({"m": {"removed": x[0], "null_removed": x[1:], "kept": x[0], "null_kept": x[1:]}})["m"]
        fired += one["removed"]["p"] <= 0.05
    assert fired / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_effects_under_another_prompt() -> None:
    """The same prompt changes nothing; a system prompt does; the same edit gives what it gives without one."""
    backend = tiny_backend("llama")
    texts, answers = ["tell me about the city", "why", "write a poem about the river"], ["yes", "i can tell you", "no"]
    rows = backend.template().encode_all(texts, answers)
    same = prompted_effects(backend, rows, rows, None)
    assert float(same.kl.abs().max()) < 1e-6 and float(same.shift.abs().max()) < 1e-6
    other = prompted_effects(backend, rows, backend.template("you are a river").encode_all(texts, answers), None)
    assert float(other.kl.min()) > 1e-4
    plain = answer_effects(backend, rows, None)
    torch.testing.assert_close(same.kl, plain.kl, atol=1e-6, rtol=0)
