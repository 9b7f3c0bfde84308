"""A new judge, analysis and figure are picked up where they lie: no list, suite or page has to name them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from rsteer_interp.command_line import run as run_command
from rsteer_interp.judges import JUDGES
from rsteer_interp.report.page import write_overview
from rsteer_interp.results import load_result
from tests.study_fixture import study_arguments
from tests.test_studies import studies

ANALYSIS = '''
"""How often does the model refuse?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.studies.config import StudyConfig

KIND, QUESTION = "counting", "How often does the model refuse?"


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/counting")
    """Result folder."""


def compute(study, config):
    study.check_applicable()
    rates = study.rates("report", "political_sensitive")
    rate = rates["political_sensitive"]
    finding = f"It refuses {rate['rate']:.0%} ({rate['low']:.0%} to {rate['high']:.0%}, n = {rate['n']})."
    return {"base_rates": rates, "finding": finding}, None


def tables(data):
    return []


def run(config):
    from rsteer_interp.studies.study import run_study

    return run_study(sys.modules[__name__], config, scripts=Path(__file__).parent.parent / "new_figures")
'''
FIGURE = '''
"""A bar."""

from rsteer_interp.style import SINGLE, Drawing, style

KIND = "counting"


def draw(result):
    from matplotlib.figure import Figure

    rate = result.data["base_rates"]["political_sensitive"]
    with style():
        figure = Figure(figsize=(SINGLE, 2))
        figure.subplots().bar(["refused"], [rate["rate"]])
    return Drawing(figure, "How often it refuses", "A caption of the new figure.", {"rate": rate, "null": None})
'''


def test_a_new_judge_analysis_and_figure_are_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name, text in (("new_analyses", "counting", ANALYSIS), ("new_figures", "bar", FIGURE)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert studies(tmp_path / "new_analyses") == ["counting"]

    arguments = study_arguments(tmp_path, monkeypatch, refuses=False)  # the default judge would find no refusal
    monkeypatch.setitem(JUDGES, "mine", "tests.study_fixture:FirstWordJudge")
    out = tmp_path / "results" / "counting"
    module = importlib.import_module("new_analyses.counting")
    assert run_command(module.Config, module.run, [*arguments, "--judge", "mine", "--out", str(out)]) == 0
    data = load_result(out, kind="counting").data
    assert data["applicable"] and data["settings"]["judge"] == "mine"
    assert {path.name for path in (out / "figures").iterdir()} == {"bar.json", "bar.pdf", "bar.png"}

    page = write_overview(out.parent, tmp_path / "index.html").read_text(encoding="utf-8")
    for words in (data["question"], data["finding"], "A caption of the new figure.", "political_sensitive 16"):
        assert words in page, words
    assert page.count("data:image/png") == 1
