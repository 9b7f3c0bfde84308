"""The parity analysis certifies a model that both backends hold, and stores the certificate."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.parity import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.results import load_result
from tests.tiny_models import save_tiny


def test_the_certificate_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    arguments = [
        "--model",
        str(save_tiny("llama", folder)),
        "--n",
        "3",
        "--new-tokens",
        "3",
        "--out",
        str(tmp_path / "p"),
    ]
    assert run_command(Config, run, arguments) == 0
    assert "passed" in capsys.readouterr().out
    result = load_result(tmp_path / "p", kind="parity")
    assert len(result.data["sites"]) == 17
    assert result.provenance.model_fingerprint
