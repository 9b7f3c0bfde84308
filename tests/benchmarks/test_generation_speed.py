"""Steered greedy generation against unsteered generation elsewhere: steering must cost next to nothing."""

from __future__ import annotations

from typing import Any

import torch

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Batch
from rsteer_interp.interventions import add
from rsteer_interp.prompts import load_prompts
from tests.benchmarks.compare import Rival, compare, seconds
from tests.benchmarks.fitted import Fitted
from tests.benchmarks.rivals import changed_inputs, generate, generate_by_bridge, on_both_kernels

NEW_TOKENS, ROWS, AMOUNT = 32, 16, -1.0
CHECKED = 12  # tokens that must be the same


def _running_on(backend: Backend, edit: Any) -> Batch:
    """Prompts whose replies, steered or not, are longer than what is measured, so that all ways make as many tokens."""
    texts = load_prompts("general").sample(ROWS + 8, 0).texts
    rows = backend.template().encode_all(texts)
    batch = backend.batch(rows)
    lengths = torch.stack([backend.generate(batch, NEW_TOKENS, e).lengths for e in (None, edit)]).amin(0)
    longest = lengths.argsort(descending=True, stable=True)[:ROWS].tolist()
    assert int(lengths[longest].min()) == NEW_TOKENS, "too few prompts with long replies"
    return backend.batch([rows[i] for i in longest])


def test_steered_generation(benchmark: Any, backend: Backend, lens: Any, fitted: Fitted, rounds: int) -> None:
    sites = sorted(fitted.vectors)
    vectors = {site: fitted.vectors[site] for site in sites[len(sites) // 2 :][:5]}
    edit, model = add(vectors, dict.fromkeys(vectors, AMOUNT)), backend.model
    batch = _running_on(backend, edit)
    stop, pad = sorted(backend.stop_ids), backend.template().pad_id

    def plain(new_tokens: int = NEW_TOKENS) -> torch.Tensor:
        return generate(model, batch, new_tokens, pad, stop)

    assert torch.equal(generate_by_bridge(lens.bridge, batch, CHECKED), plain(CHECKED))
    with changed_inputs(model, {s.layer: lambda x, v=v: x + AMOUNT * v / v.norm() for s, v in vectors.items()}):
        steered = plain(CHECKED)
    assert torch.equal(backend.generate(batch, CHECKED, edit).ids, steered)
    compare(
        benchmark,
        f"steered generation, {NEW_TOKENS} tokens x {ROWS} rows",
        seconds(lambda: backend.generate(batch, NEW_TOKENS, edit)),
        [
            Rival("our own generate, unsteered", seconds(lambda: backend.generate(batch, NEW_TOKENS)), None, "same"),
            *on_both_kernels("transformers generate, unsteered", model, plain, 1.03),
            *on_both_kernels(
                "TransformerLens generate, unsteered",
                lens.model,
                lambda: generate_by_bridge(lens.bridge, batch, NEW_TOKENS),
                0.7,
            ),
        ],
        rounds,
        note=f"steered at {len(vectors)} layers; greedy tokens of all ways are equal (the first {CHECKED})",
    )
