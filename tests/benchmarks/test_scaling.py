"""Seconds of a capture against prompts, tokens, layers and model size; the exponents are fitted in the report."""

from __future__ import annotations

from typing import Any

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import Tokens
from tests.benchmarks.compare import Cost, seconds
from tests.benchmarks.unshared import unshared

TOKENS = (64, 128, 256, 512)
PROMPTS = (8, 16, 32, 64)


def _millions(backend: Backend) -> int:
    """Parameters that a token is multiplied with: all but the embedding and the output head, which is not run."""
    ends = {backend.model.get_input_embeddings().weight, backend.model.get_output_embeddings().weight}
    return round((sum(p.numel() for p in backend.model.parameters()) - sum(w.numel() for w in ends)) / 1e6)


def test_scaling(benchmark: Any, backend: Backend, small: Backend | None, rows: list[Tokens], rounds: int) -> None:
    def read(chosen: list[Tokens], layer: int, of: Backend = backend) -> Cost:
        return seconds(lambda: last_states(of, chosen, [Site(layer)]))

    depth = backend.n_layers
    quarters = [depth * k // 4 for k in (1, 2, 3, 4)]
    work = {
        "prompts": {n: read(rows[:: len(rows) // n], depth) for n in PROMPTS},
        "tokens per prompt": {n: read(unshared(4, n, 190), depth) for n in TOKENS},
        "layers": {n: read(rows[::4], n) for n in quarters},
    }
    if small is not None:
        same = unshared(4, TOKENS[1], 190)
        work["million parameters"] = {_millions(b): read(same, b.n_layers, b) for b in (small, backend)}
        work["million parameters"][_millions(small)]()  # first touch
    spent: dict[str, dict[int, list[float]]] = {axis: {n: [] for n in costs} for axis, costs in work.items()}

    def one_round() -> None:
        for axis, costs in work.items():
            for n, cost in costs.items():
                spent[axis][n].append(cost())

    read(rows[::8], depth)()
    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    benchmark.extra_info["scaling"] = [
        {"axis": axis, "sizes": list(costs), "seconds": list(costs.values())} for axis, costs in spent.items()
    ]
    benchmark.extra_info["scaled_work"] = {
        "prompts": "chat prompts of the built-in sets, a shared template prefix",
        "tokens per prompt": "4 prompts, no shared prefix",
        "million parameters": "of the blocks; 4 prompts of 128 tokens, no shared prefix",
        "layers": f"{len(rows[::4])} chat prompts, read at one depth, where the pass stops",
    }
