"""Rates and means with intervals whose unit is the cluster: the subject, the vector, the repeated prompt.

    Var(mean) = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2       one way, G clusters (linearised ratio of sums)
    Var(mean) = V_rows + V_columns - V_cells                                a matrix of vectors by prompts, two ways

The two-way form is that of Cameron, Gelbach and Miller (2011). Student's t has G - 1 degrees of freedom (the smaller side of a matrix).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rsteer_interp.errors import UserError

Labels = Sequence[Hashable] | NDArray[np.generic]
Clusters = Labels | None
FEWEST_RESAMPLED = 30
"""Fewest clusters that are resampled: with less a bootstrap of the mean covers too seldom (BCa 0.90 at n = 10 to 16)."""


@dataclass(frozen=True)
class Rate:
    """A proportion count / n with its Wilson (1927) score interval. Prints as `81/340 = 24 % (18 to 31, 33 clusters)`.

    Over clusters the interval is Wilson's for the effective number of prompts (Korn and Graubard 1998): as many independent ones
    as give the variance over clusters, with Student's t for the clusters' number. `units` is that number of clusters.
    """

    count: int
    n: int
    rate: float
    low: float
    high: float
    units: int

    @classmethod
    def of(cls, flags: ArrayLike, confidence: float = 0.95, *, clusters: Clusters = None) -> Rate:
        """Rate of flags; those of one cluster (any hashable label) are not independent. UserError for no flags."""
        x = _flat(flags)
        sums, sizes = _sums(x, clusters)
        return cls._over(x, _cluster_variance(sums, sizes), len(sums), confidence)

    @classmethod
    def crossed(cls, flags: ArrayLike, confidence: float = 0.95, *, clusters: Clusters = None) -> Rate:
        """Rate of a matrix of flags (vectors by prompts) of which neither rows nor columns are independent of each other; `clusters`
        of the columns are the prompts' subjects. `units`: the smaller number of the two."""
        x = np.asarray(flags, dtype=float)
        variance, units = _crossed_variance(x, clusters)
        return cls._over(x.ravel(), variance, units, confidence)

    @classmethod
    def from_count(cls, count: int, n: int, confidence: float = 0.95) -> Rate:
        """Rate of n independent prompts."""
        return cls.of(np.arange(n) < count, confidence)

    @classmethod
    def _over(cls, x: NDArray[np.float64], variance: float, units: int, confidence: float) -> Rate:
        if len(x) == 0:
            raise UserError("a rate over no prompts; keep at least one prompt")
        count, n = int(x.sum()), len(x)
        low, high = wilson(count / n, _effective(x, variance, units, confidence), confidence)
        return cls(count, n, count / n, low, high, units)

    def __str__(self) -> str:
        clusters = f", {self.units} clusters" if self.units < self.n else ""
        return (
            f"{self.count}/{self.n} = {100 * self.rate:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f}{clusters})"
        )


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval and n, in the units of the values.

    Student's t on the clusters when there are fewer than 30, else the BCa bootstrap (Efron 1987) over clusters. Values without
    clusters are a cluster each.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        confidence: float = 0.95,
        *,
        clusters: Clusters = None,
        n_draws: int = 2000,
        seed: int = 0,
    ) -> Estimate:
        """UserError for fewer than two values or clusters, or a value that is not finite. Equal values: no width."""
        x = np.asarray(values, dtype=float)
        sums, sizes = _sums(x, clusters)
        if len(sums) < 2 or not np.isfinite(x).all():
            raise UserError(
                f"a mean with an interval needs two finite values or more (n = {len(x)}, {len(sums)} apart); add prompts"
            )
        mean = float(x.mean())
        if np.ptp(x) == 0:
            return cls(mean, mean, mean, len(x))
        if len(sums) < FEWEST_RESAMPLED or np.ptp(sums / sizes) == 0:
            return cls._t(mean, _cluster_variance(sums, sizes), len(sums), len(x), confidence)
        found = stats.bootstrap(
            (sums, sizes),
            lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
            paired=True,
            n_resamples=n_draws,
            confidence_level=confidence,
            method="BCa",
            batch=256,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return cls(mean, float(found.low), float(found.high), len(x))

    @classmethod
    def crossed(cls, values: ArrayLike, confidence: float = 0.95, *, clusters: Clusters = None) -> Estimate:
        """Mean of a matrix (vectors by prompts, of these subjects) of which neither rows nor columns are independent; n is the
        smaller side."""
        x = np.asarray(values, dtype=float)
        if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
            raise UserError(
                f"a mean over two ways needs two finite rows and columns or more (shape {x.shape}); add some"
            )
        variance, units = _crossed_variance(x, clusters)
        if units < 2:
            raise UserError("a mean over two ways needs prompts of two subjects or more; add some")
        return cls._t(float(x.mean()), variance, units, min(x.shape), confidence)

    @classmethod
    def difference(
        cls,
        first: ArrayLike,
        second: ArrayLike,
        confidence: float = 0.95,
        *,
        clusters: tuple[Labels, Labels] | None = None,
    ) -> Estimate:
        """mean(first) - mean(second) with Welch's (1947) interval; n of the smaller group.

        `clusters` of either group's values: one label in both is one cluster, whose differences inside are not noise.
        """
        a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
        if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(
                f"a difference of means needs two finite values a side ({len(a)} and {len(b)}); add prompts"
            )
        change = float(a.mean() - b.mean())
        variance, df = difference_variance(a, b, clusters=clusters)
        half = student(df, confidence) * math.sqrt(variance)
        return cls(change, change - half, change + half, min(len(a), len(b)))

    @classmethod
    def of_draws(
        cls, value: float, draws: ArrayLike, n: int, confidence: float = 0.95, *, corrected: bool = False
    ) -> Estimate:
        """A statistic with the percentile interval of its bootstrap draws over n prompts.

        `corrected`: Efron's (1981) correction for draws whose median is not the value, of which the interval never leaves out
        the value (draws of clipped noise look more spread out than it).
        """
        x, tail = np.asarray(draws, dtype=float), (1 - confidence) / 2
        ends = np.array([tail, 1 - tail])
        if corrected:
            below = float(np.mean(x < value) + np.mean(x == value) / 2)
            z0 = stats.norm.ppf(np.clip(below, 0.5 / len(x), 1 - 0.5 / len(x)))
            ends = stats.norm.cdf(2 * z0 + stats.norm.ppf(ends))
        low, high = (float(end) for end in np.quantile(x, ends))
        return cls(value, min(low, value) if corrected else low, max(high, value) if corrected else high, n)

    @classmethod
    def jackknife(cls, value: float, left_out: ArrayLike, n: int, confidence: float = 0.95) -> Estimate:
        """A statistic with its interval from leaving out one of g clusters in turn: value +- t sqrt((g - 1) / g sum (x_i - mean)^2)."""
        x = np.asarray(left_out, dtype=float)
        if len(x) < 2:
            raise UserError(f"{len(x)} clusters to leave out; an interval needs two or more, so add subjects")
        return cls._t(value, (len(x) - 1) * float(x.var()), len(x), n, confidence)

    @classmethod
    def _t(cls, mean: float, variance: float, units: int, n: int, confidence: float) -> Estimate:
        half = student(units - 1, confidence) * math.sqrt(variance)
        return cls(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, n = {self.n})"


def student(df: float, confidence: float = 0.95) -> float:
    """How many standard errors an interval reaches to either side: Student's t with df degrees of freedom."""
    return float(stats.t.ppf((1 + confidence) / 2, df))


def difference_variance(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    *,
    clusters: tuple[Labels, Labels] | None = None,
) -> tuple[float, float]:
    """Variance of a difference of two means over clusters, and its degrees of freedom (Satterthwaite 1946)."""
    sides = (first - first.mean()) / len(first), -(second - second.mean()) / len(second)
    labels = [*range(len(first)), *range(-len(second), 0)]
    if clusters is not None:
        labels = [x for side in clusters for x in (side if isinstance(side, Sequence) else np.asarray(side).tolist())]
    member = membership(labels)
    if len(member) != len(first) + len(second):
        raise UserError(f"{len(first)} and {len(second)} values but {len(member)} clusters; give each its cluster")
    members = member[: len(first)], member[len(first) :]
    groups = [len(np.unique(m)) for m in members]
    if min(groups) < 2:
        raise UserError(f"a difference of means needs two clusters a side ({groups[0]} and {groups[1]}); add subjects")
    sums = [
        math.sqrt(g / (g - 1)) * np.bincount(m, x, member.max() + 1)
        for g, m, x in zip(groups, members, sides, strict=True)
    ]
    one, other = (float(s @ s) for s in sums)
    if one + other == 0:
        return 0.0, min(groups) - 1
    df = (one + other) ** 2 / (one**2 / (groups[0] - 1) + other**2 / (groups[1] - 1))
    together = sums[0] + sums[1]
    return float(together @ together), df


def wilson(rate: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score limits of a rate seen in n prompts, n any positive number (an effective one, too)."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    middle, scale = rate + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return 0.0 if rate == 0 else (middle - half) / scale, 1.0 if rate == 1 else (middle + half) / scale


def effective_n(flags: ArrayLike, confidence: float = 0.95, *, clusters: Clusters = None) -> float:
    """How many independent prompts say as much about the rate as these in their clusters."""
    x = _flat(flags)
    sums, sizes = _sums(x, clusters)
    return _effective(x, _cluster_variance(sums, sizes), len(sums), confidence)


def _flat(flags: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(flags, dtype=bool).astype(float)


def _effective(x: NDArray[np.float64], variance: float, units: int, confidence: float) -> float:
    """1 / n_eff: the variance over clusters in units of p (1 - p), with t^2 / z^2 for few clusters, between 1 / n and 1.

    With few of the rarer outcome the variance is not known, and none shows nothing at all about how alike a cluster's prompts are:
    then each cluster counts once. The two meet as if one event had been seen of clusters that are all alike.
    """
    n = len(x)
    if units == n:
        return float(n)
    p, events = float(x.mean()), float(min(x.sum(), n - x.sum()))
    alike = 1 / units
    if events == 0 or units < 2:
        return 1 / alike
    level = (1 + confidence) / 2
    few = (student(units - 1, confidence) / float(stats.norm.ppf(level))) ** 2
    seen = few * max(variance / (p * (1 - p)), 1 / n)
    return 1 / min(max((events * seen + alike) / (events + 1), 1 / n), 1.0)


def _sums(x: NDArray[np.float64], clusters: Clusters) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and size of each cluster."""
    if clusters is None:
        return x, np.ones(len(x))
    member = membership(clusters)
    if len(member) != len(x):
        raise UserError(f"{len(x)} values but {len(member)} clusters; give each value its cluster")
    return np.bincount(member, x).astype(float), np.bincount(member).astype(float)


def membership(clusters: Labels) -> NDArray[np.int64]:
    """Each item's cluster as a number from 0 on, in order of appearance."""
    number: dict[Hashable, int] = {}
    labels = clusters if isinstance(clusters, Sequence) else np.asarray(clusters).tolist()
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def _cluster_variance(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    groups, n = len(sums), float(sizes.sum())
    if groups < 2:
        return 0.0
    apart = sums - sizes * sums.sum() / n
    return float(groups / (groups - 1) * (apart @ apart)) / n**2


def _crossed_variance(x: NDArray[np.float64], clusters: Clusters) -> tuple[float, int]:
    """Never under what either way alone gives: the two-way difference may be negative in a small matrix. And the fewer clusters."""
    member = np.arange(x.shape[1]) if clusters is None else membership(clusters)
    if len(member) != x.shape[1]:
        raise UserError(f"{x.shape[1]} columns but {len(member)} clusters; give each column its cluster")
    sizes = np.bincount(member).astype(float)
    cell = x @ np.eye(len(sizes))[member]  # row, cluster
    rows = _cluster_variance(x.sum(1), np.full(len(x), float(x.shape[1])))
    columns = _cluster_variance(cell.sum(0), len(x) * sizes)
    cells = _cluster_variance(cell.ravel(), np.tile(sizes, len(x)))
    return max(rows + columns - cells, rows, columns), min(len(x), len(sizes))
