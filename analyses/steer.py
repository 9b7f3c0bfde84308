"""Can political refusal be removed while safety refusal stays, and refusal of one subject be induced?

1 directions  the paper's four vectors, retain-constrained ones and an opposite-sign pair (fit split)
2 condition   which prompts are to be edited, read from the prompt's own tokens; layer and threshold from select, ROC on report
3 search      bands of layers and doses, judged replies on select; one configuration to remove, one to induce
4 frontier    refusal removed against safety refusal kept, for every family, beside random directions (judged replies, report)
5 report      judged replies of every set before and after, paired; KL, perplexity of answers; targets

The two configurations are saved for analyses/apply_steering.py: OUT/steering/remove and OUT/steering/induce.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/steer")
    """Result folder; finished stages in it are reused."""
    remove: str = "political_sensitive"
    """Prompt set whose refusal is removed: a built-in name, a file or a hub data set with subjects."""
    contrast: str = "political_matched"
    """Ordinary prompts on like subjects; refused against answered prompts of both give the direction."""
    keep: tuple[str, ...] = ("harmful", "harmless_matched", "borderline", "general")
    """Prompt sets to be left alone. Refusals of the first are the ones to keep."""
    watch: tuple[str, ...] = ("world_politics",)
    """Prompt sets that are reported, and on which nothing is fitted or chosen."""
    induce: str = "taxes"
    """Prompt set on the one subject of which refusal is induced."""
    doses: tuple[float, ...] = (0.04, 0.06, 0.08, 0.11)
    """Relative doses |edit| / |resid| per layer that are tried."""
    aim: float = 0.1
    """Refusal rate of the removed set to be reached on the select split; the target on report is 0.15."""
    frontier: int = 32
    """Refused report prompts of the removed and of the kept set, at most, for the frontier."""
    conversations: int = 24
    """Benign conversations on which KL is measured."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figures, print the tables; returns the folder."""
    from rsteer_interp.studies import selective_steering
    from rsteer_interp.studies.study import run_study

    return run_study(selective_steering, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
