"""Study of refusal geometry: planted cosines and transfers, nulls that stay null, and the whole of it on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import rsteer_interp.studies.refusal_geometry as study
import rsteer_interp.studies.refusal_steering as refusal_steering
from analyses.refusal_geometry import Config, run
from figures import refusal_geometry as figure
from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.command_line import run as run_command
from rsteer_interp.directions import Evidence
from rsteer_interp.directions.mean_difference import MeanDifference
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.interventions import ablate
from rsteer_interp.nulls import random_unit_vectors, split_half
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.results import load_result
from rsteer_interp.studies.direction_atlas import (
    Groups,
    atlas,
    coefficients,
    cosines,
    cross_half,
    random_cosines,
    subspace_cosines,
)
from rsteer_interp.studies.independence import shifts, summary
from rsteer_interp.studies.refusal_kinds import Kind, weights
from rsteer_interp.studies.refusal_steering import Prompts, Transfer, random_directions, windows
from rsteer_interp.studies.transfer import auc, cells, dissociation, dose_for
from tests.pushes import equal_dose, pushes
from tests.study_fixture import study_arguments
from tests.tiny_models import PROMPTS, draw, tiny_backend, tiny_rows

D, SUBJECTS, EACH = 256, 12, 4


def planted(seed: int, cosine: float, strength: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Groups]:
    """Two kinds of refused prompts against the same answered ones, in noise that subjects share; the true cosine is given."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, D, generator=g, dtype=torch.float64) / D**0.5

    u, w = torch.linalg.qr(torch.randn(D, 2, generator=g, dtype=torch.float64))[0].T
    means = {"a": u, "b": cosine * u + (1 - cosine**2) ** 0.5 * w, "answered": 0 * u}
    rows, sets, subjects = [], [], []
    for name, mean in means.items():
        for k in range(SUBJECTS):
            rows.append(strength * mean + 0.6 * noise(1) + 0.8 * noise(EACH))
            sets += [name] * EACH
            subjects += [str(k)] * EACH
    of = {name: torch.tensor([s == name for s in sets]) for name in means}
    refused, answered = torch.stack([of["a"], of["b"]]), torch.stack([of["answered"]] * 2)
    return torch.cat(rows), refused, answered, Groups.of(sets, subjects)


def test_directions_from_the_gram_matrix_are_mean_differences() -> None:
    x, refused, answered, _ = planted(0, 0.3)
    c = coefficients(refused, answered, torch.ones(len(x), dtype=torch.float64))
    scores = refused[0].double() - answered[0].double()
    mine = MeanDifference().fit(Evidence(x, scores))
    torch.testing.assert_close(c[0] @ x, mine)
    v = c @ x
    plain = torch.nn.functional.cosine_similarity(v[0], v[1], dim=0)
    torch.testing.assert_close(cosines(c, c, x @ x.T)[0, 1], plain)


def test_reliability_agrees_with_split_half() -> None:
    x, refused, answered, groups = planted(1, 0.3, strength=0.5)
    one = torch.ones(len(x), dtype=torch.float64)
    mine = cross_half(refused, answered, x @ x.T, one, groups.halves(100, 0))[0, 0]
    keep = (refused[0] | answered[0]).nonzero()[:, 0]
    labels = refused[0][keep].long().tolist()

    def fit(index: Tensor) -> Tensor:
        rows, z = x[keep][index], torch.tensor(labels)[index].bool()
        return rows[z].mean(0) - rows[~z].mean(0)

    plain = split_half(fit, len(keep), groups=[str(m) for m in groups.member[keep]], strata=labels, n_splits=100)
    assert float(mine) == pytest.approx(plain.cosine, abs=0.02)


def test_the_corrected_cosine_finds_the_planted_one_where_the_plain_one_is_off() -> None:
    for true, strength in ((0.0, 0.5), (0.4, 0.5), (0.8, 1.0)):
        found = [atlas(*planted(s, true, strength), seed=s) for s in range(12)]
        clean = [f["disattenuated"][0][1] for f in found]
        plain = sum(f["raw"][0][1]["value"] for f in found) / len(found)
        mean = sum(c["value"] for c in clean) / len(clean)
        assert mean == pytest.approx(true, abs=0.04)
        assert sum(c["low"] <= true <= c["high"] for c in clean) >= 10
        if true == 0:  # the answered prompts are shared, and with them their noise
            assert plain > 0.08


def test_pure_noise_is_not_called_a_direction() -> None:
    x, refused, answered, groups = planted(5, 0.5, strength=0.0)
    found = atlas(x, refused, answered, groups, 0)
    assert found["disattenuated"][0][1] is None
    far = refused.flip(0) & False
    far[0], far[1] = refused[0], answered[0]  # kinds without a common prompt
    other = torch.stack([refused[1], refused[1]])
    other[0, ::2], other[1, 1::2] = False, False
    assert atlas(x, far, other, groups, 0)["p"][0][1] > 0.05


def test_the_random_null_is_wider_where_few_dimensions_carry_most() -> None:
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(80, D, generator=g)  # 80 states span no more than 79 dimensions
    assert random_cosines(flat, 2000, 0).quantile(0.95) < 0.3
    flat[:, :3] *= 30
    assert random_cosines(flat, 2000, 0).quantile(0.95) > 0.7


KINDS = (Kind("a", "a", "x", "x"), Kind("b", "b", "y", "y"))


def _by_subject(seed: int, shared: float) -> tuple[Tensor, Scored]:
    """Two sets whose subjects lie anywhere along one axis and are refused the more, the further along they lie: topic. Refusal
    itself moves the prompts of both sets along another axis, by `shared`."""
    g, subject = torch.Generator().manual_seed(seed), torch.arange(2 * SUBJECTS).repeat_interleave(8)
    topic = torch.randn(2 * SUBJECTS, generator=g)
    refused = torch.rand(len(subject), generator=g) < (2 * topic).sigmoid()[subject]
    x = 0.3 * torch.randn(len(subject), D, generator=g)
    x[:, 0] += 3 * topic[subject]
    x[:, 1] += shared * refused
    sets = ["x" if s < SUBJECTS else "y" for s in subject.tolist()]
    confidence = refused.double() * 2 - 1
    return x.double(), Scored([""] * len(subject), sets, [str(s) for s in subject.tolist()], confidence)


def test_directions_inside_subjects_hold_no_topic_and_their_cosine_has_a_null() -> None:
    fired = 0
    for seed in range(60):
        x, scored = _by_subject(seed, 0.0)
        groups, sides = Groups.of(scored.sets, scored.subjects), weights(KINDS, scored)
        found = atlas(x, *sides, groups, seed, n_splits=2, n_draws=4, n_random=50, n_shuffles=99)
        fired += found["within_subject_p"][0][1] <= 0.05
    assert fired <= 8  # of 3 expected
    topical = coefficients(
        torch.stack([torch.tensor([s == k.refused for s in scored.sets]) & (scored.confidence > 0) for k in KINDS]),
        torch.stack([torch.tensor([s == k.answered for s in scored.sets]) & (scored.confidence < 0) for k in KINDS]),
        torch.ones(len(x), dtype=torch.float64),
    )
    v = topical @ x
    assert float(torch.cosine_similarity(v[0], v[1], dim=0)) > 0.8  # the means of sets agree on the topic
    x, scored = _by_subject(1, 1.0)
    groups, sides = Groups.of(scored.sets, scored.subjects), weights(KINDS, scored)
    v = coefficients(*sides, torch.ones(len(x), dtype=torch.float64)) @ x
    assert float((v[:, 1] - 1).abs().max()) < 0.3 and float(v[:, 0].abs().max()) < 0.3
    assert atlas(x, *sides, groups, 0)["within_subject_p"] == [[1.0, 1 / 500], [1 / 500, 1.0]]
    design = torch.nn.functional.one_hot(torch.from_numpy(groups.member)).double()
    mine = torch.tensor([s == "x" for s in scored.sets])
    whole = torch.cat([(scored.confidence > 0).double()[:, None], design], 1)[mine]
    by_regression = torch.linalg.lstsq(whole, x[mine], driver="gelsd").solution[0]
    torch.testing.assert_close(v[0], by_regression)  # a mean of its own for every subject


def test_subspaces_of_one_kind_agree_more_than_with_random_ones() -> None:
    x, refused, answered, groups = planted(2, 0.1)
    found = subspace_cosines(x, refused, answered, groups, 2, 0)
    assert found["cosines"][0][0][0] > 0.9 > found["cosines"][0][1][0]
    assert found["cosines"][0][1] == found["cosines"][1][0]
    assert found["cosines"][0][0][0] > found["null_q95"][0]
    assert subspace_cosines(x, refused, answered, groups, SUBJECTS, 0)["cosines"][0][0] is None


def test_cells_find_a_planted_transfer_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    columns = ["a"] * 12 + ["b"] * 12
    random = torch.randn(8, 1, generator=g).double() * 0.1 + 0.02 * torch.randn(8, 24, generator=g).double()
    effect = torch.randn(2, 1, generator=g).double() * 0.1 + 0.02 * torch.randn(2, 24, generator=g).double()
    effect[0, :12] += 2
    subjects = [f"subject {i // 2}" for i in range(24)]
    found = cells(effect, [1.0, 1.0], random, [1.0] * 8, columns, subjects)
    hits = [[c["q"] <= 0.05 for c in line] for line in found["cells"]]
    assert hits == [[True, False], [False, False]]
    twice = cells(effect, [1.0, 1.0], 2 * random, [2.0] * 8, columns, subjects)["cells"][0][0]
    assert twice["null"] == pytest.approx(found["cells"][0][0]["null"])
    assert found["cells"][0][0]["low"] <= found["cells"][0][0]["value"] <= found["cells"][0][0]["high"]


def test_doses_dissociation_and_auc() -> None:
    assert dose_for([0.5, 1.0, 3.0], [1, 2, 4], 2.0) == pytest.approx(3.0)
    assert dose_for([0.1, 0.2, 0.3], [1, 2, 4], 2.0) is None
    columns = ["a", "a", "b", "b"]
    first, second = torch.tensor([3.0, 3.1, 1.0, 1.1]).double(), torch.tensor([1.0, 1.0, 2.0, 2.2]).double()
    noise = 0.1 * torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    pair = dissociation(torch.stack([first, second]), 1.0, noise, [1.0] * 9, columns, list("1234"), ("a", "b"))
    assert pair["a"]["value"] == pytest.approx(2.05) and pair["b"]["value"] == pytest.approx(1.05)
    assert pair["selectivity"]["value"] == pytest.approx(1.55) and pair["selectivity"]["p"] < 1e-4
    stronger = dissociation(torch.stack([first, first - 1]), 1.0, noise, [1.0] * 9, columns, list("1234"), ("a", "b"))
    assert stronger["a"]["value"] > 0 > stronger["b"]["value"]  # strength alone is not selectivity
    assert stronger["selectivity"]["value"] == pytest.approx(0) and stronger["selectivity"]["p"] > 0.9
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 3 == 0
    found = auc(x, labels, range(40))
    assert found["value"] == pytest.approx(roc_auc_score(labels.numpy(), x.numpy()))
    assert found["p"] > 0.05 and found["low"] < 0.5 < found["high"]


def test_the_null_of_a_row_is_of_equal_dose_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding and ablating over a window: every kind's nulls are its own edit, turned into the span of the random directions."""
    backend, asked = tiny_backend("llama"), list[Edit]()
    rows, sites = tiny_rows(backend), [Site(1), Site(2), Site(3)]

    def spied(backend: Backend, rows: Prepared, tokens: list[int], edits: list[Edit]) -> Tensor:
        asked.extend(edits)
        return log_odds_of_each(backend, rows, tokens, edits)

    def stage(name: str, key: dict[str, Any], compute: Callable[[], Any]) -> SimpleNamespace:
        data, tensors = compute()
        return SimpleNamespace(data=data, tensors=tensors)

    monkeypatch.setattr(refusal_steering, "log_odds_of_each", spied)
    fake: Any = SimpleNamespace(
        backend=backend, template=backend.template(), refusal_tokens=(5,), n_layers=4, stage=stage
    )
    units = {
        name: {
            s: torch.nn.functional.normalize(draw(32, seed=s.layer + k) + draw(32, seed=k), dim=0).float()
            for s in sites
        }
        for k, name in ((10, "a"), (20, "b"))
    }
    random = random_directions({s: draw(20, 32, seed=40 + s.layer).float() for s in sites}, 4, 0)
    prompts = Prompts(list(PROMPTS), ["a", "b"] * 3, list(PROMPTS))
    transfer = Transfer(fake, units, random, 2, prompts, prompts, 0.3, {})
    transfer.__dict__["window"] = {"layers": [1, 2, 3]}
    found = transfer.rows
    assert len(asked) == 12 and list(found) == ["a", "b"]
    for k, (removed, sizes) in enumerate(found.values()):
        assert removed.shape == (2, 3, len(PROMPTS))
        for way in (0, 1):
            own, *nulls = pushes(backend, rows, *asked[6 * k + 3 * way :][:3])
            assert all(equal_dose(own, null) for null in nulls)
            span = torch.linalg.qr(torch.stack([random[s][2 * k] for s in sites]).double().T)[0]
            moved = torch.cat(list(nulls[0].values()))
            assert float((moved - moved @ span @ span.T).norm() / moved.norm()) < 1e-4
        total = sum(x[0] for x in pushes(backend, rows, asked[6 * k])[0].values())
        assert sizes[0] == pytest.approx(float(torch.as_tensor(total).norm()), rel=1e-4)
    assert transfer.equal_dose()["add"]["n_random"] == 4


def test_windows_lie_inside_the_model() -> None:
    assert windows(24) == [list(range(6, 11)), list(range(12, 17)), list(range(17, 22))]
    assert windows(4) == [[1], [2], [3]]


def test_random_directions_agree_between_layers_as_their_states_do() -> None:
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    same = random_directions({Site(1): x, Site(2): x.flip(1)}, 3, 0)
    torch.testing.assert_close(same[Site(1)], same[Site(2)].flip(1))
    torch.testing.assert_close(same[Site(1)].norm(dim=1), torch.ones(3))


def test_independence_counts_what_later_blocks_do_and_not_geometry() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    vectors = random_unit_vectors(2, backend.d_model, 0).float()
    units = {Site(layer): vectors for layer in range(1, backend.n_layers + 1)}
    gaps = {site: torch.ones(2) for site in units}
    found = shifts(backend, rows, Site(2), units, gaps, random_unit_vectors(3, backend.d_model, 1).float())
    assert found["total"].shape == (2, 4, len(rows), backend.n_layers - 2, 2)
    # The plain way: both runs from the start, no prepared states.
    later = [Site(3), Site(4)]
    base = last_states(backend, rows, [Site(2), *later])
    after = last_states(backend, rows, later, ablate({Site(2): vectors[0]}))
    plain = (after[Site(4)] - base[Site(4)]) @ vectors[1]
    torch.testing.assert_close(found["total"][0, 0, :, 1, 1].float(), plain, atol=1e-4, rtol=0)
    geometry = -(base[Site(2)] @ vectors[0]) * (vectors[0] @ vectors[1])
    torch.testing.assert_close(found["downstream"][0, 0, :, 1, 1].float(), plain - geometry, atol=1e-4, rtol=0)


def test_without_later_blocks_there_is_no_dependence() -> None:
    """Blocks that write nothing: ablation moves the other projection by geometry alone."""
    backend = tiny_backend("llama")
    for block in backend.blocks:  # type: ignore[attr-defined]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    rows = tiny_rows(backend)
    vectors = random_unit_vectors(2, backend.d_model, 0).float()
    units = {Site(layer): vectors for layer in range(1, backend.n_layers + 1)}
    found = shifts(backend, rows, Site(1), units, {s: torch.ones(2) for s in units}, vectors.flip(0))
    assert float(found["downstream"].abs().max()) < 1e-5 < float(found["total"][0, 0, :, :, 0].abs().max())


def test_the_summary_sees_a_planted_dependence_of_one_pair() -> None:
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(2, 9, 10, 4, 2, generator=g)
    x[0, 0, :, :, 1] += 1
    there, back = summary([x, x], ["a", "b"])
    assert (there["ablated"], there["read"]) == ("a", "b")
    assert there["beyond"] == there["pairs"] == 8 and back["beyond"] == 0
    assert there["excess"]["low"] > 0.5


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    base = study_arguments(tmp_path, monkeypatch)
    for size, n in (
        ("--fit", "64"),
        ("--select", "40"),
        ("--report", "40"),
    ):  # enough of both verdicts for several kinds
        base[base.index(size) + 1] = n
    return [*base, "--refusing", "5", "--probe", "4", "--random", "4", "--dimensions", "2"]


def test_the_whole_study_resumes_and_draws(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, arguments) == 0
    first = capsys.readouterr().out
    result = load_result(tmp_path / "out", kind=study.KIND)
    data = result.data
    assert data["applicable"], data["reason"]
    assert data["layers"] == [1, 2, 3, 4] and len(data["window"]["layers"]) == 1
    assert data["columns"][0] == "political" and len(data["columns"]) >= 2
    n = len(data["kinds"])
    assert result.tensors["directions"].shape == (4, n, 32)
    for edit in ("add", "ablate"):
        found = data["transfer"][edit]
        assert len(found["cells"]) == len(data["transfer"]["rows"]) and found["columns"] == data["columns"]
        for cell in (c for line in found["cells"] for c in line):
            assert cell["low"] <= cell["value"] <= cell["high"] and 0 <= cell["p"] <= cell["q"] <= 1
    assert {p.name for p in (tmp_path / "out" / "figures").glob("*.png")} == {
        "refusal_geometry.png",
        "refusal_independence.png",
        "refusal_transfer.png",
    }
    steps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("*/result.json")}
    files = [tmp_path / "out" / "result.json", *(tmp_path / "out" / "figures").iterdir()]
    before = {p: p.read_bytes() for p in files}
    assert run_command(Config, run, arguments) == 0
    assert capsys.readouterr().out == first
    assert {p: p.read_bytes() for p in files} == before
    assert {p: p.stat().st_mtime_ns for p in steps} == steps
    assert figure.main(["--result", str(tmp_path / "out"), "--out", str(tmp_path / "a")]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == before[tmp_path / "out" / "figures" / path.name]


def test_a_model_that_does_not_refuse_is_a_plain_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_arguments(tmp_path, monkeypatch, refuses=False)
    assert run_command(Config, run, arguments) == 0
    assert "not applicable: base refusal 0%" in capsys.readouterr().out
    assert not load_result(tmp_path / "out", kind=study.KIND).data["applicable"]


def test_wrong_settings_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Config, run, [*arguments, "--random", "2"]) == 2
    assert "at least 4" in capsys.readouterr().err
