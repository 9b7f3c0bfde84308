"""A whole path of ridge directions from one eigendecomposition per site, against one scikit-learn fit per penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from rsteer_interp.directions.ridge import ridge_path
from rsteer_interp.moments import Scatter
from tests.benchmarks.compare import Rival, compare, seconds

PENALTIES = np.logspace(0, 5, 20).tolist()
SITES = 25


def _data(n: int, d: int) -> tuple[Tensor, Tensor]:
    """States with a spectrum that falls like a model's, and labels that depend on them."""
    random = torch.Generator().manual_seed(n + d)
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.5)
    x = torch.randn(n, d, generator=random, dtype=torch.float64) * scale * 10
    y = (x[:, :8].sum(1) + torch.randn(n, generator=random, dtype=torch.float64)).sign()
    return x, y


def _ours(x: Tensor, y: Tensor, penalties: list[float]) -> Tensor:
    centred = x - x.mean(0)
    return ridge_path(centred.T @ (y - y.mean()), Scatter.of(centred), penalties)


@pytest.mark.parametrize(
    ("d", "n", "our_sites", "their_penalties"),
    [(896, 300, 5, 20), (896, 3000, 3, 10), (4096, 300, 3, 10), (4096, 3000, 1, 1)],
)
def test_ridge_path(benchmark: Any, d: int, n: int, our_sites: int, their_penalties: int, rounds: int) -> None:
    x, y = _data(n, d)
    states, labels = x.numpy(), y.numpy()
    chosen = PENALTIES[:: len(PENALTIES) // their_penalties]

    def theirs(penalties: list[float]) -> list[Any]:
        return [Ridge(alpha=penalty).fit(states, labels).coef_ for penalty in penalties]

    whole = _ours(x, y, PENALTIES)  # which also warms up what is timed
    expected_ends = torch.from_numpy(np.stack(theirs([PENALTIES[0], PENALTIES[-1]])))
    for ours, expected in zip((whole[0], whole[-1]), expected_ends, strict=True):
        assert float((ours - expected).norm() / expected.norm()) <= 1e-8
    compare(
        benchmark,
        f"ridge path, {len(PENALTIES)} penalties x {SITES} sites, d = {d}, n = {n}",
        seconds(lambda: [_ours(x, y, PENALTIES) for _ in range(our_sites)], SITES / our_sites),
        [
            Rival(
                "scikit-learn Ridge in a loop",
                seconds(lambda: theirs(chosen), SITES * len(PENALTIES) / len(chosen)),
                0.1,
            )
        ],
        rounds,
        note=f"ours timed on {our_sites} of {SITES} sites, scikit-learn on one site and {len(chosen)} penalties, both scaled",
    )
