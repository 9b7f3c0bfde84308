"""Study of layers: planted truth for both curves, nulls that stay null, several methods; test_studies.py runs it whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rsteer_interp.studies.layers as study
from analyses.layer_concentration import Config, run
from rsteer_interp.backends.edits import Site
from rsteer_interp.command_line import run as run_command
from rsteer_interp.directions import Evidence
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import Displace, ablate, add
from rsteer_interp.nulls import max_correlation_null, random_unit_vectors
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.results import load_result
from rsteer_interp.studies.layer_curves import causal_curve, read_out, significant
from tests.study_fixture import study_arguments
from tests.tiny_models import draw, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)


def test_displacing_along_itself_is_ablation_and_the_null_is_as_large() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    v, u = random_unit_vectors(2, backend.d_model, 0).float()
    mine = log_odds(backend, rows, TOKENS, Displace(Site(2), v, v))
    torch.testing.assert_close(mine, log_odds(backend, rows, TOKENS, ablate({Site(2): v})), atol=1e-5, rtol=0)
    x = torch.randn(3, 4, backend.d_model)
    size = [(Displace(Site(2), v, w)(x, None) - x).norm(dim=-1) for w in (v, u)]  # type: ignore[arg-type]
    torch.testing.assert_close(size[0], size[1])


def test_one_site_equals_the_plain_way() -> None:
    backend = tiny_backend("qwen2")
    rows = tiny_rows(backend)
    v, *random = random_unit_vectors(3, backend.d_model, 1).float()
    got = study.single_site(backend, rows, TOKENS, Site(3), v, torch.stack(random), 0.7)
    assert got.shape == (2, 3, len(rows))
    plain = log_odds(backend, rows, TOKENS, add({Site(3): random[1]}, {Site(3): -0.7}))
    torch.testing.assert_close(got[1, 2], plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("null", ["isotropic", "covariance"])
def test_a_draw_of_the_null_is_one_for_all_layers(null: str) -> None:
    """So that a curve of the null is as smooth over layers as one of a family that agrees."""
    units = {Site(i): torch.nn.functional.normalize(draw(64, seed=0) + draw(64, seed=i), dim=0) for i in (1, 2, 3)}
    shared, scores = draw(30, 64, seed=9), torch.arange(30).double() % 2 - 0.5
    evidence = {s: Evidence(shared + 0.2 * draw(30, 64, seed=20 + s.layer), scores) for s in units}
    config: Any = SimpleNamespace(null=null, random=4, seed=3)
    found = torch.stack(list(study.null_directions(config, units, evidence).values()), 1).double()  # draw, layer, d
    own = torch.stack(list(units.values()))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4, 3).double())
    if null == "isotropic":
        torch.testing.assert_close(found @ found.mT, (own @ own.T).expand(4, -1, -1), atol=1e-6, rtol=0)
    else:
        assert float((found[:, 0] * found[:, 1]).sum(-1).min()) > 0.9
    assert float((found[0] * found[1]).sum(-1).abs().max()) < 0.6


def test_the_causal_curve_finds_the_layer_where_the_direction_was_written_in() -> None:
    """At block 2 the direction is the model's own gradient of the log-odds, elsewhere random."""
    backend = tiny_backend("llama")
    rows, planted, step = tiny_rows(backend), 2, 0.05
    base = log_odds(backend, rows, TOKENS)
    eye = torch.eye(backend.d_model)
    slope = [log_odds(backend, rows, TOKENS, add({Site(planted): e}, {Site(planted): step})).mean() for e in eye]
    gradient = (torch.stack(slope) - base.mean()).float()
    layers, effects = [1, 2, 3], []
    for layer in layers:
        v, *random = random_unit_vectors(9, backend.d_model, layer).float()
        if layer == planted:
            v = gradient / gradient.norm()
        effects.append(base - study.single_site(backend, rows, TOKENS, Site(layer), v, torch.stack(random), 0.3)[1])
    x = torch.stack(effects, -1)
    curve = causal_curve(x[0], x[1:].mean(1), layers, backend.n_layers)
    assert curve["peak_layer"] == planted
    assert significant(curve, layers) == [planted]
    assert curve["rank"][1] == 1


def _report(n: int, seed: int) -> Scored:
    c = torch.randn(n, generator=torch.Generator().manual_seed(seed)).sign().double()
    return Scored([""] * n, ["a", "b"] * (n // 2), [f"subject {i // 8}" for i in range(n)], c)


def test_the_read_out_finds_a_planted_layer_and_not_a_random_label() -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    select, report = _report(80, 1), _report(80, 2)
    null = read_out(p, select.confidence, p, report.confidence, report.groups, 0, 400)
    assert null["p_max"] > 0.05
    assert null["concentration"]["effective_layers"]["n"] == 80
    planted, chosen = p.clone(), p.clone()
    planted[:, 3] += 2 * report.confidence
    chosen[:, 3] += 2 * select.confidence
    found = read_out(chosen, select.confidence, planted, report.confidence, report.groups, 0, 400)
    assert found["p_max"] < 0.01 and found["within_subject_p_max"] < 0.01
    assert found["chosen_on_select"]["layer"] == 4
    r = found["chosen_on_select"]["r"]
    assert r["low"] < r["value"] < r["high"]
    assert found["concentration"]["peak"]["value"] == pytest.approx(4 / 6)
    assert found["concentration"]["effective_layers"]["value"] < found["null_effective_layers"]["low"]


def test_states_that_carry_subject_alone_are_not_refusal() -> None:
    """Refusal rates that differ by subject inside the sets, states that know the subject and nothing else."""
    generator, n, draws = torch.Generator().manual_seed(5), 104, 200
    subject = torch.arange(n) // 8
    sets, groups = (subject < 7).tolist(), subject.tolist()
    fired = {"sets": 0, "subjects": 0}
    for seed in range(draws):
        states = torch.randn(13, 4, generator=generator)[subject] + 0.5 * torch.randn(n, 4, generator=generator)
        rate = torch.randn(13, generator=generator).mul(1.5).sigmoid()[subject]
        c = (torch.rand(n, generator=generator) < rate).double() * 2 - 1
        found = read_out(states.double(), c, states.double(), c, groups, seed, 99)
        fired["subjects"] += found["within_subject_p_max"] <= 0.05
        fired["sets"] += max_correlation_null(states, c, 99, seed, groups=sets).p <= 0.05
        assert 0 < found["within_subject_n"] <= n
    slack = 3 * (0.05 * 0.95 / draws) ** 0.5
    assert fired["subjects"] / draws <= 0.05 + slack
    assert fired["sets"] / draws > 0.15  # what was said of sets


def test_random_directions_are_rarely_beyond_random() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        means = torch.randn(6, 10, generator=generator, dtype=torch.float64)  # six directions, one of them "ours"
        effect = means[0] + 0.01 * torch.randn(12, 10, generator=generator, dtype=torch.float64)
        curve = causal_curve(effect, means[1:], list(range(1, 11)), 11)
        hits += bool(significant(curve, list(range(1, 11))))
    assert hits <= 15  # at most 5 % of 200, and half of it on this side


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [*study_arguments(tmp_path, monkeypatch), "--refusing", "6", "--random", "4"]


def test_every_method_is_read_and_one_more_redoes_no_causal_step(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, arguments) == 0
    one = load_result(tmp_path / "out", kind=study.KIND).data
    steps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("*/result.json")}
    assert run_command(Config, run, [*arguments, "--methods", "md", "wrmd"]) == 0
    data = load_result(tmp_path / "out", kind=study.KIND).data
    assert {p: p.stat().st_mtime_ns for p in steps} == steps
    assert data["methods"] == ["md", "wrmd"] and data["causal"] == one["causal"]
    assert data["readouts"]["md"] == one["readouts"]["md"] != data["readouts"]["wrmd"]
    assert data["readouts"]["wrmd"]["layers"] == [1, 2, 3, 4] and data["causal"]["layers"] == [1, 2, 3]
    assert data["finding"].startswith(one["finding"].split(" Ablating")[0] + " Read-out of WRMD at layer")
    assert data["causal"]["n"] <= 6
    for edit in study.EDITS:
        curve = data["causal"][edit]
        assert all(e["low"] <= e["value"] <= e["high"] for e in curve["effect"])
        assert all(0 <= p <= q <= 1 for p, q in zip(curve["p"], curve["q"], strict=True))
    capsys.readouterr()
    for wrong in (["--methods", "md", "nobody"], ["--methods", "md", "md"], ["--random", "3"]):
        assert run_command(Config, run, [*arguments, *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong[0]}")


def test_a_weighted_method_gets_graded_scores_or_says_why_it_is_left_out(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One reply each makes |c| = 1 everywhere, and the weighted ridge the plain one to the last bit."""
    methods = ["--methods", "rmd", "wrmd", "rmd_loso"]
    assert run_command(Config, run, [*arguments, *methods]) == 0
    data = load_result(tmp_path / "out", kind=study.KIND).data
    assert data["methods"] == methods[1:] and data["left_out"] == {}
    assert data["readouts"]["rmd"]["r"] != data["readouts"]["wrmd"]["r"]
    rows = data["directions"]
    assert rows["wrmd"]["cosine_unweighted"] < 1 - 1e-6 and rows["rmd"]["cosine_unweighted"] is None
    assert rows["rmd"]["layer"] == data["readouts"]["rmd"]["chosen_on_select"]["layer"]
    assert all(0 <= row["null_space_share"] <= 1 <= row["effective_rank"] for row in rows.values())
    assert {p.name for p in (tmp_path / "scores").glob("*_sampled")} == {
        "fit_political_sensitive_sampled",
        "fit_political_matched_sampled",
    }
    said = capsys.readouterr().out
    assert "How far the directions can be trusted" in said and "RMD LOSO" in said

    assert run_command(Config, run, [*arguments, *methods, "--samples", "1"]) == 0
    data = load_result(tmp_path / "out", kind=study.KIND).data
    assert data["methods"] == ["rmd", "rmd_loso"] and "--samples 4 or more" in data["left_out"]["wrmd"]
    assert "WRMD is not applicable: 'wrmd' weighs prompts by |c|" in " ".join(capsys.readouterr().out.split())
    assert run_command(Config, run, [*arguments, "--methods", "wmd", "--samples", "1"]) == 2
    assert "error: 'wmd' weighs prompts by |c|" in capsys.readouterr().err
