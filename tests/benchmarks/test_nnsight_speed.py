"""The same states traced by nnsight, in an environment of its own: `make bench NNSIGHT=path/to/its/python`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens
from tests.benchmarks.compare import Rival, assert_same, compare, seconds
from tests.benchmarks.test_capture_speed import _states

SCRIPT = Path(__file__).with_name("nnsight_rival.py")


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    found = request.config.getoption("--bench-nnsight")
    if not found:
        pytest.skip("no Python with nnsight given (--bench-nnsight, make bench NNSIGHT=...)")
    return str(found)


@pytest.fixture
def tracing(
    python: str, backend: Backend, rows: list[Tokens], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """nnsight's process, waiting for a line, and the file of the states that it traced."""
    batch, states = backend.batch(rows), tmp_path / "states.safetensors"
    save_file({"ids": batch.ids, "mask": batch.mask, "positions": batch.positions}, tmp_path / "batch.safetensors")
    command = [python, str(SCRIPT), str(backend.checkpoint.folder), str(tmp_path / "batch.safetensors"), str(states)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process, states
        process.stdin.close()


def test_short_chat_prompts(
    benchmark: Any, tracing: tuple[subprocess.Popen[str], Path], backend: Backend, rows: list[Tokens], rounds: int
) -> None:
    process, states = tracing
    assert process.stdin is not None and process.stdout is not None
    assert_same(_states(backend, rows), load_file(states)["states"])

    def traced() -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    compare(
        benchmark,
        "states of all layers, 64 chat prompts, beside nnsight",
        seconds(lambda: _states(backend, rows)),
        [Rival("nnsight trace", traced, None, "plain")],
        rounds,
        note="nnsight traces one padded batch, logits of the last token only, no gradients, in a process of its own",
    )
