"""How many dimensions the subspaces of all sites have together: K directions per site are K dimensions only if they agree.

The K unit rows of every site, stacked, have singular values sigma_i with sum sigma_i^2 = K sites; shares of that energy say

    effective rank = (sum sigma_i^2)^2 / sum sigma_i^4        dims_90 = fewest i with 90 % of the energy

from K (one subspace at every site) to K sites (all orthogonal), or the stream's width where that is less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.spectrum import participation_ratio
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.rotation import random_frame
from rsteer_interp.studies.dimension_results import UnionRank
from rsteer_interp.studies.subspaces import principal

Bases = Mapping[Any, Float[Tensor, "r d"]]


def union_ranks(
    bases: Bases,
    ks: Sequence[int],
    resampled: Sequence[Bases] = (),
    seed: int = 0,
    n_null: int = 5,
) -> tuple[UnionRank, ...]:
    """Rank of the union for every K, beside that of random bases drawn apart for each site (what no agreement looks like; turning
    all by one rotation changes nothing). Bands are the central 95 % of the `resampled` bases that have K rows, and the value itself:
    a resample has noise of its own, so that bands lean to more dimensions, never to fewer."""
    d, found = next(iter(bases.values())).shape[1], []
    for k in ks:
        effective, dims_90, dims_99 = _ranks(bases, k)
        apart = [{s: random_frame(k, d, _seed(seed, draw, i)) for i, s in enumerate(bases)} for draw in range(n_null)]
        null = torch.tensor([_ranks(draw, k) for draw in apart], dtype=torch.float64).mean(0).tolist()
        draws = [_ranks(draw, k)[:2] for draw in resampled if min(map(len, draw.values())) >= k]
        bands: list[tuple[float, float]] | None = None
        if len(draws) * 2 > len(resampled):  # else the draws that reach K are a selection
            own = (effective, dims_90)
            bands = [
                (min(a, x), max(b, x)) for a, b, x in zip(*(p.tolist() for p in percentiles(draws)), own, strict=True)
            ]
        found.append(
            UnionRank(
                k=k,
                rows=k * len(bases),
                effective=effective,
                dims_90=dims_90,
                dims_99=dims_99,
                effective_band=bands[0] if bands else None,
                dims_90_band=bands[1] if bands else None,
                null_effective=null[0],
                null_dims_90=null[1],
                null_dims_99=null[2],
                n_null=n_null,
            )
        )
    return tuple(found)


def _seed(seed: int, draw: int, site: int) -> int:
    return 100_000 * seed + 1000 * draw + site


def leading(bases: Bases) -> Float[Tensor, "r d"]:
    """One basis for all sites: the right singular vectors of their first rows, largest first; as many as those rows span."""
    firsts = torch.stack([rows[0].double() for rows in bases.values()])
    return principal(firsts, len(firsts))


def energy(bases: Bases, k: int) -> Float[Tensor, " m"]:
    """Squared singular values of the first k rows of all sites, stacked; largest first."""
    rows = torch.cat([basis[:k].double() for basis in bases.values()])
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0)


def _ranks(bases: Bases, k: int) -> tuple[float, int, int]:
    values = energy(bases, k)
    return participation_ratio(values), dimensions(values, 0.9), dimensions(values, 0.99)


def dimensions(values: Float[Tensor, " m"], share: float) -> int:
    """Fewest leading values that hold the share of their sum."""
    held = values.cumsum(0) / values.sum()
    return int((held < share - 1e-12).sum()) + 1
