"""Arditi et al.: the one direction, of every position and layer, whose ablation takes refusal away (arXiv 2406.11717).

Section 2.4 and the published code: each candidate has three scores at the last prompt token,

    ablation   mean refusal log-odds of refusing prompts, candidate ablated everywhere        the lowest is chosen
    addition   mean refusal log-odds of complying prompts, r added with its length at its block input     at least 0
    KL         mean KL(base || ablated) of the next token on ordinary prompts                             at most 0.1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine
from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.methods.candidates import Candidate, Place, Search, ablate_everywhere
from rsteer_interp.methods.trials import Effects, Selected, chosen_among, shortfall, trials


@dataclass(frozen=True)
class Score:
    """A candidate's scores: refusal log-odds and KL in nats, its length in units of the stream, and the filters it fails.

    `violation` adds up how far it misses them: KL above the limit in units of the limit, and the addition score under its own in
    units of its distance from the unedited model's (of 1 nat at least). 0 for one that passes.
    """

    position: int
    layer: int
    length: float
    ablation: float
    addition: float
    kl: float
    failed: tuple[str, ...]
    violation: float

    @property
    def merit(self) -> float:
        return -self.ablation


@dataclass(frozen=True, eq=False)
class Selection(Selected[Score]):
    """Also the unedited model's log-odds on the same prompts; `effects` are per prompt, for intervals."""

    refusing: float
    complying: float
    effects: Mapping[Place, Effects]


@dataclass(frozen=True)
class Arditi:
    """Directional ablation of the chosen direction everywhere; strength is kappa of `ablate_everywhere`, 1 the paper's."""

    name: ClassVar[str] = "arditi"
    label: ClassVar[str] = "Directional ablation"
    source: ClassVar[str] = "Arditi et al., arXiv 2406.11717"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 0.75, 1.0, 1.5)

    max_kl: float = 0.1
    """Largest mean KL, in nats, that ablation may cost on ordinary prompts."""
    min_addition: float = 0.0
    """Least mean log-odds of refusal, in nats, to which adding r must bring complying prompts."""
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise UserError(f"max_kl is {self.max_kl}; choose a positive number of nats (the paper's is 0.1)")

    def select(self, material: Material) -> Selection:
        """Choose on the select split among the directions of the fit split, with every score kept."""
        tried = trials(material, self.search)
        scores, place = chosen_among(
            tried,
            "linear",
            lambda effects: {at: self._score(tried.candidates[at], one, tried.base) for at, one in effects.items()},
        )
        return Selection(
            tried.candidates[place],
            not scores[place].failed,
            tuple(scores[at] for at in sorted(scores)),
            float(tried.base.removed.mean()),
            float(tried.base.added.mean()),
            tried.effects(scores, "linear"),
        )

    def fit(self, material: Material) -> Fitted:
        chosen = self.select(material).chosen
        return lambda strength: Treatment(ablate_everywhere(material.backend, chosen.vector, strength))

    def _score(self, candidate: Candidate, effects: Effects, base: Effects) -> Score:
        addition, kl = float(effects.added.mean()), float(effects.kl.double().mean())
        missed = {
            "kl": shortfall(-kl, -self.max_kl, self.max_kl),
            "addition": shortfall(addition, self.min_addition, max(self.min_addition - float(base.added.mean()), 1.0)),
        }
        return Score(
            candidate.position,
            candidate.layer,
            candidate.length,
            float(effects.removed.mean()),
            addition,
            kl,
            tuple(name for name, by in missed.items() if by > 0),
            sum(missed.values()),
        )


@dataclass(frozen=True)
class ArditiAddition(Arditi):
    """h - strength r at the chosen direction's one block input, at all positions; strength 1 is the paper's subtraction."""

    name: ClassVar[str] = "arditi_add"
    label: ClassVar[str] = "Subtract the refusal direction"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0)

    def fit(self, material: Material) -> Fitted:
        chosen = self.select(material).chosen
        return lambda strength: Treatment(Affine(chosen.site, chosen.vector, amount=-strength * chosen.length))
