"""Seconds of a capture by the processes of a torchrun: `torchrun -m tests.benchmarks.shared_out MODEL ROUNDS`, as JSON."""

from __future__ import annotations

import json
import sys

from rsteer_interp import processes
from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.prompts import load_prompts
from tests.benchmarks.compare import seconds

N = 96


def measure(model: str, rounds: int) -> list[float]:
    backend = load_backend(model, "hooks", dtype="fp32", device="cpu")
    texts = load_prompts("political_sensitive").sample(N, 0).texts
    rows, sites = backend.template().encode_all(texts), [Site(layer) for layer in range(1, backend.n_layers + 1)]
    cost = seconds(lambda: last_states(backend, rows, sites))
    cost()  # first touch of weights and libraries is no part of the work
    return [cost() for _ in range(rounds)]


if __name__ == "__main__":
    with processes.together():
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    processes.leave(0)
