"""The README's blocks are true: its example probe runs as printed, and the commands it names exist."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, DirectionEstimator, fit_directions
from tests.planted import planted
from tests.study_fixture import study_arguments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no python block marked {marker}"
    return found[1]


@pytest.fixture
def registry() -> Iterator[None]:
    """ESTIMATORS as it was, whatever a test registers in it."""
    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def test_the_example_probe_recovers_a_planted_direction(registry: None) -> None:
    exec(compile(_block("add a probe"), "README.md", "exec", dont_inherit=True), {"__name__": "my_probe"})
    probe = ESTIMATORS["logistic"]()
    assert isinstance(probe, DirectionEstimator)
    evidence, planted_direction, covariance = planted(800, 12, seed=0, strength=3.0)
    (direction,) = fit_directions(probe, {Site(1): evidence}).values()
    # A linear discriminant of Gaussian classes is Sigma^-1 u.
    best = torch.linalg.solve(covariance, planted_direction)
    assert float(direction.unit.double() @ (best / best.norm())) > 0.8


def test_the_example_probe_runs_as_printed_and_is_in_the_figure(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block as a script, with the options that the README gives it, on a tiny model."""
    options = re.search(r"python my_probe.py (--methods .*?)(?: --out|`)", README)
    assert options, "README does not say how to run the example"
    small = [*study_arguments(tmp_path, monkeypatch), "--refusing", "6", "--random", "4"]
    monkeypatch.setattr(sys, "argv", ["my_probe.py", *options[1].split(), *small])
    with pytest.raises(SystemExit) as end:
        exec(compile(_block("add a probe"), "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    assert end.value.code == 0
    plotted = json.loads((tmp_path / "out" / "figures" / "layer_concentration.json").read_text(encoding="utf-8"))[
        "data"
    ]
    assert plotted["methods"] == ["md", "logistic"]
    curves = plotted["readouts"]
    assert len(curves["logistic"]["r"]) == len(curves["md"]["r"]) == 4
    assert curves["logistic"]["r"] != curves["md"]["r"]


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted(set(re.findall(r"(?:analyses|figures)/\w+\.py", README))))
def test_every_script_named_exists(script: str) -> None:
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"\]\(([^)]+\.png)\)", README))))
def test_every_picture_shown_exists(picture: str) -> None:
    assert (ROOT / picture).is_file()
