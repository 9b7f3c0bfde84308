"""analyses/convert_direction.py and the controls that it runs on a vector from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analyses.convert_direction import Config, run
from rsteer_interp import vector_controls
from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.command_line import run as run_command
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.gates import Gate
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.prompts import Prompt, load_prompts
from rsteer_interp.results import load_result
from rsteer_interp.steering import Steering, load_steering, make_steering
from rsteer_interp.vector_controls import Controls, controls, opening_token_ids
from rsteer_interp.vector_formats import added_by, load_vectors, save_vectors
from tests.pushes import equal_dose, pushes
from tests.refusing_model import OpeningJudge, save_refusing, texts, write_sets
from tests.test_vector_formats import some
from tests.tiny_models import D_MODEL, PROMPTS, tiny_backend, tiny_rows

SITES = (Site(2), Site(3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refusing(tmp_path_factory.mktemp("refusing") / "model")


@pytest.fixture(scope="module")
def backend(model: Path) -> Backend:
    return load_backend(model, "hooks")


def planted(backend: Backend, alpha: float) -> Steering:
    """Along what writes the opening of refusals, which the nearly linear model reads at every site; amounts in units of |resid|."""
    rows = {word: backend.template().encode_all(texts(word)) for word in ("bomb", "bread")}
    norms = mean_norms(backend, rows["bomb"], SITES)
    (opening,) = opening_token_ids(backend.tokenizer, ["i"])
    read = backend.model.lm_head.weight[opening] * backend.model.model.norm.weight
    vectors = dict.fromkeys(SITES, read)
    means = {s: x.mean(0) for s, x in last_states(backend, rows["bread"], SITES).items()}
    scales = {s: (norms[s], norms[s]) for s in SITES}
    return make_steering("md", vectors, means, scales, SITES, alpha=alpha, reposition=False)


def measured(backend: Backend, steering: Steering, n_random: int = 8) -> Controls:
    benign = list(load_prompts("conversations").sample(3, 0))
    tokens = opening_token_ids(backend.tokenizer, ["i"])
    asked = [Prompt(prompt=text, subject=text) for text in texts("bomb")]
    return controls(backend, steering, asked, benign, tokens, OpeningJudge(), n_random=n_random, tokens=2)


def test_a_true_direction_beats_random_edits_and_a_flipped_one_is_called_so(backend: Backend) -> None:
    found = measured(backend, planted(backend, -0.03))
    assert found.as_stated is True
    assert found.effect.high < min(found.null)
    assert found.beside.z < -1.5
    assert found.beside.p() == found.beside.least_p == pytest.approx(1 / 9)
    assert found.base.low > 0
    assert found.refused[0].rate == 1.0 and found.refused[1].n == len(texts("bomb"))
    assert found.record()["read_out"]["refused"]["rate"] == found.refused[1].rate
    assert found.kl.value > 0
    steering = planted(backend, -0.03)
    states = last_states(backend, backend.template().encode_all(texts("bomb")), SITES)
    assert found.dose == steering.dose(states)
    flipped = measured(backend, replace(steering, directions=-steering.directions))
    assert flipped.as_stated is False
    assert flipped.dose == found.dose


def test_a_random_direction_is_no_better_than_random_ones(backend: Backend) -> None:
    beaten = 0
    for seed in range(4):
        units = random_unit_vectors(2, D_MODEL, 100 + seed).float()
        found = measured(backend, replace(planted(backend, -0.1), directions=units), n_random=6)
        beaten += found.beside.p() < 0.15
    assert beaten <= 2


@pytest.mark.parametrize("kind", ["add", "reposition", "gated"])
def test_the_null_is_as_large_a_push_in_the_sum_of_all_sites(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the runs that the controls ask for: sites that agree push as one, in the null too."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    w = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    median = float((last_states(backend, rows, [Site(1)])[Site(1)] @ w).median())
    gate = Gate(Site(1), w, median) if kind == "gated" else None
    steering = replace(some(sites=SITES, gate=gate), reposition=kind == "reposition")
    steering = replace(steering, directions=steering.directions[:1].expand(2, -1))
    asked: list[Edit | None] = []

    def spied(backend: Backend, rows: list[Tokens], ids: list[int], edits: list[Edit | None]) -> Tensor:
        asked.extend(edits)
        return log_odds_of_each(backend, rows, ids, edits)

    monkeypatch.setattr(vector_controls, "log_odds_of_each", spied)
    prompts = [Prompt(prompt=text, subject=text) for text in PROMPTS]
    controls(
        backend,
        steering,
        prompts,
        list(load_prompts("conversations").sample(3, 0)),
        [5],
        OpeningJudge(),
        n_random=3,
        tokens=1,
    )
    none, *edits = asked
    assert none is None and len(edits) == 4
    own, *nulls = pushes(backend, rows, *[e for e in edits if e is not None])
    assert all(equal_dose(own, null) for null in nulls)
    moved = own[SITES[0]].norm(dim=-1) > 0
    assert bool(moved.any()) and bool(moved.all()) == (kind != "gated")


def test_controls_need_an_edit_and_a_null(backend: Backend) -> None:
    with pytest.raises(UserError, match="adds nothing"):
        measured(backend, planted(backend, 0.0))
    with pytest.raises(UserError, match="1 random rotations make no null"):
        measured(backend, planted(backend, -0.1), n_random=1)


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Callable[..., int]:
    sets = write_sets(tmp_path)

    def call(source: str, *arguments: str, check: bool = False) -> int:
        checks = ["--model", str(model), "--refused", sets["refused"], "--conversations", "3", "--random", "4"]
        words = ["--source", str(tmp_path / source), "--refusal-words", "i", *(checks if check else [])]
        return run_command(Config, run, [*words, *(["--check"] if check else []), *arguments])

    return call


def test_conversion_there_and_back(command: Callable[..., int], backend: Backend, tmp_path: Path) -> None:
    steering = replace(planted(backend, -0.1), fingerprint=backend.fingerprint)
    save_vectors(tmp_path / "a.safetensors", steering)
    out = str(tmp_path / "b.gguf")
    assert command("a.safetensors", "--out", out, "--to", "gguf", "--model-hint", "llama") == 0
    assert command("b.gguf", "--out", str(tmp_path / "c"), "--to", "steering") == 0
    back = load_steering(tmp_path / "c", backend, other_model=True)
    for site, vector in added_by(steering).added.items():
        torch.testing.assert_close(added_by(back).added[site], vector, atol=0, rtol=1e-6)
    assert back.alpha == -1.0
    assert command("b.gguf", "--out", str(tmp_path / "d.npy"), "--to", "tensor", "--strength", "-2") == 0
    assert load_vectors(tmp_path / "d.npy", sign=1).amounts == pytest.approx(
        {site: -2 * amount for site, amount in steering.amounts.items()}
    )
    assert command("a.safetensors", "--out", out) == 2  # it is there already


def test_a_checked_import(
    command: Callable[..., int], backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_vectors(tmp_path / "v.gguf", planted(backend, -0.03), "gguf")
    arguments = ["--out", str(tmp_path / "w.safetensors")]
    assert command("v.gguf", *arguments, check=True) == 0
    assert "effect has the stated sign" in capsys.readouterr().out
    result = load_result(tmp_path / "w.safetensors.controls", kind="controls")
    assert result.data["as_stated"] is True
    assert result.data["effect"]["value"] < min(result.data["null"])
    assert result.data["effect"]["n"] == 8
    assert load_vectors(tmp_path / "w.safetensors", backend=backend).sites == SITES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check"], "need a model"),
        (["--check", "--model", "MODEL", "--refused", "ANSWERED"], "refuses 0 of 8 prompts"),
        (["--points-to", "refusing"], "says itself which way"),
        (["--out", "x.npy", "--to", "tensor", "--source", "GATED"], "has a gate"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    message: str,
    command: Callable[..., int],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_vectors(tmp_path / "v.gguf", some(sites=SITES), "gguf")
    save_vectors(tmp_path / "gated", some(sites=SITES, gate=Gate(Site(1), torch.ones(D_MODEL), 0.0)))
    names = {"MODEL": str(model), "ANSWERED": str(tmp_path / "answered.jsonl"), "GATED": str(tmp_path / "gated")}
    assert command("v.gguf", *(names.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl")) == '["gated", "v.gguf"]'
