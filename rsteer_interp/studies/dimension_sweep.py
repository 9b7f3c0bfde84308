"""The answer of a K-sweep, from numbers alone: what each K removes beyond random subspaces, and the smallest K that is enough.

    net(K)    = removed(K) - mean over random subspaces of the same K and dose
    removable = min(max over K of net(K), gap),  gap = log-odds of refused minus of answered prompts, both without an edit
    K90       = smallest K of the sweep with net(K) >= 0.9 removable

The gap bounds what can be called refusal: a model that an edit has destroyed opens no refusals either, at log-odds far below
those of prompts that it answers. Where the gap is not positive (log-odds do not tell the prompts apart) it bounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.intervals import Estimate


def sweep_curve(
    removed: Float[Tensor, "prompt k"],
    nulls: Sequence[Float[Tensor, "draw prompt"]],
    base: tuple[Float[Tensor, " prompt"], Float[Tensor, " answered"]],
    ks: Sequence[int],
    share: float = 0.9,
    seed: int = 0,
    n_draws: int = 2000,
) -> dict[str, Any]:
    """Removed, null and net per K (nats), each with interval; p and q against one more random draw; K90 with its bootstrap band.

    `nulls` are the random subspaces' removals per K, `base` the log-odds of refused and of answered prompts. p is two-sided from the
    t prediction interval of the R draws' means (R - 1 degrees of freedom), q after false-discovery control over K. The band
    is the central 95 % of K90 over resampled prompts: values of the sweep, so it is as fine as the grid.
    """
    net = removed - torch.stack([draws.mean(0) for draws in nulls], 1)
    p, low, high = [], [], []
    for value, draws in zip(removed.mean(0).tolist(), nulls, strict=True):
        means, t = draws.mean(1), stats.t(len(draws) - 1)
        spread = math.sqrt(1 + 1 / len(draws)) * max(float(means.std()), 1e-12)
        middle = float(means.mean())
        p.append(2 * float(t.sf(abs(value - middle) / spread)))
        low.append(middle - float(t.ppf(0.975)) * spread)
        high.append(middle + float(t.ppf(0.975)) * spread)
    return {
        "ks": list(ks),
        "n": len(removed),
        "n_null": [len(draws) for draws in nulls],
        "removed": [asdict(Estimate.of(column.tolist(), seed=seed)) for column in removed.T],
        "net": [asdict(Estimate.of(column.tolist(), seed=seed)) for column in net.T],
        "null_mean": [float(draws.mean()) for draws in nulls],
        "null_low": low,
        "null_high": high,
        "p": p,
        "q": list(false_discovery(p)),
        "enough": _enough(net, base, ks, share, seed, n_draws),
        "enough_without_null": _enough(removed, base, ks, share, seed, n_draws),
    }


def _enough(
    effect: Float[Tensor, "prompt k"],
    base: tuple[Float[Tensor, " prompt"], Float[Tensor, " answered"]],
    ks: Sequence[int],
    share: float,
    seed: int,
    n_draws: int,
) -> dict[str, Any] | None:
    """K90 with its band, how often each K was it, and the removable refusal; None when no K has a positive effect."""
    refused, answered = base
    gap = refused.mean() - answered.mean()
    found = smallest_enough(effect.mean(0)[None], gap[None], share)
    if int(found[0]) < 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    draws = _resamples(n_draws, len(refused), generator)
    gaps = refused[draws].mean(1) - answered[_resamples(n_draws, len(answered), generator)].mean(1)
    means = effect[draws].mean(1)
    resampled = smallest_enough(means, gaps, share)
    resampled = resampled[resampled >= 0]
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = resampled.double().quantile(tails, interpolation="nearest").int().tolist()
    least, most = removable(means, gaps).quantile(tails).tolist()
    return {
        "k": ks[int(found[0])],
        "low": ks[low],
        "high": ks[high],
        "share": share,
        "frequency": [float((resampled == i).double().mean()) for i in range(len(ks))],
        "removable": asdict(Estimate(float(removable(effect.mean(0)[None], gap[None])), least, most, len(effect))),
        "bounded_by_gap": 0 < float(gap) < float(effect.mean(0).max()),
        "best_k": ks[int(effect.mean(0).argmax())],
    }


def _resamples(n_draws: int, n: int, generator: torch.Generator) -> Int[Tensor, "draw n"]:
    return torch.randint(n, (n_draws, n), generator=generator)


def removable(means: Float[Tensor, "draw k"], gaps: Float[Tensor, " draw"]) -> Float[Tensor, " draw"]:
    """The best K's mean, or the gap where that is smaller and positive."""
    top = means.max(1).values
    return torch.where(gaps > 0, torch.minimum(top, gaps), top)


def smallest_enough(means: Float[Tensor, "draw k"], gaps: Float[Tensor, " draw"], share: float) -> Int[Tensor, " draw"]:
    """Index of the first K that reaches `share` of the removable refusal; -1 where no mean is positive."""
    size = removable(means, gaps)
    first = (means >= share * size[:, None]).int().argmax(1)
    return torch.where(size > 0, first, -1)


def to_match(target: float, removed: Sequence[float], ks: Sequence[int]) -> int | None:
    """The smallest K of the sweep that removes `target` or more; None when none does."""
    return next((k for k, value in zip(ks, removed, strict=True) if value >= target), None)
