"""Memory above the loaded model: of a capture, and whether it stays flat while more prompts stream through."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.compare import Rival, compare, limit
from tests.benchmarks.memory import PROMPTS, measured


def test_of_a_capture(benchmark: Any, model_name: str) -> None:
    found = measured(model_name, "capture")
    turns = {name: iter(values) for name, values in found.items()}
    compare(
        benchmark,
        "extra memory of a capture, B8 x T512",
        lambda: next(turns["ours"]),
        [Rival("plain hooks that slice", lambda n=name: next(turns[n]), 1.5, name) for name in found if name != "ours"],
        len(found["ours"]),
        unit="MB",
        note="peak resident memory above the loaded and warmed model, in a process of its own",
    )


@pytest.mark.parametrize("sites", ["4 sites", "all sites"])
def test_is_flat_in_the_number_of_prompts(benchmark: Any, model_name: str, sites: str, rounds: int) -> None:
    few, many = PROMPTS
    peaks: list[tuple[float, float]] = []

    def growth() -> float:
        # Every number from a process of its own: what an earlier one leaves in the heap is used again, and hides growth.
        a, b = (measured(model_name, "stream", sites, str(n))[sites][0] for n in PROMPTS)
        peaks.append((a, b))
        return max(b - a, 0.0)

    compare(
        benchmark,
        f"growth of memory, {few} to {many} prompts into Moments at {sites}",
        growth,
        [limit(100, "MB")],
        rounds,
        unit="MB",
        note="Moments hold rows or half a matrix in float64 per site, whichever is smaller",
    )
    above = ", ".join(f"{a:.0f} to {b:.0f}" for a, b in peaks)
    benchmark.extra_info["comparison"]["note"] += f"; peaks above the model: {above} MB"
