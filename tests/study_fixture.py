"""A tiny random model that "refuses" some prompts, and the arguments of a small study of it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rsteer_interp.judges import JUDGES
from rsteer_interp.judges.base import Verdict
from tests.tiny_models import save_tiny


class FirstWordJudge:
    """A random model then refuses some prompts and answers others."""

    name = "first word"

    @classmethod
    def load(cls, backend: Any = None) -> FirstWordJudge:
        return cls()

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.9 if zlib.crc32(text.split(" ")[0].encode()) % 2 else 0.1) for text in responses]


class NeverJudge(FirstWordJudge):
    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.1) for _ in responses]


def study_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool = True) -> list[str]:
    """Command-line arguments of a study on the tiny model, judged by a stand-in; results go to `tmp_path/out`."""
    monkeypatch.setitem(JUDGES, "default", f"{__name__}:{'FirstWordJudge' if refuses else 'NeverJudge'}")
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        save_tiny("llama", folder)
    sizes = ["--fit", "24", "--select", "20", "--report", "16", "--tokens", "4"]
    places = ["--out", str(tmp_path / "out"), "--scores", str(tmp_path / "scores")]
    return ["--model", str(folder), "--backend", "hooks", *places, *sizes]
