"""Peak memory above the loaded model, measured in a process of its own: `python -m tests.benchmarks.memory MODEL WORK ...`.

capture: B8 x T512, ours against plain hooks. stream SITES PROMPTS: prompts of 2 own tokens whose states go into Moments and
are dropped. Prints extra megabytes per way as JSON.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rsteer_interp.activations import last_moments, last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import Tokens
from tests.benchmarks.rivals import KERNELS, kernel, sliced_by_hooks
from tests.benchmarks.unshared import unshared

PROMPTS = (100, 3000)


def measured(model: str, *work: str) -> dict[str, list[float]]:
    """What this module prints, from a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", model, *work]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(out.stdout.splitlines()[-1]))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _resident() -> float:
    """Megabytes in use now; what the allocator merely keeps is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _peak(run: Callable[[], Any], base: float) -> float:
    """Highest resident memory while `run` runs, above `base`, in MB."""
    _resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    run()
    return _status("VmHWM") - base


def capture(backend: Backend) -> dict[str, list[float]]:
    rows = unshared(8, 512, 190)
    batch, sites = backend.batch(rows), [Site(layer) for layer in range(backend.n_layers + 1)]
    small = rows[:1]
    last_states(backend, small, sites)  # first touch of weights and libraries is no part of the work
    sliced_by_hooks(backend.model, backend.batch(small))
    base, out = _resident(), dict[str, list[float]]()
    for _ in range(2):
        out.setdefault("ours", []).append(_peak(lambda: last_states(backend, rows, sites), base))
        for name in KERNELS:
            with kernel(backend.model, name):
                out.setdefault(name, []).append(_peak(lambda: sliced_by_hooks(backend.model, batch), base))
    return out


def stream(backend: Backend, wanted: str, n: str) -> dict[str, list[float]]:
    sites = [Site(layer) for layer in range(backend.n_layers + 1)]
    chosen = {"4 sites": sites[:: max(1, len(sites) // 4)][:4], "all sites": sites}[wanted]

    def into_moments(n: int, kept: list[Site]) -> None:
        ids = torch.randint(10, 190, (n, 2), generator=torch.Generator().manual_seed(n)).tolist()
        last_moments(backend, [Tokens((*range(10, 22), *row), 12, 13, 14) for row in ids], kept)

    into_moments(PROMPTS[0], chosen[:1])  # first touch of weights and libraries is no part of the work
    base = _resident()
    return {wanted: [_peak(lambda: into_moments(int(n), chosen), base)]}


if __name__ == "__main__":
    loaded = load_backend(sys.argv[1], "hooks", dtype="fp32", device="cpu")
    print(json.dumps({"capture": capture, "stream": stream}[sys.argv[2]](loaded, *sys.argv[3:])))
