"""How much refusal goes under a push along a random direction, and where do learned directions fall? After The Rogue Scalpel.

1 scores      one judged greedy reply per prompt; refusal-opening tokens and the directions of two sets (fit); threshold (select)
2 per layer   a third, a half and two thirds of the depth: the largest relative dose that leaves benign answers coherent; refusal
              log-odds of refused report prompts under each random direction, and under minus each learned one at the same dose
3 judged      replies under some of the pushes, judged and thrown away: who is no longer refused, and whether log-odds tell
4 together    the layer where they take most from select prompts; there the mean of the directions that flip one prompt, on prompts of
              other subjects, beside single random ones; one figure
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/random_audit")
    """Result folder; finished layers in it are reused."""
    audited: str = "harmful"
    """Prompt set whose refused report prompts are pushed."""
    answered: str = "harmless_matched"
    """Prompts of like form that are answered: for the set's own direction and for the flip threshold."""
    prompts: int = 24
    """Refused prompts, at most; as many on other subjects are held out for the aggregated direction."""
    vectors: int = 24
    """Random directions, the same at every layer."""
    dose: float | None = None
    """Relative dose |push| / |resid| at every layer. None: the largest of the paper's grid that passes the guard, by layer."""
    bound: float = 0.5
    """The guard: largest KL on benign answers (nats per token)."""
    conversations: int = 8
    """Benign conversations of the guard."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import random_audit
    from rsteer_interp.studies.study import run_study

    return run_study(random_audit, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
