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

from rsteer_interp.statistics.intervals import Estimate

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

    `answer_shift` is L_g in nats per token. `removal` is Delta_c = E[c] - E[c_g] over refusing prompts, from judged replies; None
    where a setting of smaller L_g had met the target. `complete`: over all of them; else the first ones ruled the setting out.
    """

    setting: Setting
    answer_shift: Estimate
    removal: Estimate | None = None
    complete: bool = False


@dataclass(frozen=True)
class Found:
    """The finder's choice, whether it meets the target, and every trial in the order of L_g."""

    chosen: Trial
    target_met: bool
    trials: tuple[Trial, ...]


def find_setting(
    answer_shifts: Mapping[Setting, Estimate],
    falls: Callable[[Sequence[Setting], int], Sequence[Sequence[float]]],
    subjects: Sequence[str],
    *,
    target: float,
    first: int,
    at_once: int = 1,
) -> Found:
    """Among the settings whose judged removal Delta_c reaches `target`, the one with the smallest answer shift L_g.

    `falls(settings, n)` gives c - c_g of the first n refusing prompts under each setting, both c from replies that had no part in
    choosing the prompts: those chosen for a high noisy c have a lower one when asked again. `subjects` are the prompts'.

    Settings are judged in the order of L_g until one meets the target, so that none of a smaller L_g is left unjudged: on the `first`
    prompts (`at_once` settings together), and on all of them unless the 95 % interval of those ends below the target. When none
    meets it, the choice is the one that removes most.
    """
    order = sorted(answer_shifts, key=lambda setting: answer_shifts[setting].value)
    removals: dict[Setting, Estimate] = {}
    complete: set[Setting] = set()

    def judge(settings: Sequence[Setting], n: int) -> None:
        for setting, values in zip(settings, falls(settings, n), strict=True):
            removals[setting] = Estimate.of(values, clusters=subjects[:n])
        complete.update(settings if n == len(subjects) else ())

    def removal(setting: Setting) -> float:
        """Over all prompts."""
        if setting not in complete:
            judge([setting], len(subjects))
        return removals[setting].value

    def found(setting: Setting) -> Found:
        trials = {s: Trial(s, answer_shifts[s], removals.get(s), s in complete) for s in order}
        return Found(trials[setting], removals[setting].value >= target, tuple(trials.values()))

    for i in range(0, len(order), at_once):
        together = order[i : i + at_once]
        judge(together, min(first, len(subjects)))
        for setting in together:
            if removals[setting].high >= target and removal(setting) >= target:
                return found(setting)
    while (best := max(order, key=lambda setting: removals[setting].value)) not in complete:
        removal(best)  # few prompts may have said too much of it
    return found(best)
