"""Refusal confidence, log-odds, scales, layer score and finder, against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rsteer_interp.errors import UserError
from rsteer_interp.measures import kl_divergence, masked_mean, refusal_log_odds, refusal_tokens, token_log_probs
from rsteer_interp.refusal_scores import refusal_confidence
from rsteer_interp.selection import (
    LayerScore,
    Setting,
    find_setting,
    grid,
    layer_score,
    scales,
    steerable_layers,
    top_layers,
)


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


def _find(removed: dict[Setting, float], shift: dict[Setting, float], judged: dict[Setting, float], target: float):  # type: ignore[no-untyped-def]
    return find_setting(
        list(removed),
        target=target,
        removals=lambda settings: [removed[setting] for setting in settings],
        answer_shift=shift.__getitem__,
        judged_removal=judged.__getitem__,
    )


def test_finder_takes_the_smallest_shift_that_reaches_the_target() -> None:
    settings = grid([1, 2], [-0.5, -1.0], [False])
    removed = dict(zip(settings, [0.2, 1.5, 1.4, 1.9], strict=True))
    shift = dict(zip(settings, [0.0, 0.3, 0.1, 0.2], strict=True))
    judged = dict(zip(settings, [0.2, 1.6, 0.9, 1.7], strict=True))
    found = _find(removed, shift, judged, 1.3)
    # The third has the smallest shift, but its judged replies miss the target; the fourth comes next.
    assert found.target_met
    assert found.chosen.setting == settings[3]
    assert len(found.trials) == 4


def test_finder_says_when_nothing_reaches_the_target() -> None:
    settings = grid([1, 2], [-0.5], [False])
    removed = dict(zip(settings, [0.1, 0.2], strict=True))
    found = _find(removed, dict.fromkeys(settings, 0.1), dict(zip(settings, [0.1, 0.3], strict=True)), 1.0)
    assert not found.target_met
    assert found.chosen.setting == settings[1]
