"""How many dimensions carry refusal? What varies with refusal beside what has to be removed for it to go.

1 scores      one judged greedy reply per prompt of the fit, select and report splits, whose subjects are disjoint
2 subspaces   nested bases from fit at every block input: paired differences, differences inside subjects, ridge;
              and controls that should not carry refusal: topics of answered prompts, random vectors with their covariance
3 variance    report split at the layer where refusal is read best on select: spectra with the Marchenko-Pastur edge,
              participation ratios, differences against shuffled labels; agreement of subspaces from halves of fit
4 ablation    log-odds of refusal removed by ablating K = 1, 2, 4, ... dimensions at all block inputs: each input's own rows,
              one layer's rows at all of them (the layer from select), and one global basis (the leading directions of all inputs);
              beside the same edits under random rotations, one for all sites. At the read-out layer alone, too
5 union       how many dimensions the inputs' own rows have together, beside random rows
6 addition    the best push inside K dimensions at one layer, of one size; push and layer from select
7 judged      replies under the ablations at both ends of the sweep, judged, beside the log-odds of the same prompts
8 answer      the smallest K that removes 90 % of the removable refusal beyond random, with its band over subjects; removable
              is what the best K of any subspace removes, or the gap between refused and answered prompts where that is smaller
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/dimensionality")
    """Result folder; finished stages in it are reused."""
    ks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Dimensions of the sweep; a subspace of lower rank is swept as far as it goes."""
    refusing: int = 16
    """Refusing report prompts, at most, on which removal is measured; as many of select for the gradient."""
    answered: int = 8
    """Answered report prompts, at most, on which side effects (KL of the first token) are measured."""
    judged: int = 16
    """Refused report prompts, at most, and as many answered ones, whose replies under the ablations are judged."""
    random: int = 6
    """Random rotations of every ablation, and random subspaces of the push; at least 2."""
    controls: int = 3
    """Draws of random subspaces with the covariance of answered prompts."""
    dose: float = 0.1
    """Added |edit| / |resid|."""
    share: float = 0.9
    """Share of the removable refusal that is enough."""
    shuffles: int = 500
    """Label shuffles of the parallel analysis."""
    splits: int = 20
    """Split halves of the fit split."""
    resamples: int = 100
    """Resamples of subjects for the bands of the union's rank."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figures, print the tables; returns the folder."""
    from rsteer_interp.studies import dimensionality
    from rsteer_interp.studies.study import run_study

    return run_study(dimensionality, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
