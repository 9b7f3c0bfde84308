"""Refusal confidence, log-odds, scales, layer score and finder, against hand-worked numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from rsteer_interp.errors import UserError
from rsteer_interp.measures import kl_divergence, masked_mean, refusal_log_odds, refusal_tokens, token_log_probs
from rsteer_interp.refusal_scores import refusal_confidence
from rsteer_interp.selection import (
    Found,
    LayerScore,
    Setting,
    find_setting,
    grid,
    layer_score,
    scales,
    steerable_layers,
    top_layers,
)
from rsteer_interp.statistics.intervals import Estimate


def test_confidence_of_three_answers_by_hand() -> None:
    s = torch.log(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    weights = [math.exp(0.5), math.exp(0.25), math.exp(0.25)]
    # w = softmax(s / tau) with s a log-probability: at tau = 1 the weights are 0.5, 0.25, 0.25.
    assert refusal_confidence(torch.tensor([1, -1, 0]), s).item() == pytest.approx(0.5 - 0.25)
    assert refusal_confidence(torch.tensor([1, -1, -1]), s.exp()).item() == pytest.approx(
        (weights[0] - weights[1] - weights[2]) / sum(weights)
    )


def test_confidence_limits() -> None:
    s = torch.tensor([-0.1, -2.0, -7.0, -0.3])
    assert refusal_confidence(torch.ones(4), s).item() == pytest.approx(1.0)
    assert refusal_confidence(-torch.ones(4), s).item() == pytest.approx(-1.0)
    z = torch.tensor([1, 1, 1, -1])
    assert refusal_confidence(z, torch.full((4,), -0.4)).item() == pytest.approx(0.5)
    assert refusal_confidence(z, s, temperature=1e9).item() == pytest.approx(0.5)
    assert -1 <= refusal_confidence(z, s).item() <= 1


def test_odd_samples_of_equal_weight_are_never_neutral() -> None:
    for refusals in range(6):
        z = torch.tensor([1] * refusals + [-1] * (5 - refusals))
        assert abs(refusal_confidence(z, torch.zeros(5)).item()) >= 1 / 5 - 1e-12


def test_log_odds_are_the_logit_of_the_summed_probability() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)[:, [3, 7]].sum(-1)
    torch.testing.assert_close(refusal_log_odds(logits, [3, 7]), (p / (1 - p)).log(), atol=1e-5, rtol=0)
    sure = torch.full((2, 50), -1e4)
    sure[0, 3], sure[1, 9] = 1e4, 1e4
    out = refusal_log_odds(sure, [3, 7])
    assert out.tolist() == pytest.approx([math.log(1 + 1e-8) - math.log(1e-8), -18.42], abs=0.01)
    with pytest.raises(UserError, match="no refusal tokens"):
        refusal_log_odds(logits, [])


def test_refusal_tokens_are_found_from_replies() -> None:
    first = [40] * 30 + [41] * 10 + [7] * 60 + [40] * 5 + [9] * 2
    refused = [True] * 40 + [False] * 65 + [True] * 2
    assert refusal_tokens(first, refused) == (40, 41)
    with pytest.raises(UserError, match="no token opens refusals"):
        refusal_tokens([1] * 20, [True] * 10 + [False] * 10)


def test_kl_is_zero_at_home_positive_elsewhere_and_takes_masked_logits() -> None:
    a = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(1))
    b = a + 0.1 * torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(2))
    assert float(kl_divergence(a, a).abs().max()) < 1e-6
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(kl_divergence(a, b), oracle, atol=1e-6, rtol=1e-5)
    a[..., 0] = b[..., 0] = -torch.inf
    assert bool(torch.isfinite(kl_divergence(a, b)).all())


def test_kl_grows_as_the_square_of_a_small_dose() -> None:
    a, d = torch.randn(2, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)
    small, double = (float(kl_divergence(a[None], (a + t * d)[None]).sum()) for t in (0.02, 0.04))
    assert math.log2(double / small) == pytest.approx(2, abs=0.1)


def test_masked_mean_reads_no_padding() -> None:
    values = torch.tensor([[float("nan"), 1.0, 3.0], [5.0, 7.0, 9.0]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert masked_mean(values, mask).tolist() == [2.0, 7.0]


def test_token_log_probs() -> None:
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    assert token_log_probs(logits, torch.tensor([[1, 0]])).exp().flatten().tolist() == pytest.approx([0.75, 0.5])


def test_scales_are_quantile_ratios_per_sign() -> None:
    c = torch.tensor([1.0] * 20 + [-1.0] * 20 + [0.0] * 5)
    p = torch.cat([torch.linspace(1, 20, 20), -torch.linspace(1, 20, 20), torch.full((5,), 99.0)])
    plus, minus = scales(p, c)
    assert plus == pytest.approx(float(torch.linspace(1, 20, 20).quantile(0.95)))
    assert minus == pytest.approx(float(torch.linspace(1, 20, 20).quantile(0.95)))
    assert scales(p[:20], c[:20])[1] == 1.0  # an empty class


def test_layer_score_by_hand() -> None:
    c = torch.tensor([1.0, 0.5, -0.5, -1.0])
    agreeing = layer_score(torch.tensor([2.0, 1.0, -1.0, -2.0]), c)
    assert agreeing.r == pytest.approx(1.0)
    assert agreeing.rmse == 0.0
    # One sign is wrong, where c = -1: RMSE = sqrt(1 / 4).
    assert layer_score(torch.tensor([2.0, 1.0, -1.0, 3.0]), c).rmse == pytest.approx(0.5)
    assert layer_score(torch.ones(4), c).r == 0.0


def test_deepest_layers_are_never_chosen() -> None:
    assert list(steerable_layers(24)) == list(range(1, 23))
    assert list(steerable_layers(48)) == list(range(1, 46))
    scores = {layer: LayerScore(0.1 * layer, 0.0) for layer in range(1, 25)}
    assert top_layers(scores, 3, 24) == [20, 21, 22]


SUBJECTS = [f"subject {i % 14}" for i in range(42)]


def _find(
    falls: Mapping[Setting, Sequence[float]],
    shift: Mapping[Setting, float],
    target: float,
    first: int = 12,
    at_once: int = 1,
) -> tuple[Found, dict[Setting, int]]:
    """The finder's choice, and on how many prompts it judged each setting."""
    asked = dict.fromkeys(falls, 0)

    def judged(settings: Sequence[Setting], n: int) -> list[Sequence[float]]:
        for setting in settings:
            asked[setting] = max(asked[setting], n)
        return [falls[setting][:n] for setting in settings]

    shifts = {setting: Estimate(x, x, x, 8) for setting, x in shift.items()}
    return find_setting(shifts, judged, SUBJECTS, target=target, first=first, at_once=at_once), asked


def _alike(means: Sequence[float], settings: Sequence[Setting]) -> dict[Setting, list[float]]:
    """Falls of every prompt with these means, spread by 0.5 over prompts."""
    spread = [0.5 * (-1) ** (i // 14) * (i < 28) for i in range(len(SUBJECTS))]
    return {setting: [mean + x for x in spread] for setting, mean in zip(settings, means, strict=True)}


def test_finder_takes_the_smallest_shift_that_reaches_the_target() -> None:
    settings = grid([1, 2], [-0.5, -1.0], [False])
    shift = dict(zip(settings, [0.0, 0.3, 0.1, 0.2], strict=True))
    found, asked = _find(_alike([-0.4, 1.6, 0.9, 1.7], settings), shift, 1.3)
    # The first is ruled out by few prompts, the third has the smallest shift but misses the target, the fourth comes next; the
    # second, with a larger shift, need not be judged.
    assert found.target_met
    assert found.chosen.setting == settings[3]
    assert [asked[setting] for setting in settings] == [12, 0, 42, 42]
    assert [(t.setting, t.removal is None, t.complete) for t in found.trials] == [
        (settings[0], False, False), (settings[2], False, True), (settings[3], False, True), (settings[1], True, False)
    ]  # fmt: skip
    assert found.chosen.removal is not None and found.chosen.removal.n == 42


def test_finder_says_when_nothing_reaches_the_target() -> None:
    settings = grid([1, 2], [-0.5, -1.0], [False])
    found, asked = _find(_alike([0.1, 0.3, -0.2, 0.2], settings), dict.fromkeys(settings, 0.1), 1.0)
    assert not found.target_met
    assert found.chosen.setting == settings[1] and found.chosen.complete
    assert found.chosen.removal is not None and found.chosen.removal.value == pytest.approx(0.3)
    assert min(asked.values()) >= 12


def _planted_search(seed: int) -> tuple[dict[Setting, list[float]], dict[Setting, float]]:
    """Falls of c and answer shifts of twelve settings: pushes of any strength on the log-odds of prompts and subjects, c by K = 2
    noisy replies, shifts that grow with the push but for what is a setting's own."""
    rng = np.random.default_rng(seed)
    settings = grid([1, 2, 4], [-0.5, -1.0], [False, True])
    subject = np.unique(SUBJECTS, return_inverse=True)[1]
    odds = 1.5 + rng.normal(size=14)[subject] + rng.normal(size=42)
    push = rng.uniform(0, 5, len(settings))[:, None]
    steered = odds - push * (1 + 0.3 * rng.normal(size=42))

    def confidence(log_odds: np.ndarray) -> np.ndarray:
        return rng.binomial(2, 1 / (1 + np.exp(-log_odds))) - 1.0

    falls = confidence(odds) - confidence(steered)
    shift = 0.02 * push[:, 0] * np.exp(rng.normal(0, 0.5, len(settings)))
    return dict(zip(settings, falls.tolist(), strict=True)), dict(zip(settings, shift.tolist(), strict=True))


def test_finder_chooses_as_if_every_setting_had_been_judged_on_every_prompt() -> None:
    target, runs, agree, judged = 0.9, 400, 0, 0
    for seed in range(runs):
        falls, shift = _planted_search(seed)
        found, asked = _find(falls, shift, target, at_once=1 + 3 * (seed % 2))
        reached = [setting for setting, values in falls.items() if np.mean(values) >= target]
        assert found.target_met <= bool(reached)
        agree += (found.chosen.setting if found.target_met else None) == min(
            reached, key=shift.__getitem__, default=None
        )
        judged += sum(asked.values())
    assert agree >= 0.99 * runs
    assert judged < 0.4 * runs * 12 * 42  # at less than half the cost


def test_no_edit_removes_nothing_though_prompts_are_chosen_by_a_noisy_score() -> None:
    """Prompts chosen for c > 0 by two replies have a lower c when asked again: counted from the first replies, no edit removes."""
    rng = np.random.default_rng(0)

    def asked(log_odds: np.ndarray) -> np.ndarray:
        return rng.binomial(2, 1 / (1 + np.exp(-log_odds))) - 1.0

    covered, fallen, runs = 0, [], 200
    nothing = Setting(1, 0.0, False)
    for _ in range(runs):
        log_odds = rng.normal(0.5, 1.5, 400)
        scored = asked(log_odds)
        chosen = log_odds[scored > 0][: len(SUBJECTS)]
        before, after = asked(chosen), asked(chosen)
        found, _ = _find({nothing: (before - after).tolist()}, {nothing: 0.0}, 1.3)
        removal = found.chosen.removal
        assert removal is not None and not found.target_met
        covered += removal.low <= 0 <= removal.high
        fallen.append(float((scored[scored > 0][: len(SUBJECTS)] - after).mean()))
    assert covered / runs > 0.9
    assert np.mean(fallen) > 0.3  # fault: counted from the replies that chose the prompts
