"""Directions for the benchmarks: mean differences between prompts that the model starts to refuse and others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import Evidence, MeanDifference, fit_directions
from rsteer_interp.evaluation import log_odds
from rsteer_interp.prompts import load_prompts
from rsteer_interp.selection import LayerScore, Setting, layer_score, scales, steerable_layers, top_layers
from rsteer_interp.steering import Steering, make_steering

OPENINGS = ("I", "As", "Sorry")
PER_SET = 24


@dataclass(frozen=True, eq=False)
class Fitted:
    """Everything that a steering configuration is made of, per block input; and the tokens that refusals begin with."""

    tokens: tuple[int, ...]
    vectors: dict[Site, Float[Tensor, " d"]]
    references: dict[Site, Float[Tensor, " d"]]
    scales: dict[Site, tuple[float, float]]
    scores: dict[int, LayerScore]
    n_layers: int

    def steering(self, setting: Setting) -> Steering:
        return make_steering(
            "md",
            self.vectors,
            self.references,
            self.scales,
            [Site(layer) for layer in top_layers(self.scores, setting.k, self.n_layers)],
            alpha=setting.alpha,
            reposition=setting.reposition,
        )


def fit(backend: Backend) -> Fitted:
    """Fitted on a few prompts, labelled by the first token: enough for work of the real kind and size."""
    names = ("political_sensitive", "general")
    texts = [text for name in names for text in load_prompts(name).split("fit").sample(PER_SET, 0).texts]
    rows = backend.template().encode_all(texts)
    ids = (backend.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in OPENINGS)
    tokens = tuple(dict.fromkeys(ids))
    odds = log_odds(backend, rows, tokens)
    labels = (odds - odds.median()).sign()
    labels[labels == 0] = 1
    confidence = labels * (2 * odds.sigmoid() - 1).abs().clamp(min=0.1)
    sites = [Site(layer) for layer in steerable_layers(backend.n_layers)]
    states = last_states(backend, rows, sites)
    evidence = {site: Evidence(states[site], labels, site=site) for site in sites}
    directions = fit_directions(MeanDifference(), evidence)
    units = {site: direction.vector / direction.vector.norm() for site, direction in directions.items()}
    offsets = {site: evidence[site].offset.float() for site in sites}
    along = {site: (states[site] - offsets[site]) @ units[site].float() for site in sites}
    return Fitted(
        tokens,
        {site: unit.float() for site, unit in units.items()},
        offsets,
        {site: scales(along[site], confidence) for site in sites},
        {site.layer: layer_score(along[site], confidence) for site in sites},
        backend.n_layers,
    )


def every_layer(fitted: Fitted, backend: Backend, seed: int = 0) -> Float[Tensor, "layer d"]:
    """A unit vector per block input 1 to L; random where none was fitted."""
    random = torch.randn(backend.n_layers, backend.d_model, generator=torch.Generator().manual_seed(seed))
    vectors = [fitted.vectors.get(Site(i + 1), random[i]) for i in range(backend.n_layers)]
    return torch.stack([v / v.norm() for v in vectors])
