"""Double dissociation: the table is algebra at the edited site, sees a planted pair and not an entangled one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import Site, compose
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import AblateSubspace, Affine
from rsteer_interp.methods.dbdi import TwoDirections
from rsteer_interp.methods.dissociation import dissociation
from rsteer_interp.nulls import random_unit_vectors
from tests.tiny_models import tiny_backend, tiny_rows
from tests.two_direction_material import LAYER

S = Site(LAYER)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pair(seed: int = 0) -> TwoDirections:
    r, g = random_unit_vectors(2, 32, seed)
    return TwoDirections(Site(1), r, g, "nearest", {})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_table_is_the_algebra_at_the_edited_site_and_the_log_odds_of_each_edit(family: str) -> None:
    backend = tiny_backend(family)
    rows, tokens, pair = tiny_rows(backend), (5, 9, 30), _pair()
    probe = Gate(pair.site, draw(backend.d_model, seed=7), 0.0)
    table = dissociation(backend, rows, tokens, pair, probe, alpha=0.5, beta=2.0, n_null=3, seed=1)
    h, w = last_states(backend, rows, [pair.site])[pair.site].double(), probe.direction
    units = random_unit_vectors(3, backend.d_model, 1)
    along = float((h @ pair.execution).mean())
    project = table.effects["project_execution", "harm_probe"]
    shift = table.effects["shift_detection", "harm_probe"]
    assert project.value.value == pytest.approx(-0.5 * along * float(w @ pair.execution), abs=1e-4)
    assert shift.value.value == pytest.approx(-2.0 * float(w @ pair.detection), abs=1e-4)
    assert shift.value.high - shift.value.low < 1e-4  # the same for every prompt
    assert project.null == pytest.approx((-0.5 * along * (units @ w)).tolist(), abs=1e-4)
    assert shift.null == pytest.approx((-2.0 * (units @ w)).tolist(), abs=1e-4)
    base = log_odds(backend, rows, tokens)
    edits = (
        AblateSubspace(pair.site, pair.execution[None], scale=0.5),
        Affine(pair.site, pair.detection, amount=-2.0),
    )
    for cause, edit in zip(("project_execution", "shift_detection"), edits, strict=True):
        change = log_odds(backend, rows, tokens, edit) - base
        cell = table.effects[cause, "refusal_log_odds"]
        assert cell.value.value == pytest.approx(float(change.mean()), abs=1e-4)
        assert cell.value.n == len(rows) and len(set(cell.null)) == 3
    assert table.overlap == pytest.approx(float(pair.execution @ pair.detection))


def test_a_planted_double_dissociation_is_seen_and_an_entangled_pair_is_not() -> None:
    """A probe that reads g alone: detection moves it, execution orthogonal to it does not; the same pair twice moves it twice."""
    backend = tiny_backend("llama")
    rows, pair = tiny_rows(backend), _pair(3)
    apart = pair.execution - (pair.execution @ pair.detection) * pair.detection
    probe = Gate(pair.site, pair.detection, 0.0)
    clean = dissociation(
        backend, rows, (5,), replace(pair, execution=apart / apart.norm()), probe, beta=2.0, n_null=20
    ).effects
    assert (
        clean["shift_detection", "harm_probe"].beside.p() < 0.06
        and clean["shift_detection", "harm_probe"].beside.z < -3
    )
    assert abs(clean["project_execution", "harm_probe"].value.value) < 1e-4
    twice = dissociation(backend, rows, (5,), replace(pair, execution=pair.detection), probe, beta=2.0, n_null=20)
    assert twice.overlap == pytest.approx(1) and abs(twice.effects["project_execution", "harm_probe"].beside.z) > 3


def test_probes_before_the_edit_and_single_nulls_are_refused() -> None:
    backend, pair = tiny_backend("llama"), replace(_pair(), site=Site(2))
    with pytest.raises(UserError, match="before the edit"):
        dissociation(backend, tiny_rows(backend), (5,), pair, Gate(Site(1), pair.detection, 0.0), beta=1.0)
    with pytest.raises(UserError, match="two or more"):
        dissociation(backend, tiny_rows(backend), (5,), pair, Gate(S, pair.detection, 0.0), beta=1.0, n_null=1)


def test_reading_both_at_once_is_reading_each() -> None:
    """A probe behind the edit sees the edited stream."""
    backend, pair = tiny_backend("qwen2"), _pair()
    rows, probe = tiny_rows(backend), Gate(Site(3), draw(32, seed=4), 0.0)
    table = dissociation(backend, rows, (5,), pair, probe, beta=1.5, n_null=2)
    edit = compose(Affine(pair.site, pair.detection, amount=-1.5))
    change = probe.scores(last_states(backend, rows, [Site(3)], edit)[Site(3)]) - probe.scores(
        last_states(backend, rows, [Site(3)])[Site(3)]
    )
    assert table.effects["shift_detection", "harm_probe"].value.value == pytest.approx(float(change.mean()), abs=1e-4)
