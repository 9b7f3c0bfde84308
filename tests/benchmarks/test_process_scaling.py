"""The same capture by one process and by two, a thread each: sharing prompts out must halve the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.compare import Rival, compare
from tests.benchmarks.shared_out import N
from tests.benchmarks.test_start_speed import ROOT

ROUNDS = 2  # timed inside one start of the processes


def _seconds(processes: int, model: str) -> float:
    """Median over the rounds of one start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    out = subprocess.run(
        [*command, "-m", "tests.benchmarks.shared_out", model, str(ROUNDS)],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    return float(sorted(json.loads(out.splitlines()[-1]))[ROUNDS // 2])


def test_two_processes(benchmark: Any, model_name: str, rounds: int) -> None:
    compare(
        benchmark,
        f"states of all layers, {N} prompts, two processes",
        lambda: _seconds(2, model_name),
        [Rival("one process", lambda: _seconds(1, model_name), 0.6, "same")],
        rounds,
        note="torchrun, gloo, one thread per process; start and loading left out, gathering included",
    )
