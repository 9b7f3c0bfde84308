"""Study of selective steering on a tiny random model: both configurations are found, saved, loaded and applied again."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.steer import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.results import load_result
from rsteer_interp.steering import load_steering
from tests.study_fixture import study_arguments


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    small = ["--samples", "2", "--frontier", "4", "--conversations", "3", "--doses", "0.1", "0.5"]
    return [*study_arguments(tmp_path, monkeypatch), *small]


def test_the_whole_study(arguments: list[str], tmp_path: Path) -> None:
    assert run_command(Config, run, arguments) == 0
    data = load_result(tmp_path / "out", kind="steer").data
    assert data["applicable"], data["reason"]
    for name in ("remove", "induce"):
        steering = load_steering(tmp_path / "out" / "steering" / name)
        assert steering.gate is not None
        assert steering.alpha * {"remove": -1, "induce": 1}[name] > 0
