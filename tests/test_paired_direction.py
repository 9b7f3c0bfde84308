"""The direction of pairs: the SVD of uncentred differences, global PCA, its sign, and pairs that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsteer_interp.directions.paired import paired_direction
from rsteer_interp.errors import UserError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n, d", [(5, 20), (60, 20), (1, 4), (20, 20)])
def test_pairwise_centring_is_the_svd_of_uncentred_differences(n: int, d: int) -> None:
    for seed in range(3):
        a, b = draw(n, d, seed=seed) + 0.7, draw(n, d, seed=seed + 50)
        v = paired_direction(a.float(), b.float())
        truth = torch.linalg.svd(a.float().double() - b.float().double(), full_matrices=False).Vh[0]
        assert v.dtype == torch.float64 and float(v.norm()) == pytest.approx(1, abs=1e-12)
        assert abs(float(v @ truth)) == pytest.approx(1, abs=1e-10)
        assert float((a - b).mean(0) @ v) > 0
        torch.testing.assert_close(paired_direction(b.float(), a.float()), -v)


def test_global_centring_is_plain_pca_and_follows_what_tells_pairs_apart() -> None:
    """Pairs differ along u by 2, subjects along z by far more: pairs find u, the global centring finds z."""
    u, z = torch.eye(20, dtype=torch.float64)[:2]
    subjects = 10 * draw(40, 1, seed=1) * z
    a, b = subjects + 2 * u + 0.3 * draw(40, 20, seed=2), subjects + 0.3 * draw(40, 20, seed=3)
    assert float(paired_direction(a, b) @ u) > 0.95
    wide = paired_direction(a, b, "global")
    assert abs(float(wide @ z)) > 0.95
    x = torch.cat([a, b])
    truth = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[0]
    assert abs(float(wide @ truth)) == pytest.approx(1, abs=1e-10)


def test_a_shift_of_a_pair_and_a_turn_of_the_axes() -> None:
    a, b, shift = draw(12, 9, seed=1) + 1, draw(12, 9, seed=2), 30 * draw(12, 9, seed=3)
    torch.testing.assert_close(paired_direction(a + shift, b + shift), paired_direction(a, b), rtol=1e-8, atol=1e-10)
    turn = torch.linalg.qr(draw(9, 9, seed=4)).Q
    for centring in ("pairs", "global"):
        torch.testing.assert_close(
            paired_direction(a @ turn.T, b @ turn.T, centring), turn @ paired_direction(a, b, centring)
        )


def test_pairs_that_are_none_are_refused() -> None:
    a = draw(3, 4)
    for other in (a[:2], a[:, :3], a[0]):
        with pytest.raises(UserError, match="one of each per pair"):
            paired_direction(a, other)
    with pytest.raises(UserError, match="unlike pairs"):
        paired_direction(a, a)
    with pytest.raises(UserError, match="finite"):
        paired_direction(a / 0, a)
