"""One method on the select split, by judged replies: strengths tried, its own best one, and the one that matches the others' removal.

Where the best of the given strengths is the first or the last, or the last removes less than the target, the grid is widened in the
ratio of its steps there: a choice at the edge of what was tried is not a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rsteer_interp.methods import Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.prompts import Prompt
from rsteer_interp.studies.method_comparison.reading import Reading

WIDENED = 4  # steps beyond either end of a method's strengths, at most


@dataclass(frozen=True)
class Trial:
    """A strength with its shares of refused select prompts: removed (now answered), kept (still refused); KL in nats per token."""

    strength: float
    removed: float
    kept: float
    kl: float

    @property
    def score(self) -> float:
        """Youden's J of removing the one refusal and keeping the other: 1 is perfect, 0 is no selectivity."""
        return self.removed + self.kept - 1


@dataclass(frozen=True)
class Chosen:
    best: Trial
    edge: bool
    """Whether the best strength is the weakest or the strongest that was tried, as far as the grid was widened."""
    matched: float | None
    """Strength at which the share removed equals the target, by linear interpolation between trials; None out of reach."""
    trials: tuple[Trial, ...]


def find_strength(
    reading: Reading,
    fitted: Fitted,
    strengths: Sequence[float],
    talks: Sequence[Prompt],
    screened: int,
    label: str,
    *,
    target: float,
    bound: float,
) -> Chosen:
    """Judged trials on at most `screened` refused select prompts of either set, until the choice is inside (see `beyond`)."""
    tried = try_strengths(reading, fitted, (0.0, *strengths), talks, screened, label)
    while (more := beyond(tried, strengths, target=target, bound=bound)) is not None:
        tried += try_strengths(reading, fitted, (more,), talks, screened, label)
    return choose(tried, target=target, bound=bound)


def try_strengths(
    reading: Reading, fitted: Fitted, strengths: Sequence[float], talks: Sequence[Prompt], screened: int, label: str
) -> tuple[Trial, ...]:
    """Trials at every strength; 0 is no treatment."""
    asked, m = reading.refused_prompts("select", screened), reading.material
    treatments = [fitted(strength) if strength else Treatment() for strength in strengths]
    replies = reading.replies_of_each(asked, treatments, f"{label}: select")
    return tuple(
        Trial(
            strength,
            fmean(reply.answers for reply in found[m.remove]),
            fmean(reply.verdict.refused for reply in found[m.keep]),
            float(effects.kl.mean()),
        )
        for strength, found, effects in zip(strengths, replies, reading.effects_of_each(talks, treatments), strict=True)
    )


def beyond(trials: Sequence[Trial], strengths: Sequence[float], *, target: float, bound: float) -> float | None:
    """The next strength to try; None when the choice is inside, or `WIDENED` steps beyond the given ones have been made there.

    Up while the strongest is coherent (KL within the bound) and is the best or removes less than the target; down while the
    weakest is the best. A method of one strength has no grid.
    """
    if len(strengths) < 2:
        return None
    best, tried = _best(trials, bound), sorted((t for t in trials if t.strength), key=lambda t: t.strength)
    weakest, strongest = tried[0], tried[-1]
    up, down = strengths[-1] / strengths[-2], strengths[1] / strengths[0]
    wanted = strongest.kl <= bound and (best == strongest or max(t.removed for t in tried) < target)
    if wanted and strongest.strength * up < strengths[-1] * up ** (WIDENED + 0.5):
        return strongest.strength * up
    if best == weakest and weakest.strength / down > strengths[0] / down ** (WIDENED + 0.5):
        return weakest.strength / down
    return None


def choose(trials: Sequence[Trial], *, target: float, bound: float) -> Chosen:
    """See `Chosen`; trials in any order."""
    ordered = tuple(sorted(trials, key=lambda t: t.strength))
    tried, best = [t for t in ordered if t.strength], _best(trials, bound)
    edge = len(tried) > 1 and best in (tried[0], tried[-1])
    return Chosen(best, edge, _matching(ordered, target), ordered)


def _best(trials: Sequence[Trial], bound: float) -> Trial:
    """The largest score among strengths whose KL is within the bound (of all, when none is), then the smallest KL."""
    tried = [t for t in trials if t.strength]
    coherent = [t for t in tried if t.kl <= bound] or tried
    return max(coherent, key=lambda t: (round(t.score, 12), -t.kl))


def _matching(trials: Sequence[Trial], target: float) -> float | None:
    if len(trials) < 3:
        return None  # a method without a knob removes what it removes
    for low, high in pairwise(trials):
        if low.removed <= target <= high.removed and high.removed > low.removed:
            share = (target - low.removed) / (high.removed - low.removed)
            return low.strength + share * (high.strength - low.strength)
    return None
