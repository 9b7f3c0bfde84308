"""In which layers does refusal concentrate? The read-out curve beside the causal curve, each with its null.

1 scores      one judged greedy reply per prompt of the fit, select and report splits; refusal-opening tokens (fit)
2 read-out    directions fitted on fit; Pearson r of projection and verdict on report, permutation nulls, inside subjects;
              one curve per estimator
3 causes      refusal log-odds removed on refusing report prompts by ablating, and by adding minus the direction, at one
              block input at a time, beside random directions of equal norm; false-discovery control over layers
4 concentration of both over depth, one sentence, one figure
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/layer_concentration")
    """Result folder; finished stages in it are reused."""
    methods: tuple[str, ...] = ("md",)
    """Direction estimators, by name (md, wmd, rmd, wrmd, rmd_loso, rmd_lw, ...). The causal curves are of the first, read-outs of all."""
    refusing: int = 12
    """Refusing report prompts, at most, for the causal curve."""
    random: int = 5
    """Random directions per layer and kind of edit; at least 4."""
    dose: float = 0.1
    """Added |edit| / |resid|, the same at every layer."""
    null: Literal["isotropic", "covariance"] = "isotropic"
    """Random directions: uniform on the sphere, or with the covariance of the answered prompts' states (stricter)."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import layers
    from rsteer_interp.studies.study import run_study

    return run_study(layers, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
