"""Are political refusal, safety refusal and over-refusal the same thing? Geometry, transfer and independence of their directions.

1 scores       one judged greedy reply per prompt of the fit, select and report splits; refusal-opening tokens (fit)
2 atlas        mean differences of every kind (fit); at every layer their cosines, plain and without estimation noise, with
               intervals over subjects and random pairs; in detail at the layer that reads refusal best on select
3 transfer     steering with one kind's direction, measured on the refused report prompts of every kind: addition at one dose, and
               ablation; the same edits turned towards random directions, false-discovery control over cells
4 matched      the same where every direction removes as much of its own kind (doses from select)
5 independence ablating one direction: what it changes of the others at later layers, beyond what geometry alone says
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/refusal_geometry")
    """Result folder; finished stages in it are reused."""
    refusing: int = 12
    """Refused prompts of each kind, at most, on which steering is tuned (select) and measured (report)."""
    probe: int = 6
    """Refused report prompts of each kind, at most, for representational independence."""
    dose: float = 0.03
    """Added |edit| / |resid|, the same at every layer and for every kind; small, so that nothing is at its ceiling."""
    random: int = 10
    """Random directions, at least 4: towards at least so many, and 2 for each kind, the steering edits are turned for their null."""
    dimensions: int = 3
    """Dimensions of each kind's subspace of per-subject directions."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figures, print the tables; returns the folder."""
    from rsteer_interp.studies import refusal_geometry
    from rsteer_interp.studies.study import run_study

    return run_study(refusal_geometry, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
