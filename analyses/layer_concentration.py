"""In which layers does refusal concentrate? The read-out curve beside the causal curve, each with its null.

1 scores      one judged greedy reply per prompt of the fit, select and report splits; refusal-opening tokens (fit)
2 read-out    directions fitted on fit; Pearson r of projection and verdict on report, permutation nulls, inside sets
3 causes      refusal log-odds removed on refusing report prompts by ablating, and by adding minus the direction, at one
              block input at a time, beside random directions of equal norm; false-discovery control over layers
4 concentration of both over depth, one sentence, one figure
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    model: str = "demo"
    """Demo model name, hub id (org/name or org/name@revision), local folder or GGUF file."""
    out: Path = Path("results/layer_concentration")
    """Result folder; finished stages in it are reused."""
    method: str = "md"
    """Direction estimator: md, wmd, rmd or wrmd."""
    fit: int = 64
    """Prompts of each set (sensitive, matched) on which directions are fitted."""
    select: int = 24
    """Prompts of each set on which the read-out's layer is chosen."""
    report: int = 48
    """Prompts of each set on which the read-out is reported."""
    refusing: int = 12
    """Refusing report prompts, at most, for the causal curve."""
    random: int = 5
    """Random directions per layer and kind of edit; at least 4."""
    dose: float = 0.1
    """Added |edit| / |resid|, the same at every layer."""
    null: Literal["isotropic", "covariance"] = "isotropic"
    """Random directions: uniform on the sphere, or with the covariance of the answered prompts' states (stricter)."""
    judge: str = "default"
    """Judge of replies: default, pattern, local or endpoint."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    batch_size: int = 96
    """Most rows at once; halved when memory runs out."""
    seed: int = 0
    """Seed of prompt samples, random directions, permutations and bootstraps."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.layer_study import layer_study

    return layer_study(config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
