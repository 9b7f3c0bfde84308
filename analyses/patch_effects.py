"""Where does a prompt's refusal sit? States of an answered prompt put into a refused one, and back, one place at a time.

1 scores   one judged greedy reply per prompt; refusal-opening tokens (fit)
2 pairs    a refused sensitive prompt and an answered ordinary one, report split, as many tokens in every span
3 patching the residual stream, an attention output or an MLP output of one block, at the instruction or at one template
           token after it: share of the pair's gap in refusal log-odds that the patch carries over, in both directions,
           beside patches from another prompt of the same class; false-discovery control over all cells
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/patch_effects")
    """Result folder; finished stages in it are reused."""
    pairs: int = 16
    """Pairs of prompts, at most."""
    every: int = 2
    """Patch every block (1), every second (2), ...; the last block always."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import patch_effects
    from rsteer_interp.studies.study import run_study

    return run_study(patch_effects, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
