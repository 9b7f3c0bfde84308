"""What every figure script keeps, whatever it draws: the same bytes twice, its null and its n, texts that can be read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from rsteer_interp.report.schema import KIND
from rsteer_interp.style import DOUBLE, SINGLE, style

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "figures").glob("[!_]*.py"))


def scripts_of(kind: str) -> list[str]:
    """Names of the figure scripts that draw this kind of result."""
    return [n for n in SCRIPTS if getattr(importlib.import_module(f"figures.{n}"), "KIND", KIND) == kind]


def check_draws_twice_the_same(name: str, result: Path, out: Path) -> dict[str, Any]:
    """Draw by the script's command line into two folders, compare, and return what the figure's JSON holds."""
    module = importlib.import_module(f"figures.{name}")
    before = dict(matplotlib.rcParams)
    for side in ("a", "b"):
        assert module.main(["--result", str(result), "--out", str(out / side)]) == 0
    assert dict(matplotlib.rcParams) == before
    files = [f"{name}.json", f"{name}.pdf", f"{name}.png"]
    assert sorted(path.name for path in (out / "a").glob(f"{name}.*")) == files
    for file in files:
        assert (out / "a" / file).read_bytes() == (out / "b" / file).read_bytes()
    assert b"CreationDate" not in (out / "a" / f"{name}.pdf").read_bytes()
    shown: dict[str, Any] = json.loads((out / "a" / f"{name}.json").read_text(encoding="utf-8"))
    assert shown["title"] and len(shown["caption"]) > 80
    keys = set(keys_in(shown["data"]))
    assert any("null" in key or "random" in key for key in keys), "a figure shows its null"
    assert any(key == "n" or key.startswith("n_") for key in keys), "a figure shows its n"
    return shown


def keys_in(value: Any) -> list[str]:
    """Every name in a JSON value, at any depth."""
    if isinstance(value, list):
        return [key for item in value for key in keys_in(item)]
    return [*value, *keys_in(list(value.values()))] if isinstance(value, dict) else []


def check_texts(figure: Figure) -> None:
    """Of a column's width; no text overlaps another or leaves the figure."""
    assert figure.get_figwidth() in (SINGLE, DOUBLE)
    with style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        hidden = _hidden_labels(figure)
        texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in hidden]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    assert len(boxes) > 5
    for i, (first, a) in enumerate(boxes):
        inside = a.x0 > -1 and a.x1 < figure.bbox.x1 + 1 and a.y0 > -1 and a.y1 < figure.bbox.y1 + 1
        assert inside, f"'{first}' is cut off"
        for second, b in boxes[i + 1 :]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            down = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across < 1 or down < 1, f"'{first}' overlaps '{second}'"


def _hidden_labels(figure: Figure) -> set[int]:
    """Labels that exist but are not drawn: of ticks outside the limits, and everything in axes that are not visible."""
    out = set()
    for axes in figure.findobj(Axes):
        assert isinstance(axes, Axes)
        if not axes.get_visible():
            out |= {id(text) for text in axes.findobj(Text)}
        for axis in (axes.xaxis, axes.yaxis):
            shown = {id(tick) for tick in axis._update_ticks()} if axis.get_visible() and axes.axison else set()
            for tick in (*axis.majorTicks, *axis.minorTicks):
                out |= {id(tick.label1), id(tick.label2)} if id(tick) not in shown else set()
    return out
