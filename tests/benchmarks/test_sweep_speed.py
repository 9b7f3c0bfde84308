"""Sweeps of single-layer edits: batches made once, each layer's sweep started from the cached state at that layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import Tokens
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.interventions import ablate, add
from rsteer_interp.measures import refusal_log_odds
from tests.benchmarks.compare import assert_same, compare, seconds
from tests.benchmarks.fitted import Fitted, every_layer
from tests.benchmarks.rivals import (
    changed_inputs,
    forward,
    kernel,
    on_both_kernels,
    published_ablation_logits,
    published_addition_logits,
)

COEFFICIENTS = (-4.0, -2.0, -1.0, 1.0, 2.0)
LAYERS_TIMED = 3


def test_every_layer_and_coefficient(
    benchmark: Any, backend: Backend, rows: list[Tokens], fitted: Fitted, rounds: int
) -> None:
    rows = rows[:32]
    batch, vectors, model = backend.batch(rows), every_layer(fitted, backend), backend.model
    # A layer costs less the deeper it lies, in proportion; these lie evenly, and on average where all do.
    step = backend.n_layers // LAYERS_TIMED
    timed = [i * step + max(1, step // 2) for i in range(LAYERS_TIMED)]
    settings = backend.n_layers * len(COEFFICIENTS)

    def sweep(layers: list[int]) -> Tensor:
        out = []
        for layer in layers:
            site = Site(layer)
            edits = [add({site: vectors[layer - 1]}, {site: amount}) for amount in COEFFICIENTS]
            out.append(log_odds_of_each(backend, prepared[layer], fitted.tokens, edits))
        return torch.stack(out)

    def one_forward(layer: int, amount: float) -> Tensor:
        with changed_inputs(model, {layer: lambda x: x + amount * vectors[layer - 1]}):
            return refusal_log_odds(forward(model, batch)[:, -1], fitted.tokens)

    def published() -> None:
        """One pass of either kind: the loop makes two that ablate (a score and a KL) for each that adds."""
        refusal_log_odds(published_ablation_logits(model, batch, vectors[timed[1] - 1]), fitted.tokens)
        refusal_log_odds(published_addition_logits(model, batch, timed[1], vectors[timed[1] - 1]), fitted.tokens)

    prepared = backend.prepare_each(rows, timed)
    preparing = seconds(lambda: backend.prepare_each(rows, range(backend.n_layers)))
    sweeping = seconds(lambda: sweep(timed), backend.n_layers / len(timed))
    swept, middle = sweep(timed[1:2])[0], timed[1]
    unit = vectors[middle - 1]
    with kernel(model, "plain"):
        assert_same(swept[0], one_forward(middle, COEFFICIENTS[0]))
    assert_same(swept[-1], one_forward(middle, COEFFICIENTS[-1]))
    theirs = published_addition_logits(model, batch, middle, COEFFICIENTS[1] * unit)
    assert_same(swept[1], refusal_log_odds(theirs, fitted.tokens))
    points = [Site(layer, point) for layer in range(backend.n_layers) for point in ("resid_pre", "attn_out", "mlp_out")]
    everywhere = log_odds(backend, rows, fitted.tokens, ablate(dict.fromkeys(points, unit)))
    assert_same(everywhere, refusal_log_odds(published_ablation_logits(model, batch, unit), fitted.tokens))
    compare(
        benchmark,
        f"sweep, {backend.n_layers} layers x {len(COEFFICIENTS)} coefficients x 32 prompts",
        lambda: preparing() + sweeping(),
        [
            *on_both_kernels(
                "one forward per setting", model, lambda: one_forward(middle, COEFFICIENTS[0]), 0.3, settings
            ),
            *on_both_kernels("published selection loop", model, published, 0.2, settings / 2),
        ],
        max(2, rounds - 1),  # far from its goals or not at all: precision is not what is wanting
        note=f"ours: one pass for the states entering every block, then timed at layers {', '.join(map(str, timed))} and scaled to {backend.n_layers}; rivals timed on one setting "
        f"(the loop on one pass that ablates and one that adds) and scaled to {settings}",
    )
