"""Direction estimators by their command-line names; a new one is a file in this folder and a line in ESTIMATORS."""

from rsteer_interp.directions.base import Direction, DirectionEstimator, Evidence, fit_directions
from rsteer_interp.directions.mean_difference import MeanDifference, WeightedMeanDifference
from rsteer_interp.directions.ridge import RidgeMeanDifference, WeightedRidgeMeanDifference

ESTIMATORS: dict[str, type[DirectionEstimator]] = {
    "md": MeanDifference,
    "wmd": WeightedMeanDifference,
    "rmd": RidgeMeanDifference,
    "wrmd": WeightedRidgeMeanDifference,
}

__all__ = [
    "ESTIMATORS",
    "Direction",
    "DirectionEstimator",
    "Evidence",
    "MeanDifference",
    "RidgeMeanDifference",
    "WeightedMeanDifference",
    "WeightedRidgeMeanDifference",
    "fit_directions",
]
