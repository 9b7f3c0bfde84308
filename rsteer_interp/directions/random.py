"""The null estimator: a random direction as long as the mean difference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.directions.evidence import Evidence
from rsteer_interp.directions.mean_difference import MeanDifference
from rsteer_interp.nulls import random_unit_vectors


@dataclass(frozen=True)
class RandomDirection:
    """A uniformly random direction with the length of MD; drawn from `seed` and the evidence's site, not from its states."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def fit(self, evidence: Evidence) -> Float[Tensor, " d"]:
        key = hashlib.blake2b(f"{self.seed}|{evidence.site}".encode(), digest_size=4)
        difference = MeanDifference().fit(evidence)
        unit = random_unit_vectors(1, evidence.d, int.from_bytes(key.digest(), "big"))[0].to(difference)
        return unit.mul(difference.norm())
