"""The curves of the layer study, from numbers alone: read-out and cause by layer, each with intervals, nulls, concentration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rsteer_interp.concentration import Concentration, concentration, of_draws
from rsteer_interp.nulls import false_discovery, max_correlation_null
from rsteer_interp.statistics.intervals import Estimate


def read_out(
    select_p: Float[Tensor, "m layer"],
    select_c: Float[Tensor, " m"],
    p: Float[Tensor, "n layer"],
    c: Float[Tensor, " n"],
    sets: Sequence[str],
    seed: int,
    n_draws: int = 1000,
) -> dict[str, Any]:
    """r per layer (layers 1, 2, ...) on report with intervals, nulls, the topic-free version, and where r^2 concentrates."""
    n = len(c)
    free = max_correlation_null(p, c, n_draws, seed, groups=sets)
    null = max_correlation_null(p, c, n_draws, seed)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (n_draws, n), generator=generator)
    boot = correlations(p[draws], c[draws])
    shuffled = correlations(p.expand(n_draws, -1, -1), c[torch.rand(n_draws, n, generator=generator).argsort(1)])
    low, high = boot.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    layers = list(range(1, p.shape[1] + 1))
    best = int(correlations(select_p[None], select_c[None])[0].argmax())
    r = torch.tensor(null.r, dtype=torch.float64)
    return {
        "layers": layers,
        "r": list(null.r),
        "low": low.tolist(),
        "high": high.tolist(),
        "null_low": list(null.low),
        "null_high": list(null.high),
        "null_max_q95": null.null_max_quantile(0.95),
        "p_max": null.p,
        "within_set_r": list(free.r),
        "within_set_null_max_q95": free.null_max_quantile(0.95),
        "within_set_p_max": free.p,
        "n": n,
        "chosen_on_select": {
            "layer": layers[best],
            "n_select": len(select_c),
            "r": asdict(Estimate(float(r[best]), float(low[best]), float(high[best]), n)),
        },
        "concentration": _on_depth(of_draws(r.square(), boot.square(), n), layers, layers[-1]),
        "null_effective_layers": _spread([_effective(row) for row in shuffled.square()]),
    }


def correlations(x: Float[Tensor, "draw n layer"], y: Float[Tensor, "draw n"]) -> Float[Tensor, "draw layer"]:
    """Pearson r per draw and layer; 0 where a side is constant."""
    a, b = x - x.mean(1, keepdim=True), (y - y.mean(1, keepdim=True))[..., None]
    size = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(size > 0, (a * b).sum(1) / size.clamp(min=1e-300), 0.0)


def causal_curve(
    effect: Float[Tensor, "prompt layer"], random: Float[Tensor, "direction layer"], layers: list[int], n_layers: int
) -> dict[str, Any]:
    """Mean effect per layer (log-odds removed, nats) with interval; z, rank and p against the random directions' means.

    p is two-sided from the t prediction interval of one more random direction: t = z / sqrt(1 + 1/R), R - 1 degrees of
    freedom; q is p after false-discovery control over layers. `at_peak` is the effect at the layer that is best for the
    other prompts (leave one out), so it isn't inflated by the choice.
    """
    count = len(random)
    estimates = [Estimate.of(column.tolist()) for column in effect.T]
    mean, sd = random.mean(0), random.std(0).clamp(min=1e-12)
    z = (effect.mean(0) - mean) / sd
    widen = math.sqrt(1 + 1 / count)
    p = [2 * float(stats.t.sf(abs(value) / widen, count - 1)) for value in z.tolist()]
    half = float(stats.t.ppf(0.975, count - 1)) * widen * sd
    out: dict[str, Any] = {
        "effect": [asdict(e) for e in estimates],
        "random_mean": mean.tolist(),
        "null_low": (mean - half).tolist(),
        "null_high": (mean + half).tolist(),
        "z": z.tolist(),
        "rank": [1 + int((column >= m).sum()) for column, m in zip(random.T, effect.mean(0), strict=True)],
        "p": p,
        "q": list(false_discovery(p)),
        "peak_layer": layers[int(effect.mean(0).argmax())],
        "at_peak": asdict(Estimate.of(_held_out_peak(effect))),
        "concentration": None,
        "null_effective_layers": _spread([_effective(row) for row in random.clamp(min=0) if bool((row > 0).any())]),
    }
    if bool((effect.mean(0) > 0).any()):
        out["concentration"] = _on_depth(concentration(effect), layers, n_layers)
    return out


def _held_out_peak(effect: Float[Tensor, "prompt layer"]) -> list[float]:
    others = effect.sum(0) - effect
    return effect.gather(1, others.argmax(1, keepdim=True))[:, 0].tolist()


def _effective(values: Tensor) -> float:
    return float(values.sum().square() / values.square().sum())


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.5, 0.975]).double())
    return {"median": float(middle), "low": float(low), "high": float(high), "n": len(values)}


def _on_depth(found: Concentration, layers: list[int], n_layers: int) -> dict[str, Any]:
    """As plain data, with peak and centre moved from 0 = first, 1 = last layer given to depth = layer / n_layers."""

    def moved(e: Estimate) -> Estimate:
        low, value, high = ((layers[0] + x * (layers[-1] - layers[0])) / n_layers for x in (e.low, e.value, e.high))
        return Estimate(value, low, high, e.n)

    return {**asdict(replace(found, peak=moved(found.peak), centre=moved(found.centre))), "layers": len(layers)}


def significant(curve: dict[str, Any], layers: list[int], rate: float = 0.05) -> list[int]:
    """Layers that remove more refusal than random directions do, at this false-discovery rate."""
    return [layer for layer, q, z in zip(layers, curve["q"], curve["z"], strict=True) if q <= rate and z > 0]
