"""What the causal part of a "dimensionality" result holds, typed: written by the study, read by its words and its figure.

Removals are refusal log-odds in nats, on the refused report prompts; a curve has one entry per K of its `ks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from rsteer_interp.errors import UserError
from rsteer_interp.reader import Validation
from rsteer_interp.statistics.intervals import Estimate, Rate

if TYPE_CHECKING:
    from rsteer_interp.results import Result

ABLATION, ROTATED = "ablation", "ablation, rotated"
"""Kinds of edit whose read-out is checked, beside no edit."""
Basis = Literal["site", "layer", "global"]
"""Which rows are ablated: each site's own, one layer's at all sites, or the leading ones of all sites together at all sites."""


@dataclass(frozen=True)
class Enough:
    """The smallest K of the sweep that removes `share` of the removable, with its band over resampled subjects.

    None: more than the largest K of the sweep. `frequency` says how often each K was it, `never` how often none was.
    """

    k: int | None
    low: int | None
    high: int | None
    share: float
    frequency: tuple[float, ...]
    never: float


@dataclass(frozen=True)
class Curve:
    """Removal by K: `net` is beyond the mean of the null's draws, whose band (95 % for one more draw) is low to high."""

    ks: tuple[int, ...]
    n: int
    n_null: int
    removed: tuple[Estimate, ...]
    net: tuple[Estimate, ...]
    null_mean: tuple[float, ...]
    null_low: tuple[float, ...]
    null_high: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    enough: Enough | None
    enough_without_null: Enough | None

    @property
    def beyond(self) -> bool:
        """Whether some K removes more than the null's draws, at a false-discovery rate of 5 %."""
        return any(q <= 0.05 and net.value > 0 for q, net in zip(self.q, self.net, strict=True))


@dataclass(frozen=True)
class AblationCurve(Curve):
    """With the dose (mean |edit| / |resid| over sites) and the KL of the first token on answered prompts, nats."""

    dose: tuple[float, ...]
    kl: tuple[Estimate, ...]
    null_kl: tuple[Estimate, ...]


@dataclass(frozen=True)
class PushCurve(Curve):
    """With the share of the gradient's length that lies in the subspace."""

    gradient_share: tuple[float, ...]


@dataclass(frozen=True)
class Control:
    """Subspaces that should not carry refusal, `n_draws` of them: mean removal, the least and the most of a draw."""

    ks: tuple[int, ...]
    n_draws: int
    removed: tuple[Estimate, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]
    to_match_one: int | None
    """The smallest K that removes as much as one dimension of the leading family; None: no K does."""
    dose: tuple[float, ...] | None = None
    kl: tuple[Estimate, ...] | None = None


@dataclass(frozen=True)
class Removable:
    """What counts as all: the most that any K of any subspace removes beyond its null, or the gap where that is smaller."""

    size: Estimate
    bounded_by_gap: bool


@dataclass(frozen=True)
class Ablation:
    """Ablation at some block inputs. `families` ablate each site's own rows; `shared` the leading family's, one basis for all
    sites; gap = log-odds of the refused minus of the answered prompts, both without an edit."""

    layers: tuple[int, ...]
    n_subjects: int
    base_log_odds: Estimate
    answered_log_odds: Estimate
    gap: float
    removable: Removable
    families: dict[str, AblationCurve]
    shared: dict[Basis, AblationCurve]
    controls: dict[str, Control]


@dataclass(frozen=True)
class Push:
    """The best push inside K dimensions at one layer, of `dose` |resid|."""

    layer: int
    dose: float
    n_select: int
    removable: Removable
    families: dict[str, PushCurve]
    controls: dict[str, Control]
    whole_gradient: Estimate


@dataclass(frozen=True)
class UnionRank:
    """How many dimensions the K rows of all sites have together: see `subspace_union`. Null: random rows, apart for each site."""

    k: int
    rows: int
    effective: float
    dims_90: int
    dims_99: int
    effective_band: tuple[float, float] | None
    dims_90_band: tuple[float, float] | None
    null_effective: float
    null_dims_90: float
    null_dims_99: float
    n_null: int


@dataclass(frozen=True)
class Judged:
    """Judged greedy replies under one edit, beside what log-odds above the check's threshold say of the same prompts.

    `basis` None: no edit. `turned`: the edit's null, one rotation. `drift`: share by log-odds minus share by the judge, over all
    prompts, paired.
    """

    basis: Basis | None
    k: int
    turned: bool
    judged: Rate
    by_log_odds: Rate
    judged_answered: Rate
    log_odds: Estimate
    drift: Estimate


@dataclass(frozen=True)
class Check:
    """The read-out under edits of the sweep's kind. `kinds`: log-odds against judged replies without an edit, under all ablations,
    and under their rotations. `threshold` (nats) is the one fitted without an edit."""

    rows: tuple[Judged, ...]
    kinds: dict[str, Validation]
    threshold: float
    tokens: int
    n_refused: int
    n_answered: int


@dataclass(frozen=True)
class Ablations:
    all: Ablation
    one: Ablation


@dataclass(frozen=True)
class Dimensions:
    """The causal part of the result. `lead` names the family that `shared` and `check` are about."""

    lead: str
    read_layer: int
    shared_layer: int
    """The layer whose basis `shared["layer"]` ablates at all sites."""
    share: float
    ablation: Ablations
    addition: Push
    union: dict[str, tuple[UnionRank, ...]]
    check: Check


def dimensions_of(data: dict[str, Any]) -> Dimensions:
    """The typed part of a result's data."""
    return TypeAdapter(Dimensions).validate_python(data)


def read_dimensions(result: Result) -> Dimensions:
    """The same of a stored result; UserError, in one line, for one of another version."""
    try:
        return dimensions_of(result.data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{result.folder}': {where}: {first['msg']}; run analyses/dimensionality.py again") from None
