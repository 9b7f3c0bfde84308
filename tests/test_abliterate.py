"""analyses/abliterate.py on a tiny model with a planted refusal: sweep, choice, checkpoint, nulls, and what it refuses to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analyses.abliterate import Config, run
from rsteer_interp.abliteration import KIND
from rsteer_interp.abliteration_sweep import (
    Candidate,
    Effects,
    Prompts,
    after_final_norm,
    choose,
    equal_dose_null,
    fit_candidates,
)
from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.edits import Around, At, Site
from rsteer_interp.command_line import run as run_command
from rsteer_interp.evaluation import log_odds
from rsteer_interp.judges import JUDGES
from rsteer_interp.nulls import cosine, random_unit_vectors
from rsteer_interp.results import load_result
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.vector_formats import save_vectors
from rsteer_interp.weight_edit import RECORD, writer_ablation, writer_sites
from tests.pushes import Spy
from tests.refusing_model import save_refusing, write_sets
from tests.test_vector_formats import some
from tests.tiny_models import D_MODEL, N_LAYERS, save_tiny, tiny_backend, tiny_rows

SMALL = ["--conversations", "3", "--random", "4", "--refusal-words", "i", "--kl-limit", "100"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refusing(tmp_path_factory.mktemp("refusing") / "model")


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setitem(JUDGES, "default", "tests.refusing_model:OpeningJudge")
    sets = [word for name, path in write_sets(tmp_path).items() for word in (f"--{name}", path)]

    def call(*arguments: str) -> int:
        return run_command(
            Config, run, ["--model", str(model), "--out", str(tmp_path / "out"), *sets, *SMALL, *arguments]
        )

    return call


@pytest.fixture(scope="module")
def token(model: Path) -> tuple[int, ...]:
    return (load_backend(model, "hooks").tokenizer("i", add_special_tokens=False)["input_ids"][0],)


def test_the_whole_command(command: Callable[..., int], model: Path, token: tuple[int, ...], tmp_path: Path) -> None:
    assert command("--fractions", "0.5", "0.75", "1") == 0
    result = load_result(tmp_path / "out", kind=KIND)
    sweep = {row["name"]: row for row in result.data["sweep"]}
    assert list(sweep) == ["0.5", "0.75", "1", "1 final norm"]
    assert [row["layer"] for row in sweep.values()] == [2, 3, 4, 4]
    assert sweep["1"]["cosines"]["1 final norm"] < 0.999
    # The planted refusal goes. (In 32 dimensions moves as large along random directions may take it as well.)
    best = result.data["chosen"]
    assert sweep[best]["layer"] < 0.8 * N_LAYERS
    refused = str(tmp_path / "refused.jsonl")
    fall = sweep[best]["change"][refused]["value"]
    assert fall < -4
    assert fall == min(row["change"][refused]["value"] for row in sweep.values() if row["layer"] < 0.8 * N_LAYERS)
    for null in ("null_random_directions", "null_equal_dose"):
        assert len(set(result.data[null])) == 4
    # The checkpoint answers as the activation edit does, and was measured as loaded from disk.
    vector = result.tensor(best, 32)
    edit = writer_ablation(vector, writer_sites(N_LAYERS))
    saved, plain = load_backend(tmp_path / "out" / "checkpoint", "hooks"), load_backend(model, "hooks")
    rows = tiny_rows(plain)
    torch.testing.assert_close(log_odds(saved, rows, token), log_odds(plain, rows, token, edit), atol=1e-3, rtol=1e-3)
    measured = result.data["checkpoint"]
    assert measured["fingerprint"] == saved.fingerprint
    assert max(measured["component"].values()) < 1e-5
    assert measured["refused_before"][refused]["rate"] == 1.0
    assert measured["refused_after"][refused]["rate"] < 0.5
    assert measured["change"][refused]["value"] < -4
    assert set(measured["read_out"]) == {"before", "after"} and measured["read_out"]["before"]["valid"]
    assert result.data["edge"] == (sweep[best]["layer"] in (2, 4))
    assert measured["answer_shift"]["n"] == 3
    record = json.loads((tmp_path / "out" / "checkpoint" / RECORD).read_text())
    assert (record["direction"], record["of"]) == (best, plain.fingerprint)
    assert "model.embed_tokens.weight" in record["writers"]
    assert str(tmp_path) not in json.dumps(record)


def test_the_equal_dose_null_moves_every_state_as_far_as_the_ablation_itself() -> None:
    """Against moves of the ablation's own sizes, replayed by hand along the same random directions."""
    backend = tiny_backend("llama")
    rows, sites = tiny_rows(backend), writer_sites(N_LAYERS)
    r, *random = random_unit_vectors(4, D_MODEL, 0)
    prompts = Prompts({}, {"set": rows}, {"set": log_odds(backend, rows, (5,))}, [], (5,), [])
    spy = Spy(writer_ablation(r.float(), sites, 1.2))
    log_odds(backend, rows, (5,), spy)

    @dataclass(frozen=True, eq=False)
    class Replay(Around):
        u: Tensor

        def __call__(self, x: Tensor, at: At) -> Tensor:
            out = x.clone()
            for i, row in enumerate(at.rows.tolist()):
                for j, position in enumerate(at.positions[i].tolist()):
                    delta = spy.seen[at.batch.rows[row].ids, at.site, position]
                    out[i, j] += ((delta @ r) * self.u).float()
            return out

    found = equal_dose_null(backend, r.float(), sites, 1.2, torch.stack(random), prompts, "set")
    wanted = [float((log_odds(backend, rows, (5,), Replay(spy.edit, u)) - prompts.base["set"]).mean()) for u in random]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_granular_reports_what_is_left(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--fraction", "0.5", "--writers", "granular") == 0
    result = load_result(tmp_path / "out", kind=KIND)
    assert [row["name"] for row in result.data["sweep"]] == ["0.5"]
    component = result.data["checkpoint"]["component"]
    assert component["blocks.0.hook_resid_pre"] > 1e-3
    assert component[f"blocks.{N_LAYERS}.hook_resid_pre"] > 1e-3
    names = json.loads((tmp_path / "out" / "checkpoint" / RECORD).read_text())["writers"]
    assert not any("embed" in name or ".0." in name for name in names)


def test_sweep_only_writes_no_checkpoint(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--sweep-only", "--fractions", "0.5") == 0
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert "checkpoint" not in load_result(tmp_path / "out", kind=KIND).data


def test_a_direction_from_a_file(command: Callable[..., int], tmp_path: Path) -> None:
    save_vectors(tmp_path / "v.gguf", some(sites=(Site(2), Site(3))), "gguf")
    assert command("--direction", str(tmp_path / "v.gguf")) == 2
    assert command("--direction", str(tmp_path / "v.gguf"), "--layer", "3") == 0
    result = load_result(tmp_path / "out", kind=KIND)
    assert abs(cosine(result.tensor("v.gguf", 32), some(sites=(Site(2), Site(3))).directions[1])) > 1 - 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fractions", "0.5", "1.5"], "fraction 1.5"),
        (["--refusal-words", "sorry"], "no token for 'sorry'"),
        (["--answered", "harmless_matched", "--refusal-words", "poem"], "this model refuses 0 prompts"),
        (["--kl-limit", "0", "--fractions", "0.5", "0.75"], "no direction of the sweep keeps the KL within 0"),
        (["--direction", "nowhere.gguf"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], message: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_weights_that_cannot_be_edited_are_said_to_be_so_before_the_sweep(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("gemma2", tmp_path / "gemma2")
    assert command("--model", str(tmp_path / "gemma2")) == 2
    said = capsys.readouterr()
    assert "not written by weights alone" in said.err
    assert not (tmp_path / "out").exists()
    assert command("--random", "1") == 2


def test_an_existing_checkpoint_stays(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    assert command() == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_the_final_norm_variant_is_the_last_hidden_state(family: str) -> None:
    backend = tiny_backend(family)
    rows = tiny_rows(backend)
    batch = backend.batch(rows)
    wanted = backend.model(
        batch.ids, attention_mask=batch.mask.long(), position_ids=batch.positions, output_hidden_states=True
    ).hidden_states[-1][:, -1]
    found = last_states(backend, rows, [Site(N_LAYERS)])[Site(N_LAYERS)]
    torch.testing.assert_close(after_final_norm(backend.model, found), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, wanted, atol=0.1)


def test_candidates_are_read_where_they_say() -> None:
    backend = tiny_backend("llama")
    rows, c = tiny_rows(backend), torch.tensor([1.0, 1, 1, -1, -1, -1])
    found = fit_candidates(backend, rows, c, (0.3, 0.6, 1.0))
    states = last_states(backend, rows, [Site(1), Site(2), Site(4)])
    for candidate, layer in zip(found, (1, 2, 4), strict=False):
        h = states[Site(layer)].double()
        torch.testing.assert_close(candidate.vector, (h[:3].mean(0) - h[3:].mean(0)).float())
    assert [c.final_norm for c in found] == [False, False, False, True]
    (pre,) = fit_candidates(backend, rows, c, (1.0,), final_norm=False)
    (post,) = fit_candidates(backend, rows, c, (1.0,), final_norm=True)
    assert torch.equal(pre.vector, found[2].vector)
    assert torch.equal(post.vector, found[3].vector)


def test_the_choice_follows_the_filters() -> None:
    def effect(change: float, kl: float) -> Effects:
        return Effects(
            {"x": Estimate(change, change, change, 9)}, {"x": Rate.from_count(1, 9)}, Estimate(kl, kl, kl, 9)
        )

    one = torch.ones(4)
    candidates = [Candidate(str(i), one, layer) for i, layer in enumerate((4, 8, 12, 17))]
    found = {"0": effect(-1, 0.01), "1": effect(-3, 0.05), "2": effect(-5, 0.5), "3": effect(-9, 0.01)}
    chosen = choose(candidates, found, "x", 0.1, 20)
    assert chosen is not None
    assert chosen.name == "1"  # the third costs too much, the fourth is read too late
    assert choose(candidates, found, "x", 0.001, 20) is None
    assert choose(candidates[3:], found, "x", 0.0, 20) is candidates[3]
