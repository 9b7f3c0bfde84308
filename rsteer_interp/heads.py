"""Single attention heads: their mean outputs, and refusal log-odds with chosen heads mean-ablated at the last token.

A head's output is z (site `z`, before W_O); what it writes to the stream is z W_O. Needs a backend with `head_sites`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.activations import RecordLast
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.measures import refusal_log_odds

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True, eq=False)
class SetHeads:
    """z of chosen heads at the last prompt token becomes a given value, by row of the batch; mean ablation with their means."""

    values: Mapping[Site, Float[Tensor, "head d_head"]]
    chosen: Mapping[Site, Bool[Tensor, "row head"]]

    pointwise = False
    leaves_prefix = True  # the last prompt token is never in the template prefix

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.chosen)

    def __call__(self, x: Float[Tensor, "row pos head d_head"], at: At) -> Float[Tensor, "row pos head d_head"]:
        if at.phase != "prompt":
            return x
        chosen = self.chosen[at.site].to(x.device)[at.rows][..., None]
        return torch.cat([x[:, :-1], torch.where(chosen, self.values[at.site].to(x), x[:, -1])[:, None]], 1)


def last_heads(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "prompt head d_head"]]:
    """Every head's z at the last token of every prompt, in the order of the prompts."""
    out: dict[Site, Tensor] = {}

    def run(batch: Batch) -> dict[Site, Tensor]:
        record = RecordLast(frozenset(sites))
        backend.run(batch, record)
        return record.states

    for group, states in backend.batches(rows, run):
        for site, value in states.items():
            out.setdefault(site, torch.empty(len(rows), *value.shape[1:]))[group] = value
    return out


def ablated_log_odds(
    backend: Backend,
    row: Tokens,
    sets: Sequence[Sequence[Head]],
    means: Mapping[Site, Float[Tensor, "head d_head"]],
    token_ids: Sequence[int],
) -> Float[Tensor, " set"]:
    """First-token refusal log-odds of one prompt with each set of heads at its mean, at the last token; () ablates nothing.

    The sets are rows of one batch, and all tokens but the last, which no set touches, are run once for all of them.
    """
    known = replace(row, prefix=row.prompt - 1, instruction=row.prompt - 1)
    out = []
    for begin in range(0, len(sets), backend.batch_size):
        part = sets[begin : begin + backend.batch_size]
        chosen: dict[Site, Tensor] = {}
        for i, heads in enumerate(part):
            for layer, head in heads:
                site = Site(layer, "z")
                chosen.setdefault(site, torch.zeros(len(part), len(means[site]), dtype=torch.bool))[i, head] = True
        logits = backend.logits(backend.batch([known] * len(part)), SetHeads(means, chosen) if chosen else None)
        out.append(refusal_log_odds(logits[:, -1], token_ids).cpu())
    return torch.cat(out)
