"""A value beside the draws of its null: the one permutation p, the one band, and how small a p so many draws can give.

    p = (1 + #{draws at least as extreme as the value}) / (1 + number of draws)

Ties count against the value, rounding included. Two-sided, extreme is the distance from the mean of all, the value among them:
exact where value and draws are exchangeable, whatever the null's centre (Davison and Hinkley 1997, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rsteer_interp.errors import UserError

Side = Literal["two", "greater", "less"]
_ROUNDING = 1e-9  # of the largest value: what differs by less is a tie


def p_value(value: ArrayLike, draws: ArrayLike, side: Side = "two") -> NDArray[np.float64]:
    """p of each value beside its draws, which lie along the first axis: value [...], draws [draw, ...]."""
    x, null = np.asarray(value, dtype=float), np.asarray(draws, dtype=float)
    if null.ndim == 0 or len(null) == 0 or null.shape[1:] != x.shape:
        raise UserError(f"values of shape {x.shape} beside draws of shape {null.shape}; give draws of the same values")
    if not (np.isfinite(x).all() and np.isfinite(null).all()):
        raise UserError("a value or a draw of its null is not finite; was something measured on no prompts?")
    if side == "two":
        centre = (x + null.sum(0)) / (1 + len(null))
        far, apart = np.abs(x - centre), np.abs(null - centre)
    else:
        far, apart = (x, null) if side == "greater" else (-x, -null)
    rounding = _ROUNDING * np.maximum(np.abs(x), np.abs(null).max(0))
    p: NDArray[np.float64] = (1 + (apart >= far - rounding).sum(0)) / (1 + len(null))
    return p


def percentiles(draws: ArrayLike, confidence: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The central share of draws along the first axis: low and high, each of the shape of a draw."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(draws, dtype=float), [tail, 1 - tail], axis=0)
    return low, high


def upper(draws: ArrayLike, level: float = 0.95) -> NDArray[np.float64]:
    """The quantile of draws along the first axis that a one-sided test at 1 - level must exceed, of the shape of a draw."""
    found: NDArray[np.float64] = np.quantile(np.asarray(draws, dtype=float), level, axis=0)
    return found


def next_draw(draws: ArrayLike, confidence: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Student's interval for one more draw of a normal null: mean +- t sd sqrt(1 + 1/N), along the first axis.

    For nulls of few draws, whose percentiles would be their extremes.
    """
    null = np.asarray(draws, dtype=float)
    mean, spread = _of_next(null)
    half = float(stats.t.ppf((1 + confidence) / 2, len(null) - 1)) * spread
    return mean - half, mean + half


def next_draw_p(value: ArrayLike, draws: ArrayLike) -> NDArray[np.float64]:
    """Two-sided p that one more draw of a normal null lies as far from its mean as the value (of `next_draw`)."""
    null = np.asarray(draws, dtype=float)
    mean, spread = _of_next(null)
    p: NDArray[np.float64] = 2 * stats.t.sf(np.abs(np.asarray(value, dtype=float) - mean) / spread, len(null) - 1)
    return p


def pair_p(difference: float, draws: ArrayLike) -> float:
    """Two-sided p of a difference beside the difference of two draws of a normal null: t = difference / (sd sqrt(2))."""
    null = np.asarray(draws, dtype=float)
    _, spread = _of_next(null)
    apart = spread * math.sqrt(2 / (1 + 1 / len(null)))
    return float(2 * stats.t.sf(abs(difference) / apart, len(null) - 1))


def _of_next(null: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(null) < 2:
        raise UserError(f"{len(null)} draws have no spread; give two or more")
    return null.mean(0), np.maximum(null.std(0, ddof=1), 1e-12) * math.sqrt(1 + 1 / len(null))


@dataclass(frozen=True)
class Beside:
    """A value and the draws of its null, in one unit."""

    value: float
    draws: tuple[float, ...]

    @classmethod
    def of(cls, value: float, draws: ArrayLike | Sequence[float]) -> Beside:
        """UserError for no draws or numbers that are not finite."""
        null = np.asarray(draws, dtype=float)
        p_value(value, null)
        return cls(float(value), tuple(null.tolist()))

    def p(self, side: Side = "two") -> float:
        return float(p_value(self.value, self.draws, side))

    @property
    def least_p(self) -> float:
        """The smallest p that this number of draws can give."""
        return 1 / (1 + len(self.draws))

    @property
    def band(self) -> tuple[float, float]:
        """The central 95 % of the draws; with fewer than 39 of them, their smallest and largest."""
        if len(self.draws) < 39:
            return min(self.draws), max(self.draws)
        low, high = percentiles(self.draws)
        return float(low), float(high)

    @property
    def rank(self) -> int:
        """1 for a value above every draw; ties count against it."""
        return 1 + sum(draw >= self.value for draw in self.draws)

    @property
    def z(self) -> float:
        """Distance from the draws' mean in their standard deviations; 0 where they do not differ."""
        spread = float(np.std(self.draws, ddof=1)) if len(self.draws) > 1 else 0.0
        return (self.value - float(np.mean(self.draws))) / spread if spread > 0 else 0.0

    def __str__(self) -> str:
        low, high = self.band
        return (
            f"{self.value:.3g} ({len(self.draws)} draws of its null {low:.3g} to {high:.3g}, p = {self.p():.2g}, "
            f"at least {self.least_p:.2g})"
        )
