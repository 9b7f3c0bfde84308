"""Several processes under torchrun: prompts are shared out, results gathered on all, files written by the first.

    torchrun --nproc-per-node 8 analyses/reproduce.py --model org/name ...

Every process holds the whole model (on CUDA the device of its local rank) and runs the same program; `Backend.spread` gives
each a share of the batches, `results.stage` and the figures are written once. With transformers' tensor parallel
(`device_map` "tp") the model is what is shared out, and every process runs every prompt.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TENSOR_PARALLEL = "tp"


@dataclass
class _World:
    """This process among those that work together; one of one until `together` has found others."""

    rank: int = 0
    size: int = 1
    sharing: bool = False


_world = _World()


def rank() -> int:
    """Number of this process, from 0; 0 also where there is but one."""
    return _world.rank


def count() -> int:
    """How many processes share out the prompts: 1 without torchrun, under tensor parallel, and inside `alone`."""
    return _world.size if _world.sharing else 1


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return _world.rank == 0


@contextmanager
def together(device_map: object = None) -> Iterator[None]:
    """Join the other processes of a torchrun for the block's length; nothing where there are none.

    Only the first prints. Collective calls time out after the backend's default of 10 to 30 minutes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _world.size > 1:
        yield
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    _world.rank, _world.size, _world.sharing = dist.get_rank(), size, device_map != TENSOR_PARALLEL
    try:
        with nullcontext() if is_first() else redirect_stdout(io.StringIO()):
            yield
        dist.barrier()  # nobody leaves while another still reads from it
    finally:
        _world.rank, _world.size, _world.sharing = 0, 1, False
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process of a torchrun with that exit code, without the interpreter's shutdown; nothing where there is but one.

    With gloo (PyTorch 2.13) about one run in eight aborted there, in native code and after all its work was done, which
    torchrun then reports as a failure of the whole.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, nothing is shared out: what runs here is one process's own share already."""
    before, _world.sharing = _world.sharing, False
    try:
        yield
    finally:
        _world.sharing = before


def gathered(own: Sequence[T]) -> list[T]:
    """Everybody's items, in the order of the ranks. Every process must call it.

    Objects travel over gloo, between this program's own processes; nothing of it reaches a disk.
    """
    import torch.distributed as dist

    parts: list[list[T]] = [[] for _ in range(_world.size)]
    dist.all_gather_object(parts, list(own))
    return [item for part in parts for item in part]


def from_first(compute: Callable[[], T]) -> T:
    """What the first process computes, on all of them. Every process must call it."""
    if _world.size == 1:
        return compute()
    import torch.distributed as dist

    held = [compute() if is_first() else None]
    dist.broadcast_object_list(held, src=0)
    found: T = held[0]  # type: ignore[assignment]
    return found
