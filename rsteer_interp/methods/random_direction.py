"""Random directions with the mean difference's layers and amounts: the null row of a comparison of methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rsteer_interp.directions import RandomDirection
from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.methods.refusal_steering import MeanDifferenceSteering, evidence


@dataclass(frozen=True)
class RandomDirections:
    """h' = h - strength s_l u_l with u_l uniform on the sphere, drawn for each layer; all else is the MD method's.

    As large at every position as the MD edit of equal strength (addition: |edit| does not depend on h), so what it does is
    what any push of that size does. Draws depend on the material's seed, this one's and the site.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "Random directions"
    source: ClassVar[str] = "null"
    strengths: ClassVar[tuple[float, ...]] = MeanDifferenceSteering.strengths

    draw: int = 0
    """Which of the draws: several, for a range."""
    k: int = 4

    def fit(self, material: Material) -> Fitted:
        steering = MeanDifferenceSteering(k=self.k).configure(material)
        sites = steering(-1.0).sites
        estimator = RandomDirection(seed=1000 * material.seed + self.draw)
        drawn = torch.stack([estimator.fit(seen) for seen in evidence(material, sites).values()])
        units = (drawn / drawn.norm(dim=1, keepdim=True)).float()
        return lambda strength: Treatment(replace(steering(-strength), directions=units, method=self.name).edit())
