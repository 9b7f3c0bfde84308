"""Random directions with the mean difference's layers and amounts: the null row of a comparison of methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.methods.refusal_steering import MeanDifferenceSteering
from rsteer_interp.statistics.rotation import rotated


@dataclass(frozen=True)
class RandomDirections:
    """h' = h - strength s_l Q v_l with v_l the mean differences and Q one random rotation for all layers; all else is the MD method's.

    As large at every position, and in the sum of all layers, as the MD edit of equal strength (addition: |edit| does not depend
    on h), so what it does is what any push of that size does. Draws depend on the material's seed and this one's.
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
        found = steering(-1.0)
        units = rotated(dict(zip(found.sites, found.directions, strict=True)), 1000 * material.seed + self.draw)
        turned = torch.stack(list(units.values())).float()
        return lambda strength: Treatment(replace(steering(-strength), directions=turned, method=self.name).edit())
