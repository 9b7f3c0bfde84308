"""Choosing a strength on select, matching removal, paired tests; the whole study runs in the contract suite."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.evaluation import answer_effects, prompted_effects
from rsteer_interp.studies.method_comparison.outcomes import against
from rsteer_interp.studies.method_comparison.selection import Trial, choose
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


def test_paired_tests_find_a_planted_difference_and_no_other() -> None:
    flags = {"removed": [False] * 30, "kept": [True] * 30}
    rows = {
        "null": {"flags": flags},
        "same": {"flags": flags},
        "better": {"flags": {"removed": [True] * 20 + [False] * 10, "kept": [True] * 30}},
    }
    found = against(rows, "null")
    assert found["better"]["removed"]["q"] < 1e-4 and found["better"]["kept"]["q"] == 1
    assert found["same"]["removed"]["q"] == 1
    assert found["better"]["removed"]["difference"]["value"] == pytest.approx(2 / 3)


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
