"""Direction and DirectionEstimator: what a direction is, and who fits it (seam 2).

A direction points from complying to refusing: adding it makes a model refuse more, removing it less. Its length is the
estimator's own and is kept; `.unit` is for projecting and editing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions.evidence import CannotFit, Evidence, check
from rsteer_interp.directions.ridge import null_space_share
from rsteer_interp.errors import UserError


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at a site that points from complying to refusing, with its length as estimated and where it comes from.

    `offset` is the neutral offset o: the mean of the neutral prompts, or, where `offset_source` says so, the midpoint of the
    class means (`counts["neutral"]` was under MIN_NEUTRAL). `diagnostics` are the share of |v|^2 in the null space of the
    complying prompts' covariance, where no prompt speaks for it, and the estimator's own numbers.
    """

    vector: Float[Tensor, " d"]
    site: Site
    estimator: str
    hyperparameters: Mapping[str, Any]
    sets: tuple[str, ...]
    counts: Mapping[str, int]
    fingerprint: str
    offset: Float[Tensor, " d"]
    offset_source: Literal["neutral", "midpoint"]
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> float:
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Float[Tensor, " d"]:
        unit: Tensor = self.vector.double() / self.vector.double().norm()
        return unit.float()

    def record(self) -> dict[str, Any]:
        """Everything but the two tensors, as plain JSON."""
        return {
            "site": str(self.site),
            "estimator": self.estimator,
            "hyperparameters": dict(self.hyperparameters),
            "sets": list(self.sets),
            "counts": dict(self.counts),
            "fingerprint": self.fingerprint,
            "length": self.length,
            "offset_source": self.offset_source,
            "diagnostics": dict(self.diagnostics),
        }


@runtime_checkable
class DirectionEstimator(Protocol):
    """A frozen dataclass whose fields are hyperparameters, with a `name` and `fit(evidence) -> vector` in float64.

    It may also have `diagnose(evidence, vector) -> dict[str, float]`, whose numbers are kept with the direction, and
    `weighted: ClassVar[bool] = True` where it weighs prompts by |c| and so needs graded scores.
    """

    name: ClassVar[str]

    def fit(self, evidence: Evidence) -> Float[Tensor, " d"]: ...


def fit_directions(
    estimator: DirectionEstimator,
    evidence: Mapping[Site, Evidence],
    *,
    sets: Iterable[str] = (),
    fingerprint: str = "",
) -> dict[Site, Direction]:
    """One Direction per site. UserError for an empty class, and for states or a result that are not finite or are zero;
    CannotFit where the estimator weighs by |c| and all weights are equal: its unweighted twin would stand under its name."""
    names = tuple(sets)
    return {site: _fit(estimator, site, seen, names, fingerprint) for site, seen in evidence.items()}


def _fit(
    estimator: DirectionEstimator, site: Site, seen: Evidence, sets: tuple[str, ...], fingerprint: str
) -> Direction:
    check(seen, site)
    if is_weighted(estimator) and not seen.graded:
        raise CannotFit(
            f"'{estimator.name}' weighs prompts by |c|, and its weights are all equal; give graded scores: "
            "sampled replies, --samples 4 or more"
        )
    vector = estimator.fit(seen)
    if vector.shape != (seen.d,):
        raise UserError(
            f"estimator '{estimator.name}' gave shape {tuple(vector.shape)} at {site}; it must return ({seen.d},)"
        )
    stored = vector.detach().float()
    norm = float(stored.double().norm())
    if not 0 < norm < float("inf"):
        raise UserError(
            f"estimator '{estimator.name}' gave a vector of length {norm} at {site}; do the classes differ there?"
        )
    diagnose = getattr(estimator, "diagnose", None)
    return Direction(
        stored,
        site,
        estimator.name,
        asdict(estimator) if is_dataclass(estimator) and not isinstance(estimator, type) else {},
        sets,
        seen.counts,
        fingerprint,
        seen.offset.float(),
        seen.offset_source,
        {
            "null_space_share": null_space_share(vector, seen.complying.scatter),
            **(diagnose(seen, vector) if diagnose is not None else {}),
        },
    )


def is_weighted(estimator: DirectionEstimator | type[DirectionEstimator]) -> bool:
    """Whether the estimator weighs prompts by |c|."""
    return bool(getattr(estimator, "weighted", False))
