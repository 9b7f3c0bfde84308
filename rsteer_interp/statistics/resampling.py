"""Permutations within groups and bootstrap resamples of clusters, as arrays: the only two ways in which items are redrawn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from rsteer_interp.statistics.intervals import Clusters, membership


def permutations(
    n: int, n_draws: int, seed: int, *, within: Sequence[Hashable] | NDArray[np.generic] | None = None
) -> Int[NDArray[np.int64], "draw n"]:
    """Random orders of n items; with `within` (subjects, sets) an item's place goes to another of its group alone.

    A group of one, or of equal labels, then tells nothing: what is left is not what differs between groups.
    """
    member = np.zeros(n, dtype=np.int64) if within is None else membership(within)
    keys = member + np.random.default_rng(seed).random((n_draws, n))
    places = np.argsort(member, kind="stable")
    orders = np.empty((n_draws, n), dtype=np.int64)
    orders[:, places] = np.argsort(keys, axis=1)
    return orders


def bootstrap_counts(
    n: int,
    n_draws: int,
    seed: int,
    *,
    clusters: Clusters = None,
    strata: Sequence[Hashable] | NDArray[np.generic] | None = None,
) -> Int[NDArray[np.int64], "draw n"]:
    """How often each of n items is in a resample: clusters are drawn with replacement, whole, as many as there are.

    With `strata` (classes, sets) clusters are drawn inside each; a cluster belongs to the stratum of its first item.
    """
    member = np.arange(n) if clusters is None else membership(clusters)
    _, first = np.unique(member, return_index=True)
    stratum = np.zeros(len(first), dtype=np.int64) if strata is None else membership(strata)[first]
    rng = np.random.default_rng(seed)
    drawn = np.zeros((n_draws, len(first)), dtype=np.int64)
    for s in np.unique(stratum):
        units = np.flatnonzero(stratum == s)
        drawn[:, units] = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=n_draws)
    return drawn[:, member]
