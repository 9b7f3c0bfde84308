"""Concentration: limits of each statistic, an independent formula, bootstrap coverage of a planted profile."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from rsteer_interp.concentration import centre_depth, concentration, gini, peak_depth
from rsteer_interp.errors import UserError
from rsteer_interp.spectrum import participation_ratio


def effects(profile: Tensor, n: int, seed: int, noise: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return profile + noise * torch.randn(n, len(profile), generator=generator, dtype=torch.float64)


def test_one_layer_and_equal_layers() -> None:
    one = torch.zeros(10, 5)
    one[:, 3] = 2.0
    found = concentration(one)
    assert (found.effective_layers.value, found.gini.value) == pytest.approx((1, 4 / 5))
    assert (found.peak.value, found.centre.value) == pytest.approx((0.75, 0.75))
    equal = concentration(torch.ones(10, 5))
    assert (equal.effective_layers.value, equal.gini.value, equal.centre.value) == pytest.approx((5, 0, 0.5))
    assert (equal.gini.low, equal.gini.high) == pytest.approx((0, 0))


def test_gini_equals_the_mean_absolute_difference() -> None:
    v = torch.rand(17, generator=torch.Generator().manual_seed(0))
    x = v.double().numpy()
    expected = np.abs(x[:, None] - x[None]).sum() / (2 * len(x) * x.sum())
    assert gini(v) == pytest.approx(expected)
    assert gini(5 * v.flip(0)) == pytest.approx(expected)


def test_negative_means_count_as_zero() -> None:
    found = concentration(torch.tensor([[1.0, -3.0, 1.0], [1.0, -3.0, 1.0]]))
    assert found.effective_layers.value == pytest.approx(2)


def test_bootstrap_intervals_cover_a_planted_profile() -> None:
    profile = torch.exp(-((torch.arange(24, dtype=torch.float64) - 15) ** 2) / 8)
    truth = {
        "effective_layers": participation_ratio(profile),
        "gini": gini(profile),
        "peak": peak_depth(profile),
        "centre": centre_depth(profile),
    }
    covered = dict.fromkeys(truth, 0)
    for seed in range(20):
        found = asdict(concentration(effects(profile, 400, seed), n_draws=200, seed=seed))
        for name, value in truth.items():
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
            covered[name] += found[name]["low"] - 0.03 * value <= value <= found[name]["high"] + 0.03 * value
    assert all(count >= 17 for count in covered.values()), covered


def test_same_seed_same_interval() -> None:
    x = effects(torch.linspace(0, 1, 6), 40, 0)
    assert concentration(x, seed=3) == concentration(x, seed=3)
    assert concentration(x, seed=3) != concentration(x, seed=4)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(UserError, match="check the sign"):
        concentration(-torch.ones(4, 3))
    with pytest.raises(UserError, match="two prompts and two layers"):
        concentration(torch.ones(1, 3))
