"""COSMIC: the direction chosen from activations alone (Siu et al., arXiv 2506.00085), and how far behaviour agrees.

    S_comply = cos(refusing prompts' states with the candidate taken out, complying prompts' unedited states)
    S_refuse = cos(complying prompts' states with the candidate put in, refusing prompts' unedited states)

States are means over prompts of the last token's at the evaluation layers (`candidates.evaluation_layers`, where we deviate
from the code). The candidate with the largest S_comply + S_refuse is chosen; only the KL filter reads logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.methods import arditi
from rsteer_interp.methods.base import Check, Examples, Fitted, Material, Treatment
from rsteer_interp.methods.candidates import Candidate, Operator, Place, Search, removal
from rsteer_interp.methods.trials import Effects, Selected, chosen_among, shortfall, trials
from rsteer_interp.nulls import cosine
from rsteer_interp.statistics.draws import p_value
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.resampling import permutations

Pool = Literal["concatenate", "average"]


@dataclass(frozen=True)
class Score:
    """A candidate's two cosines, its KL in nats, its length in units of the stream, and the filters it fails.

    `ablation`, the mean refusal log-odds of refusing prompts with the candidate taken out, has no part in the choice. `violation`
    adds up how far it misses the filters: KL above the limit in units of the limit; infinite for a layer too deep at position -1.
    """

    position: int
    layer: int
    length: float
    comply: float
    refuse: float
    kl: float
    ablation: float
    failed: tuple[str, ...]
    violation: float

    @property
    def merit(self) -> float:
        return self.comply + self.refuse


@dataclass(frozen=True, eq=False)
class Selection(Selected[Score]):
    """Also the layers that scores were read at, and the cosine before any edit."""

    layers: tuple[int, ...]  # whose inputs were read: block l - 1's output is block l's input
    unedited: float


@dataclass(frozen=True)
class Cosmic:
    """The linear form: ablation of COSMIC's direction everywhere; strength is kappa of `ablate_everywhere`, 1 the paper's."""

    name: ClassVar[str] = "cosmic"
    label: ClassVar[str] = "COSMIC, ablation"
    source: ClassVar[str] = "Siu et al., arXiv 2506.00085"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 0.75, 1.0, 1.5)
    operator: ClassVar[Operator] = "linear"

    max_kl: float = 0.1
    """Largest mean KL, in nats, that taking the candidate out may cost on ordinary prompts."""
    pool: Pool = "concatenate"
    """How the evaluation layers' mean states become one vector before the cosine; the authors' code has their average."""
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise UserError(f"max_kl is {self.max_kl}; choose a positive number of nats (the paper's is 0.1)")

    def select(self, material: Material) -> Selection:
        """Choose on the select split among the directions of the fit split, with every score kept."""
        tried = trials(material, self.search)
        scores, place = chosen_among(
            tried,
            self.operator,
            lambda effects: self._scores(tried.candidates, effects, tried.base),
        )
        return Selection(
            tried.candidates[place],
            not scores[place].failed,
            tuple(scores[at] for at in sorted(scores)),
            tuple(site.layer for site in tried.evaluation),
            self._similarity(tried.base.removed_states, tried.base.added_states),
        )

    def fit(self, material: Material) -> Fitted:
        chosen = self.select(material).chosen
        return lambda strength: Treatment(removal(material.backend, chosen, self.operator, strength))

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """Agreement of the order by activations with the order by behaviour over the same candidates, both on held-out prompts; and
        what the choice by activations leaves there, of the two that are made on select."""
        there, behaviour = replace(material, select=held), arditi.Arditi(search=self.search)
        found = agreement(self.select(there), seed=material.seed)
        ours, theirs = (_place(one.select(material).chosen) for one in (self, behaviour))
        left = trials(there, self.search).effects((ours, theirs), self.operator)
        cost = float(left[ours].removed.mean() - left[theirs].removed.mean())
        choice = "the same place as by behaviour" if ours == theirs else f"another, which leaves {cost:+.1f} nats"
        return [
            Check(
                f"rank correlation of the scores with the fall of refusal log-odds over candidates; chosen: {choice}",
                Estimate(found.rho, found.low, found.high, found.n),
                f"0 (permuted candidates: p = {found.p:.2g})",
            )
        ]

    def _scores(
        self, candidates: Mapping[Place, Candidate], effects: Mapping[Place, Effects], base: Effects
    ) -> dict[Place, Score]:
        comply = {at: self._similarity(one.removed_states, base.added_states) for at, one in effects.items()}
        refuse = {at: self._similarity(one.added_states, base.removed_states) for at, one in effects.items()}
        limits = (_median_peak(comply), _median_peak(refuse))
        scores = {}
        for (position, layer), one in effects.items():
            at, kl = (position, layer), float(one.kl.double().mean())
            deep = position == -1 and all(layer > limit for limit in limits)
            missed = {"kl": shortfall(-kl, -self.max_kl, self.max_kl), "depth of -1": float("inf") if deep else 0.0}
            scores[at] = Score(
                position,
                layer,
                candidates[at].length,
                comply[at],
                refuse[at],
                kl,
                float(one.removed.mean()),
                tuple(name for name, by in missed.items() if by > 0),
                sum(missed.values()),
            )
        return scores

    def _similarity(self, a: Float[Tensor, "layer d"], b: Float[Tensor, "layer d"]) -> float:
        return cosine(a.flatten(), b.flatten()) if self.pool == "concatenate" else cosine(a.mean(0), b.mean(0))


@dataclass(frozen=True)
class CosmicAffine(Cosmic):
    """The affine form: ACE at the chosen direction's block input alone, in the scores too. Strength 1, the paper's, sets every
    projection to the complying mean; less goes that share of the way, more beyond it by (strength - 1) |r| (`removal`)."""

    name: ClassVar[str] = "cosmic_affine"
    label: ClassVar[str] = "COSMIC, affine"
    strengths: ClassVar[tuple[float, ...]] = (1.0, 1.5, 2.0, 3.0)
    operator: ClassVar[Operator] = "affine"


def _place(candidate: Candidate) -> Place:
    return candidate.position, candidate.layer


def _median_peak(scores: Mapping[Place, float]) -> float:
    """Median over the positions before the last of the layer where a position scores highest (the lower of a middle pair);
    at the last position deeper layers than both medians are dropped. Infinite without other positions: nothing is dropped."""
    peaks = [
        max((score, -layer) for (where, layer), score in scores.items() if where == position)
        for position in sorted({where for where, _ in scores} - {-1})
    ]
    return float(torch.tensor([-layer for _, layer in peaks]).median()) if peaks else float("inf")


@dataclass(frozen=True)
class Agreement:
    """How far COSMIC's order of the candidates is that of behaviour: Spearman's rho of S_comply + S_refuse with the fall of
    refusal log-odds (1: the same order), its 95 % interval (Bonett and Wright 2000) and two-sided permutation p.

    Candidates of neighbouring layers are alike, so that n of them tell less than n independent ones: interval and p are too narrow,
    and say at most that there is an order.
    """

    rho: float
    low: float
    high: float
    p: float
    n: int


def agreement(cosmic: Selection, *, n_permutations: int = 9999, seed: int = 0) -> Agreement:
    """Over the candidates that COSMIC tried. UserError for fewer than five, or when all score the same."""
    fall = np.array([-score.ablation for score in cosmic.scores])
    merit = np.array([score.merit for score in cosmic.scores])
    n = len(merit)
    if n < 5 or np.ptp(fall) == 0 or np.ptp(merit) == 0:
        raise UserError(f"a rank correlation needs five candidates of different scores (n = {n}); lower the stride")
    a, b = stats.rankdata(fall), stats.rankdata(merit)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    rho = float(a @ b / n)
    null = b[permutations(n, n_permutations, seed)] @ a / n
    z, half = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9)), 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return Agreement(rho, float(np.tanh(z - half)), float(np.tanh(z + half)), float(p_value(rho, null)), n)
