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
    removal: Estimate | None = None
    """Delta_c by judged replies to the select split's refusing prompts."""
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


class Band(_Part):
    """A mean over draws with their central 95 %."""

    value: float
    low: float
    high: float


class InsideSubjects(_Part):
    """Pearson r of projection and score inside subjects, p of the largest over layers, prompts of subjects with both verdicts."""

    r: float
    p_max: float
    n: int


class Diagnosis(_Part):
    """How far one method's direction can be trusted, at its best layer; see `directions.diagnosis`."""

    layer: int
    counts: dict[str, int]
    d: int
    null_space_share: float
    effective_rank: float | None
    relative_penalty: float | None
    split_half: Band | None
    split_half_topic: Band | None
    n_splits: int
    cosine_md: float
    cosine_null: float
    cosine_unweighted: float | None
    within_subject: InsideSubjects


class Drawn(_Part):
    """The method whose direction the figures draw, and the rule by which it was chosen."""

    method: str
    rule: str


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
    """A setting of one method, and what the finder measured of it on the select split."""

    method: str
    k: int
    alpha: float
    reposition: bool
    answer_shift: Estimate
    """L_g, in nats."""
    removal: Estimate | None = None
    """Delta_c by judged replies; None where a setting of a smaller L_g had met the target."""
    complete: bool = False
    """Judged on all prompts; else the first ones ruled the setting out."""

    @property
    def update(self) -> str:
        return "reposition" if self.reposition else "addition"


class Tried(Configuration):
    chosen: bool = False


class Finder(_Part):
    """The search of every method: target, the prompts' c by the replies that chose them and by fresh ones, every setting."""

    target: float
    scored: Estimate
    fresh: Estimate
    trials: list[Tried]

    def open(self, removal: Estimate) -> bool:
        """Whether the removal's interval holds the target: its prompts do not tell on which side of it the setting is."""
        return removal.low < self.target <= removal.high


class Paired(_Part):
    """Refusal rates of the same prompts before and after, and their difference."""

    before: Rate
    after: Rate
    difference: Estimate
    p: float


class Matched(Configuration):
    """The setting of a method and update whose removal is nearest the target, and what it does to harmful select prompts."""

    harmful: Paired


class RandomDirections(_Part):
    """Refusal rates of select prompts by set: of the model as it is, and under each random edit of the headline method's size."""

    base: dict[str, Rate]
    random: list[dict[str, Rate]]


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
    """Of the model as it is, by set."""
    steered_auc: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    """Under each method's edit, by set."""


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
    directions: dict[str, Diagnosis] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Methods without a direction, and why."""
    drawn: Drawn | None = None
    density: Density | None = None
    pca: Pca | None = None
    finder: Finder | None = None
    matched: list[Matched] = Field(default_factory=list)
    null: RandomDirections | None = None
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

    def shift_factor(self, row: Row) -> float | None:
        """Times the smallest L_g of all methods, where the two intervals are apart: what the row's removal costs ordinary answers."""
        found = [r.answer_shift for r in self.steered if r.answer_shift is not None]
        least = min(found, key=lambda shift: shift.value, default=None)
        own = row.answer_shift
        return own.value / least.value if own and least and 0 < least.high < own.low else None

    def silent(self, row: Row) -> bool:
        """Whether no refusal is left in any set: a model that refuses nothing may be one that is broken."""
        before = self.base.rates if self.base is not None else {}
        return (
            row.method is not None
            and any(before[n].count for n in before)
            and not any(r.count for r in row.rates.values())
        )

    @property
    def headline(self) -> Row | None:
        """The row the finding speaks of: that of the method the figures draw."""
        return next((row for row in self.steered if self.drawn and row.method == self.drawn.method), None)


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
