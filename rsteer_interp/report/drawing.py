"""What every figure script does with its command line: read a result folder, draw, and save beside the plotted data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsteer_interp.command_line import run
from rsteer_interp.errors import UserError
from rsteer_interp.processes import is_first
from rsteer_interp.report.schema import KIND, read_reproduction
from rsteer_interp.style import Drawing, save_figure

if TYPE_CHECKING:
    from rsteer_interp.results import Result


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


def read(folder: Path | str, kind: str = KIND) -> Any:
    """What a figure script's `draw` gets: a "reproduce" result typed, any other kind as the Result that is on disk."""
    from rsteer_interp.results import load_result

    return read_reproduction(folder) if kind == KIND else load_result(folder, kind=kind)


def study_data(result: Result) -> dict[str, Any]:
    """The data of a study that found something. UserError for one that was not applicable to its model."""
    data = result.data
    if not data.get("applicable"):
        raise UserError(f"'{result.folder}' is {data.get('reason') or 'not applicable'}; there is nothing to draw")
    return data


def draw_figures(result_folder: Path | str, out: Path | str, scripts: Path | str) -> list[Path]:
    """Draw every script of this kind of result (its `KIND`, "reproduce" unless it says so) in the folder `scripts`. None for
    a model that does not refuse; a script that finds nothing to draw says so in one line and is passed over."""
    from rsteer_interp.results import load_result

    if not is_first():
        return []
    stored = load_result(result_folder)
    result = read(result_folder, stored.kind)
    written: list[Path] = []
    for script in sorted(Path(scripts).glob("[!_]*.py")) if stored.data.get("applicable") else ():
        module = _load(script)
        if getattr(module, "KIND", KIND) != stored.kind:
            continue
        try:
            written += save_drawing(module.draw(result), Path(out), script.stem)
        except UserError as error:
            print(f"figure {script.stem}: {error}", file=sys.stderr)
    return written


def redraw(root: Path | str, scripts: Path | str) -> list[Path]:
    """The figures of every result in the folders of `root`, drawn again into each one's `figures`; loads no model."""
    folders = sorted(path.parent for path in Path(root).glob("*/result.json"))
    return [path for folder in folders for path in draw_figures(folder, folder / "figures", scripts)]


def _load(script: Path) -> Any:
    name = f"_figure_{script.stem}"
    spec = spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def figure_main(
    config_type: type[FigureConfig],
    draw: Callable[[Any], Drawing],
    name: str,
    argv: Sequence[str] | None = None,
    kind: str = KIND,
) -> int:
    """Exit code of a figure script that reads results of this kind."""

    def draw_and_save(config: FigureConfig) -> None:
        for path in save_drawing(draw(read(config.result, kind)), config.out, name):
            print(path)

    return run(config_type, draw_and_save, argv)
