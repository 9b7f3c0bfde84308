"""The contract of every study: each analysis whose Config is a StudyConfig, found, and run whole on a tiny model.

A new analysis is tested without a change here. SIZES makes one smaller, or gives it the backend that it needs.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from rsteer_interp.command_line import run as run_command
from rsteer_interp.report.drawing import read, redraw
from rsteer_interp.report.page import write_overview
from rsteer_interp.results import load_result
from rsteer_interp.studies.config import StudyConfig
from tests.figure_contract import ROOT, check_draws_twice_the_same, check_texts, scripts_of
from tests.study_fixture import study_arguments

SIZES = {
    "layer_concentration": ["--refusing", "6", "--random", "4", "--methods", "md", "wmd"],
    "component_attribution": ["--heads", "2", "--random", "6", "--prompts", "6"],
    "patch_effects": ["--report", "96", "--pairs", "6"],
    "compare_methods": [
        *("--fit", "40", "--select", "40", "--report", "40", "--methods", "md", "wrmd", "selective", "prompt_open"),
        *("--judged", "16", "--screened", "8", "--conversations", "8", "--watch", "borderline", "general"),
    ],
    "random_audit": ["--prompts", "6", "--vectors", "8", "--conversations", "4"],
    "refusal_cones": ["--prompts", "6", "--steps", "2", "--trained", "6", "--random", "4", "--drawn", "4"],
    "embedding_noise": ["--prompts", "8", "--doses", "0", "0.5", "2", "8"],
    # Enough of both verdicts for several kinds of refusal.
    "refusal_geometry": [
        "--fit",
        "64",
        "--select",
        "40",
        "--report",
        "40",
        "--refusing",
        "5",
        "--probe",
        "4",
        "--random",
        "4",
        "--dimensions",
        "2",
    ],
}


def studies(folder: Path = ROOT / "analyses") -> list[str]:
    """Names of the analyses in a folder whose Config is a StudyConfig."""
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    return [n for n in names if issubclass(importlib.import_module(f"{folder.name}.{n}").Config, StudyConfig)]


@dataclass(frozen=True)
class Ran:
    """A study that ran twice; `first` and `second` say what was printed, `before` and `after` what lay on disk."""

    name: str
    out: Path
    first: str
    second: str
    before: dict[Path, tuple[int, bytes]]
    after: dict[Path, tuple[int, bytes]]


def _run(name: str, arguments: list[str]) -> str:
    module, printed = importlib.import_module(f"analyses.{name}"), StringIO()
    with redirect_stdout(printed):
        assert run_command(module.Config, module.run, arguments) == 0
    return printed.getvalue()


def _on_disk(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module", params=studies())
def ran(request: pytest.FixtureRequest, root: Path) -> Iterator[Ran]:
    """Two runs of one study in ROOT/results, where every study shares its judged prompts."""
    name, out, scores = request.param, root / "results" / request.param, root / "scores"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*study_arguments(root, patch), *SIZES.get(name, []), "--out", str(out)]
        first = _run(name, arguments)
        before = _on_disk(out, scores)
        second = _run(name, arguments)
    yield Ran(name, out, first, second, before, _on_disk(out, scores))


def test_make_runs_what_is_tested() -> None:
    said = subprocess.run(["make", "-n", "studies"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    compared = subprocess.run(["make", "-n", "compare"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        sorted(set(re.findall(r"analyses/(\w+)\.py", said.split("; do")[0] + compared.split("page.py")[0])))
        == studies()
    )


def test_it_answers_its_question(ran: Ran) -> None:
    data = load_result(ran.out).data
    assert data["applicable"], data["reason"]
    assert data["question"].endswith("?")
    finding = data["finding"]
    assert finding.endswith(".") and re.search(r"n = \d", finding), "a finding says its n"
    assert re.search(r"\d to -?\d", finding), "a finding has an interval"
    assert re.search(r"null|random|chance|permut|\bp = |\bq = |p of ", finding), "a finding names its null"
    assert set(data["model"]) >= {"name", "n_layers", "d_model", "fingerprint"}
    assert data["settings"]["seed"] == 0 and data["settings"]["fit"] >= 24
    assert data["seconds"] and all(s >= 0 for s in data["seconds"].values())
    assert " ".join(finding.split()) in " ".join(ran.first.split())


def test_a_second_run_redoes_nothing_and_ends_the_same(ran: Ran) -> None:
    assert ran.second == ran.first
    assert set(ran.after) == set(ran.before)
    for path, (time, content) in ran.after.items():
        if "steps" in path.parts or "scores" in path.parts:
            assert time == ran.before[path][0], f"{path} was written again"
        if path.name != "provenance.json":  # which holds the time
            assert content == ran.before[path][1], f"{path} differs"


def test_its_figures_show_their_null_and_can_be_read(ran: Ran, tmp_path: Path) -> None:
    kind = load_result(ran.out).kind
    names = scripts_of(kind)
    assert names, f"no script in figures/ has KIND = '{kind}'"
    drawn = {path.stem for path in (ran.out / "figures").iterdir()}
    assert drawn == set(names)
    for name in names:
        check_draws_twice_the_same(name, ran.out, tmp_path / name)
        check_texts(importlib.import_module(f"figures.{name}").draw(read(ran.out, kind)).figure)


def test_the_page_shows_it(ran: Ran, tmp_path: Path) -> None:
    result = load_result(ran.out)
    page = write_overview(ran.out.parent, tmp_path / "index.html", result.provenance.model_fingerprint)
    text = page.read_text(encoding="utf-8")
    assert _escaped(result.data["question"]) in text and _escaped(result.data["finding"]) in text
    assert text.count("data:image/png") >= len(scripts_of(result.kind))
    assert "/tmp" not in text and str(ran.out) not in text


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))


@pytest.mark.parametrize("name", studies())
def test_a_model_that_does_not_refuse_gets_a_plain_sentence(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*study_arguments(root, monkeypatch, refuses=False), *SIZES.get(name, [])]
    out = tmp_path / "results" / name
    said = _run(name, [*arguments, "--out", str(out), "--scores", str(root / "never")])
    data = load_result(out).data
    assert not data["applicable"] and data["reason"] == said.strip()
    assert data["reason"].startswith("not applicable: ") and re.search(r"\d", data["reason"])
    assert "finding" not in data and not (out / "figures").exists()
    assert redraw(out.parent, ROOT / "figures") == []
    page = write_overview(out.parent, tmp_path / "index.html").read_text(encoding="utf-8")
    assert _escaped(data["reason"]) in page and "data:image" not in page
