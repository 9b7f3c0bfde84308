"""Directions trained to mediate refusal: what ablating each takes, what a cone of them holds, and which are independent.

(a) fall of refusal log-odds per direction, beside random edits of equal size; (b) directions drawn from the cone, beside random
edits of their sizes; (c) RepInd of pairs beside random directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "refusal_cones"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Three panels; grey is random."""
    data = study_data(result)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows, cone, pairs, label = data["directions"], data["cone"], data["pairs"], data["label"]
    with style():
        figure = Figure(figsize=(DOUBLE, 2.9), layout="constrained")
        a, b, c = figure.subplots(1, 3, width_ratios=(1.4, 0.8, 1.2))
        for y, row in enumerate(rows):
            _strip(a, row["null"], y)
            for name, shift in (("removed", -0.12), ("kept", 0.12)):
                _error(a, row[name], y + shift, colour(data["names"][name]), data["names"][name] if y == 0 else None)
        a.set_yticks(range(len(rows)), [label[row["name"]].replace(", ", ",\n") for row in rows])
        a.invert_yaxis()
        a.axvline(0, color=colour("ink"), lw=0.5)
        a.set_xlabel("fall of log-odds, nats")
        a.set_title("(a) Ablated everywhere")
        for x, (name, values) in enumerate((("random", cone["random"]), ("cone", cone["cone"]))):
            spread = np.linspace(-0.18, 0.18, len(values))
            b.plot(x + spread, values, "o", ms=3, color=colour("null" if name == "random" else "refusing"))
        b.set_xticks([0, 1], ["random", "cone"])
        b.set_xlim(-0.5, 1.5)
        b.axhline(0, color=colour("ink"), lw=0.5)
        b.set_ylabel("fall of log-odds, nats")
        b.set_title(f"(b) Cone of {cone['dimension']}")
        for y, pair in enumerate(pairs):
            _strip(c, pair["null"], y)
            c.plot([pair["value"]], [y], "D", color=colour("refusing"), ms=4)
        c.set_yticks(range(len(pairs)), [f"{_short(p['first'])} /\n{_short(p['second'])}" for p in pairs])
        c.set_ylim(len(pairs) - 0.5, -0.5)
        c.set_xscale("log")
        c.xaxis.set_major_locator(LogLocator(numticks=4))
        c.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        c.xaxis.set_minor_formatter(NullFormatter())
        c.set_xlabel("RepInd")
        c.set_title("(c) Independence")
        figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return Drawing(
        figure,
        "Directions trained to mediate refusal",
        f"Refused report prompts, n = {data['n'][data['names']['removed']]} and {data['n'][data['names']['kept']]}; 95 % intervals over "
        f"subjects. Grey: {data['n_random']} random edits that move every state as far. RepInd: mean squared change of one direction's cosine "
        f"with the stream when the other is ablated, both ways. {data['finding']}",
        {name: data[name] for name in ("directions", "cone", "pairs", "n", "n_random")}
        | {"null": "random edits of equal size"},
    )


def _short(name: str) -> str:
    return {"dim": "means", "rdo": "RDO"}.get(name, name)


def _strip(axes: Any, values: Sequence[float], y: float) -> None:
    axes.plot(values, y + np.linspace(-0.2, 0.2, len(values)), "o", ms=1.8, color=colour("null"))


def _error(axes: Any, e: dict[str, float], y: float, ink: str, label: str | None) -> None:
    error = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
    axes.errorbar([e["value"]], [y], xerr=error, fmt="o", ms=3.5, color=ink, elinewidth=0.8,
                  label=label.replace("_", " ") if label else None)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "refusal_cones", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
