"""Agreement of a judge or a score with reference verdicts: accuracy, AUC and Cohen's kappa, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.intervals import Clusters, Estimate, Rate, difference_variance, membership, student
from rsteer_interp.statistics.resampling import bootstrap_counts


@dataclass(frozen=True)
class Agreement:
    """How well verdicts agree with a reference on the same n items (two judges, or a judge and hand labels).

    `accuracy` has a Wilson interval, `kappa` (Cohen 1960) a bootstrap percentile interval, `auc` of the scores Newcombe's (2006,
    method 5). kappa is None when all verdicts on both sides are the same, auc without scores or with one class.
    """

    n: int
    accuracy: Rate
    kappa: Estimate | None
    auc: Estimate | None

    @classmethod
    def of(
        cls,
        verdicts: ArrayLike,
        reference: ArrayLike,
        scores: ArrayLike | None = None,
        *,
        clusters: Clusters = None,
        seed: int = 0,
    ) -> Agreement:
        """`scores`: graded confidence behind the verdicts (refusal confidence, log-odds), higher for True. Items of one cluster
        (replies to one prompt) are not independent."""
        x, y = np.asarray(verdicts, dtype=bool), np.asarray(reference, dtype=bool)
        if len(x) != len(y) or len(x) == 0:
            raise UserError(
                f"agreement of {len(x)} verdicts with {len(y)}; give the same items, one or more, in the same order"
            )
        auc = None if scores is None else auc_estimate(scores, y, clusters=clusters)
        return cls(len(x), Rate.of(x == y, clusters=clusters), _kappa(x, y, clusters, seed), auc)


def auc_estimate(
    scores: ArrayLike, reference: ArrayLike, confidence: float = 0.95, *, clusters: Clusters = None
) -> Estimate | None:
    """Area under the ROC curve of scores for True items; None with only one class. 0.5 is chance.

    The interval holds every area A with |A - estimate| <= z sqrt(V(A)), V the Hanley-McNeil variance (Newcombe 2006, method 5): it
    keeps a width at AUC = 1. Over clusters there are as many items a side fewer as the variance of the placements is larger for
    them (Obuchowski 1997); where the area is 0 or 1, which shows no variance, each cluster counts once.
    """
    y, s = np.asarray(reference, dtype=bool), np.asarray(scores, dtype=float)
    positive, negative = float(y.sum()), float((~y).sum())
    if positive == 0 or negative == 0:
        return None
    area = float(roc_auc_score(y, s))
    reach = float(stats.norm.ppf((1 + confidence) / 2))
    if clusters is not None:
        effect, reach = _design_effect(s, y, membership(clusters), confidence)
        positive, negative = positive / effect, negative / effect
    half = (positive + negative) / 2

    def excess(a: float) -> float:
        variance = a * (1 - a) * (1 + (half - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (positive * negative)
        return abs(a - area) - reach * math.sqrt(max(variance, 0.0))

    step = 1e-9  # the area itself is inside, also where the variance is 0 at an area of 0 or 1
    low = brentq(excess, 0.0, area - step) if area > step else 0.0
    high = brentq(excess, area + step, 1.0) if area < 1 - step else 1.0
    return Estimate(area, float(low), float(high), len(y))


def _design_effect(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], member: NDArray[np.int64], confidence: float
) -> tuple[float, float]:
    """Variance of the area over clusters in units of that of independent items, at least 1; and Student's t for the clusters."""
    over = scores[positive][:, None] - scores[~positive][None]
    placed = (over > 0) + 0.5 * (over == 0)
    sides, labels = (placed.mean(1), -placed.mean(0)), (member[positive], member[~positive])
    units = min(len(np.unique(side)) for side in labels)
    alike = len(member) / len(np.unique(member))
    if units < 2:  # one subject has all the refusals: nothing is known of another
        return alike, student(1, confidence)
    plain, _ = difference_variance(*sides)
    clustered, df = difference_variance(*sides, clusters=labels)
    return (max(clustered / plain, 1.0) if plain > 0 else alike), student(df, confidence)


def _kappa(x: np.ndarray, y: np.ndarray, clusters: Clusters, seed: int, n_draws: int = 2000) -> Estimate | None:
    if len(np.unique(np.concatenate([x, y]))) < 2:
        return None
    cells = np.eye(4)[2 * x + y]
    draws = bootstrap_counts(len(x), n_draws, seed, clusters=clusters) @ cells
    draws /= draws.sum(1, keepdims=True)
    expected = (draws[:, 2] + draws[:, 3]) * (draws[:, 1] + draws[:, 3])
    expected += (draws[:, 0] + draws[:, 1]) * (draws[:, 0] + draws[:, 2])
    defined = expected < 1  # a draw with one verdict only has no kappa
    kappas = (draws[defined, 0] + draws[defined, 3] - expected[defined]) / (1 - expected[defined])
    return Estimate.of_draws(float(cohen_kappa_score(x, y)), kappas, len(x))
