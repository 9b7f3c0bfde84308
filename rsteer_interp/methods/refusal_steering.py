"""Refusal Steering (arXiv 2512.16602): the vectors, layers, scales and both updates of its section 3, as methods.

At the k block inputs whose direction reads refusal best, at every position and decoding step (strength = |alpha|),

    addition:    h' = h + alpha s_l v_l          reposition:    h' = h - <h - o_l, v_l> v_l + alpha s_l v_l

with alpha < 0 and s_l the 5 % quantile of the projections of answered prompts over that of their confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import (
    Direction,
    DirectionEstimator,
    Evidence,
    MeanDifference,
    WeightedRidgeMeanDifference,
    fit_directions,
    is_weighted,
)
from rsteer_interp.methods.base import Examples, Fitted, Material, Treatment
from rsteer_interp.selection import layer_score, scales, steerable_layers, top_layers
from rsteer_interp.steering import Steering, make_steering

SOURCE = "arXiv 2512.16602"


def evidence(material: Material, sites: Iterable[Site], graded: bool = False) -> dict[Site, Evidence]:
    """Fit states and confidence of the set whose refusals are to go and of its contrast, together, at each site.

    Refused against answered of both: prompts of one set on both sides keep the subject from being all that differs.
    """
    rows, confidence = _pooled(material, material.fit, sites, graded)
    return {site: Evidence(x, confidence, site=site) for site, x in rows.items()}


def best_layers(material: Material, directions: Mapping[Site, Direction], k: int, graded: bool = False) -> list[int]:
    """The k steerable layers with the largest r - RMSE on the select split (section 3.3), in order of depth."""
    rows, confidence = _pooled(material, material.select, directions, graded)
    scores = {site.layer: layer_score(projections(d, rows[site]), confidence) for site, d in directions.items()}
    return top_layers(scores, k, material.n_layers)


def projections(direction: Direction, states: Float[Tensor, "prompt d"]) -> Float[Tensor, " prompt"]:
    """p = <h - o, v>, v of unit length, about the direction's neutral offset o: uncentred, its sign would mean nothing."""
    return (states.double() - direction.offset.double()) @ direction.unit.double()


def _pooled(
    material: Material, examples: Mapping[str, Examples], sites: Iterable[Site], graded: bool
) -> tuple[dict[Site, Tensor], Tensor]:
    both = [examples[material.remove], examples[material.contrast]]
    rows = {site: torch.cat([x.states[site] for x in both]) for site in sites}
    return rows, torch.cat([x.graded if graded else x.confidence for x in both])


@dataclass(frozen=True)
class MeanDifferenceSteering:
    """MD with addition, the paper's simplest row; the other rows differ in the estimator and the update.

    The paper's finder also chooses k and the update; here they are fields, and the strength alone is chosen on select.
    An estimator that weighs by |c| gets graded confidence for fit, layers and scales, the others the greedy replies' verdicts.
    """

    name: ClassVar[str] = "md"
    label: ClassVar[str] = "Mean difference"
    source: ClassVar[str] = SOURCE
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 1.0)

    estimator: DirectionEstimator = field(default_factory=MeanDifference)
    k: int = 4
    """How many layers are steered: the paper's for MD, and for every method on its 4B model but one."""
    reposition: bool = False

    def fit(self, material: Material) -> Fitted:
        """Closed form from the states in the material; the model is run for graded confidence alone."""
        steering = self.configure(material)
        return lambda strength: Treatment(steering(-strength).edit())

    def configure(self, material: Material) -> Callable[[float], Steering]:
        """From alpha (negative: away from refusal) to the configuration. UserError for a class without prompts; CannotFit for a
        weighted estimator and confidence that is not graded."""
        backend, graded = material.backend, is_weighted(self.estimator)
        sites = [Site(layer) for layer in steerable_layers(material.n_layers)]
        directions = fit_directions(
            self.estimator,
            evidence(material, sites, graded),
            sets=(material.remove, material.contrast),
            fingerprint=backend.fingerprint,
        )
        chosen = [Site(layer) for layer in best_layers(material, directions, self.k, graded)]
        rows, confidence = _pooled(material, material.select, chosen, graded)
        vectors = {site: directions[site].unit for site in chosen}
        references = {site: directions[site].offset for site in chosen}
        sizes = {site: scales(projections(directions[site], rows[site]), confidence) for site in chosen}

        def steering(alpha: float) -> Steering:
            return make_steering(
                self.name,
                vectors,
                references,
                sizes,
                chosen,
                alpha=alpha,
                reposition=self.reposition,
                refusal_tokens=material.refusal_tokens,
                fingerprint=backend.fingerprint,
            )

        return steering


@dataclass(frozen=True)
class MeanDifferenceReposition(MeanDifferenceSteering):
    """MD with reposition, which the paper's finder never chose."""

    name: ClassVar[str] = "md_reposition"
    label: ClassVar[str] = "Mean difference, reposition"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)

    reposition: bool = True


@dataclass(frozen=True)
class WeightedRidgeSteering(MeanDifferenceSteering):
    """WRMD with addition: the paper's best row (of 80B parameters, with k = 16 of 48 layers)."""

    name: ClassVar[str] = "wrmd"
    label: ClassVar[str] = "Weighted ridge"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)

    estimator: DirectionEstimator = field(default_factory=WeightedRidgeMeanDifference)


@dataclass(frozen=True)
class WeightedRidgeReposition(WeightedRidgeSteering):
    """WRMD with reposition."""

    name: ClassVar[str] = "wrmd_reposition"
    label: ClassVar[str] = "Weighted ridge, reposition"

    reposition: bool = True
