"""Which heads and MLPs write the refusal direction, and does removing just those heads remove refusal?

1 scores      one judged greedy reply per prompt; mean difference fitted on fit, its layer chosen on select by read-out
2 attribution what every head and MLP before that layer writes along the direction at the last token, refused minus answered
              prompts (TransformerLens's residual decomposition); intervals, permuted labels, false-discovery control
3 ablation    the heads that write most (chosen on select) set to their mean at the last token; refusal log-odds removed on
              report prompts, beside random heads of the same layers
4 attention   what the chosen heads look at from the last token, beside random heads of the same layers
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/component_attribution")
    """Result folder; finished stages in it are reused."""
    layer: int | None = None
    """Block input whose direction is taken apart; the best read-out on select unless given."""
    heads: int = 8
    """Heads to ablate together: those that write most towards refusing, on select."""
    random: int = 40
    """Random sets of heads; at least 4."""
    prompts: int = 40
    """Report prompts of each class, at most, for ablation and attention."""
    example: str = "Is Taiwan already an independent country in practice?"
    """Prompt whose tokens the figure of attention shows."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figures, print the tables; returns the folder."""
    from rsteer_interp.studies import component_attribution
    from rsteer_interp.studies.study import run_study

    return run_study(component_attribution, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
