"""The curves of the layer study, from numbers alone: read-out and cause by layer, each with intervals, nulls, concentration."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.concentration import Concentration, concentration, of_draws
from rsteer_interp.nulls import false_discovery, max_correlation_null
from rsteer_interp.statistics.draws import Beside, next_draw, next_draw_p, percentiles
from rsteer_interp.statistics.intervals import Clusters, Estimate, membership
from rsteer_interp.statistics.resampling import bootstrap_counts, movable, permutations


def read_out(
    select_p: Float[Tensor, "m layer"],
    select_c: Float[Tensor, " m"],
    p: Float[Tensor, "n layer"],
    c: Float[Tensor, " n"],
    subjects: Sequence[Hashable],
    seed: int,
    n_draws: int = 1000,
) -> dict[str, Any]:
    """r per layer (layers 1, 2, ...) on report, with intervals over subjects, nulls, and where r^2 concentrates.

    `within_subject_*`: r of what each subject's mean leaves, its null by verdicts permuted inside subjects. It is the one that
    topic cannot feed; the plain null, in which any prompt's verdict goes to any other, is fed by it.
    """
    n = len(c)
    free = max_correlation_null(p, c, n_draws, seed, groups=subjects)
    null = max_correlation_null(p, c, n_draws, seed)
    counts = torch.from_numpy(bootstrap_counts(n, n_draws, seed, clusters=subjects)).double()
    boot = correlations(p.expand(n_draws, -1, -1), c.expand(n_draws, -1), counts)
    shuffled = correlations(p.expand(n_draws, -1, -1), c[torch.from_numpy(permutations(n, n_draws, seed))])
    low, high = percentiles(boot)
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
        "within_subject_r": list(free.r),
        "within_subject_null_max_q95": free.null_max_quantile(0.95),
        "within_subject_p_max": free.p,
        "within_subject_n": int(movable(c.tolist(), subjects).sum()),
        "n": n,
        "chosen_on_select": {
            "layer": layers[best],
            "n_select": len(select_c),
            "r": asdict(Estimate(float(r[best]), float(low[best]), float(high[best]), n)),
        },
        "concentration": _on_depth(of_draws(r.square(), boot.square(), n), layers, layers[-1]),
        "null_effective_layers": _spread([_effective(row) for row in shuffled.square()]),
    }


def correlations(
    x: Float[Tensor, "draw n layer"], y: Float[Tensor, "draw n"], counts: Float[Tensor, "draw n"] | None = None
) -> Float[Tensor, "draw layer"]:
    """Pearson r per draw and layer, of prompts as often as `counts` has them; 0 where a side is constant."""
    w = (torch.ones_like(y) if counts is None else counts)[..., None]
    a, b = (z - (w * z).sum(1, keepdim=True) / w.sum(1, keepdim=True) for z in (x, y[..., None]))
    size = (w * a.square()).sum(1).sqrt() * (w * b.square()).sum(1).sqrt()
    return torch.where(size > 0, (w * a * b).sum(1) / size.clamp(min=1e-300), 0.0)


def causal_curve(
    effect: Float[Tensor, "prompt layer"],
    random: Float[Tensor, "direction layer"],
    layers: list[int],
    n_layers: int,
    subjects: Clusters = None,
) -> dict[str, Any]:
    """Mean effect per layer (log-odds removed, nats) with interval over subjects; z, rank and p against the random directions' means.

    p is that of one more random direction (`next_draw_p`), q the same after false-discovery control over layers. `at_peak` is the
    effect at the layer that is best for the prompts of other subjects (leave one out), so it isn't inflated by the choice.
    """
    estimates = [Estimate.of(column.tolist(), clusters=subjects) for column in effect.T]
    beside = [Beside.of(e.value, column.tolist()) for e, column in zip(estimates, random.T, strict=True)]
    low, high = next_draw(random)
    p = next_draw_p(effect.mean(0), random).tolist()
    out: dict[str, Any] = {
        "effect": [asdict(e) for e in estimates],
        "random_mean": random.mean(0).tolist(),
        "null_low": low.tolist(),
        "null_high": high.tolist(),
        "z": [b.z for b in beside],
        "rank": [b.rank for b in beside],
        "p": p,
        "q": list(false_discovery(p)),
        "peak_layer": layers[int(effect.mean(0).argmax())],
        "at_peak": asdict(Estimate.of(held_out_peak(effect, subjects), clusters=subjects)),
        "concentration": None,
        "null_effective_layers": _spread([_effective(row) for row in random.clamp(min=0) if bool((row > 0).any())]),
    }
    if bool((effect.mean(0) > 0).any()):
        out["concentration"] = _on_depth(concentration(effect, clusters=subjects), layers, n_layers)
    return out


def held_out_peak(effect: Float[Tensor, "prompt layer"], subjects: Clusters = None) -> list[float]:
    """Every prompt's effect at the layer that is best for the prompts of other subjects."""
    member = torch.from_numpy(membership(range(len(effect)) if subjects is None else subjects))
    own = torch.zeros(int(member.max()) + 1, effect.shape[1]).to(effect).index_add(0, member, effect)
    others = effect.sum(0) - own[member]
    return effect.gather(1, others.argmax(1, keepdim=True))[:, 0].tolist()


def _effective(values: Tensor) -> float:
    return float(values.sum().square() / values.square().sum())


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, high = percentiles(values)
    return {"median": median(values), "low": float(low), "high": float(high), "n": len(values)}


def _on_depth(found: Concentration, layers: list[int], n_layers: int) -> dict[str, Any]:
    """As plain data, with peak and centre moved from 0 = first, 1 = last layer given to depth = layer / n_layers."""

    def moved(e: Estimate) -> Estimate:
        low, value, high = ((layers[0] + x * (layers[-1] - layers[0])) / n_layers for x in (e.low, e.value, e.high))
        return Estimate(value, low, high, e.n)

    return {**asdict(replace(found, peak=moved(found.peak), centre=moved(found.centre))), "layers": len(layers)}


def significant(curve: dict[str, Any], layers: list[int], rate: float = 0.05) -> list[int]:
    """Layers that remove more refusal than random directions do, at this false-discovery rate."""
    return [layer for layer, q, z in zip(layers, curve["q"], curve["z"], strict=True) if q <= rate and z > 0]
