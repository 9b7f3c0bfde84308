"""Agreement of a judge or a score with reference verdicts: accuracy, AUC and Cohen's kappa, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from rsteer_interp.errors import UserError
from rsteer_interp.statistics.draws import p_value
from rsteer_interp.statistics.intervals import (
    Clusters,
    Estimate,
    Labels,
    Rate,
    difference_variance,
    membership,
    student,
)
from rsteer_interp.statistics.resampling import bootstrap_counts, movable, permutations


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
    them (Obuchowski 1997), and t takes z's place; where the area is 0 or 1, which shows no variance, each cluster counts once.
    """
    found = _area(scores, reference, clusters)
    if found is None:
        return None
    area, positive, negative, df, n = found
    reach = student(df, confidence)

    def excess(a: float) -> float:
        return abs(a - area) - reach * math.sqrt(max(_hanley_mcneil(a, positive, negative), 0.0))

    step = 1e-9  # the area itself is inside, also where the variance is 0 at an area of 0 or 1
    low = brentq(excess, 0.0, area - step) if area > step else 0.0
    high = brentq(excess, area + step, 1.0) if area < 1 - step else 1.0
    return Estimate(area, float(low), float(high), n)


def auc_p(scores: ArrayLike, reference: ArrayLike, *, clusters: Clusters = None) -> float:
    """Two-sided p of an area of 0.5: 0.05 or less where `auc_estimate`'s interval leaves it out. 1 with only one class."""
    found = _area(scores, reference, clusters)
    if found is None:
        return 1.0
    area, positive, negative, df, _ = found
    return float(2 * stats.t.sf(abs(area - 0.5) / math.sqrt(_hanley_mcneil(0.5, positive, negative)), df))


def auc_within(
    scores: ArrayLike, reference: ArrayLike, groups: Labels, n_permutations: int = 999, seed: int = 0
) -> tuple[Estimate, float]:
    """The area of pairs inside a group (subject) alone: P(a True item scores above a False one of its group); and its two-sided p.

    p is that of labels permuted inside groups (van Elteren's rank sum with a group's pairs as its weight), the interval Wilson's of
    the pairs over groups; n is of items in groups with both. UserError where no group has both.
    """
    y, s, member = np.asarray(reference, dtype=bool), np.asarray(scores, dtype=float), membership(groups)
    kept = movable(y.tolist(), groups)
    if not kept.any():
        raise UserError("no group has items of both classes to compare; add prompts of each subject")
    y, s, member = y[kept], s[kept], member[kept]
    rank, pairs, of = np.zeros(len(y)), list[bool](), list[int]()
    for g in np.unique(member):
        mine = member == g
        rank[mine] = stats.rankdata(s[mine])
        above = s[mine & y][:, None] > s[mine & ~y]
        pairs += above.ravel().tolist()
        of += [int(g)] * above.size
    seen = Rate.of(pairs, clusters=of)
    drawn = y[permutations(len(y), n_permutations, seed, within=member)] @ rank
    p = float(p_value(float(rank[y].sum()), drawn))
    return Estimate(seen.rate, seen.low, seen.high, len(y)), p


def _area(scores: ArrayLike, reference: ArrayLike, clusters: Clusters) -> tuple[float, float, float, float, int] | None:
    """Area, effective items of each side, degrees of freedom and n."""
    y, s = np.asarray(reference, dtype=bool), np.asarray(scores, dtype=float)
    if y.all() or not y.any():
        return None
    positive, negative, area = float(y.sum()), float((~y).sum()), float(roc_auc_score(y, s))
    if clusters is None:
        return area, positive, negative, math.inf, len(y)
    member = membership(clusters)
    over = s[y][:, None] - s[~y][None]
    placed = (over > 0) + 0.5 * (over == 0)
    sides, labels = (placed.mean(1), -placed.mean(0)), (member[y], member[~y])
    effect, df = len(member) / len(np.unique(member)), 1.0
    if (
        min(len(np.unique(side)) for side in labels) > 1
    ):  # else one subject has a whole side: nothing is known of another
        (plain, _), (clustered, df) = difference_variance(*sides), difference_variance(*sides, clusters=labels)
        effect = max(clustered / plain, 1.0) if plain > 0 else effect
    return area, positive / effect, negative / effect, df, len(y)


def _hanley_mcneil(a: float, positive: float, negative: float) -> float:
    """Variance of an area of so many items a side, with the mean of both counts (Newcombe 2006, method 5)."""
    half = (positive + negative) / 2
    return a * (1 - a) * (1 + (half - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (positive * negative)


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
