"""One HTML page of everything that the results folder holds about a model: the paper's experiment and every study.

Nothing is computed and no model is loaded. A folder is shown when its result is a reproduction or answers a question,
and belongs to the page's model; what else lies there is named in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    results: Path = Path("results")
    """Folder of result folders."""
    out: Path = Path("results/index.html")
    """The page."""
    fingerprint: str | None = None
    """Fingerprint of the page's model. None: that of RESULTS/reproduce, else of the model with the most results."""


def run(config: Config) -> Path:
    """Write the page; returns its path."""
    from rsteer_interp.report.page import write_overview

    page = write_overview(config.results, config.out, config.fingerprint)
    print(f"page: {page}")
    return page


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
