"""Mean differences: MD, and the score-weighted WMD in two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.directions.evidence import Evidence
from rsteer_interp.errors import UserError


@dataclass(frozen=True)
class MeanDifference:
    """MD: mean of refusing minus mean of complying states (Arditi et al., eq. 2; Refusal Steering before normalising)."""

    name: ClassVar[str] = "md"

    def fit(self, evidence: Evidence) -> Float[Tensor, " d"]:
        return evidence.refusing.mean - evidence.complying.mean


@dataclass(frozen=True)
class WeightedMeanDifference:
    """WMD: unit(mu_P - o) - unit(mu_N - o) with weights |c| and neutral offset o (Cyberey and Evans, Steering the CensorShip).

    Form "plain" is mu_P - mu_N of the weighted means, in which o cancels. "units" has no unit (its length is at most 2), and
    with o at the midpoint of the class means (see `Evidence.offset`) it is nearly parallel to "plain".
    """

    name: ClassVar[str] = "wmd"
    weighted: ClassVar[bool] = True
    form: Literal["units", "plain"] = "units"

    def fit(self, evidence: Evidence) -> Float[Tensor, " d"]:
        refusing, complying = evidence.refusing_weighted.mean, evidence.complying_weighted.mean
        if self.form == "plain":
            return refusing - complying
        return _unit(refusing - evidence.offset) - _unit(complying - evidence.offset)


@dataclass(frozen=True)
class PlainWeightedMeanDifference(WeightedMeanDifference):
    """WMD in its plain form: the difference of the weighted means."""

    name: ClassVar[str] = "wmd_plain"
    form: Literal["units", "plain"] = "plain"


def _unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    if not bool(vector.norm() > 0):
        raise UserError(
            "a class mean lies on the neutral mean, so it has no direction; use WMD with form 'plain', or MD"
        )
    unit: Tensor = vector / vector.norm()
    return unit
