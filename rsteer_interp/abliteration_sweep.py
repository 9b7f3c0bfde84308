"""Directions read at different depths, and what taking each out of the stream does: the sweep behind `abliteration`.

Granular study (arXiv 2510.02768): r = mean difference at hidden_states[int(L * fraction)]; its default fraction, 1, is the state
AFTER the final norm, which no weight but the unembedding reads. Choice and filters are Arditi et al.'s (arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.backends.hooks import find_blocks
from rsteer_interp.batch import Tokens
from rsteer_interp.directions import Evidence, MeanDifference, fit_directions
from rsteer_interp.equal_norm import turned_edits
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, log_odds, log_odds_of_each
from rsteer_interp.judges.base import Judge
from rsteer_interp.prompts import Prompt
from rsteer_interp.refusal_scores import Reply, replies_of_each
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.weight_edit import writer_ablation

DEEPEST = 0.8  # a direction read at or below this share of the depth is not chosen


@dataclass(frozen=True, eq=False)
class Candidate:
    """A direction r, and where it was read: layer, and whether after the final norm; layer None for one that a file gave."""

    name: str
    vector: Float[Tensor, " d"]
    layer: int
    fraction: float | None = None
    final_norm: bool = False


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one split by set, as rows with the unedited model's refusal log-odds, and benign conversations with their subjects."""

    asked: Mapping[str, list[Prompt]]
    rows: Mapping[str, list[Tokens]]
    base: Mapping[str, Float[Tensor, " prompt"]]
    benign: list[Tokens]
    token_ids: tuple[int, ...]
    benign_subjects: list[str]

    def subjects(self, name: str) -> list[str]:
        return [prompt.subject for prompt in self.asked[name]]

    def above_zero(self, odds: Mapping[str, Float[Tensor, " prompt"]]) -> dict[str, Rate]:
        """Share of each set's prompts with log-odds above 0."""
        return {name: Rate.of((of > 0).numpy(), clusters=self.subjects(name)) for name, of in odds.items()}

    def changes(self, odds: Mapping[str, Float[Tensor, " prompt"]], seed: int) -> dict[str, Estimate]:
        """Mean change of each set's log-odds from the unedited model's, nats."""
        return {
            name: Estimate.of((of - self.base[name]).numpy(), clusters=self.subjects(name), seed=seed)
            for name, of in odds.items()
        }


@dataclass(frozen=True)
class Effects:
    """What an edit does: change of the log-odds (nats) by set, share of prompts with log-odds above 0 after it (no rate of refusal:
    nothing is judged in a sweep), KL (nats per token of benign answers)."""

    change: dict[str, Estimate]
    above_zero: dict[str, Rate]
    kl: Estimate


def fit_candidates(
    backend: Backend,
    rows: Sequence[Tokens],
    confidence: Float[Tensor, " prompt"],
    fractions: Sequence[float],
    *,
    final_norm: bool | None = None,
) -> list[Candidate]:
    """Mean differences of last-token states entering block int(L * fraction), one per different layer.

    At the end, fraction 1, states are those that enter the final norm, or with `final_norm` what it makes of them (what
    hidden_states[-1] holds in most families); None: both.
    """
    bad = [f for f in fractions if not 0 < f <= 1]
    if bad or not fractions:
        raise UserError(f"fraction {bad[0] if bad else 'missing'}; give fractions of the depth above 0, up to 1")
    n, layers = backend.n_layers, {int(backend.n_layers * f): f for f in sorted(fractions)}
    states = last_states(backend, rows, [Site(layer) for layer in layers])
    out = []
    at_the_end = {None: (False, True), False: (False,), True: (True,)}[final_norm]
    for layer, fraction in layers.items():
        for normed in at_the_end if layer == n else (False,):
            h = after_final_norm(backend.model, states[Site(layer)]) if normed else states[Site(layer)]
            seen = {Site(layer): Evidence(h, confidence, site=Site(layer))}
            vector = fit_directions(MeanDifference(), seen)[Site(layer)].vector
            name = f"{fraction:g} final norm" if normed else f"{fraction:g}"
            out.append(Candidate(name, vector, layer, fraction, normed))
    return out


@torch.no_grad()
def after_final_norm(model: Any, states: Float[Tensor, "prompt d"]) -> Float[Tensor, "prompt d"]:
    """What the decoder's final norm makes of states: its first sub-module that runs after the last block."""
    config = model.config.get_text_config()
    decoder, last = model.get_decoder(), find_blocks(model, int(config.num_hidden_layers))[-1]
    order: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda module, *_: order.append(module)) for m in [last, *decoder.children()]]
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    after = order[order.index(last) + 1 :]
    if not after:
        raise UserError(f"{type(model).__name__} has no norm after its last block; leave out --final-norm")
    weight = next(iter(after[0].parameters()), states)
    normed: Tensor = after[0](states.to(weight.device, weight.dtype))
    return normed.float().cpu()


def effects(backend: Backend, edit: Edit, prompts: Prompts, seed: int = 0) -> Effects:
    """An edit's effects on the prompts, beside the unedited model."""
    after = {name: log_odds(backend, rows, prompts.token_ids, edit) for name, rows in prompts.rows.items()}
    return Effects(
        prompts.changes(after, seed),
        prompts.above_zero(after),
        Estimate.of(
            answer_effects(backend, prompts.benign, edit).kl.numpy(), clusters=prompts.benign_subjects, seed=seed
        ),
    )


def judged_replies(backend: Backend, prompts: Prompts, judge: Judge, tokens: int) -> dict[str, list[Reply]]:
    """A judged greedy reply to every prompt, by set, with its log-odds."""
    out = {}
    for name, asked in prompts.asked.items():
        texts, rows = [prompt.prompt for prompt in asked], prompts.rows[name]
        (out[name],) = replies_of_each(
            backend, rows, texts, judge, [None], max_new_tokens=tokens, refusal_tokens=prompts.token_ids
        )
    return out


def equal_dose_null(
    backend: Backend,
    direction: Float[Tensor, " d"],
    sites: Sequence[Site],
    scale: float,
    randoms: Float[Tensor, "n d"],
    prompts: Prompts,
    name: str,
) -> list[float]:
    """Mean changes where every state is moved as far as the ablation of r moves it, but along random unit vectors."""
    ablation = writer_ablation(direction, sites, scale)
    nulls = turned_edits(ablation, backend.run, direction[None], list(randoms[:, None]))
    after = log_odds_of_each(backend, prompts.rows[name], prompts.token_ids, nulls)
    return [float(change) for change in (after - prompts.base[name]).mean(1)]


def mean_change(backend: Backend, edit: Edit, prompts: Prompts, name: str) -> float:
    """Mean change of the refusal log-odds of one set, in nats."""
    after = log_odds(backend, prompts.rows[name], prompts.token_ids, edit)
    return float((after - prompts.base[name]).mean())


def choose(
    candidates: Sequence[Candidate], found: Mapping[str, Effects], name: str, kl_limit: float, n_layers: int
) -> Candidate | None:
    """The candidate that leaves the lowest log-odds of the set; of several, those read early enough and with KL within the
    limit are eligible (Arditi et al.'s filters). None: none is. A single candidate is what the user named."""
    if len(candidates) == 1:
        return candidates[0]
    eligible = [c for c in candidates if c.layer < DEEPEST * n_layers and found[c.name].kl.value <= kl_limit]
    return min(eligible, key=lambda c: found[c.name].change[name].value, default=None)


def at_edge(best: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Whether the chosen depth is the shallowest or the deepest of several that were read: the best may lie beyond it."""
    layers = sorted({c.layer for c in candidates})
    return len(layers) > 1 and best.layer in (layers[0], layers[-1])
