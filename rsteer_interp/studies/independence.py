"""Representational independence: does ablating one direction leave the other's projection unchanged at later layers?

Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420). Ablating v_i at block l changes the projection on v_j at a later
layer l' in two ways: the removed component itself points along v_j a little (it stays in the stream, geometry alone),
and later blocks compute something else. Only the second is dependence, so it is what counts here:

    downstream = |<h'_l' - h_l', v_j> + <h_l, v_i> <v_i, v_j>| / gap_j(l'),   gap_j = mean refused - mean answered along v_j

beside random directions whose displacement is as large at every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.interventions import Displace
from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.draws import next_draw, next_draw_p
from rsteer_interp.statistics.intervals import Clusters, Estimate

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
    by_source: Sequence[Float[Tensor, "kind edit prompt site kind"]],
    names: Sequence[str],
    subjects: Clusters = None,
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
            value, null = [x[0].mean(0) for x in parts], [x[1:].mean(1) for x in parts]
            p = [x for v, draws in zip(value, null, strict=True) for x in next_draw_p(v, draws).tolist()]
            q = false_discovery(p)
            above = [x for v, draws in zip(value, null, strict=True) for x in (v > draws.mean(0)).tolist()]
            own = torch.cat([x[0] for x in parts], -1).mean(-1)
            chance = torch.cat([x[1:].mean(0) for x in parts], -1).mean(-1)
            size = Estimate.of(own.tolist(), clusters=subjects)
            out.append(
                {
                    "ablated": ablated,
                    "read": read,
                    "mean": [v.tolist() for v in value],
                    "null": [draws.mean(0).tolist() for draws in null],
                    "null_high": [next_draw(draws)[1].tolist() for draws in null],
                    "q": list(q),
                    "beyond": sum(a and x <= 0.05 for a, x in zip(above, q, strict=True)),
                    "pairs": len(q),
                    "size": asdict(size),
                    "random_size": float(chance.mean()),
                    "excess": asdict(Estimate.of((own - chance).tolist(), clusters=subjects)),
                    "n_random": count,
                }
            )
    return out
