"""What every figure script does with its command line: read a result folder, draw, and save beside the plotted data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run
from rsteer_interp.report.schema import Reproduced, read_reproduction
from rsteer_interp.style import Drawing, save_figure


@dataclass(frozen=True)
class FigureConfig:
    result: Path
    """The result folder to read; nothing else is read."""
    out: Path
    """The folder for the figure's PDF, PNG and JSON."""


def save_drawing(drawing: Drawing, out: Path, name: str) -> list[Path]:
    """Save under `name`; the JSON also holds title and caption, which the page prints."""
    return save_figure(
        drawing.figure, out / name, {"title": drawing.title, "caption": drawing.caption, "data": drawing.data}
    )


def figure_main(
    config_type: type[FigureConfig],
    draw: Callable[[Reproduced], Drawing],
    name: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Exit code of a figure script."""

    def draw_and_save(config: FigureConfig) -> None:
        for path in save_drawing(draw(read_reproduction(config.result)), config.out, name):
            print(path)

    return run(config_type, draw_and_save, argv)
