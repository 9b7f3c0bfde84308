"""What a "reproduce" result holds, typed and checked: the one reading of it that figures and page share.

Rates are shares in [0, 1]; the paper's published rows are in percent, as printed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsteer_interp.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from rsteer_interp.provenance import Provenance

KIND = "reproduce"
POLITICAL, HARMFUL = "political_sensitive", "harmful"
_SET_ORDER = (POLITICAL, HARMFUL, "political_matched", "general")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Rate(_Part):
    """A share with its 95 % Wilson interval; `units`: clusters (subjects) that its n prompts are of, where that is known."""

    count: int
    n: int
    rate: float
    low: float
    high: float
    units: int | None = None


class Estimate(_Part):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class ModelIdentity(_Part):
    name: str
    source: str
    fingerprint: str
    n_layers: int
    d_model: int
    backend: str


class PromptCount(_Part):
    label: str
    n: int
    subjects: int | None = None


class Row(_Part):
    """One line of the claim table, measured on the report split."""

    label: str
    method: str | None = None
    k: int | None = None
    alpha: float | None = None
    reposition: bool | None = None
    layers: list[int] = Field(default_factory=list)
    dose: float | None = None
    """|edit| / |resid|, mean over the edited sites."""
    target_met: bool | None = None
    rates: dict[str, Rate]
    answer_shift: Estimate | None = None
    """The paper's L_g, in nats."""
    kl: Estimate | None = None
    """KL(base || steered) on general text, nats per token."""


class PaperRow(_Part):
    """A published row, refusal in percent."""

    label: str
    political: float
    harmful: float


class LayerScores(_Part):
    """The read-out of one method by layer, with its label-permutation null."""

    layers: list[int]
    r: list[float]
    rmse: list[float]
    score: list[float]
    excluded: list[int] = Field(default_factory=list)
    within_subject_r: list[float] = Field(default_factory=list)
    within_subject_p_max: float | None = None
    within_subject_n: int | None = None
    null_low: list[float]
    null_high: list[float]
    null_max_q95: float
    p_max: float
    chosen: list[int]
    n: int


class Grid(_Part):
    rows: int
    columns: int


class Spread(_Part):
    mean: float
    low: float
    high: float


class Density(_Part):
    """Sizes of a direction's coordinates beside those of Gaussian vectors of the same width."""

    layer: int
    method: str
    sorted_abs: list[float]
    null_mean: list[float]
    null_low: list[float]
    null_high: list[float]
    top10_share: float
    null_top10: Spread
    grid: Grid
    participation_ratio: float


class Pca(_Part):
    layer: int
    explained: tuple[float, float]
    label: list[str]
    set: list[str]
    subject: list[str]


class Configuration(_Part):
    """One steering configuration tried on the select split; refusal there is log-odds above 0, nothing is generated."""

    method: str | None = None
    k: int | None = None
    alpha: float | None = None
    reposition: bool | None = None
    dose: float | None = None
    political: Rate
    harmful: Rate
    answer_shift: float | None = None
    meets_target: bool | None = None
    """None: not recorded."""
    chosen: bool = False
    null: bool = False

    @property
    def is_base(self) -> bool:
        return not self.null and (self.method in (None, "base") or not self.alpha)


class Confidence(_Part):
    """Refusal scores of the same prompts before and after steering, in one order."""

    before: list[float]
    after: dict[str, list[float]] = Field(default_factory=dict)
    subjects: list[str]


class Agreement(_Part):
    n: int
    accuracy: float
    low: float
    high: float
    auc: float | None = None
    kappa: float | None = None


class JudgePair(_Part):
    a: str
    b: str
    n: int
    agreement: float
    kappa: float | None = None


class Judges(_Part):
    default: str
    agreement: Agreement | None = None
    between: list[JudgePair] = Field(default_factory=list)
    log_odds_auc: dict[str, Estimate] = Field(default_factory=dict)


class Reply(_Part):
    response: str
    refused: bool
    confidence: float | None = None
    log_odds: float | None = None


class Replies(_Part):
    set: str
    prompt: str
    base: Reply
    steered: dict[str, Reply] = Field(default_factory=dict)


class Reproduction(_Part):
    """The data of a "reproduce" result; a model that does not refuse has `applicable` false, a reason, and little else."""

    applicable: bool
    reason: str | None = None
    preset: str = ""
    model: ModelIdentity
    sets: dict[str, PromptCount] = Field(default_factory=dict)
    table: list[Row] = Field(default_factory=list)
    paper: list[PaperRow] = Field(default_factory=list)
    layer_scores: dict[str, LayerScores] = Field(default_factory=dict)
    density: Density | None = None
    pca: Pca | None = None
    frontier: list[Configuration] = Field(default_factory=list)
    confidence: dict[str, Confidence] = Field(default_factory=dict)
    confidence_measure: Literal["log_odds", "confidence"] = "log_odds"
    """What `confidence` holds: first-token refusal log-odds in nats, or c(x) in [-1, 1]. Above 0 is refusal in both."""
    judges: Judges | None = None
    replies: list[Replies] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)

    def set_label(self, name: str) -> str:
        """A set's short printable name."""
        return (self.sets[name].label if name in self.sets else name).replace("_", " ")

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Sets or methods in the order of showing: political, harmful, matched, general; methods as in the table."""
        order = [*_SET_ORDER, *(row.method or "" for row in self.table)]
        return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))

    @property
    def base(self) -> Row | None:
        return next((row for row in self.table if row.method is None), None)

    @property
    def steered(self) -> list[Row]:
        return [row for row in self.table if row.method is not None]

    @property
    def headline(self) -> Row | None:
        """The row the finding speaks of: the paper's method WRMD, else the one with the fewest political refusals."""
        rows = [row for row in self.steered if POLITICAL in row.rates]
        return next(
            (r for r in rows if r.method == "wrmd"), min(rows, key=lambda r: r.rates[POLITICAL].rate, default=None)
        )


@dataclass(frozen=True)
class Reproduced:
    """A loaded "reproduce" result: typed data, the tensors that figures draw, and its provenance."""

    folder: Path
    data: Reproduction
    provenance: Provenance
    pca: np.ndarray | None
    density_vector: np.ndarray | None

    def missing(self, what: str) -> UserError:
        """The error for a figure that has nothing to draw."""
        if not self.data.applicable:
            return UserError(f"'{self.folder}' is {self.data.reason or 'not applicable'}; there is no {what} to draw")
        return UserError(f"'{self.folder}' holds no {what}; run analyses/reproduce.py again")


def read_reproduction(folder: Path | str) -> Reproduced:
    """The "reproduce" result in a folder; one-line errors for a missing, foreign, damaged or inconsistent one."""
    from rsteer_interp.results import load_result

    result = load_result(folder, kind=KIND)
    try:
        data = Reproduction.model_validate(result.data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{folder}': {where}: {first['msg']}; run analyses/reproduce.py again") from None
    pca = None if data.pca is None else result.tensor("pca", len(data.pca.label), 2).double().numpy()
    vector = None if data.density is None else result.tensor("density_vector", -1).double().numpy()
    return Reproduced(Path(folder), data, result.provenance, pca, vector)
