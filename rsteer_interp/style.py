"""Figure style as plain dicts, colours by meaning, and saving: PDF, PNG and the plotted data, the same bytes each time.

Nothing global is changed: figures are matplotlib `Figure` objects made inside `style()`, never pyplot's. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; every colour also has a marker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINGLE, DOUBLE = 3.25, 6.75  # column widths of the venue, inches

COLOURS = {
    "refusing": "#D55E00",
    "answering": "#0072B2",
    "neutral": "#8C8C8C",
    "null": "#B8B8B8",
    "ink": "#222222",
    "base": "#222222",
    "md": "#56B4E9",
    "wmd": "#009E73",
    "rmd": "#E69F00",
    "wrmd": "#CC79A7",
    "political": "#E69F00",
    "harmful": "#CC79A7",
    "matched": "#56B4E9",
    "general": "#009E73",
}
COLOURS |= {"refused": COLOURS["refusing"], "answered": COLOURS["answering"], "random": COLOURS["null"]}
MARKERS = {
    "base": "D",
    "md": "o",
    "wmd": "s",
    "rmd": "^",
    "wrmd": "v",
    "political": "o",
    "harmful": "^",
    "matched": "s",
    "general": "D",
}
_SPARE_COLOURS = ("#7A5195", "#5B8C5A", "#A0522D", "#B5A300")  # 4 and 5 without a common factor: 20 pairs of both
_SPARE_MARKERS = ("P", "X", "<", ">", "h")

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so every machine draws the same bytes
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.prop_cycle": "cycler('color', ['#222222', '#56B4E9', '#009E73', '#E69F00', '#CC79A7', '#0072B2', '#D55E00'])",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "rsteer_interp",
    "path.simplify": False,
    "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
}


@dataclass(frozen=True)
class Drawing:
    """A drawn figure with what it shows in words and the numbers it was drawn from."""

    figure: Figure
    title: str
    caption: str
    data: Mapping[str, Any] = field(repr=False)


@contextmanager
def style() -> Iterator[None]:
    """The style inside the block; what was set before comes back after it."""
    import matplotlib

    with matplotlib.rc_context(RC):
        yield


def colour(name: str) -> str:
    """The colour of a meaning, prompt set or method; one not in the table gets its own, always the same."""
    return COLOURS.get(_meaning(name)) or _SPARE_COLOURS[crc32(name.encode()) % len(_SPARE_COLOURS)]


def marker(name: str) -> str:
    """The marker that goes with `colour(name)`."""
    return MARKERS.get(_meaning(name)) or _SPARE_MARKERS[crc32(name.encode()) % len(_SPARE_MARKERS)]


def method_label(method: str) -> str:
    """A method's name as tables and figures print it."""
    return method.upper().replace("_", " ")


def _meaning(name: str) -> str:
    known = {"political_sensitive": "political", "political_matched": "matched", "harmless_matched": "matched"}
    return known.get(name, name)


def save_figure(figure: Figure, stem: Path | str, data: Any) -> list[Path]:
    """Write STEM.pdf, STEM.png (200 dpi) and STEM.json (the plotted data); byte-identical when drawn again."""
    from rsteer_interp.provenance import json_text

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json_text(data, "figure data", sort_keys=True) + "\n"
    dateless = {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None}
    writers: dict[str, Callable[[Path], Any]] = {
        ".pdf": lambda path: figure.savefig(path, format="pdf", metadata=dateless),
        ".png": lambda path: figure.savefig(path, format="png", metadata={"Software": None}),
        ".json": lambda path: path.write_text(text, encoding="utf-8"),
    }
    written = []
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, the same for PDF and PNG
        for suffix, write in writers.items():
            path = stem.with_name(stem.name + suffix)
            partial = path.with_name(f".{path.name}.partial")
            try:
                write(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            written.append(path)
    return written
