"""The arithmetic behind `make bench` (not its timings): ratios, verdicts, exponents, the kernel switch, and the figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rsteer_interp.command_line import run
from rsteer_interp.results import load_result
from tests.benchmarks.compare import Rival, again, compare, limit
from tests.benchmarks.report import KIND, Config, comparisons, ratio, report, scaling, verdict
from tests.benchmarks.rivals import kernel, sliced_by_hooks
from tests.figure_contract import check_draws_twice_the_same, check_texts, scripts_of
from tests.tiny_models import tiny_backend, tiny_rows


class Rounds:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Any, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            function()


def _measured() -> list[dict[str, Any]]:
    order: list[str] = []

    def cost(name: str, value: float) -> Any:
        return lambda: order.append(name) or value + 0.01 * (len(order) % 3)

    first, second = Rounds(), Rounds()
    ours = cost("ours", 1.0)
    rivals = [
        again(ours),
        Rival("slow", cost("slow", 4.0), 0.5, "plain"),
        Rival("fast", cost("fast", 0.5), 0.5, "same"),
    ]
    compare(first, "work", ours, rivals, 3)
    assert order == ["ours", "ours", "slow", "fast"] * 3  # in turn, not one after the other
    compare(second, "limited work", cost("ours", 0.2), [limit(0.5, "s")], 1)
    curve = {"axis": "prompts", "sizes": [1, 2, 4], "seconds": [[1.0, 1.1], [4.0, 4.4], [16.0, 17.6]]}
    grown = {"scaling": [curve], "scaled_work": {"prompts": "any"}}
    return [{"extra_info": info} for info in (first.extra_info, second.extra_info, grown)]


def test_ratio_is_of_medians_and_its_interval_covers_what_the_rounds_gave() -> None:
    found = ratio([1.0, 1.0, 9.0], [2.0, 2.0, 2.0], 0)
    assert found["value"] == 0.5 and found["low"] == 0.5 and found["high"] == 4.5
    assert ratio([1.0], [4.0], 0) == {"value": 0.25, "low": 0.25, "high": 0.25}
    # Rounds are resampled together: what slows both down leaves the ratio as it is.
    drifting = ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], 0)
    assert drifting["low"] == drifting["high"] == 0.5


@pytest.mark.parametrize(
    ("low", "high", "goal", "word"),
    [(0.2, 0.3, 0.3, "met"), (0.31, 0.4, 0.3, "missed"), (0.2, 0.4, 0.3, "not decided"), (0.9, 1.1, None, "covers 1")],
)
def test_a_goal_is_met_by_the_whole_interval(low: float, high: float, goal: float | None, word: str) -> None:
    assert verdict({"value": (low + high) / 2, "low": low, "high": high}, goal) == word


def test_rounds_become_rows_and_exponents() -> None:
    rows, curves = comparisons(_measured(), 0), scaling(_measured(), 0)
    assert [(row["against"], row["verdict"]) for row in rows] == [
        ("itself", "covers 1"),
        ("slow", "met"),
        ("fast", "missed"),
        ("limit of 0.5 s", "met"),
    ]
    assert rows[-1]["ratio"]["value"] == pytest.approx(0.4, abs=0.05)
    assert curves[0]["exponent"]["value"] == pytest.approx(2, abs=1e-9)


def test_the_kernel_switch_is_undone_and_changes_rounding_only() -> None:
    backend = tiny_backend("llama")
    batch, before = (
        backend.batch(tiny_rows(backend)),
        [module.__dict__.get("forward") for module in backend.model.modules()],
    )
    same = sliced_by_hooks(backend.model, batch)
    with kernel(backend.model, "plain"):
        assert all("forward" not in module.__dict__ for module in backend.model.modules())
        plain = sliced_by_hooks(backend.model, batch)
    after = [module.__dict__.get("forward") for module in backend.model.modules()]
    assert [f is None for f in after] == [f is None for f in before]
    assert same.shape == (backend.n_layers + 1, len(batch), backend.d_model)
    torch.testing.assert_close(plain, same, rtol=1e-4, atol=1e-4)


def test_report_writes_table_result_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "dtype": "float32"}
    rounds = tmp_path / "rounds.json"
    rounds.write_text(json.dumps({"machine_info": machine, "benchmarks": _measured()}), encoding="utf-8")
    out = tmp_path / "out"
    report(Config(rounds, out, Path(__file__).resolve().parent.parent / "figures"))
    assert "2 of 3 goals met" in capsys.readouterr().out
    assert "| fast, same kernel |" in (out / "table.md").read_text(encoding="utf-8")
    result = load_result(out, kind=KIND)
    assert scripts_of(KIND) == ["benchmark_scaling", "benchmarks"]
    for name in scripts_of(KIND):
        check_draws_twice_the_same(name, out, tmp_path / name)
        check_texts(importlib.import_module(f"figures.{name}").draw(result).figure)
    assert run(Config, report, ["--rounds", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert "make bench" in capsys.readouterr().err
