"""How many dimensions the variance has: participation ratio, parallel analysis against shuffled labels, Marchenko-Pastur edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from math import pi, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from rsteer_interp.moments import Moments
from rsteer_interp.spectrum import spectrum
from rsteer_interp.statistics.draws import p_value, percentiles, upper
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.subspaces import distinct, shuffled

Contrast = Callable[[Int[Tensor, " n"]], Float[Tensor, "m d"]]


def class_spectrum(states: Float[Tensor, "n d"], group: Int[Tensor, " n"], top: int) -> dict[str, Any]:
    """Largest `top` eigenvalues of the states' covariance, participation ratio with interval, and those over the noise edge.

    The interval is from the jackknife over groups (subjects): a bootstrap repeats states, which lowers the rank and with
    it the ratio. The ratio cannot exceed n - 1.
    """
    found = spectrum(Moments.of(states))
    noise = noise_level(found.values, len(states) - 1, states.shape[1])
    edge = marchenko_pastur_edge(noise, len(states) - 1, states.shape[1])
    return {
        "n": len(states),
        "values": found.values[:top].tolist(),
        "shares": found.shares[:top].tolist(),
        "participation": asdict(jackknife(lambda x: spectrum(Moments.of(x)).participation, states, group)),
        "noise_variance": noise,
        "noise_edge": edge,
        "over_edge": int((found.values > edge).sum()),
    }


def jackknife(
    statistic: Callable[[Float[Tensor, "n d"]], float], states: Float[Tensor, "n d"], group: Int[Tensor, " n"]
) -> Estimate:
    """A participation ratio, which is 1 or more, with its 95 % interval from leaving out one group at a time."""
    left_out = [statistic(states[group != name]) for name in distinct(group)]
    found = Estimate.jackknife(statistic(states), left_out, len(states))
    return replace(found, low=max(1.0, found.low))


def parallel_analysis(
    contrast: Contrast, role: Int[Tensor, " n"], group: Int[Tensor, " n"], n_shuffles: int, seed: int, top: int
) -> dict[str, Any]:
    """Eigenvalues of the (uncentred) second moment of contrasts beside those with roles shuffled inside groups (Horn 1965).

    `beyond`: how many leading eigenvalues are each over the 95 % quantile of the null at their rank. `p_first`: share of shuffles
    with as large a first eigenvalue. What differs inside a group and is not its roles, such as topic, is in the null too.
    """
    values = _second_moment(contrast(role))[:top]
    generator = torch.Generator().manual_seed(seed)
    null = torch.stack([_second_moment(contrast(shuffled(role, group, generator)))[:top] for _ in range(n_shuffles)])
    low, high = percentiles(null)
    q95 = upper(null)
    over = values > torch.from_numpy(q95)
    return {
        "n": len(contrast(role)),
        "values": values.tolist(),
        "null_low": low.tolist(),
        "null_median": np.median(null, axis=0).tolist(),
        "null_high": high.tolist(),
        "null_q95": q95.tolist(),
        "beyond": int(over.int().cumprod(0).sum()),
        "p_first": float(p_value(values[0], null[:, 0], "greater")),
        "n_shuffles": n_shuffles,
    }


def _second_moment(rows: Float[Tensor, "m d"]) -> Float[Tensor, " r"]:
    values: Tensor = torch.linalg.svdvals(rows)
    return values.square().div(len(rows))


def noise_level(values: Float[Tensor, " r"], n: int, d: int) -> float:
    """Variance per coordinate of white noise with this median eigenvalue: median / (d/n mu) for n < d (Gavish and Donoho 2014).

    The median is hardly moved by a few large eigenvalues. Spectra of real states are not white plus a few spikes, so what
    lies over the edge is an upper bound on structure, not a count of meanings.
    """
    beta = min(n, d) / max(n, d)
    return float(values.double().median()) / (max(n, d) / n * _marchenko_pastur_median(beta))


def marchenko_pastur_edge(noise: float, n: int, d: int) -> float:
    """Largest eigenvalue that white noise of this variance gives for large n and d: noise (1 + sqrt(d / n))^2."""
    return noise * (1 + sqrt(d / n)) ** 2


@cache
def _marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law of ratio beta <= 1 and variance 1."""
    low, high = (1 - sqrt(beta)) ** 2, (1 + sqrt(beta)) ** 2

    def below(x: float) -> float:
        mass, _ = quad(lambda t: sqrt(max((high - t) * (t - low), 0.0)) / (2 * pi * beta * t), low, x)
        return float(mass)

    return float(brentq(lambda x: below(x) - 0.5, low + 1e-9, high))


def without(states: Float[Tensor, "n d"], coordinates: tuple[int, ...]) -> Float[Tensor, "n rest"]:
    """The states without these coordinates (those of massive activations)."""
    keep: Bool[Tensor, " d"] = torch.ones(states.shape[1], dtype=torch.bool)
    keep[list(coordinates)] = False
    return states[:, keep]
