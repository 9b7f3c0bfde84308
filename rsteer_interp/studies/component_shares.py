"""What components write along a direction, and what ablating some of them does, from numbers alone."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.draws import Beside, next_draw, next_draw_p, p_value, percentiles, upper
from rsteer_interp.statistics.intervals import Clusters, Estimate, membership
from rsteer_interp.statistics.resampling import movable, permutations


@dataclass(frozen=True)
class Component:
    """A part of what stands in the stream: a head or MLP of a block, or an embedding or bias (layer None)."""

    kind: str
    layer: int | None = None
    head: int | None = None

    @classmethod
    def parse(cls, name: str) -> Component:
        """From TransformerLens's label: L3H1, 3_mlp_out, embed, pos_embed, bias."""
        if found := re.fullmatch(r"L(\d+)H(\d+)", name):
            return cls("head", int(found[1]), int(found[2]))
        if found := re.fullmatch(r"(\d+)_mlp_out", name):
            return cls("mlp", int(found[1]))
        return cls(name)


def differences(
    parts: Float[Tensor, "prompt component"],
    refused: Bool[Tensor, " prompt"],
    subjects: Sequence[Hashable],
    seed: int,
    n: int = 2000,
) -> dict[str, Any]:
    """Mean of refused minus mean of answered prompts, per component, with Welch's interval over subjects and permuted labels as null.

    `null_low`, `null_high`: 95 % of label permutations; `null_max`: 95 % quantile of their largest |difference| over components.
    q: two-sided permutation p after false-discovery control. `within_subject_q`: the same where labels move only inside their
    subject and each subject is centred, so that topic counts for nothing.
    """
    x = parts.double()
    # Embeddings and biases: the last token is the same in all prompts.
    constant = x.std(0) < 1e-9 * x.abs().amax().clamp(min=1e-300)
    x = torch.where(constant, 0.0, x)
    value, null = _permuted(x, refused, ["any"] * len(x), seed, n)
    inside, inside_null = _permuted(x, refused, subjects, seed, n)
    sides = [[s for s, r in zip(subjects, refused.tolist(), strict=True) if r == side] for side in (True, False)]
    ends = [Estimate.difference(c[refused], c[~refused], clusters=(sides[0], sides[1])) for c in x.T]
    low, high = percentiles(null)
    p = p_value(value, null).tolist()
    return {
        "value": value.tolist(),
        "low": [e.low for e in ends],
        "high": [e.high for e in ends],
        "null_low": low.tolist(),
        "null_high": high.tolist(),
        "null_max": float(upper(null.abs().amax(1))),
        "p": p,
        "q": list(false_discovery(p)),
        "within_subject": inside.tolist(),
        "within_subject_q": list(false_discovery(p_value(inside, inside_null).tolist())),
        "n_within": int(movable(refused.tolist(), subjects).sum()),
        "n_refused": int(refused.sum()),
        "n_answered": int((~refused).sum()),
        "n": len(refused),
    }


def _permuted(
    x: Float[Tensor, "prompt component"],
    refused: Bool[Tensor, " prompt"],
    groups: Sequence[Hashable],
    seed: int,
    n: int,
) -> tuple[Float[Tensor, " component"], Float[Tensor, "draw component"]]:
    """The difference of means per component, groups centred, and the same under labels permuted inside groups."""
    member = torch.from_numpy(membership(groups))
    sizes = member.bincount().double()[:, None]
    x = x - (torch.zeros(len(sizes), x.shape[1]).double().index_add(0, member, x) / sizes)[member]
    labels = refused[torch.from_numpy(permutations(len(x), n, seed, within=groups))]

    def difference(y: Tensor) -> Tensor:
        y = y.double()
        return (y / y.sum(-1, keepdim=True) - (1 - y) / (1 - y).sum(-1, keepdim=True)) @ x

    return difference(refused), difference(labels)


def top_heads(value: Sequence[float], components: Sequence[Component], k: int) -> list[tuple[int, int]]:
    """The k heads that write most towards refusing, most first."""
    heads = [(v, c.layer, c.head) for v, c in zip(value, components, strict=True) if c.kind == "head"]
    return [(int(layer or 0), int(head or 0)) for _, layer, head in sorted(heads, reverse=True, key=lambda h: h[0])[:k]]


def random_heads(
    chosen: Sequence[tuple[int, int]], n_heads: Mapping[int, int], n_draws: int, seed: int
) -> list[list[tuple[int, int]]]:
    """Sets of as many heads from each layer as the chosen ones, drawn from the layer's other heads (all, if too few are left)."""
    rng = np.random.default_rng(seed)
    layers = sorted({layer for layer, _ in chosen})
    out = []
    for _ in range(n_draws):
        heads: list[tuple[int, int]] = []
        for layer in layers:
            mine = [h for i, h in chosen if i == layer]
            rest = [h for h in range(n_heads[layer]) if h not in mine]
            pool = rest if len(rest) >= len(mine) else list(range(n_heads[layer]))
            heads += [(layer, int(h)) for h in rng.choice(pool, len(mine), replace=False)]
        out.append(heads)
    return out


def against_random(
    chosen: Float[Tensor, " prompt"], random: Float[Tensor, "prompt draw"], subjects: Clusters = None
) -> dict[str, Any]:
    """Mean effect of the chosen heads with its interval over subjects; where one more random set would lie (95 %), rank and p."""
    means = random.mean(0)
    effect = Estimate.of(chosen.tolist(), clusters=subjects)
    low, high = next_draw(means)
    return {
        "effect": asdict(effect),
        "random": means.tolist(),
        "random_low": float(low),
        "random_high": float(high),
        "rank": Beside.of(effect.value, means.tolist()).rank,
        "n_random": len(means),
        "p": float(next_draw_p(effect.value, means)),
    }


SPANS = ("first token", "template before", "instruction", "template after")


def mass_by_span(attention: Float[Tensor, "head pos"], ends: tuple[int, int]) -> Float[Tensor, "head span"]:
    """Attention from the last token, summed over SPANS; `ends`: where the template before and the instruction end.

    The first token stands alone: most heads rest there when they do nothing (attention sink, Xiao et al. 2023).
    """
    edges = (0, 1, max(1, ends[0]), ends[1], attention.shape[1])
    return torch.stack([attention[:, a:b].sum(1) for a, b in pairwise(edges)], 1)
