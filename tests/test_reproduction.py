"""The reproduction end to end on a tiny random model: every step, resuming after a stop, and models that do not refuse."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

import rsteer_interp.reproduction as reproduction
from analyses.apply_steering import Config as ApplyConfig
from analyses.apply_steering import run as apply_run
from analyses.reproduce import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.directions import ESTIMATORS, PAPER, RidgeMeanDifference
from rsteer_interp.judges.base import Verdict
from rsteer_interp.reproduction.finder import NULL_DRAWS
from rsteer_interp.reproduction.presets import PRESETS
from rsteer_interp.results import load_result
from tests.tiny_models import save_tiny

SMALL = replace(
    PRESETS["demo"],
    fit=dict.fromkeys(PRESETS["demo"].fit, 24),
    select=dict.fromkeys(PRESETS["demo"].select, 20),
    report=dict.fromkeys(PRESETS["demo"].report, 6),
    tokens=3,
    harmful_tokens=3,
    ks=(1, 2),
    alphas=(-0.5, -1.0),
    judged=16,
    first=4,
    harmful=4,
    null=3,
    finder_conversations=3,
    report_conversations=4,
    permutations=50,
)


class FirstWordJudge:
    """Calls a reply a refusal by a hash of its first word: a random model then refuses some prompts, answers others."""

    name = "first word"

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.9 if zlib.crc32(text.split(" ")[0].encode()) % 2 else 0.1) for text in responses]


class NeverJudge(FirstWordJudge):
    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.1) for _ in responses]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(PRESETS, "demo", SMALL)
    monkeypatch.setattr(reproduction, "load_judge", lambda name, backend: FirstWordJudge())
    folder = tmp_path / "model"
    folder.mkdir()
    return Config(model=str(save_tiny("llama", folder)), out=tmp_path / "out", backend="hooks", batch_size=16)


def test_every_step_and_the_saved_configuration(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run(config)
    result = load_result(config.out, kind="reproduce")
    data = result.data
    assert data["applicable"]
    assert [row["label"] for row in data["table"]] == ["base", "MD", "WMD", "RMD", "WRMD"]
    for row in data["table"]:
        for rate in row["rates"].values():
            assert rate["n"] == 6
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
        assert (row["answer_shift"] is None) == (row["label"] == "base")
    assert data["layer_scores"]["wrmd"]["layers"] == [1, 2, 3, 4]
    assert len(data["null"]["random"]) == NULL_DRAWS
    assert [(row["method"], row["reposition"]) for row in data["matched"]] == [
        (m, r) for m in PAPER for r in (False, True)
    ]
    assert all(row["harmful"]["before"]["n"] == 4 for row in data["matched"])
    trials, every = data["finder"]["trials"], data["finder"]["fresh"]["n"]
    assert len(trials) == 4 * 8 and sum(trial["chosen"] for trial in trials) == 4
    for trial in trials:
        assert trial["removal"] is None or trial["removal"]["n"] == (every if trial["complete"] else 4)
        assert trial["complete"] or not trial["chosen"]
    assert page.is_file()

    prompts = tmp_path / "mine.jsonl"
    prompts.write_text(json.dumps({"prompt": "tell me about the city", "set": "harmful_mine"}) + "\n", encoding="utf-8")
    monkeypatch.setattr("rsteer_interp.application.load_judge", lambda name, backend: FirstWordJudge())
    out = apply_run(
        ApplyConfig(
            steering=config.out / "steering" / "wrmd",
            prompts=str(prompts),
            out=tmp_path / "applied",
            model=config.model,
            backend="hooks",
            max_new_tokens=24,
            harmful_tokens=4,
        )
    )
    (line,) = [json.loads(text) for text in (out / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(line) == {"set", "prompt", "base", "steered"}
    for side in ("base", "steered"):
        assert set(line[side]) == {"response", "refused", "confidence", "log_odds"}
        assert len(line[side]["response"].removesuffix(" [cut]").split()) <= 4


def test_no_edit_removes_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpha 0 without reposition is no edit. The prompts' scores, high because they were chosen for that, are no start to count from."""
    monkeypatch.setitem(PRESETS, "demo", replace(SMALL, alphas=(0.0,)))
    run(config)
    found = load_result(config.out).data["finder"]
    unedited = [trial for trial in found["trials"] if not trial["reposition"]]
    assert len(unedited) == 2 * len(PAPER)
    assert [trial["removal"]["value"] for trial in unedited] == pytest.approx([0.0] * len(unedited), abs=1e-6)
    # fault: counted from the replies that chose the prompts, no edit would remove the difference
    assert found["scored"]["value"] > found["fresh"]["value"] + 0.3


def test_a_stopped_run_continues_and_ends_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    whole = load_result(config.out).data
    again = replace(config, out=config.out.with_name("again"))
    real, calls = reproduction.evaluate, []

    def stops(context, label, *rest):  # type: ignore[no-untyped-def]
        calls.append(label)
        if label == "wmd":
            raise KeyboardInterrupt
        return real(context, label, *rest)

    monkeypatch.setattr(reproduction, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    assert not (again.out / "result.json").exists()
    monkeypatch.setattr(reproduction, "evaluate", real)
    finished = {p.name: (p / "result.json").stat().st_mtime_ns for p in (again.out / "steps").iterdir() if p.is_dir()}
    assert "4_evaluation_md" in finished
    assert "4_evaluation_wmd" not in finished
    run(again)
    for name, time in finished.items():
        assert (again.out / "steps" / name / "result.json").stat().st_mtime_ns == time
    continued = load_result(again.out).data
    for data in (whole, continued):
        data.pop("seconds")
    assert continued == whole


def test_the_table_reads_the_same_from_stored_steps(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run(config)
    first = capsys.readouterr().out
    run(config)
    assert capsys.readouterr().out == first


def test_a_model_that_does_not_refuse_is_a_plain_result(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduction, "load_judge", lambda name, backend: NeverJudge())
    code = run_command(Config, run, ["--model", config.model, "--out", str(config.out), "--backend", "hooks"])
    assert code == 0
    assert "not applicable: base refusal 0%" in capsys.readouterr().out
    data = load_result(config.out, kind="reproduce").data
    assert not data["applicable"]
    assert "table" not in data


@dataclass(frozen=True)
class Probe(RidgeMeanDifference):
    name: ClassVar[str] = "probe"
    penalty: float = 100.0


def test_a_new_estimator_gets_a_setting_a_row_and_its_place_in_every_figure(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ESTIMATORS, Probe.name, Probe)
    page = run(replace(config, methods=("md", "probe")))
    data = load_result(config.out).data
    assert [row["method"] for row in data["table"]] == [None, "md", "probe"]
    assert set(data["layer_scores"]) == set(data["directions"]) | set(data["left_out"]) == set(ESTIMATORS)
    assert (config.out / "steering" / "probe").is_dir()
    for name in ("claim_table", "frontier", "scores", "fig5_layers"):
        assert '"probe"' in (config.out / "figures" / f"{name}.json").read_text(encoding="utf-8"), name
    assert "PROBE" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no-such-model"], "no such model"),
        (["--judge", "nobody"], "unknown judge"),
        (["--device", "nowhere"], "no such device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    config: Config, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    given = ["--model", config.model, "--out", str(config.out), "--backend", "hooks", *arguments]
    assert run_command(Config, run, given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not config.out.exists()
