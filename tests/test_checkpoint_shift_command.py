"""The command on two checkpoints: a planted shift is found where it was put, equal ones are said to be equal, others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.checkpoint_shift import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.report.page import write_overview
from rsteer_interp.results import load_result
from rsteer_interp.studies.checkpoint_shift import KIND
from tests.figure_contract import check_draws_twice_the_same, check_texts, scripts_of
from tests.tiny_models import D_MODEL, save_tiny, tiny_model, tiny_tokenizer

SMALL = ("--prompts", "20", "--others", "general", "--draws", "20")


def _call(before: Path, after: Path, out: Path, *arguments: str) -> int:
    return run_command(
        Config, run, ["--before", str(before), "--after", str(after), "--out", str(out), *SMALL, *arguments]
    )


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last block's MLP writes more along one direction, by an amount that depends on the prompt."""
    folder, model = tmp_path_factory.mktemp("after"), tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    weight = model.model.layers[-1].mlp.down_proj.weight.data
    along = torch.randn(len(weight), generator=generator)
    weight += 0.5 * torch.outer(along, torch.randn(weight.shape[1], generator=generator))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_planted_shift_of_one_dimension_is_found_at_its_depth(before: Path, after: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "shift"
    assert _call(before, after, out) == 0
    data = load_result(out, kind=KIND).data
    found = {one["layer"]: one["shift"] for one in data["sites"]}
    assert list(found) == [1, 2, 3, 4]
    assert [layer for layer, shift in found.items() if shift is not None] == [4]
    spectra, nulls = found[4]["spectra"], found[4]["rank_null"]
    assert spectra["identity"]["effective_ranks"]["0.9"] == 1
    assert nulls["isotropic"]["0.9"]["low"] > 10 and nulls["isotropic"]["0.9"]["p"] < 0.05
    assert set(spectra) == {"identity", "matrix", "map"} and data["n"] > D_MODEL + 1
    assert "mean state of 'harmful' prompts minus that of 'harmless_matched'" in data["finding"]
    assert "refused" not in data["finding"] and "answered" not in data["finding"], "sets are no verdicts"
    assert "1 dimensions" in data["finding"] and data["model"]["fingerprint"] != data["after"]["fingerprint"]
    (name,) = scripts_of(KIND)
    check_draws_twice_the_same(name, out, tmp_path / "figures")
    from figures.checkpoint_shift import draw

    check_texts(draw(load_result(out)).figure)
    page = write_overview(out.parent, tmp_path / "index.html").read_text(encoding="utf-8")
    assert data["question"] in page and "data:image/png" in page


def test_too_few_prompts_for_a_fit_are_said_to_be_too_few(before: Path, after: Path, tmp_path: Path) -> None:
    assert _call(before, after, tmp_path / "few", "--prompts", "8", "--others", "general") == 0
    shift = load_result(tmp_path / "few").data["sites"][-1]["shift"]
    assert set(shift["spectra"]) == {"identity"} and "add prompts" in shift["not_fitted"]["map"]


def test_the_same_checkpoint_twice_has_no_shift(before: Path, tmp_path: Path) -> None:
    assert _call(before, before, tmp_path / "same") == 0
    data = load_result(tmp_path / "same").data
    assert all(one["shift"] is None for one in data["sites"]) and "nothing to compare" in data["finding"]
    assert not list((tmp_path / "same" / "figures").glob("*")) if (tmp_path / "same" / "figures").exists() else True


def test_a_contrast_is_of_two_sets(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(before, before, tmp_path / "one", "--contrast", "harmful", "harmful") == 2
    assert "two different prompt sets" in capsys.readouterr().err


def test_models_that_are_not_checkpoints_of_one_are_refused(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_model("llama")
    other.model.layers = other.model.layers[:3]
    other.config.num_hidden_layers = 3
    other.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    assert _call(before, tmp_path / "short", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "compare two checkpoints of one model" in error and error.count("\n") <= 2
