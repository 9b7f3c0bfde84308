"""Double dissociation of detecting harm and carrying refusal out, on benign prompts that sound harmful.

DBDI (arXiv 2511.06852) says that two directions do two things. If so, prompts that only sound harmful (over-refusal prompts, as
in XSTest) lie far along detection, and projecting execution out moves refusal but not the harm that is read, while shifting
against detection moves what is read. Every cell stands beside random directions of the same dose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import RecordLast
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import AblateSubspace, Affine
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.methods.dbdi import TwoDirections
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Clusters, Estimate

Cause = Literal["project_execution", "shift_detection"]
ReadOut = Literal["refusal_log_odds", "harm_probe"]


@dataclass(frozen=True)
class AgainstRandom:
    """A mean with its interval, and the same mean for random directions."""

    value: Estimate
    null: tuple[float, ...]

    @property
    def beside(self) -> Beside:
        """Its z is the distance from the null's mean in standard deviations: comparable between read-outs."""
        return Beside.of(self.value.value, self.null)


@dataclass(frozen=True)
class Dissociation:
    """Mean change of each read-out (log-odds in nats, probe in standard deviations within its sets) under each edit.

    A double dissociation is a table whose diagonal (execution on log-odds, detection on the probe) leaves its null and whose
    rest does not. `overlap` is <r, g>: where it is large, no such claim can be made. A probe fitted on the sets that gave
    detection is moved by it almost by construction; the cells off the diagonal are the test. `n` prompts.
    """

    effects: Mapping[tuple[Cause, ReadOut], AgainstRandom]
    overlap: float
    n: int


def dissociation(
    backend: Backend,
    rows: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    directions: TwoDirections,
    probe: Gate,
    *,
    alpha: float = 1.0,
    beta: float,
    subjects: Clusters = None,
    n_null: int = 20,
    seed: int = 0,
) -> Dissociation:
    """The 2 x 2 table on the given (benign) prompts of these subjects: 3 + 2 n_null passes. beta in units of the stream.

    The probe may read at the edited site, where its change is exact algebra, or behind it. A null of the projection moves every
    state as far as it does, but along a random unit vector u (h - alpha <h, r> u); that of the shift adds -beta u. UserError for
    a probe before the edit or fewer than two null draws.
    """
    site = directions.site
    if probe.site < site:
        raise UserError(f"the probe reads {probe.site}, before the edit at {site}; read at or behind it")
    if n_null < 2:
        raise UserError(f"{n_null} null directions; a null needs two or more")
    units = random_unit_vectors(n_null, backend.d_model, seed)
    execution = directions.execution[None]
    edits: dict[Cause, list[Edit]] = {
        "project_execution": [AblateSubspace(site, execution, u[None], alpha) for u in (directions.execution, *units)],
        "shift_detection": [Affine(site, u, amount=-beta) for u in (directions.detection, *units)],
    }
    base = _read(backend, rows, refusal_tokens, probe, None)
    effects: dict[tuple[Cause, ReadOut], AgainstRandom] = {}
    for cause, tried in edits.items():
        after = [_read(backend, rows, refusal_tokens, probe, edit) for edit in tried]
        for name in base:
            change = [(x[name] - base[name]).numpy() for x in after]
            null = tuple(float(x.mean()) for x in change[1:])
            effects[cause, name] = AgainstRandom(Estimate.of(change[0], clusters=subjects, seed=seed), null)
    return Dissociation(effects, directions.overlap, len(rows))


def _read(
    backend: Backend, rows: Sequence[Tokens], refusal_tokens: Sequence[int], probe: Gate, edit: Edit | None
) -> dict[ReadOut, Float[Tensor, " prompt"]]:
    """Both read-outs from one pass."""
    out: dict[ReadOut, Tensor] = {
        "refusal_log_odds": torch.zeros(len(rows), dtype=torch.float64),
        "harm_probe": torch.zeros(len(rows), dtype=torch.float64),
    }

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        record = RecordLast(frozenset({probe.site}))
        logits = backend.logits(batch, compose(edit, record))[:, -1]
        return refusal_log_odds(logits, refusal_tokens).cpu(), probe.scores(record.states[probe.site])

    for group, (odds, scores) in backend.spread(rows, run):
        out["refusal_log_odds"][group], out["harm_probe"][group] = odds, scores
    return out
