"""Shifts between checkpoints: planted ones are recovered by the variant that can see them, and nulls hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import Site
from rsteer_interp.checkpoint_shift import (
    THRESHOLDS,
    component_cosine,
    effective_rank,
    mean_shift,
    paired_states,
    rank_null,
    shift_rows,
    shift_spectrum,
    split_overlap,
)
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import add
from rsteer_interp.spectrum import principal_angles
from tests.tiny_models import tiny_backend, tiny_rows

SEEDS = (0, 1, 2)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _basis(seed: int, k: int, d: int) -> Tensor:
    return torch.linalg.qr(_normal(seed, d, k))[0].T


def _planted(seed: int, n: int, d: int, k: int, noise: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """States, states shifted by amounts of their own in k dimensions, and the basis of those."""
    x, basis = 3 * _normal(seed, n, d) + _normal(seed + 9, d), _basis(seed + 1, k, d)
    return x, x + _normal(seed + 2, n, k) @ basis + noise * _normal(seed + 3, n, d), basis


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("variant", ["identity", "matrix"])
def test_a_planted_shift_of_rank_k_is_recovered(variant: str, k: int, seed: int) -> None:
    x, y, basis = _planted(seed, 120, 24, k)
    found = shift_spectrum(x, y, variant)  # type: ignore[arg-type]
    assert found.effective_rank(0.98) == k
    assert max(principal_angles(found.components[:k], basis)) < 0.03
    # Another basis is far away: the angle can be large.
    assert max(principal_angles(found.components[:k], _basis(seed + 50, k, 24))) > 0.8
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(len(found.components)).double())


@pytest.mark.parametrize("seed", SEEDS)
def test_each_variant_sees_what_it_is_made_for(seed: int) -> None:
    """A linear map moves y = x + x U V^T: "map" finds U (right singular vectors), "identity" V, "matrix" nothing but noise."""
    n, d, k = 200, 16, 2
    x = _normal(seed, n, d)
    u, v = _basis(seed + 1, k, d), _basis(seed + 2, k, d)
    y = x + 0.5 * (x @ u.T) @ v + 0.3 + 1e-4 * _normal(seed + 3, n, d)
    found = shift_spectrum(x, y, "map")
    assert found.effective_rank(0.99) == k and found.mean_share is None
    torch.testing.assert_close(found.values[:k], torch.full((k,), 0.25).double(), atol=1e-2, rtol=0)
    assert max(principal_angles(found.components[:k], u)) < 1e-2
    centred = shift_spectrum(x, y, "identity", centred=True)
    assert max(principal_angles(centred.components[:k], v)) < 1e-2
    linear = x + (x @ u.T) @ v
    assert float(shift_rows(x, linear, "matrix").norm()) < 1e-9 * float((linear - x).norm())
    assert float(shift_rows(x, y, "map").norm()) > 0.5


def test_the_fits_need_more_prompts_than_dimensions() -> None:
    """With n <= d the least-squares remainder is 0 whatever was done, which is why it is refused."""
    d = 16
    for n in (10, 16):
        x, y = _normal(0, n, d), _normal(1, n, d)
        remainder = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        assert float(remainder.abs().max()) < 1e-9
        for variant in ("matrix", "map"):
            with pytest.raises(UserError, match=rf"needs \d+ prompts or more \(n = {n}\)"):
                shift_spectrum(x, y, variant)  # type: ignore[arg-type]
    assert len(shift_rows(_normal(0, 17, d), _normal(1, 17, d), "matrix")) == 17
    with pytest.raises(UserError, match=r"n = 17"):
        shift_rows(_normal(0, 17, d), _normal(1, 17, d), "map")
    assert shift_rows(_normal(0, 18, d), _normal(1, 18, d), "map").shape == (d, d)


def test_eigenvalues_and_shares_are_as_written() -> None:
    x, y, _ = _planted(0, 50, 12, 2, noise=0.1)
    r = y - x + 2.0
    y = x + r
    found = shift_spectrum(x, y)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(r.T @ r).flip(0) / 49)
    assert found.mean_share == pytest.approx(float(50 * r.mean(0).square().sum() / r.square().sum()))
    centred = shift_spectrum(x, y, centred=True)
    torch.testing.assert_close(centred.values, torch.linalg.eigvalsh(torch.cov(r.T)).flip(0))
    assert not torch.allclose(centred.values, found.values)
    # A shift common to all prompts is the first uncentred component, and none of the centred ones.
    assert found.mean_share > 0.8
    assert abs(float(found.components[0] @ torch.ones(12).double())) / 12**0.5 > 0.98
    hand = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [effective_rank(hand, t) for t in (0.4, 0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert list(found.effective_ranks) == list(THRESHOLDS)
    with pytest.raises(UserError, match="threshold"):
        effective_rank(hand, 0.0)
    with pytest.raises(UserError, match="centres already"):
        shift_spectrum(x, y, "map", centred=True)
    with pytest.raises(UserError, match="no shift"):
        shift_spectrum(x, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_low_rank_is_beyond_its_nulls_and_an_unstructured_shift_is_not(seed: int) -> None:
    x, y, _ = _planted(seed, 40, 24, 2)
    for kind in ("isotropic", "pairing"):
        band = rank_null(x, y, kind, thresholds=(0.9,), n_draws=60)[0.9]  # type: ignore[arg-type]
        assert band.rank == 2 and band.low > 8 and band.p == 1 / 61
    loose = x + _normal(seed + 4, 40, 24)
    band = rank_null(x, loose, "isotropic", thresholds=(0.9,), n_draws=60)[0.9]
    assert band.low <= band.rank <= band.high and band.p > 0.05


def test_swapped_labels_leave_an_uncentred_spectrum_as_it_is() -> None:
    """So that null is refused there, and catches a mean shift where it can: among centred spectra and in the mean's share."""
    x, y, _ = _planted(0, 30, 12, 2)
    swap = 2 * torch.randint(2, (30, 1), generator=torch.Generator().manual_seed(0)).double() - 1
    torch.testing.assert_close(shift_spectrum(x, x + swap * (y - x)).values, shift_spectrum(x, y).values)
    with pytest.raises(UserError, match="leaves an uncentred spectrum"):
        rank_null(x, y, "signs")
    assert rank_null(x, y + 5.0, "signs", centred=True, thresholds=(0.9,), n_draws=40)[0.9].rank == 2
    shifted, level = mean_shift(x, y + 1.0), mean_shift(x, y)
    assert shifted.p < 0.005 and shifted.share > shifted.null_high
    assert level.p > 0.02 and 0 < level.share < 0.2
    assert level.share == pytest.approx(shift_spectrum(x, y).mean_share)


def test_mean_shift_null_has_its_size() -> None:
    p = torch.tensor([mean_shift(torch.zeros(20, 6), _normal(s, 20, 6), n_draws=99).p for s in range(200)])
    assert 0.01 <= float((p <= 0.05).double().mean()) <= 0.11


def test_halves_agree_on_a_planted_span_only() -> None:
    x, y, _ = _planted(3, 60, 24, 2)
    planted = split_overlap(x, y, 2)
    assert planted.low > 0.99 and planted.chance == 2 / 24
    loose = split_overlap(x, x + _normal(4, 60, 24), 2)
    assert loose.overlap < 0.5
    with pytest.raises(UserError, match="halves"):
        split_overlap(x[:5], y[:5], 2)


def test_component_one_against_the_mean_difference() -> None:
    labels = torch.arange(60) % 2 == 0
    u, big = _basis(0, 2, 24)
    x = _normal(1, 60, 24) + labels[:, None] * 4 * u + 20 * _normal(2, 60, 1) * big
    y = x - 3 * u + 0.1 * _normal(3, 60, 24)
    centred = x - ((x @ big)[:, None]) * big
    difference = centred[labels].mean(0) - centred[~labels].mean(0)
    first = shift_spectrum(x, y).oriented(difference)
    assert float(first.components[0] @ u) > 0.98
    assert float(shift_spectrum(x, y).oriented(-difference).components[0] @ u) < -0.98
    found = component_cosine(first.components[0], centred, labels)
    assert found.random.cosine > 0.8 and found.random.p < 1e-3 and found.label_p < 0.01
    # The direction in which all states vary is like the difference of any two groups: only permuted labels tell.
    fooled = [
        component_cosine(big, _normal(seed, 60, 24) + 20 * _normal(seed + 99, 60, 1) * big, labels, n_permutations=99)
        for seed in range(30)
    ]
    assert sum(one.random.p < 0.05 for one in fooled) > 20
    assert sum(one.label_p <= 0.05 for one in fooled) <= 5
    with pytest.raises(UserError, match="needs both groups"):
        component_cosine(u, x, torch.ones(60))


def test_paired_states_are_those_of_both_models() -> None:
    before, after = tiny_backend("llama"), tiny_backend("llama")
    rows, sites = tiny_rows(before), [Site(2), Site(4)]
    vector = _normal(0, 32).float()
    after.model.model.layers[1].mlp.down_proj.weight.data *= 0.5
    found = paired_states(before, after, rows, sites)
    for site in sites:
        assert torch.equal(found[site][0], last_states(before, rows, [site])[site])
        assert torch.equal(found[site][1], last_states(after, rows, [site])[site])
        assert not torch.equal(*found[site])
    same = paired_states(before, before, rows, [Site(1), Site(2)], edit=add({Site(2): vector}, {Site(2): 2.0}))
    assert torch.equal(*same[Site(1)])
    shift = shift_spectrum(*same[Site(2)])
    assert shift.effective_rank(0.99) == 1 and shift.mean_share == pytest.approx(1, abs=1e-6)
    other = tiny_backend("gpt2")
    other.d_model = 64
    with pytest.raises(UserError, match="no states in common"):
        paired_states(before, other, rows, sites)
    other.d_model = 32
    other.tokenizer.add_tokens(["more"])
    with pytest.raises(UserError, match="vocabularies"):
        paired_states(before, other, rows, sites)
