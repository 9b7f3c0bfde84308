"""The package and every --help stay light, every public name is there, and scripts' options are documented."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rsteer_interp

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(p.stem for p in (ROOT / "analyses").glob("[a-z]*.py"))
HEAVY = ("torch", "transformers", "transformer_lens", "matplotlib", "sklearn", "scipy", "pandas")


def _heavy_after(code: str) -> list[str]:
    code += f"\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return list(eval(out.stdout.strip().splitlines()[-1]))


def test_import_is_light() -> None:
    assert _heavy_after("import rsteer_interp") == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light(script: str) -> None:
    code = (
        f"from analyses.{script} import Config, run_command, run\n"
        "try:\n    run_command(Config, run, ['--help'])\nexcept SystemExit as end:\n    assert end.code == 0"
    )
    assert _heavy_after(code) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_documented(script: str) -> None:
    module = importlib.import_module(f"analyses.{script}")
    assert module.__doc__
    classes = [c for c in module.Config.__mro__ if dataclasses.is_dataclass(c)]
    for field in dataclasses.fields(module.Config):
        source = inspect.getsource(next(c for c in classes if field.name in c.__annotations__))
        line = source.index(f"\n    {field.name}: ")
        following = source[source.index("\n", line + 1) :].lstrip()
        assert following.startswith('"""'), f"{script}.{field.name} has no documentation"


@pytest.mark.parametrize("name", rsteer_interp.__all__)
def test_front_door(name: str) -> None:
    assert getattr(rsteer_interp, name) is not None
    assert set(rsteer_interp._WHERE) == set(rsteer_interp.__all__)
