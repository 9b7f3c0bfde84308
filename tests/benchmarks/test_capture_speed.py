"""Reading the last token's state at every layer: a shared template prefix, no LM head, slices inside the hooks."""

from __future__ import annotations

from typing import Any

import torch

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import Batch, Tokens
from tests.benchmarks.compare import again, assert_same, compare, seconds
from tests.benchmarks.rivals import cached_by_bridge, forward, kernel, on_both_kernels, sliced_by_hooks


def _states(backend: Backend, rows: list[Tokens]) -> torch.Tensor:
    sites = [Site(layer) for layer in range(backend.n_layers + 1)]
    return torch.stack(list(last_states(backend, rows, sites).values()))


def _same_states(backend: Backend, lens: Any, rows: list[Tokens]) -> None:
    ours, batch = _states(backend, rows), backend.batch(rows)
    assert_same(ours, sliced_by_hooks(backend.model, batch))
    assert_same(ours, cached_by_bridge(lens.bridge, batch, backend.n_layers))
    with kernel(backend.model, "plain"):
        assert_same(ours, sliced_by_hooks(backend.model, batch))


def test_short_chat_prompts(benchmark: Any, backend: Backend, lens: Any, rows: list[Tokens], rounds: int) -> None:
    _same_states(backend, lens, rows[::8])
    batch: Batch = backend.batch(rows)
    ours = seconds(lambda: _states(backend, rows))
    compare(
        benchmark,
        "states of all layers, 64 chat prompts",
        ours,
        [
            again(ours),
            *on_both_kernels("transformers forward", backend.model, lambda: forward(backend.model, batch), 0.55),
            *on_both_kernels(
                "TransformerLens run_with_cache",
                lens.model,
                lambda: cached_by_bridge(lens.bridge, batch, backend.n_layers),
                0.35,
            ),
        ],
        rounds,
        note="rivals: one padded batch, logits of the last token only, no gradients",
    )


def test_long_prompts_without_a_shared_prefix(
    benchmark: Any, backend: Backend, lens: Any, long_batch: Batch, rounds: int
) -> None:
    rows = list(long_batch.rows)
    _same_states(backend, lens, rows[:2])
    ours = seconds(lambda: _states(backend, rows))
    compare(
        benchmark,
        "states of all layers, 8 prompts of 256 tokens, no shared prefix",
        ours,
        [
            again(ours),
            *on_both_kernels("transformers forward", backend.model, lambda: forward(backend.model, long_batch), 1.02),
        ],
        rounds + 1,
        note="nothing can be shared here: ours may cost no more than the bare forward",
    )
