"""Ours against its rivals in one run: every round runs all of them in turn (A B C A B C ...), so drift hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Cost = Callable[[], float]


@dataclass(frozen=True)
class Rival:
    """What ours is compared with: a cost in the same unit, and the ratio ours / rival that is hoped for.

    `kernel` says how the rival's linear layers ran: "plain" as its user gets them, "same" with this library's kernel.
    """

    name: str
    cost: Cost
    goal: float | None = None
    kernel: str = ""
    null: bool = False


def again(ours: Cost) -> Rival:
    """Ours against itself: how far from 1 a ratio comes by the machine's noise alone."""
    return Rival("itself", ours, null=True)


def limit(value: float, unit: str) -> Rival:
    """An absolute bound, as a rival that always costs as much."""
    return Rival(f"limit of {value:g} {unit}", lambda: value, 1.0)


def seconds(run: Callable[[], Any], times: float = 1.0) -> Cost:
    """Wall seconds of `run`; `times` scales a part that was timed up to the whole it stands for."""

    def cost() -> float:
        gc.collect()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * times

    return cost


def compare(
    benchmark: Any,
    work: str,
    ours: Cost,
    rivals: Sequence[Rival],
    rounds: int,
    *,
    unit: str = "s",
    note: str = "",
) -> None:
    """Measure, and leave the costs of every round with the benchmark's record; nothing is asserted about speed."""
    spent: list[list[float]] = []

    def one_round() -> None:
        spent.append([ours(), *(rival.cost() for rival in rivals)])

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    columns = [list(column) for column in zip(*spent, strict=True)]
    benchmark.extra_info["comparison"] = {
        "work": work,
        "unit": unit,
        "note": note,
        "ours": columns[0],
        "rivals": [
            {"name": r.name, "kernel": r.kernel, "goal": r.goal, "null": r.null, "costs": costs}
            for r, costs in zip(rivals, columns[1:], strict=True)
        ],
    }


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to the rounding of fp32: the largest difference, relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    size = max(1.0, float(theirs.abs().max()))
    assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * size
