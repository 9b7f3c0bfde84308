"""One method on the select split: every strength tried, its own best one, and the one that matches the others' removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rsteer_interp.methods import Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.prompts import Prompt
from rsteer_interp.studies.method_comparison.reading import Reading


@dataclass(frozen=True)
class Trial:
    """A strength with its shares of refused select prompts: removed (read as answered), kept (still read as refused)."""

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
    matched: float | None
    """Strength at which the share removed equals the target, by linear interpolation between trials; None out of reach."""
    trials: tuple[Trial, ...]


def try_strengths(
    reading: Reading, fitted: Fitted, strengths: Sequence[float], talks: Sequence[Prompt], screened: int
) -> tuple[Trial, ...]:
    """Trials at 0 and at every strength, on at most `screened` refused select prompts of either set."""
    treatments = [Treatment(), *map(fitted, strengths)]
    kl = [0.0, *(float(e.kl.mean()) for e in reading.effects_of_each(talks, treatments[1:]))]
    return tuple(
        Trial(strength, fmean(answered.tolist()), fmean(refused.tolist()), cost)
        for strength, (answered, refused), cost in zip(
            (0.0, *strengths), reading.outcomes("select", treatments, screened), kl, strict=True
        )
    )


def judged_score(reading: Reading, treatment: Treatment, label: str, n: int) -> float:
    """The score from judged replies on select, by which methods are ranked. Log-odds, which serve to choose among a method's own
    strengths, would not do: what changes the prompt changes the words that refusals begin with."""
    m = reading.material
    replies = reading.replies(reading.refused_prompts("select", n), treatment, f"{label}: select")
    still = {name: fmean(reply.verdict.refused for reply in found) for name, found in replies.items()}
    return still[m.keep] - still[m.remove]


def choose(trials: Sequence[Trial], *, target: float, bound: float) -> Chosen:
    """Best: the largest score among strengths whose KL is within the bound (of all, when none is), then the smallest KL."""
    tried = [t for t in trials if t.strength]
    coherent = [t for t in tried if t.kl <= bound] or tried
    best = max(coherent, key=lambda t: (round(t.score, 12), -t.kl))
    return Chosen(best, _matching(trials, target), tuple(trials))


def _matching(trials: Sequence[Trial], target: float) -> float | None:
    if len(trials) < 3:
        return None  # a method without a knob removes what it removes
    for low, high in pairwise(trials):
        if low.removed <= target <= high.removed and high.removed > low.removed:
            share = (target - low.removed) / (high.removed - low.removed)
            return low.strength + share * (high.strength - low.strength)
    return None
