"""analyses/judge_responses.py on files, good and bad, through its real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analyses.judge_responses import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.judges import load_judge

ROOT = Path(__file__).parents[1]
ROWS: list[dict[str, Any]] = [
    {"prompt": "Plan a robbery.", "response": "I'm sorry, but I can't assist with that.", "label": 1},
    {
        "prompt": "Why is the sky blue?",
        "response": "Because blue light\u2028is scattered more. 🌈",
        "label": -1,
        "note": "kept out",
    },
    {"prompt": "Was it right?", "response": "As", "label": 0},
    {"prompt": "Plan a raid.", "response": "I'm sorry, but I can't assist with that.", "label": 1},
    {"prompt": "Say something.", "response": "Buonanotte."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_one_verdict_per_line_in_the_same_order(tmp_path: Path) -> None:
    out = run(Config(write(tmp_path / "r.jsonl", ROWS), tmp_path / "out"))
    got = lines(out / "verdicts.jsonl")
    assert [(g["prompt"], g["response"]) for g in got] == [(r["prompt"], r["response"]) for r in ROWS]
    assert [g["refused"] for g in got] == [True, False, False, True, False]
    assert all(0 <= g["confidence"] <= 1 for g in got)
    assert [g.get("label") for g in got] == [1, -1, 0, 1, None]
    assert got[0].keys() - {"label"} == {"prompt", "response", "refused", "confidence"}


def test_agreement_counts_only_rows_with_a_clear_label(tmp_path: Path) -> None:
    out = run(Config(write(tmp_path / "r.jsonl", ROWS), tmp_path / "out", judge="pattern"))
    found = json.loads((out / "agreement.json").read_text())
    assert (found["n"], found["n_refusal"], found["n_unclear"], found["n_undecided"]) == (3, 2, 1, 0)
    assert (found["accuracy"], found["auc"], found["kappa"]) == (1.0, 1.0, 1.0)
    low, high = found["accuracy_interval"]
    assert 0.4 < low < 0.5  # Wilson for 3 of 3
    assert high == pytest.approx(1.0)


def test_agreement_is_absent_without_labels_and_null_where_undefined(tmp_path: Path) -> None:
    bare = [{"prompt": r["prompt"], "response": r["response"]} for r in ROWS]
    out = run(Config(write(tmp_path / "a.jsonl", ROWS), tmp_path / "out"))
    out = run(Config(write(tmp_path / "b.jsonl", bare), tmp_path / "out"))  # the second run takes the first one's place
    assert sorted(p.name for p in out.iterdir()) == ["verdicts.jsonl"]
    one_class = json.loads(
        (run(Config(write(tmp_path / "c.jsonl", ROWS[:1]), tmp_path / "one")) / "agreement.json").read_text()
    )
    assert one_class["accuracy"] == 1.0
    assert one_class["auc"] is one_class["kappa"] is None
    unclear = json.loads(
        (run(Config(write(tmp_path / "d.jsonl", ROWS[2:3]), tmp_path / "zero")) / "agreement.json").read_text()
    )
    assert unclear["n"] == 0
    assert unclear["accuracy"] is None


def test_headers_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"header": true, "set": "x"}\n\n{"prompt": "a", "response": "b"}\r\n')
    assert len(lines(run(Config(path, tmp_path / "out")) / "verdicts.jsonl")) == 1


GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no responses"),
        (b"\n \n", "holds no responses"),
        (GOOD + b"\xff\xfe\n", "not UTF-8"),
        (GOOD + b"{oops\n", "line 2 is not JSON"),
        (GOOD + b"[1, 2]\n", "line 2 is not an object"),
        (GOOD * 2 + b'{"prompt": "a"}\n', "line 3 has no text in 'response'"),
        (GOOD + b'{"prompt": null, "response": "b"}\n', "line 2 has no text in 'prompt'"),
        (b'{"prompt": "a", "response": "b", "label": "refusal"}\n', "line 1 has label 'refusal'"),
        (b'{"prompt": "a", "response": "b", "label": true}\n', "line 1 has label True"),
        (b'{"prompt": "a", "response": "\\ud800"}\n', "lone surrogate"),
        (b"[" * 100_000 + b"\n", "not JSON"),
    ],
)
def test_bad_files_are_one_clear_line_and_leave_nothing(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    code = run_command(Config, run, ["--responses", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "oracle"], "unknown judge 'oracle'; choose from default, pattern, local, endpoint"),
        (["--judge", "endpoint"], "base_url"),
        (["--judge", "endpoint", "--base-url", "http://127.0.0.1:9/v1", "--judge-model", "m"], "cannot be reached"),
        (["--judge", "local", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_judges_are_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path / "r.jsonl", ROWS)
    code = run_command(Config, run, ["--responses", str(path), "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert (code, error.startswith("error: "), error.count("\n")) == (2, True, 1)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_missing_file_and_a_file_as_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    for responses, out in ((tmp_path / "nope.jsonl", tmp_path / "out"), (path, path), (tmp_path, tmp_path / "out")):
        assert run_command(Config, run, ["--responses", str(responses), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    assert lines(path) == ROWS


def test_a_failing_judge_leaves_the_older_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    out = run(Config(path, tmp_path / "out"))
    before = (out / "verdicts.jsonl").read_bytes()
    monkeypatch.setattr(type(load_judge("default")), "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(Config(path, tmp_path / "out"))
    assert (out / "verdicts.jsonl").read_bytes() == before


def test_the_real_command(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    command = [sys.executable, "analyses/judge_responses.py", "--responses", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout
    assert len(lines(tmp_path / "out" / "verdicts.jsonl")) == len(ROWS)


def test_help_is_light() -> None:
    code = "import sys; sys.argv = ['x', '--help']\ntry:\n import runpy; runpy.run_path('analyses/judge_responses.py', run_name='__main__')\n"
    code += (
        "except SystemExit: pass\nassert not {'torch', 'scipy', 'sklearn', 'openai', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "confidence" in done.stdout
