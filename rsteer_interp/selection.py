"""Selection: layer scores, steering scales, and the (k, alpha, reposition) configuration finder.

Refusal Steering (arXiv 2512.16602), sections 3.3 and 3.4; the layer score and its sign-disagreement error are those of
Cyberey and Evans (arXiv 2504.17130).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DEEPEST_EXCLUDED = 0.05  # share of the deepest sites that are never steered


@dataclass(frozen=True)
class LayerScore:
    """How well the projection on one site's direction reads the refusal confidence: score = r - RMSE."""

    r: float
    rmse: float

    @property
    def score(self) -> float:
        return self.r - self.rmse


def layer_score(projections: Float[Tensor, " prompt"], confidence: Float[Tensor, " prompt"]) -> LayerScore:
    """r = Pearson(p, c); RMSE = sqrt(mean((c 1[sign p != sign c])^2)), p centred on the neutral mean.

    r is 0 where either side is constant.
    """
    p, c = projections.double(), confidence.double()
    pc, cc = p - p.mean(), c - c.mean()
    norm = float(pc.norm() * cc.norm())
    r = float(pc @ cc) / norm if norm > 0 else 0.0
    wrong = torch.where(p.sign() != c.sign(), c, 0.0)
    return LayerScore(r, float(wrong.pow(2).mean().sqrt()))


def scales(projections: Float[Tensor, " prompt"], confidence: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """(s+, s-): s+ = |Q95(p) / Q95(c)| over prompts with c > 0, s- = |Q5(p) / Q5(c)| over c < 0; 1 for an empty class.

    In the paper's update, alpha > 0 is multiplied by s+ and alpha < 0 by s-. Because most c are near -1 or +1, a scale
    is in practice a tail quantile of the projection.
    """

    def ratio(chosen: Tensor, q: float) -> float:
        if not bool(chosen.any()):
            return 1.0
        top, bottom = projections.double()[chosen].quantile(q), confidence.double()[chosen].quantile(q)
        return abs(float(top / bottom)) if float(bottom) != 0 else 1.0

    return ratio(confidence > 0, 0.95), ratio(confidence < 0, 0.05)


def steerable_layers(n_layers: int) -> range:
    """Block inputs that may be steered: the deepest 5 % (at least the last) are left out, as in the paper, and so is the
    first, where the last prompt token is the same embedding for every prompt."""
    return range(1, n_layers - max(1, round(n_layers * DEEPEST_EXCLUDED)))


def top_layers(scores: Mapping[int, LayerScore], k: int, n_layers: int) -> list[int]:
    """The k best-scored steerable layers, in order of depth."""
    best = sorted(steerable_layers(n_layers), key=lambda layer: -scores[layer].score)[:k]
    return sorted(best)


@dataclass(frozen=True)
class Setting:
    """One global choice g = (k, alpha, reposition)."""

    k: int
    alpha: float
    reposition: bool

    def __str__(self) -> str:
        return f"k={self.k} alpha={self.alpha:g}{' reposition' if self.reposition else ''}"


def grid(ks: Sequence[int], alphas: Sequence[float], repositions: Sequence[bool]) -> list[Setting]:
    return [Setting(k, alpha, reposition) for k in ks for alpha in alphas for reposition in repositions]


@dataclass(frozen=True)
class Trial:
    """A setting with what was measured of it on the select split.

    `removal` is Delta_c = E[c] - E[c_g] on refusing prompts; screened from the log-odds, and `judged_removal` from
    judged replies where the setting came that far. `answer_shift` is L_g in nats.
    """

    setting: Setting
    removal: float
    answer_shift: float
    judged_removal: float | None = None


@dataclass(frozen=True)
class Found:
    """The finder's choice, whether it meets the target, and every trial."""

    chosen: Trial
    target_met: bool
    trials: tuple[Trial, ...]


def find_setting(
    settings: Sequence[Setting],
    *,
    target: float,
    removals: Callable[[Sequence[Setting]], Sequence[float]],
    answer_shift: Callable[[Setting], float],
    judged_removal: Callable[[Setting], float],
    max_judged: int = 4,
    slack: float = 0.8,
) -> Found:
    """Among the settings whose judged removal Delta_c reaches `target`, the one with the smallest answer shift L_g.

    Judging replies is dear, so all settings are first screened by the first-token log-odds: those that reach
    `slack * target` there are judged in the order of L_g, and the first that reaches the target is the answer. When
    none of `max_judged` does, the judged setting that removes most is returned with `target_met` False.
    """
    screened = [Trial(s, removal, 0.0) for s, removal in zip(settings, removals(settings), strict=True)]
    promising = [t for t in screened if t.removal >= slack * target] or sorted(screened, key=lambda t: -t.removal)[
        :max_judged
    ]
    shifted = [Trial(t.setting, t.removal, answer_shift(t.setting)) for t in promising]
    trials = {t.setting: t for t in screened} | {t.setting: t for t in shifted}
    best: Trial | None = None
    for trial in sorted(shifted, key=lambda t: t.answer_shift)[:max_judged]:
        judged = Trial(trial.setting, trial.removal, trial.answer_shift, judged_removal(trial.setting))
        trials[trial.setting] = judged
        assert judged.judged_removal is not None
        if judged.judged_removal >= target:
            return Found(judged, True, tuple(trials.values()))
        if best is None or judged.judged_removal > (best.judged_removal or 0.0):
            best = judged
    assert best is not None
    return Found(best, False, tuple(trials.values()))
