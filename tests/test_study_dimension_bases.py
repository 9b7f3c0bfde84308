"""One subspace or many: planted truths at the sites, the null that turns all sites by one rotation, and the read-out under edits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

from rsteer_interp.backends.edits import Around, At, Site
from rsteer_interp.errors import UserError
from rsteer_interp.reader import UNSTEERED
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.results import Result
from rsteer_interp.statistics.rotation import random_frame, rotated
from rsteer_interp.studies.dimension_inputs import SETS, Inputs, groups_of, over_subjects, part
from rsteer_interp.studies.dimension_judged import check
from rsteer_interp.studies.dimension_results import (
    ABLATION,
    ROTATED,
    Ablations,
    Check,
    Dimensions,
    dimensions_of,
    read_dimensions,
)
from rsteer_interp.studies.dimension_runs import Bases, Bench, ablation_sweep, with_nulls
from rsteer_interp.studies.dimension_steps import ablation, addition, union
from rsteer_interp.studies.dimension_sweep import Base, Swept, sweep_curves
from rsteer_interp.studies.dimension_words import by_basis, causal_finding, causal_tables
from rsteer_interp.studies.subspace_union import energy, leading, union_ranks
from rsteer_interp.studies.subspaces import families, mean_first, resampled, vectors
from tests.planted_sites import N_SITES, WIDTH, PlantedStudy
from tests.tiny_models import tiny_backend, tiny_rows

TRUTHS = {"one": random_frame(1, WIDTH, 0).expand(N_SITES, -1), "many": random_frame(N_SITES, WIDTH, 0)}


@cache
def studied(truth: str) -> Dimensions:
    """The study's causal part, its own steps from prompts to answers."""
    study = PlantedStudy(TRUTHS[truth])
    inputs = Inputs(study, study.config)  # type: ignore[arg-type]
    return Dimensions(
        lead=inputs.lead,
        read_layer=inputs.read_site.layer,
        shared_layer=inputs.shared_site.layer,
        share=0.9,
        ablation=Ablations(
            ablation(inputs, "all", inputs.sites, inputs.shared), ablation(inputs, "one", [inputs.read_site], {})
        ),
        addition=addition(inputs),
        union=union(inputs),
        check=check(inputs),
    )


# -- planted truths ----------------------------------------------------------------------------------------------


def test_one_direction_at_all_sites_is_one_dimension_by_every_basis() -> None:
    found = studied("one")
    for basis, curve in by_basis(found.ablation.all, found.lead).items():
        assert curve.beyond and curve.enough is not None, basis
        assert (curve.enough.k, curve.enough.low, curve.enough.high) == (1, 1, 1), basis
    first = found.union[found.lead][0]
    assert first.dims_90 == 1 and first.effective < 1.2 and first.null_dims_90 > N_SITES - 2


def test_another_direction_at_each_site_is_one_dimension_per_site_and_as_many_as_sites_together() -> None:
    """Each site's own first row removes all, which says nothing of one subspace: one layer's never does, a global one with all."""
    found = studied("many")
    curves = by_basis(found.ablation.all, found.lead)
    own, layer, whole = (curves[basis].enough for basis in ("site", "layer", "global"))
    assert own is not None and own.k == 1
    assert layer is not None and layer.k is None and layer.high is None and layer.never > 0.95
    assert curves["layer"].removed[0].value == pytest.approx(curves["site"].removed[0].value / N_SITES, rel=0.3)
    assert whole is not None and whole.k == N_SITES and whole.low == N_SITES
    first = found.union[found.lead][0]
    assert first.dims_90 == N_SITES and first.effective > 0.95 * N_SITES
    assert first.dims_90_band is not None and first.dims_90_band[0] >= N_SITES - 1


def test_the_finding_says_whether_it_is_one_dimension() -> None:
    one, many = (" ".join(causal_finding(studied(truth))) for truth in ("one", "many"))
    assert f"The {N_SITES} sites' own directions are one dimension: 1 " in one
    assert f"The {N_SITES} sites' own directions are not one dimension: {N_SITES} " in many
    assert one.count("K = 1 (1 to 1) with ") == 3 and many.count("K = 1 (1 to 1) with ") == 1
    assert f"more than K = 8 with layer {studied('many').shared_layer}'s basis at all sites" in many
    assert all(table.row_count for truth in TRUTHS for table in causal_tables(studied(truth)))


def test_the_typed_result_is_the_stored_one_and_an_older_one_is_one_line() -> None:
    found = studied("many")
    stored = json.loads(json.dumps(asdict(found), sort_keys=True))
    assert dimensions_of(stored) == found
    del stored["union"]
    with pytest.raises(UserError, match=r"union: Field required; run analyses/dimensionality.py again$"):
        read_dimensions(
            Result(folder="x", kind="dimensionality", data=stored, tensors={}, provenance=None, digest="", key=None)
        )  # type: ignore[arg-type]


# -- the null ----------------------------------------------------------------------------------------------------


def test_random_labels_remove_no_more_than_rotations_by_any_basis() -> None:
    p: dict[str, list[float]] = {"site": [], "layer": [], "global": []}
    for seed in range(60):
        study = PlantedStudy(TRUTHS["one"], seed=seed, size=0.0, noise=1.0)  # labels are coins, states noise
        groups, prompts = groups_of(study.scored("fit", *SETS)), study.scored("report", *SETS).texts[:12]
        bench = Bench.of(study.backend, study.template.encode_all(prompts), (1,), 1)
        own = {s: mean_first(vectors(x, groups, "pairs"), 1) for s, x in study.states("fit", *SETS).items()}
        shared = {"layer": own[Site(3)], "global": leading(own)[:1]}
        every: dict[str, Bases] = {"site": own, **{name: dict.fromkeys(own, rows) for name, rows in shared.items()}}
        for i, (basis, bases) in enumerate(every.items()):
            turns = [random_frame(WIDTH, WIDTH, 1000 * seed + 10 * i + j).float() for j in range(6)]
            outcome = ablation_sweep(bench, bases, [1], turns)["outcome"][:, :, 0]
            removed = bench.measure(None)[0] - outcome
            base = Base(removed[0, 0], -removed[0, 0], range(12), range(12))
            curves, _ = sweep_curves({"x": Swept([1], removed[:, 0], removed[:, 1:])}, base, n_draws=2)
            p[basis].append(curves["x"].p[0])
    for basis, values in p.items():
        assert stats.kstest(values, "uniform").pvalue > 0.01, basis
        assert sum(value <= 0.05 for value in values) <= 8, basis


def test_a_sweeps_null_is_as_long_as_its_ablation_at_every_site_and_in_the_sum() -> None:
    """The study's own edits, on a model whose later states its own edit changes; per-site rows that agree at two sites."""
    backend = tiny_backend("llama")
    bases = {Site(layer): random_frame(2, 32, layer) for layer in (1, 2, 3)}
    bases[Site(2)] = bases[Site(1)].flip(0)
    batch = backend.batch(tiny_rows(backend))
    found = []
    for edit in with_nulls(backend, bases, [random_frame(32, 32, 7).float()]):
        moved = Displacements(edit)
        backend.logits(batch, moved)
        found.append(moved.of("prompt"))
    own, null = found
    assert not torch.allclose(own, null, atol=0.1)
    torch.testing.assert_close(
        null @ null.mT, own @ own.mT, atol=2e-5, rtol=1e-4
    )  # lengths, and products between sites
    torch.testing.assert_close(null.sum(2).norm(dim=-1), own.sum(2).norm(dim=-1), atol=2e-5, rtol=1e-4)


@dataclass(frozen=True, eq=False)
class Displacements(Around):
    """An edit that keeps how far another moves every state."""

    moved: dict[tuple[Site, str], Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        out = self.edit(x, at)
        self.moved[at.site, at.phase] = torch.where(at.mask[..., None], (out - x).double(), 0.0)  # padding is nobody's
        return out

    def of(self, phase: str) -> Tensor:
        return torch.stack([value for (_, p), value in sorted(self.moved.items()) if p == phase], 2)  # row pos site d


# -- the union ---------------------------------------------------------------------------------------------------


def test_the_rank_of_a_union_is_that_of_its_gram_matrix_and_no_rotation_changes_it() -> None:
    bases = {s: random_frame(3, 40, s) for s in range(5)}
    bases[1] = bases[0]
    values = torch.linalg.svdvals(torch.cat([rows[:2] for rows in bases.values()])).square()
    torch.testing.assert_close(energy(bases, 2)[: len(values)], values)
    first, second = (union_ranks(each, [1, 3], n_null=2) for each in (bases, rotated(bases, 4)))
    for a, b in zip(first, second, strict=True):
        assert replace(a, effective=0.0) == replace(b, effective=0.0) and a.effective == pytest.approx(b.effective)
    assert [rank.rows for rank in first] == [5, 15] and first[0].dims_99 == 4
    same = union_ranks(dict.fromkeys(range(5), bases[0]), [1, 3], n_null=2)
    assert [(rank.dims_90, rank.dims_99, round(rank.effective, 6)) for rank in same] == [(1, 1, 1.0), (3, 3, 3.0)]


def test_the_global_basis_begins_with_what_the_sites_share() -> None:
    rows = random_frame(4, 40, 0)
    bases = {0: rows[:2], 1: rows[[0, 2]], 2: rows[[0, 3]], 3: rows[[1, 0]]}
    found = leading(bases)
    assert len(found) == 2  # four first rows that span two dimensions
    assert abs(float(found[0] @ rows[0])) == pytest.approx(1) and abs(float(found[1] @ rows[1])) == pytest.approx(1)


def test_subjects_are_resampled_in_pairs_and_alike_at_all_sites() -> None:
    study = PlantedStudy(TRUTHS["many"])
    groups, states = groups_of(study.scored("fit", *SETS)), study.states("fit", *SETS)
    for name in ("pairs", "subjects"):
        draws = resampled(states, groups, name, 3, 4, 0)  # type: ignore[arg-type]
        twice = resampled({1: states[Site(1)], 2: states[Site(1)]}, groups, name, 3, 4, 0)  # type: ignore[arg-type]
        for draw, both in zip(draws, twice, strict=True):
            torch.testing.assert_close(both[1], both[2])
            torch.testing.assert_close(both[1], draw[Site(1)])
            assert float(draw[Site(1)][0] @ families(states[Site(1)], groups, 1)[name][0]) > 0.98
        assert not torch.allclose(draws[0][Site(1)], draws[1][Site(1)])


def test_prompts_are_of_as_many_subjects_as_can_be() -> None:
    scored = Scored(list("abcdef"), ["x"] * 6, ["u", "u", "u", "v", "v", "w"], torch.ones(6))
    assert over_subjects(scored, [0, 1, 2, 3, 4, 5]) == [0, 3, 5, 1, 4, 2]
    assert over_subjects(scored, [1, 2, 4]) == [1, 4, 2]
    assert part(scored, [3, 0]).texts == ["d", "a"]


# -- the read-out under edits ------------------------------------------------------------------------------------


@cache
def checked(keeps_refusing: bool) -> Check:
    study = PlantedStudy(TRUTHS["one"], keeps_refusing=keeps_refusing)
    return check(Inputs(study, study.config))  # type: ignore[arg-type]


def test_judged_replies_and_log_odds_agree_where_replies_follow_them() -> None:
    found = checked(False)
    assert [(row.basis, row.k, row.turned) for row in found.rows[:5]] == [
        (None, 0, False), ("site", 1, False), ("site", 1, True), ("site", 8, False), ("site", 8, True),
    ]  # fmt: skip
    assert {row.basis for row in found.rows} == {None, "site", "layer", "global"}
    base, one = found.rows[0], found.rows[1]
    assert base.judged.rate == base.by_log_odds.rate == 1 and base.judged_answered.rate == 0
    assert one.judged.rate < 0.8 and found.n_refused == found.n_answered == 16
    assert all(row.drift.value == 0 and row.judged == row.by_log_odds for row in found.rows)
    assert found.kinds[UNSTEERED].valid and found.kinds[ROTATED].valid
    assert found.kinds[ABLATION].area is None  # nothing is refused under any of these ablations


def test_a_read_out_that_an_edit_leaves_behind_is_seen() -> None:
    """Replies refuse as before; log-odds say that the ablation removed it."""
    found = checked(True)
    assert found.rows[0].drift.value == 0
    for row in found.rows:
        assert row.judged.rate == 1
        if row.basis and row.k == 1 and not row.turned:
            assert row.by_log_odds.rate < 0.8 and row.drift.value < 0 and row.drift.low < 0
