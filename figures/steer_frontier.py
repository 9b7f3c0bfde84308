"""Safety refusal kept against the refusal removed, for every family of directions, with and without a condition.

Each line joins the doses of one family; grey points are random directions at the largest dose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, marker, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "steer"
PAPER = ("md", "wmd", "rmd", "wrmd")


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """The paper's vectors on the left, what was added on the right; the gated line and the null on both."""
    data = study_data(result)
    if "frontier" not in data:
        raise UserError(f"'{result.folder}' holds no frontier; run analyses/steer.py again")
    found, labels = data["frontier"], data["labels"]
    families = list(dict.fromkeys(p["family"] for p in found["points"]))
    own = [f for f in families if f not in (*PAPER, "gated", "random")]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, shown, title in (
            (left, [f for f in families if f in PAPER], "(a) The paper's four vectors"),
            (right, ["md", *own], "(b) Retain-constrained and opposite-sign"),
        ):
            _panel(axes, found, [*shown, "gated"], labels)
            axes.set_title(title)
            axes.set_xlabel(f"refused {_words(found['remove'])} prompts now answered")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        left.set_ylabel(f"refused {_words(found['kept'])} prompts still refused")
    points = found["points"]
    null = sum(p["null"] for p in points)
    n = {"removed": points[0]["removed"]["n"], "kept": points[0]["kept"]["n"]}
    doses = sorted({p["dose"] for p in points if p["update"] == "addition"})
    return Drawing(
        figure,
        "Removal against safety, by family of directions",
        f"Judged greedy replies to report prompts that the unsteered model refuses, n = {n['removed']} and {n['kept']}; empty replies are no "
        f"answers; every point is shown, none chosen. {_read_out(found)} Lines: addition at relative doses {', '.join(f'{d:g}' for d in doses)} per "
        f"layer at layers {found['layers'][0]} to {found['layers'][-1]}; hollow: reposition to the neutral mean. Diamond: unsteered, "
        f"at 0 and 1 by the choice of prompts. The null: {null} random rotations of the mean differences at the "
        f"largest dose, one for all layers; no p beside them is below {1 / (1 + null):.2g}. "
        "Crosses on the gated line are 95 % Wilson intervals; the other points' are as wide.",
        {
            "null": [p for p in points if p["null"]],
            "n": n,
            "points": points,
            "base": found["base"],
            "read_out": found["read_out"],
        },
    )


def _read_out(found: dict[str, Any]) -> str:
    """How well first-token log-odds, which cost a pass in place of a reply, would have told the same."""
    under = [check for kind, check in found["read_out"].items() if not kind.startswith("no edit")]
    valid = sum(check["valid"] for check in under)
    areas = [check["area"]["value"] for check in under if check["area"] is not None]
    span = f", ROC areas {min(areas):.2f} to {max(areas):.2f}" if areas else ""
    return f"First-token log-odds would tell refused from answered in {valid} of {len(under)} families and sets{span}."


def _panel(axes: Any, found: dict[str, Any], shown: list[str], labels: dict[str, str]) -> None:
    base = found["base"]
    null = [p for p in found["points"] if p["null"]]
    axes.plot(_x(null), _y(null), "o", color=colour("null"), ms=5, label=labels["random"])
    axes.plot(
        base["removed"]["rate"], base["kept"]["rate"], "D", mfc="white", mec=colour("ink"), label="unsteered", zorder=4
    )
    for name in shown:
        line = [p for p in found["points"] if p["family"] == name and p["update"] == "addition"]
        moved = [p for p in found["points"] if p["family"] == name and p["update"] == "reposition"]
        tone = colour("answering") if name == "gated" else colour(name)
        sign = "*" if name == "gated" else marker(name)
        axes.plot(_x(line), _y(line), color=tone, marker=sign, ms=8 if name == "gated" else 4, label=labels[name])
        axes.plot(_x(moved), _y(moved), sign, mec=tone, mfc="white")
        if name == "gated":
            p = line[-1]
            axes.errorbar(
                p["removed"]["rate"],
                p["kept"]["rate"],
                xerr=_error(p["removed"]),
                yerr=_error(p["kept"]),
                color=tone,
                elinewidth=0.7,
                fmt="none",
            )
    axes.set_xlim(-0.04, 1.06)
    axes.set_ylim(-0.04, 1.06)


def _x(points: list[dict[str, Any]]) -> list[float]:
    return [p["removed"]["rate"] for p in points]


def _y(points: list[dict[str, Any]]) -> list[float]:
    return [p["kept"]["rate"] for p in points]


def _error(rate: dict[str, Any]) -> list[list[float]]:
    return [[rate["rate"] - rate["low"]], [rate["high"] - rate["rate"]]]


def _words(name: str) -> str:
    return name.replace("_", " ")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "steer_frontier", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
