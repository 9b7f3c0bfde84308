"""Judges by checkpoints: hand-worked counts and kappas, what is counted and what is left out, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import cohen_kappa_score

from analyses.judge_table import Config, run
from rsteer_interp.backends import load_backend
from rsteer_interp.command_line import run as run_command
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.judge_tables import KIND, JudgeTable, LogOddsJudge, judge_table, recorded_log_odds
from rsteer_interp.judges.base import UNDECIDED, Verdict
from rsteer_interp.judges.responses import Response
from rsteer_interp.results import load_result
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.vector_controls import opening_token_ids
from tests.refusing_model import save_refusing, texts

ROOT = Path(__file__).parents[1]


class WordJudge:
    """Refusal where the reply holds the word; undecided where it is empty."""

    def __init__(self, word: str) -> None:
        self.name, self.word = word, word

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.9 if self.word in r else 0.1) if r else UNDECIDED for r in responses]


REPLIES = {
    "before": [Response(f"p{i}", text) for i, text in enumerate(["sorry no", "sorry", "no", "yes", ""])],
    "after": [
        Response(f"p{i}", text, label)
        for i, (text, label) in enumerate([("yes", -1), ("sorry", 1), ("fine", 0), ("no", None)])
    ],
}


def table() -> JudgeTable:
    return judge_table(REPLIES, {"sorry": WordJudge("sorry"), "no": WordJudge("no")})


def test_counts_hold_every_reply() -> None:
    found = table()
    assert found.judges == ["sorry", "no", "label"]
    assert found.count("before", "sorry") == (Rate.from_count(2, 5), 1)
    assert found.count("before", "no") == (Rate.from_count(2, 5), 1)
    assert found.count("after", "sorry") == (Rate.from_count(1, 4), 0)
    assert found.count("after", "label") == (Rate.from_count(1, 4), 2)  # an unclear and a missing label


def test_replies_to_one_prompt_count_once() -> None:
    many = {name: [row for row in rows for _ in range(20)] for name, rows in REPLIES.items()}
    found = judge_table(many, {"sorry": WordJudge("sorry"), "no": WordJudge("no")})
    rate, _ = found.count("before", "sorry")
    assert (rate.count, rate.n, rate.units) == (40, 100, 5)
    once, _ = table().count("before", "sorry")
    assert rate.low <= once.low and rate.high >= once.high
    (pair,), (single,) = (each.pairs("before")[:1] for each in (found, table()))
    assert pair.agreement is not None and single.agreement is not None
    assert pair.agreement.accuracy.high >= single.agreement.accuracy.high and pair.agreement.accuracy.units == 4


def test_confusion_and_kappa_are_over_what_both_decided() -> None:
    (pair,) = table().pairs("before")
    assert (pair.first, pair.second, pair.n_left_out) == ("sorry", "no", 1)
    assert pair.confusion == ((1, 1), (1, 1))  # neither; only no; only sorry; both
    assert pair.agreement is not None
    assert pair.agreement.kappa is not None
    assert pair.agreement.kappa.value == 0.0
    pooled = {(p.first, p.second): p for p in table().pairs()}
    assert pooled["sorry", "no"].confusion == ((3, 2), (2, 1))
    assert pooled["sorry", "label"].confusion == ((1, 0), (0, 1))
    assert pooled["sorry", "label"].n_left_out == 2
    assert pooled["sorry", "label"].agreement.accuracy == Rate.from_count(2, 2)  # type: ignore[union-attr]


def test_kappa_is_scikit_learns_and_its_interval_covers_the_truth() -> None:
    """Two judges that agree with probability 0.8 at base rate 1/2 have kappa 0.6."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.random(120) < 0.5
        other = np.where(rng.random(120) < 0.8, truth, ~truth)
        z = {"a": tuple(np.where(truth, 1, -1).tolist()), "b": tuple(np.where(other, 1, -1).tolist())}
        (pair,) = JudgeTable({"m": z}).pairs("m", seed=seed)
        assert pair.agreement is not None
        kappa = pair.agreement.kappa
        assert kappa is not None
        assert kappa.value == pytest.approx(cohen_kappa_score(truth, other))
        covered += kappa.low <= 0.6 <= kappa.high
    assert 52 <= covered <= 60


def test_judges_that_say_one_thing_have_no_kappa_and_disjoint_ones_no_pair() -> None:
    same = JudgeTable({"m": {"a": (1, 1, 1), "b": (1, 1, 1)}, "n": {"c": (1, 0)}})
    (pair,) = same.pairs()
    assert pair.agreement is not None
    assert pair.agreement.kappa is None
    assert JudgeTable({"m": {"a": (0, 1), "b": (1, 0)}}).pairs()[0].agreement is None
    with pytest.raises(UserError, match="saw different replies"):
        JudgeTable({"m": {"a": (1,), "b": (1, -1)}})


def test_tables_show_every_cell() -> None:
    console = Console(width=200, record=True, file=StringIO())
    for printed in table().tables():
        console.print(printed)
    shown = console.export_text()
    assert "2: 40 (12-77), 1 undecided" in shown
    assert "sorry, no" in shown
    assert "undefined" not in shown.split("sorry, no")[1].splitlines()[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refusing(tmp_path_factory.mktemp("refusing") / "model")


def test_first_token_log_odds_as_a_judge(model: Path) -> None:
    backend = load_backend(model, "hooks")
    tokens = opening_token_ids(backend.tokenizer, ["i"])
    prompts = [*texts("bomb")[:3], *texts("bread")[:3], texts("bomb")[0]]
    found = LogOddsJudge(backend, tokens).judge(prompts, [""] * 7)
    assert [v.z for v in found] == [1, 1, 1, -1, -1, -1, 1]
    odds = log_odds(backend, backend.template().encode_all(prompts), tokens)
    assert [v.confidence for v in found] == pytest.approx(odds.sigmoid().tolist())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SORRY, YES = "I'm sorry, but I can't assist with that.", "Sure! Here is a short answer: yes, it is so."


def test_the_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [{"prompt": p, "response": SORRY, "label": 1} for p in texts("bomb")[:6]]
    second = [{"prompt": p, "response": YES, "label": -1} for p in texts("bread")[:6]]
    a, b = write(tmp_path / "base" / "responses.jsonl", first + second), write(tmp_path / "edited.jsonl", second)
    arguments = ["--responses", str(a), f"new={b}", "--out", str(tmp_path / "out"), "--judges", "pattern"]
    arguments += ["--checkpoints", str(model), str(model), "--refusal-words", "i"]
    assert run_command(Config, run, arguments) == 0
    assert "kappa" in capsys.readouterr().out
    data = load_result(tmp_path / "out", kind=KIND).data
    assert {judge: c["count"] for judge, c in data["counts"]["base"].items()} == {
        "pattern": 6,
        "label": 6,
        "log_odds": 6,
    }
    assert data["counts"]["new"]["pattern"]["count"] == 0
    assert all(pair["agreement"]["kappa"]["value"] == 1.0 for pair in data["pooled"])
    assert len(data["pooled"]) == 3


def test_recorded_log_odds(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "log_odds": x} for x in (2.5, -0.1, 0)]
    found = recorded_log_odds(write(tmp_path / "r.jsonl", [{"header": True}, *rows]))
    assert found is not None
    assert [v.z for v in found] == [1, -1, 0]
    assert recorded_log_odds(write(tmp_path / "s.jsonl", [{"prompt": "a", "response": "b"}])) is None
    for bad in (None, "2", True, float("nan")):
        rows[1]["log_odds"] = bad
        with pytest.raises(UserError, match="response 2 has log_odds"):
            recorded_log_odds(write(tmp_path / "t.jsonl", rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--responses", "FILE", "FILE"], "write them as NAME=FILE"),
        (["--responses", "a=nowhere.jsonl"], "cannot read"),
        (["--responses", "FILE", "--judges", "oracle"], "unknown judge"),
        (["--responses", "FILE", "--checkpoints", "x", "y"], "2 checkpoints for 1 files"),
        (["--responses", "FILE", "--judges", "local"], "needs a model"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.jsonl", [{"prompt": "a", "response": YES}])
    words = [str(file) if a == "FILE" else a for a in arguments]
    assert run_command(Config, run, [*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_real_command(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [{"prompt": "a", "response": r} for r in (SORRY, YES)])
    command = [sys.executable, "-m", "analyses.judge_table", "--responses", str(file), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
