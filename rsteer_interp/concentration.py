"""Concentration: in how few layers an effect sits, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.spectrum import participation_ratio
from rsteer_interp.statistics.intervals import Clusters, Estimate
from rsteer_interp.statistics.resampling import bootstrap_counts


@dataclass(frozen=True)
class Concentration:
    """How an effect per layer is spread over depth (0 = first layer given, 1 = last), with bootstrap intervals.

    `effective_layers`: participation ratio, from 1 to the number of layers. `gini`: 0 for equal effects, (L - 1) / L for one
    layer. `peak`: depth of the largest effect. `centre`: mean depth weighted by effect.
    """

    effective_layers: Estimate
    gini: Estimate
    peak: Estimate
    centre: Estimate


def concentration(
    effects: Float[Tensor, "prompt layer"], n_draws: int = 1000, seed: int = 0, *, clusters: Clusters = None
) -> Concentration:
    """Concentration of the mean effect per layer, given the effect of each layer on each prompt (positive = wanted).

    Means below 0 count as 0. Noise in layers without an effect adds layers, so compare with the same statistic under a null
    intervention. UserError when no layer has a positive mean effect, or for one layer or prompt only.
    """
    x = effects.double()
    n, layers = x.shape
    if n < 2 or layers < 2:
        raise UserError(f"concentration needs two prompts and two layers or more (there are {n} and {layers})")
    means = x.mean(0).clamp(min=0)
    if not bool(means.sum() > 0):
        raise UserError(
            "no layer has a positive mean effect, so there is nothing to locate; check the sign of the effect"
        )
    counts = torch.from_numpy(bootstrap_counts(n, n_draws, seed, clusters=clusters)).to(x)
    return of_draws(means, (counts @ x / counts.sum(1, keepdim=True)).clamp(min=0), n)


def of_draws(values: Float[Tensor, " layer"], draws: Float[Tensor, "draw layer"], n: int) -> Concentration:
    """Concentration of nonnegative values per layer, with intervals from their bootstrap draws over n prompts."""
    kept = draws[draws.sum(1) > 0]

    def estimate(statistic: Callable[[Tensor], float]) -> Estimate:
        return Estimate.of_draws(statistic(values), [statistic(row) for row in kept], n, corrected=True)

    return Concentration(estimate(participation_ratio), estimate(gini), estimate(peak_depth), estimate(centre_depth))


def gini(values: Float[Tensor, " k"]) -> float:
    """sum_ij |v_i - v_j| / (2 k sum v) of nonnegative values: 0 when all are equal, (k - 1) / k when one has everything."""
    x = values.double().sort().values
    k = len(x)
    ranks = 2 * torch.arange(1, k + 1).to(x) - k - 1
    return float((ranks @ x) / (k * x.sum()))


def peak_depth(values: Float[Tensor, " k"]) -> float:
    """Depth of the largest value, 0 = first and 1 = last."""
    return int(values.argmax()) / (len(values) - 1)


def centre_depth(values: Float[Tensor, " k"]) -> float:
    """Mean depth weighted by nonnegative values, 0 = first and 1 = last."""
    depth = torch.linspace(0, 1, len(values)).to(values)
    return float((depth @ values) / values.sum())
