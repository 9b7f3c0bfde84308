"""The README's blocks are true: its example probe runs as printed, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import DirectionEstimator, fit_directions
from tests.planted import planted

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no python block marked {marker}"
    return found[1]


def test_the_example_probe_runs_as_printed_and_recovers_a_planted_direction() -> None:
    names: dict[str, object] = {}
    exec(compile(_block("add a probe"), "README.md", "exec"), names)
    probe = names["LogisticProbe"]()  # type: ignore[operator]
    assert isinstance(probe, DirectionEstimator)
    evidence, planted_direction, covariance = planted(800, 12, seed=0, strength=3.0)
    (direction,) = fit_directions(probe, {Site(1): evidence}).values()
    # A linear discriminant of Gaussian classes is Sigma^-1 u.
    best = torch.linalg.solve(covariance, planted_direction)
    assert float(direction.unit.double() @ (best / best.norm())) > 0.8


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted(set(re.findall(r"(?:analyses|figures)/\w+\.py", README))))
def test_every_script_named_exists(script: str) -> None:
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"\]\(([^)]+\.png)\)", README))))
def test_every_picture_shown_exists(picture: str) -> None:
    assert (ROOT / picture).is_file()
