"""Representational independence: does ablating one direction leave the other's projection unchanged at later layers?

Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420). Ablating v_i at block l changes the projection on v_j at a later
layer l' in two ways: the removed component itself points along v_j a little (it stays in the stream, geometry alone),
and later blocks compute something else. Only the second is dependence, so it is what counts here:

    downstream = |<h'_l' - h_l', v_j> + <h_l, v_i> <v_i, v_j>| / gap_j(l'),   gap_j = mean refused - mean answered along v_j

beside random directions whose displacement is as large at every position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.interventions import Displace
from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.intervals import Estimate

Units = dict[Site, Float[Tensor, "kind d"]]


def shifts(
    backend: Backend,
    rows: Any,
    source: Site,
    units: Units,
    gaps: dict[Site, Float[Tensor, " kind"]],
    random: Float[Tensor, "draw d"],
) -> dict[str, Float[Tensor, "kind edit prompt site kind"]]:
    """`total` and `downstream` signed shifts, as shares of the gap; first axis the ablated kind, edit 0 its ablation, the
    others random; sites are those after the source."""
    later = [site for site in units if site > source]
    prepared: Any = backend.prepare(rows, source.layer)
    base = last_states(backend, prepared, [source, *later])
    total, downstream = [], []
    for v in units[source]:
        projection = base[source].double() @ v.double()
        for u in (v, *random):
            after = last_states(backend, prepared, later, Displace(source, v, u))
            change = [(after[s].double() - base[s].double()) @ units[s].double().T / gaps[s].double() for s in later]
            kept = [projection[:, None] * (units[s].double() @ u.double() / gaps[s].double()) for s in later]
            total.append(torch.stack(change, 1))
            downstream.append(torch.stack(change, 1) + torch.stack(kept, 1))
    shape = (len(units[source]), 1 + len(random), len(projection), len(later), len(units[source]))
    return {"total": torch.stack(total).view(shape), "downstream": torch.stack(downstream).view(shape)}


def summary(
    by_source: Sequence[Float[Tensor, "kind edit prompt site kind"]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """For each ordered pair of kinds: mean |shift| by source and later layer, with its null; q over all of a pair's layers.

    `size` is the mean over all layer pairs; `excess` is that minus the same under random directions, paired by prompt.
    """
    out = []
    for i, ablated in enumerate(names):
        for j, read in enumerate(names):
            if i == j:
                continue
            parts = [x[i, :, :, :, j].abs().double() for x in by_source]  # edit, prompt, site
            count = len(parts[0]) - 1
            widen, quantile = math.sqrt(1 + 1 / count), float(stats.t.ppf(0.975, count - 1))
            value = [x[0].mean(0) for x in parts]
            null = [(x[1:].mean(1).mean(0), x[1:].mean(1).std(0).clamp(min=1e-12)) for x in parts]
            p = [
                float(2 * stats.t.sf(abs(v - m) / (widen * s), count - 1))
                for values, (means, sds) in zip(value, null, strict=True)
                for v, m, s in zip(values.tolist(), means.tolist(), sds.tolist(), strict=True)
            ]
            q = false_discovery(p)
            above = [
                v > m
                for values, (means, _) in zip(value, null, strict=True)
                for v, m in zip(values, means, strict=True)
            ]
            own = torch.cat([x[0] for x in parts], -1).mean(-1)
            chance = torch.cat([x[1:].mean(0) for x in parts], -1).mean(-1)
            size = Estimate.of(own.tolist())
            out.append(
                {
                    "ablated": ablated,
                    "read": read,
                    "mean": [v.tolist() for v in value],
                    "null": [m.tolist() for m, _ in null],
                    "null_high": [(m + quantile * widen * s).tolist() for m, s in null],
                    "q": list(q),
                    "beyond": sum(a and x <= 0.05 for a, x in zip(above, q, strict=True)),
                    "pairs": len(q),
                    "size": asdict(size),
                    "random_size": float(chance.mean()),
                    "excess": asdict(Estimate.of((own - chance).tolist())),
                    "n_random": count,
                }
            )
    return out
