"""Moments: streamed = one-shot, merging is associative, nothing is lost to dtype or offset, processes agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments, RunningMoments, Scatter, reduce
from rsteer_interp.symmetric import add_gram, packed_gram, packed_width, unpacked


def sample(n: int, d: int, seed: int = 0, offset: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = offset + torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 5, d)
    return states, torch.rand(n, generator=generator, dtype=torch.float64) + 0.05


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-10) -> None:
    assert a.count == b.count
    assert a.weight == pytest.approx(b.weight, rel=tolerance)
    assert a.squared_weight == pytest.approx(b.squared_weight, rel=tolerance)
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    scale = a.scatter.trace / a.d + 1e-300
    torch.testing.assert_close(a.scatter.dense / scale, b.scatter.dense / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("n", "d"), [(40, 7), (6, 20), (21, 20), (22, 20), (1, 5)])
def test_one_shot_equals_numpy(n: int, d: int) -> None:
    x, w = sample(n, d)
    moments = Moments.of(x, w)
    expected = np.cov(x.numpy().T, aweights=w.numpy(), ddof=0) if n > 1 else np.zeros((d, d))
    np.testing.assert_allclose(moments.mean, np.average(x, axis=0, weights=w), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-10)
    assert moments.effective_count == pytest.approx(float(w.sum()) ** 2 / float((w**2).sum()))
    rows = moments.scatter.rows
    assert (rows is not None and len(rows) == n - 1) if n - 1 <= d else rows is None


@pytest.mark.parametrize("sizes", [(1,) * 30, (5, 1, 24), (0, 30), (13, 17)])
@pytest.mark.parametrize("d", [4, 25, 60])
def test_streamed_equals_one_shot(sizes: tuple[int, ...], d: int) -> None:
    x, w = sample(30, d)
    streamed, running = Moments.empty(d), RunningMoments(d)
    for part, weights in zip(x.split(sizes), w.split(sizes), strict=True):
        streamed = streamed.merge(Moments.of(part, weights))
        running.add(part, weights)
        assert_same(running.moments(), streamed)
    assert_same(streamed, Moments.of(x, w))


def test_running_moments_hold_half_a_matrix_at_most_and_give_out_copies() -> None:
    x, w = sample(60, 8)
    running = RunningMoments(8)
    for i in range(60):
        before = running.moments()
        running.add(x[i : i + 1], w[i : i + 1])
        assert_same(before, Moments.of(x[:i], w[:i]))
        assert running.moments().scatter.held.numel() <= 36
    assert running.moments().scatter.packed is not None


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("m", [0, 1, 3, 20])
def test_a_packed_gram_matrix_is_the_matrix(m: int, d: int) -> None:
    x, y = torch.randn(2, m, d, dtype=torch.float64)
    packed = packed_gram(x)
    assert packed.shape == (d * (d + 1) // 2,)
    assert packed_width(packed) == d
    torch.testing.assert_close(unpacked(packed), x.T @ x)
    add_gram(packed, y.T.contiguous().T)  # of any memory layout
    torch.testing.assert_close(unpacked(packed), x.T @ x + y.T @ y)
    assert torch.equal(unpacked(packed), unpacked(packed).T)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 12)] * 3),
    d=st.integers(1, 10),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 10_000),
)
def test_merge_is_associative_and_commutative(sizes: tuple[int, int, int], d: int, offset: float, seed: int) -> None:
    a, b, c = (Moments.of(*sample(n, d, seed + i, offset * i)) for i, n in enumerate(sizes))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))


def test_weight_two_is_a_copy_and_weight_zero_is_absence() -> None:
    x, _ = sample(12, 5)
    double = torch.ones(12, dtype=torch.float64)
    double[3] = 2
    copied = Moments.of(torch.cat([x, x[3:4]]))
    weighted = Moments.of(x, double)
    torch.testing.assert_close(weighted.mean, copied.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted.covariance, copied.covariance, rtol=1e-12, atol=1e-12)
    absent = torch.ones(12, dtype=torch.float64)
    absent[[0, 7]] = 0
    assert_same(Moments.of(x, absent), Moments.of(x[absent > 0]))


def test_states_of_any_dtype_are_upcast_where_a_low_precision_gram_is_wrong() -> None:
    x, _ = sample(300, 24, offset=0)
    x[:, -1] += 500  # a massive activation
    low = x.to(torch.bfloat16)
    truth = torch.from_numpy(np.cov(low.double().numpy().T, ddof=0))
    assert (Moments.of(low).covariance - truth).norm() / truth.norm() < 1e-12
    fault = (low.T @ low / 300).double() - torch.outer(low.mean(0), low.mean(0)).double()
    assert (fault - truth).norm() / truth.norm() > 0.1
    with pytest.raises(TypeError, match="float64"):
        Scatter(rows=low)


@pytest.mark.parametrize("n", [20, 200])
def test_a_large_offset_costs_no_digits(n: int) -> None:
    x, w = sample(n, 30, offset=0)
    far = Moments.of(x + 2.0**20, w)  # exact addition up to 1e-10
    torch.testing.assert_close(far.covariance, Moments.of(x, w).covariance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [0, 4, 50])
def test_saved_and_loaded_to_the_last_bit(n: int, tmp_path: Path) -> None:
    moments = Moments.of(*sample(n, 6))
    safetensors.torch.save_file(moments.tensors(), tmp_path / "moments.safetensors")
    loaded = Moments.from_tensors(safetensors.torch.load_file(tmp_path / "moments.safetensors"))
    assert (loaded.count, loaded.weight, loaded.squared_weight) == (
        moments.count,
        moments.weight,
        moments.squared_weight,
    )
    assert torch.equal(loaded.mean, moments.mean)
    assert torch.equal(loaded.scatter.dense, moments.scatter.dense)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(UserError, match="at least 0"):
        Moments.of(torch.randn(2, 3), torch.tensor([1.0, -1.0]))
    with pytest.raises(UserError, match="width 3 and 4"):
        Moments.empty(3).merge(Moments.empty(4))
    with pytest.raises(UserError, match="no states"):
        _ = Moments.empty(3).covariance


def test_reduce_without_processes_is_a_no_op() -> None:
    moments = Moments.of(*sample(5, 3))
    assert reduce(moments) is moments


def _reduce_in_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, w = sample(26, 8)
    parts = [slice(0, 5), slice(5, 26)]  # rows on one rank, the full matrix on the other
    merged = reduce(Moments.of(x[parts[rank]], w[parts[rank]]))
    with_empty = reduce(Moments.empty(8) if rank == 0 else Moments.of(x[:4], w[:4]))
    assert_same(merged, Moments.of(x, w))
    assert_same(with_empty, Moments.of(x[:4], w[:4]))
    dist.destroy_process_group()


def test_reduce_over_two_processes_equals_one_shot(tmp_path: Path) -> None:
    mp.spawn(_reduce_in_process, (str(tmp_path),), nprocs=2)
