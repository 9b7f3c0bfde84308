"""How much refusal goes under random pushes, by layer, and where learned directions and the aggregated one fall among them.

(a) fall of the refusal log-odds per random direction, with learned directions at the same layer and dose; (b) share of prompts no
longer refused, by judged replies, under some of the random directions; (c) the mean of the directions that flip one prompt, on other prompts, beside single random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "random_audit"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Every random direction is a point."""
    data = study_data(result)
    layers, together = data["layers"], data["aggregation"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 2.7), layout="constrained")
        a, b, c = figure.subplots(1, 3, width_ratios=(1.5, 1.2, 0.8))
        for x, (one, falls, freed) in enumerate(zip(layers, data["falls"], data["freed_per_vector"], strict=True)):
            _points(a, x, falls, "random direction" if x == 0 else None)
            _points(b, x, freed, None)
            _mean(a, x, one["fall"])
            _mean(b, x, one["freed"])
            for name in data["learned"]:
                label = f"minus {name.replace('_', ' ')}" if x == 0 else None
                y = one["learned"][name]["value"]
                a.plot([x + 0.3], [y], marker(name), color=colour(name), ms=5, ls="", label=label)
        names = [f"{one['layer']}\ndose {one['dose']:g}" for one in layers]
        for axes in (a, b):
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.4)
            axes.set_xlabel("layer, |push| / |resid|")
        a.axhline(0, color=colour("ink"), lw=0.5)
        a.set_ylabel("fall of log-odds, nats")
        a.set_title("(a) Random and learned")
        a.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncol=2)
        b.set_ylabel("share no longer refused")
        b.set_ylim(-0.03, 1.03)
        b.set_title(f"(b) Judged replies, n = {data['n_prompts']}")
        c.set_title("(c) Aggregated")
        if together is None:
            c.text(0.5, 0.5, "no prompt is flipped\nby two directions", ha="center", transform=c.transAxes)
            c.set_xticks([])
            c.set_yticks([])
        else:
            _points(c, 0, together["null_falls"], None)
            fall = together["fall"]
            c.errorbar(
                [1], [fall["value"]], [[fall["value"] - fall["low"]], [fall["high"] - fall["value"]]],
                fmt="o", color=colour("refusing"), elinewidth=0.8,
            )  # fmt: skip
            c.axhline(0, color=colour("ink"), lw=0.5)
            c.set_xticks([0, 1], ["single", f"mean of {together['members']}"])
            c.set_xlim(-0.5, 1.5)
            c.set_ylabel("fall, other prompts, nats")
    return Drawing(
        figure,
        "Refusal under random pushes",
        f"Refused {data['set'].replace('_', ' ')} prompts (report, n = {data['n_prompts']}), {data['n_vectors']} random directions, each added at one "
        "block input at the largest relative dose that leaves benign answers coherent. Grey: random directions, with mean and "
        f"95 % interval over them and the prompts' subjects. (b) Judged replies under {len(data['freed_per_vector'][0])} of them. (c) On "
        f"prompts on other subjects, the mean of directions under which log-odds fall below {data['threshold']:.1f} nats. {data['finding']}",
        {
            name: data[name]
            for name in ("layers", "falls", "freed_per_vector", "learned", "aggregation", "n_vectors", "n_prompts")
        }
        | {"null": "random directions"},
    )


def _points(axes: Any, x: float, values: Sequence[float], label: str | None) -> None:
    spread = np.linspace(-0.16, 0.16, len(values))
    axes.plot(x + spread, values, "o", color=colour("null"), ms=2, label=label)


def _mean(axes: Any, x: float, e: dict[str, float]) -> None:
    value = e["value"] if "value" in e else e["rate"]
    axes.errorbar(
        [x],
        [value],
        [[value - e["low"]], [e["high"] - value]],
        fmt="_",
        color=colour("ink"),
        ms=8,
        elinewidth=0.8,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "random_audit", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
