"""What a user waits for without a model: the import, every --help, every figure and the page from stored results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rsteer_interp.report.drawing import _load
from tests.benchmarks.compare import compare, limit, seconds

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "transformer_lens")
MODELS = ("transformers.modeling_utils", "transformer_lens", "rsteer_interp.backends.hooks")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def _imported(script: str, arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Which of the modules a script has imported by its end."""
    code = (
        f"import runpy, sys\nsys.argv = {[script, *arguments]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit:\n    pass\n"
        f"import json; print(); print(json.dumps([m for m in {names!r} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return list(json.loads(out.stdout.splitlines()[-1]))


def test_import(benchmark: Any, rounds: int) -> None:
    _run("-c", f"import rsteer_interp, sys; assert not [m for m in {HEAVY!r} if m in sys.modules]")
    compare(
        benchmark,
        "import rsteer_interp",
        seconds(lambda: _run("-c", "import rsteer_interp")),
        [limit(0.2, "s")],
        2 * rounds,
        note="wall time of a fresh interpreter; neither torch nor transformers is imported",
    )


def test_help(benchmark: Any, rounds: int) -> None:
    scripts = {path.stem: f"analyses/{path.name}" for path in sorted((ROOT / "analyses").glob("[!_]*.py"))}
    spent = {}
    for each, script in scripts.items():
        assert _imported(script, ["--help"], HEAVY) == []
        spent[each] = seconds(lambda script=script: _run(script, "--help"))()
    name = max(spent, key=lambda each: spent[each])
    command = [scripts[name], "--help"]
    compare(
        benchmark,
        "--help of the slowest analysis",
        seconds(lambda: _run(*command)),
        [limit(0.5, "s")],
        2 * rounds,
        note=f"{name}, the slowest of {len(scripts)}; neither torch nor transformers is imported by any",
    )


def test_figures(benchmark: Any, tmp_path: Path, rounds: int) -> None:
    kinds = {json.loads(p.read_text(encoding="utf-8"))["kind"]: p.parent for p in ROOT.glob("results/*/result.json")}
    scripts = {p: getattr(_load(p), "KIND", "reproduce") for p in sorted((ROOT / "figures").glob("[!_]*.py"))}
    commands = {
        script.stem: [f"figures/{script.name}", "--result", str(kinds[kind]), "--out", str(tmp_path)]
        for script, kind in scripts.items()
        if kind in kinds and kind != "benchmarks"
    }
    if not commands:
        pytest.skip("no stored results; run `make demo` or `make studies` first")
    spent = {}
    for each, (script, *arguments) in commands.items():
        start = time.perf_counter()
        assert _imported(script, arguments, MODELS) == []
        spent[each] = time.perf_counter() - start
    name = max(spent, key=lambda each: spent[each])
    command = commands[name]
    compare(
        benchmark,
        "the slowest figure from stored results",
        seconds(lambda: _run(*command)),
        [limit(5, "s")],
        rounds,
        note=f"{name}, the slowest of {len(commands)} whose result is stored; no model is loaded",
    )


def test_page(benchmark: Any, tmp_path: Path, rounds: int) -> None:
    if not list(ROOT.glob("results/*/result.json")):
        pytest.skip("no stored results; run `make demo` or `make studies` first")
    arguments = ["--results", str(ROOT / "results"), "--out", str(tmp_path / "index.html")]
    assert _imported("analyses/page.py", arguments, MODELS) == []
    compare(
        benchmark,
        "the page from stored results",
        seconds(lambda: _run("analyses/page.py", *arguments)),
        [limit(5, "s")],
        rounds,
        note="no model is loaded",
    )
