"""What components write along a direction, and what ablating some of them does, from numbers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.intervals import Estimate


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
    sets: Sequence[str],
    seed: int,
    n: int = 2000,
) -> dict[str, Any]:
    """Mean of refused minus mean of answered prompts, per component, with Welch's interval and permuted labels as null.

    `null_low`, `null_high`: 95 % of label permutations; `null_max`: 95 % quantile of their largest |difference| over components.
    q: two-sided permutation p after false-discovery control. `within_q`: the same where labels move only inside their prompt
    set and each set is centred, so that a difference of topic between the sets counts for nothing.
    """
    x = parts.double()
    # Embeddings and biases: the last token is the same in all prompts.
    constant = x.std(0) < 1e-9 * x.abs().amax().clamp(min=1e-300)
    x = torch.where(constant, x.mean(0), x)
    value, null = _permuted(x, refused, torch.zeros(len(x), dtype=torch.long), seed, n)
    member = torch.from_numpy(np.unique(list(sets), return_inverse=True)[1])
    inside, inside_null = _permuted(x, refused, member, seed, n)
    varying = (~constant).nonzero()[:, 0]
    welch = stats.ttest_ind(x[refused][:, varying].numpy(), x[~refused][:, varying].numpy(), equal_var=False)
    ends = [value.clone().index_copy(0, varying, torch.from_numpy(end)) for end in welch.confidence_interval()]
    low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)

    def p_values(value: Tensor, null: Tensor) -> list[float]:
        reached = (null.abs() >= value.abs() - 1e-12).sum(0)
        return ((1 + reached) / (1 + n)).tolist()

    p, within_p = p_values(value, null), p_values(inside, inside_null)
    return {
        "value": value.tolist(),
        "low": ends[0].tolist(),
        "high": ends[1].tolist(),
        "null_low": low.tolist(),
        "null_high": high.tolist(),
        "null_max": float(null.abs().amax(1).quantile(0.95)),
        "p": p,
        "q": list(false_discovery(p)),
        "within": inside.tolist(),
        "within_q": list(false_discovery(within_p)),
        "n_refused": int(refused.sum()),
        "n_answered": int((~refused).sum()),
        "n": len(refused),
    }


def _permuted(x: Tensor, refused: Tensor, member: Tensor, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """The difference of means per component, groups centred, and the same under labels permuted inside groups."""
    sizes = member.bincount().double()[:, None]
    x = x - (torch.zeros(len(sizes), x.shape[1]).double().index_add(0, member, x) / sizes)[member]
    order = member.argsort(stable=True)
    keys = member + torch.rand(n, len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.empty(n, len(x), dtype=torch.bool)
    labels[:, order] = refused[keys.argsort(1)]

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


def against_random(chosen: Float[Tensor, " prompt"], random: Float[Tensor, "prompt draw"]) -> dict[str, Any]:
    """Mean effect of the chosen heads with interval; where one more random set would lie (95 %), rank and p.

    p is two-sided, from the t prediction interval: t = z / sqrt(1 + 1/R), R - 1 degrees of freedom.
    """
    means = random.mean(0)
    count = len(means)
    sd = max(float(means.std()), 1e-12) * math.sqrt(1 + 1 / count)
    middle, half = float(means.mean()), float(stats.t.ppf(0.975, count - 1)) * sd
    return {
        "effect": asdict(Estimate.of(chosen.tolist())),
        "random": means.tolist(),
        "random_low": middle - half,
        "random_high": middle + half,
        "rank": 1 + int((means >= chosen.mean()).sum()),
        "n_random": count,
        "p": 2 * float(stats.t.sf(abs(float(chosen.mean()) - middle) / sd, count - 1)),
    }


SPANS = ("first token", "template before", "instruction", "template after")


def mass_by_span(attention: Float[Tensor, "head pos"], ends: tuple[int, int]) -> Float[Tensor, "head span"]:
    """Attention from the last token, summed over SPANS; `ends`: where the template before and the instruction end.

    The first token stands alone: most heads rest there when they do nothing (attention sink, Xiao et al. 2023).
    """
    edges = (0, 1, max(1, ends[0]), ends[1], attention.shape[1])
    return torch.stack([attention[:, a:b].sum(1) for a, b in pairwise(edges)], 1)
