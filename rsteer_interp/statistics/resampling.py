"""Permutations within groups, bootstrap resamples and random halves of clusters, as arrays: how items are redrawn."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Clusters, Labels, membership


def permutations(n: int, n_draws: int, seed: int, *, within: Clusters = None) -> Int[NDArray[np.int64], "draw n"]:
    """Random orders of n items; with `within` (subjects, sets) an item's place goes to another of its group alone.

    A group of one, or of equal labels, then tells nothing: what is left is not what differs between groups.
    """
    member = np.zeros(n, dtype=np.int64) if within is None else membership(within)
    keys = member + np.random.default_rng(seed).random((n_draws, n))
    places = np.argsort(member, kind="stable")
    orders = np.empty((n_draws, n), dtype=np.int64)
    orders[:, places] = np.argsort(keys, axis=1)
    return orders


def movable(labels: Labels, within: Labels) -> Bool[NDArray[np.bool_], " n"]:
    """The items of groups with more than one label: those of which a permutation inside groups can tell something."""
    member, label = membership(within), membership(labels)
    kinds = np.zeros((member.max() + 1, label.max() + 1), dtype=bool)
    kinds[member, label] = True
    found: NDArray[np.bool_] = (kinds.sum(1) > 1)[member]
    return found


def bootstrap_counts(
    n: int,
    n_draws: int,
    seed: int,
    *,
    clusters: Clusters = None,
    strata: Clusters = None,
    fewer: int = 0,
) -> Int[NDArray[np.int64], "draw n"]:
    """How often each of n items is in a resample: clusters are drawn with replacement, whole, as many as there are.

    With `strata` (classes, sets) clusters are drawn inside each; a cluster belongs to the stratum of its first item. With
    `fewer` = 1 one less is drawn, which makes the variance of few clusters right (Rao and Wu 1988).
    """
    member = np.arange(n) if clusters is None else membership(clusters)
    _, first = np.unique(member, return_index=True)
    stratum = np.zeros(len(first), dtype=np.int64) if strata is None else membership(strata)[first]
    rng = np.random.default_rng(seed)
    drawn = np.zeros((n_draws, len(first)), dtype=np.int64)
    for s in np.unique(stratum):
        units = np.flatnonzero(stratum == s)
        drawn[:, units] = rng.multinomial(max(len(units) - fewer, 1), np.full(len(units), 1 / len(units)), size=n_draws)
    return drawn[:, member]


def halves(
    n: int,
    n_draws: int,
    seed: int,
    *,
    clusters: Clusters = None,
    strata: Clusters = None,
) -> Bool[NDArray[np.bool_], "draw n"]:
    """Random halves of the clusters, True the first; even inside each stratum, where an odd cluster falls to either side.

    A cluster whose items are of several strata is of a stratum of its own kind. UserError for fewer than two clusters.
    """
    member = np.arange(n) if clusters is None else membership(clusters)
    kinds: list[set[int]] = [set() for _ in range(int(member.max()) + 1)]
    for unit, stratum in zip(member.tolist(), [0] * n if strata is None else membership(strata).tolist(), strict=True):
        kinds[unit].add(stratum)
    if len(kinds) < 2:
        raise UserError(f"halves need two clusters of prompts or more (there are {len(kinds)}); add subjects")
    kind = membership([tuple(sorted(k)) for k in kinds])
    rng = np.random.default_rng(seed)
    first = np.zeros((n_draws, len(kinds)), dtype=bool)
    for k in np.unique(kind):
        units = np.flatnonzero(kind == k)
        places = np.argsort(rng.random((n_draws, len(units))), axis=1)
        first[:, units] = places < (len(units) + rng.integers(2, size=(n_draws, 1))) // 2
    return first[:, member]
