"""Ridge mean differences under names of their own: the paper's formula read literally, the pooled form, and two ways to shrink.

Each is a class of `ridge` with other defaults, so that a command can ask for it by name (`--methods rmd rmd_loso`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rsteer_interp.directions.ridge import RidgeMeanDifference, WeightedRidgeMeanDifference


@dataclass(frozen=True)
class LiteralRidge(WeightedRidgeMeanDifference):
    """WRMD with eq. 4 as the paper prints it, Sigma_N + o o^T: it damps the neutral mean o."""

    name: ClassVar[str] = "wrmd_literal"
    covariance: Literal["centred", "literal", "pooled"] = "literal"


@dataclass(frozen=True)
class PooledRidge(RidgeMeanDifference):
    """RMD with the covariance within both classes: the direction of a ridge regression on the class labels."""

    name: ClassVar[str] = "rmd_pooled"
    covariance: Literal["centred", "literal", "pooled"] = "pooled"


@dataclass(frozen=True)
class LedoitWolfRidge(RidgeMeanDifference):
    """RMD with Sigma shrunk by Ledoit and Wolf's (2004) intensity, beside the paper's lambda."""

    name: ClassVar[str] = "rmd_lw"
    shrinkage: Literal["none", "ledoit_wolf"] = "ledoit_wolf"


@dataclass(frozen=True)
class WeightedLedoitWolfRidge(WeightedRidgeMeanDifference):
    """WRMD with Sigma shrunk by Ledoit and Wolf's (2004) intensity."""

    name: ClassVar[str] = "wrmd_lw"
    shrinkage: Literal["none", "ledoit_wolf"] = "ledoit_wolf"


@dataclass(frozen=True)
class LeftOutRidge(RidgeMeanDifference):
    """RMD with lambda chosen by leaving one subject out at a time (LOSO)."""

    name: ClassVar[str] = "rmd_loso"
    penalty: float | Literal["left_out"] = "left_out"


@dataclass(frozen=True)
class WeightedLeftOutRidge(WeightedRidgeMeanDifference):
    """WRMD with lambda chosen by leaving one subject out at a time (LOSO)."""

    name: ClassVar[str] = "wrmd_loso"
    penalty: float | Literal["left_out"] = "left_out"
