"""How many independent directions mediate refusal when they are trained for it? After The Geometry of Refusal.

1 cones        unit directions trained by gradient (fit): RDO from the difference of means, then a cone of two dimensions or more,
               then a direction that is representationally independent of the first
2 effects      fall of the refusal log-odds of refused report prompts when each is ablated everywhere, and of directions drawn
               from the cone, beside edits of the same size along random directions
3 independence RepInd of pairs: how much ablating one changes what there is of the other downstream, beside random ones; a figure

Targets are openers of a few tokens and replies to ordinary prompts. Effects are in log-odds; replies under the ablations are judged and
thrown away, to see whether log-odds tell refusals there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/refusal_cones")
    """Result folder; finished steps in it are reused."""
    remove: str = "political_sensitive"
    """Prompt set whose refusal the directions mediate."""
    contrast: str = "political_matched"
    """Ordinary prompts on like subjects."""
    keep: str = "harmful"
    """Prompt set whose refusal is reported beside it."""
    ordinary: tuple[str, ...] = ("harmless_matched", "general")
    """Prompt sets whose replies are not to change."""
    dimension: int = 2
    """Dimensions of the cone."""
    trained: int = 24
    """Prompts of each kind that directions are trained on."""
    steps: int = 12
    """Steps of gradient descent for each direction or cone."""
    prompts: int = 16
    """Refused report prompts of either set on which effects are measured."""
    drawn: int = 12
    """Directions drawn from the cone, each with a random edit of its size."""
    random: int = 19
    """Random draws beside each direction and each pair."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import refusal_cones
    from rsteer_interp.studies.study import run_study

    return run_study(refusal_cones, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
