"""How many replies of each checkpoint does each judge call a refusal, and how far do the judges agree?

Reads one JSONL file of `prompt` and `response` per checkpoint (also `label`: +1, 0, -1, and `log_odds`: first-token refusal
log-odds, where every line has it). Prints and saves refusal counts with Wilson intervals, the confusion table of every pair
of judges, and Cohen's kappa with a bootstrap interval. Labels and log-odds stand in the table as judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    responses: tuple[str, ...]
    """Files of replies, one per checkpoint, as NAME=FILE or FILE (called after its folder, if the file is responses.jsonl)."""
    out: Path
    """Folder for the result; complete or absent."""
    judges: tuple[str, ...] = ("pattern", "default")
    """Judges of all replies: default, pattern, local, endpoint."""
    model: str | None = None
    """Model that the judges default and local ask: demo model name, hub id, folder or GGUF file. None: the default judge goes by patterns alone."""
    checkpoints: tuple[str, ...] = ()
    """The models that replied, in the order of the files: their first-token log-odds on the prompts become a judge. Without: those in the files, if any."""
    refusal_words: tuple[str, ...] = ("I", "As", "Sorry")
    """Words that open refusals, for these log-odds."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    seed: int = 0
    """Seed of the bootstraps."""


def run(config: Config) -> Path:
    """Read, judge, print, save; returns the folder."""
    from rsteer_interp.judge_tables import run_judge_table

    return run_judge_table(config)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
