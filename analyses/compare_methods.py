"""Which published method removes political refusal at the least cost? All of them, one protocol, one table.

1 scores      judged unsteered replies and states of every prompt (shared with the other studies)
2 per method  fitted on fit; strengths tried on select, and more of them while the best is the last or the first; its own best strength,
              and the one that removes as much as the others; on report KL, perplexity of answers beside the unsteered answers to
              the same prompts, and random rotations of its own edit. Refused or answered is what the judge says of
              a reply, everywhere; how well first-token log-odds would have told the same stands beside it
3 checks      what the method's own paper claims (a ROC, a rank correlation, a leakage, ...), where the method says how
4 together    paired tests against random directions and against the best on select; tables, one figure

A system prompt asking for openness, one asking for safety, a neutral one and random directions are methods like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command
from rsteer_interp.studies.config import StudyConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    out: Path = Path("results/compare_methods")
    """Result folder; finished methods in it are not run again."""
    methods: tuple[str, ...] = ()
    """Methods, by name; all when none is named. Random directions are always among them."""
    remove: str = "political_sensitive"
    """Prompt set whose refusals are to go."""
    contrast: str = "political_matched"
    """Ordinary prompts on like subjects."""
    keep: str = "harmful"
    """Prompt set whose refusals are to stay."""
    ordinary: tuple[str, ...] = ("harmless_matched", "general")
    """Prompt sets that methods may learn to leave alone."""
    protect: tuple[str, ...] = ("conversations", "taxes")
    """Prompt sets whose fit prompts, and the unjudged ones of those above, a method may learn to leave alone."""
    watch: tuple[str, ...] = ("borderline", "general", "unusual")
    """Prompt sets on which over-refusal is reported."""
    target: float = 0.7
    """Share of refused select prompts to be answered, at which methods are compared at matched removal."""
    bound: float = 0.5
    """Largest KL on benign answers (nats per token, select) at which a strength counts as coherent."""
    screened: int = 24
    """Refused select prompts of either set, at most, on which strengths are tried."""
    judged: int = 48
    """Refused report prompts of the removed and of the kept set, at most, whose replies are judged."""
    watched: int = 32
    """Report prompts of each watched set, at most, whose replies are judged."""
    draws: int = 3
    """Random rotations of every method's own edit, on `screened` report prompts of either set: n of them give no p below 1 / (1 + n)."""
    conversations: int = 16
    """Benign conversations for KL on report; half as many others on select."""


def run(config: Config) -> Path:
    """Run what is missing, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies import method_comparison
    from rsteer_interp.studies.study import run_study

    return run_study(method_comparison, config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
