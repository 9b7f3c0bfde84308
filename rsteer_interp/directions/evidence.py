"""Evidence: what a direction is fitted on, states with refusal confidence or only their Moments, and whether it will do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments


class CannotFit(UserError):
    """One estimator cannot be fitted on this evidence, though others can: a table says why in the estimator's row."""


Group = Literal["refusing", "complying", "neutral", "refusing_weighted", "complying_weighted"]
GROUPS: tuple[Group, ...] = ("refusing", "complying", "neutral", "refusing_weighted", "complying_weighted")
MIN_NEUTRAL = 8  # with fewer neutral prompts their mean is noise, and the offset falls back to the midpoint


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an estimator sees at one site: states h and refusal confidence c in [-1, 1] per prompt, or only their Moments.

    Refusing is c > neutral_band, complying c < -neutral_band, neutral |c| <= neutral_band (Refusal Steering, section 3.1;
    binary labels are c = +1 and -1). The weighted groups hold the same prompts with weights w = |c|: the paper only says that
    weights are nonnegative and come from the scores. Moments are made when asked for and kept. Entries of `moments` stand
    before what the rows would give, so neutral prompts from another set are `moments={"neutral": Moments.of(...)}`.
    """

    rows: Float[Tensor, "n d"] | None = None
    confidence: Float[Tensor, " n"] | None = None
    neutral_band: float = 0.15
    moments: Mapping[Group, Moments] = field(default_factory=dict)
    site: Site | None = None
    subjects: Sequence[Hashable] | None = None
    """The subject of every row, for estimators that leave one out and for split halves."""

    def __post_init__(self) -> None:
        if not 0 <= self.neutral_band < 1:
            raise UserError(f"neutral_band is {self.neutral_band}; choose a number from 0 up to, not including, 1")
        if (self.rows is None) != (self.confidence is None):
            raise UserError("states and scores come together; give both, or only moments")
        if self.rows is None:
            missing = [name for name in GROUPS if name not in self.moments]
            if missing:
                raise UserError(f"moments of '{missing[0]}' are missing; give states and scores, or all five groups")
            return
        assert self.confidence is not None
        if len(self.rows) != len(self.confidence):
            raise UserError(f"{len(self.rows)} states but {len(self.confidence)} scores; give one score per state")
        if self.subjects is not None and len(self.subjects) != len(self.rows):
            raise UserError(f"{len(self.rows)} states but {len(self.subjects)} subjects; give one subject per state")
        if not bool((self.confidence.abs() <= 1).all()):
            raise UserError(
                "a refusal score is not in [-1, 1]; refusal confidence runs from -1 (complies) to +1 (refuses)"
            )

    @classmethod
    def streamed(
        cls,
        batches: Iterable[tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]],
        neutral_band: float = 0.15,
        site: Site | None = None,
    ) -> Evidence:
        """Evidence of (states, scores) batches of which only the moments are kept."""
        merged: Evidence | None = None
        for states, scores in batches:
            part = cls(states, scores, neutral_band, site=site)
            merged = part.summary() if merged is None else merged.merge(part)
        if merged is None:
            raise UserError("no batches of states; collect activations of at least one prompt")
        return merged

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of both, as moments only."""
        if self.neutral_band != other.neutral_band:
            raise UserError(f"neutral bands {self.neutral_band} and {other.neutral_band} do not merge; use one band")
        groups: dict[Group, Moments] = {name: getattr(self, name).merge(getattr(other, name)) for name in GROUPS}
        return Evidence(neutral_band=self.neutral_band, moments=groups, site=self.site)

    def summary(self) -> Evidence:
        """The same evidence without its rows: the five groups' moments."""
        groups: dict[Group, Moments] = {name: getattr(self, name) for name in GROUPS}
        return Evidence(neutral_band=self.neutral_band, moments=groups, site=self.site)

    def subset(self, index: Int[Tensor, " k"] | Bool[Tensor, " n"]) -> Evidence:
        """Evidence of some prompts, for split halves and bootstraps; moments given by hand stay."""
        kept = torch.arange(len(self.states))[index].tolist()
        subjects = None if self.subjects is None else [self.subjects[i] for i in kept]
        return Evidence(self.states[index], self.scores[index], self.neutral_band, self.moments, self.site, subjects)

    @property
    def states(self) -> Float[Tensor, "n d"]:
        """The rows, on the CPU like the moments, for estimators that need more than those. UserError when only moments were kept."""
        return self._raw(self.rows).cpu()

    @property
    def scores(self) -> Float[Tensor, " n"]:
        """Refusal confidence per row. UserError when only moments were kept."""
        return self._raw(self.confidence).cpu()

    @staticmethod
    def _raw(value: Tensor | None) -> Tensor:
        if value is None:
            raise UserError("this needs the states of each prompt, but only moments were kept; collect with states")
        return value

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """+1 refusing, -1 complying, 0 neutral, per row."""
        scores = self.scores
        return (scores > self.neutral_band).long() - (scores < -self.neutral_band).long()

    @property
    def d(self) -> int:
        return int(self.rows.shape[1]) if self.rows is not None else self.moments["refusing"].d

    @cached_property
    def refusing(self) -> Moments:
        return self._group("refusing")

    @cached_property
    def complying(self) -> Moments:
        return self._group("complying")

    @cached_property
    def neutral(self) -> Moments:
        return self._group("neutral")

    @cached_property
    def refusing_weighted(self) -> Moments:
        return self._group("refusing_weighted")

    @cached_property
    def complying_weighted(self) -> Moments:
        return self._group("complying_weighted")

    def _group(self, name: Group) -> Moments:
        if name in self.moments:
            return self.moments[name]
        wanted = {"refusing": 1, "complying": -1, "neutral": 0}[name.removesuffix("_weighted")]
        keep = self.labels == wanted
        return Moments.of(self.states[keep], self.scores[keep].abs() if name.endswith("_weighted") else None)

    @property
    def offset_source(self) -> Literal["neutral", "midpoint"]:
        return "neutral" if self.neutral.count >= MIN_NEUTRAL else "midpoint"

    @property
    def offset(self) -> Float[Tensor, " d"]:
        """o: mean state of the neutral prompts; with fewer than MIN_NEUTRAL of them, the midpoint of the class means."""
        if self.offset_source == "neutral":
            return self.neutral.mean
        return (self.refusing.mean + self.complying.mean) / 2

    @property
    def graded(self) -> bool:
        """Whether |c| differs inside a class (up to rounding): n sum w^2 > W^2 for weights w that are not all equal."""
        classes = (self.refusing_weighted, self.complying_weighted)
        return any(m.count * m.squared_weight > (1 + 1e-9) * m.weight**2 for m in classes)

    @property
    def counts(self) -> dict[str, int]:
        groups = {"refusing": self.refusing, "complying": self.complying, "neutral": self.neutral}
        return {name: moments.count for name, moments in groups.items()}


def check(evidence: Evidence, site: Site | None) -> None:
    """UserError when a class is empty or a statistic is not finite; names the class, its n and the remedy."""
    band = evidence.neutral_band
    for name, moments, sign in (("refusing", evidence.refusing, "> "), ("complying", evidence.complying, "< -")):
        if moments.count == 0:
            raise UserError(
                f"no {name} prompts (n = 0 with score {sign}{band:g}) at {site}; "
                f"add prompts that the model {'refuses' if name == 'refusing' else 'answers'}, or lower the neutral band"
            )
    for name, moments in (
        ("refusing", evidence.refusing),
        ("complying", evidence.complying),
        ("neutral", evidence.neutral),
    ):
        total = float(moments.mean.abs().sum()) + moments.scatter.trace
        if not total < float("inf"):
            raise UserError(
                f"states of the {name} prompts (n = {moments.count}) at {site} are not finite; "
                "use a wider dtype (bfloat16 or float32)"
            )
