"""Direction estimators by their command-line names; a new one is a file in this folder and a line in ESTIMATORS."""

from collections.abc import Sequence

from rsteer_interp.directions.base import Direction, DirectionEstimator, fit_directions, is_weighted
from rsteer_interp.directions.evidence import CannotFit, Evidence
from rsteer_interp.directions.mean_difference import MeanDifference, PlainWeightedMeanDifference, WeightedMeanDifference
from rsteer_interp.directions.ridge import RidgeMeanDifference, WeightedRidgeMeanDifference
from rsteer_interp.directions.ridge_variants import (
    LedoitWolfRidge,
    LeftOutRidge,
    LiteralRidge,
    PooledRidge,
    WeightedLedoitWolfRidge,
    WeightedLeftOutRidge,
)
from rsteer_interp.errors import UserError

PAPER = ("md", "wmd", "rmd", "wrmd")  # the four of Refusal Steering

ESTIMATORS: dict[str, type[DirectionEstimator]] = {
    estimator.name: estimator
    for estimator in (
        MeanDifference,
        WeightedMeanDifference,
        RidgeMeanDifference,
        WeightedRidgeMeanDifference,
        PlainWeightedMeanDifference,
        PooledRidge,
        LiteralRidge,
        LedoitWolfRidge,
        WeightedLedoitWolfRidge,
        LeftOutRidge,
        WeightedLeftOutRidge,
    )
}


def checked_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if they are different ones of ESTIMATORS and at least one; else UserError."""
    if not names or len(set(names)) < len(names) or not set(names) <= set(ESTIMATORS):
        raise UserError(f"--methods are different names out of {', '.join(ESTIMATORS)}, at least one")
    return tuple(names)


__all__ = [
    "ESTIMATORS",
    "PAPER",
    "CannotFit",
    "Direction",
    "DirectionEstimator",
    "Evidence",
    "MeanDifference",
    "RidgeMeanDifference",
    "WeightedMeanDifference",
    "WeightedRidgeMeanDifference",
    "checked_methods",
    "fit_directions",
    "is_weighted",
]
