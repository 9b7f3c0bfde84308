"""Can political refusal be removed while safety refusal stays? The main paper's experiment on one chat model.

Refusal Steering (arXiv 2512.16602), in the paper's order; every step is a result folder and is not redone when present:

    1 scores      K sampled replies per prompt, judged: refusal confidence c(x); refusal-opening tokens from the replies
    2 directions  every registered estimator at every block input, from last-prompt-token states; layer scores with their nulls; how
                  repeatable each direction is over halves of the subjects. The figures draw the steered method that is most so
    3 finder      per method of --methods, the (k, alpha, reposition) that reaches the removal target with the smallest answer shift,
                  by judged fresh replies; what addition and reposition do to harmful prompts where they remove alike
    4 evaluation  base and steered greedy replies on prompts that nothing was fitted or chosen on
    5 answers     shift and KL of every method on benign conversations that the finder did not use
    6 table, figures and one HTML page
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
    preset: Literal["demo", "full"] = "demo"
    """demo: minutes on a laptop, intervals of at most +-10 points. full: every built-in prompt, more samples."""
    out: Path = Path("results/reproduce")
    """Result folder; finished stages in it are reused."""
    judge: str = "default"
    """Judge of replies: default, pattern, local or endpoint."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    device_map: str | None = None
    """Passed to transformers (hooks backend), for example auto."""
    batch_size: int = 96
    """Most rows at once; halved when memory runs out. Below float32 results move with it: steps kept at another are run again."""
    seed: int = 0
    """Seed of prompt samples, sampled replies and nulls."""
    methods: tuple[str, ...] = ("md", "wmd", "rmd", "wrmd")
    """Estimators that get a setting, a row and steered replies: the paper's four, or rmd_loso, rmd_lw, wrmd_literal, ..."""
    target: float = 0.9
    """Removal target: mean fall of c(x) (from -1 to 1) over refusing prompts that the finder must reach, counted from fresh replies of
    the unsteered model, whose mean c + 1 is the most that can fall."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder, figures and page, print the table; returns the page's path."""
    from rsteer_interp.reproduction import reproduce

    return reproduce(config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
