"""From what size on does noise on the embeddings of benign prompts change replies, and would a check notice it? After SEP.

1 scores     refusal-opening tokens (fit)
2 response   per prompt set and kind of noise, at rising relative norm: KL of the next token, change of the refusal log-odds, share
             of perturbed tokens that still map to themselves. axis: single embedding coordinates, as SEP perturbs; sphere: random
             directions of the same norm, the null
3 together   regimes (noticeable, different, broken), the norm below which a token check can notice nothing; one figure

Descriptive: benign and borderline prompts alone, and no search for a perturbation that makes a model comply.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/embedding_noise")
    """Result folder; finished steps in it are reused."""
    sets: tuple[str, ...] = ("general", "borderline")
    """Benign and borderline prompt sets."""
    prompts: int = 24
    """Report prompts of each set."""
    doses: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Norms of the noise, relative to the embedding's."""
    directions: int = 16
    """Noise directions, which the tokens of a prompt take in turn."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import embedding_noise
    from rsteer_interp.studies.study import run_study

    return run_study(embedding_noise, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
