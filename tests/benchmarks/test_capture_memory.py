"""Memory above the loaded model: of a capture, and whether it stays flat while more prompts stream through."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.compare import Rival, compare, limit
from tests.benchmarks.memory import PROMPTS, measured


def test_of_a_capture(benchmark: Any, model_name: str) -> None:
    found = measured("capture", model_name)
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


@pytest.fixture(scope="module")
def streamed(model_name: str) -> dict[str, float]:
    return {name: values[0] for name, values in measured("stream", model_name).items()}


@pytest.mark.parametrize("sites", ["4 sites", "all sites"])
def test_is_flat_in_the_number_of_prompts(benchmark: Any, streamed: dict[str, float], sites: str) -> None:
    few, more, many = (streamed[f"{sites}, {n}"] for n in PROMPTS)
    compare(
        benchmark,
        f"growth of memory, {PROMPTS[0]} to {PROMPTS[-1]} prompts into Moments at {sites}",
        lambda: max(many - few, 0.0),
        [limit(100, "MB")],
        1,
        unit="MB",
        note=f"{few:.0f}, {more:.0f}, {many:.0f} MB above the model for {', '.join(map(str, PROMPTS))} prompts; Moments hold "
        "rows until n > d, then a d x d matrix of float64 per site",
    )
