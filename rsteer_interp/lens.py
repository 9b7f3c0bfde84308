"""Logit lens of directions: which tokens a vector of the residual stream writes, and whether they are refusal's openers.

The vector takes the place of the state that the final norm reads, and the model's own norm and unembedding do the rest, so
the lens needs to know neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.statistics.draws import p_value, upper

ROWS = 64  # vectors at once: rows x vocabulary x 4 bytes


@dataclass(frozen=True, eq=False)
class _SetState:
    """Puts a state of its own in the place of each row's, at every position."""

    site: Site
    states: Float[Tensor, "row d"]

    pointwise = False  # the new state is the row's

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return self.states.to(x.device, x.dtype)[at.rows][:, None].expand_as(x).clone()


def lens_logits(backend: Backend, vectors: Float[Tensor, "vector d"]) -> Float[Tensor, "vector vocab"]:
    """Logits of every vector behind the final norm, float32 on CPU. Only where a vector points matters, and its sign.

    Vectors are scaled to a root mean square of 1, so that the norm's epsilon does not count. UserError for one without length.
    """
    wide = vectors.double().cpu()
    lengths = wide.norm(dim=-1, keepdim=True)
    if not bool(((lengths > 0) & torch.isfinite(lengths)).all()):
        raise UserError("a vector for the logit lens has no finite, nonzero length; leave it out")
    states = (wide / lengths * wide.shape[-1] ** 0.5).float()
    row = Tokens((0,), 0, 0, 1)  # any token: nothing of it is left in the state
    found = []
    for part in states.split(ROWS):
        edit = _SetState(Site(backend.n_layers), part)
        found.append(backend.logits(backend.batch([row] * len(part)), edit)[:, -1].float().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Anchor:
    """How much a site's direction writes the openers of refusals: their log-odds in its lens (nats), beside random vectors.

    `null_high` is the 95 % quantile of random directions, `p` the share of them that write as much or more. `openers` are the
    refusal tokens among the `top` ones.
    """

    site: Site
    score: float
    null_high: float
    p: float
    top: tuple[str, ...]
    openers: tuple[str, ...]

    @property
    def anchored(self) -> bool:
        """Whether refusal tokens stand among the top tokens and above what random directions give."""
        return bool(self.openers) and self.score > self.null_high


def anchors(
    backend: Backend,
    directions: Mapping[Site, Float[Tensor, " d"]],
    refusal_tokens: Sequence[int],
    *,
    k: int = 20,
    n_null: int = 199,
    seed: int = 0,
) -> dict[Site, Anchor]:
    """SCANS's look at the layers (arXiv 2408.11491): project each layer's direction to the vocabulary, and see whether it
    says refusal. That a layer counts when an opener is among the top k and beats random directions is our reading."""
    sites = sorted(directions)
    logits = lens_logits(backend, torch.stack([directions[site].float() for site in sites]))
    scores = refusal_log_odds(logits, refusal_tokens)
    random = random_unit_vectors(n_null, backend.d_model, seed)
    parts = [random[start : start + ROWS] for start in range(0, n_null, ROWS)]
    null = torch.cat([refusal_log_odds(lens_logits(backend, part), refusal_tokens) for part in parts])
    high, p = float(upper(null)), p_value(scores, null[:, None].expand(-1, len(scores)), "greater").tolist()
    found = {}
    for site, row, score, own_p in zip(sites, logits, scores.tolist(), p, strict=True):
        ids = row.topk(k).indices.tolist()
        found[site] = Anchor(
            site,
            score,
            high,
            own_p,
            tuple(backend.tokenizer.decode([i]) for i in ids),
            tuple(backend.tokenizer.decode([i]) for i in ids if i in refusal_tokens),
        )
    return found
