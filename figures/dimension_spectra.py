"""In how many dimensions refused and answered prompts differ, and in how many of them two halves of the data agree.

(a) Eigenvalues of differences between refused and answered prompts of one subject, beside labels shuffled inside subjects; (b)
overlap of the K-dimensional subspaces fitted on two halves of the subjects, beside shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "dimensionality"
SHOWN = 12  # eigenvalues
CONTRASTS = {"subjects": "Refused minus answered\ninside each subject"}
FAMILIES = {
    "pairs": (colour("refusing"), "o", "paired differences"),
    "subjects": (colour("md"), "s", "inside subjects"),
    "ridge": (colour("rmd"), "v", "ridge"),
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """The contrast's spectrum and the agreement of halves."""
    data = study_data(result)
    if not data.get("variance", {}).get("contrasts"):
        raise UserError(
            f"'{result.folder}' holds no differences of refused and answered prompts; give more report prompts"
        )
    found, layer = data["variance"], data["read_layer"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
        panels = figure.subplots(1, len(found["contrasts"]) + 1)
        for axes, (name, one), letter in zip(panels, found["contrasts"].items(), "ab", strict=False):
            _spectrum(axes, one, f"({letter}) {CONTRASTS[name]}")
        _halves(panels[-1], found["halves"], f"({'abc'[len(found['contrasts'])]}) Agreement of halves")
    counts = "; ".join(
        f"{name}: {one['beyond']} beyond shuffled labels, n = {one['n']}, p of the first = {one['p_first']:.2g}"
        for name, one in found["contrasts"].items()
    )
    classes = "; ".join(
        f"{name}: participation ratio {one['participation']['value']:.1f} ({one['participation']['low']:.1f} to "
        f"{one['participation']['high']:.1f}), {one['over_edge']} eigenvalues over the Marchenko-Pastur edge, n = {one['n']}"
        for name, one in found["classes"].items()
    )
    any_half = next((rows[0]["n_splits"] for rows in found["halves"].values() if rows), 0)
    return Drawing(
        figure,
        "In how many dimensions refusal varies, and in how many that can be repeated",
        f"Layer {layer}, chosen on select; eigenvalues from report. Grey: central 95 % of label shuffles inside subjects, so that topic counts "
        f"for nothing; filled markers lead and are above the null's 95 % quantile ({counts}). "
        f"Last panel: mean squared cosine of the principal angles between subspaces from two halves of the fit subjects ({any_half} splits, central "
        f"95 %), shaded: labels shuffled. States of one class: {classes}.",
        {"layer": layer, **found},
    )


def _spectrum(axes: Any, found: dict[str, Any], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    values = found["values"][:SHOWN]
    rank = list(range(1, len(values) + 1))
    axes.fill_between(
        rank,
        found["null_low"][:SHOWN],
        found["null_high"][:SHOWN],
        color=colour("null"),
        alpha=0.6,
        lw=0,
        label="labels shuffled",
    )
    axes.plot(rank, found["null_median"][:SHOWN], color=colour("neutral"), lw=0.8)
    axes.plot(rank, values, color=colour("ink"), lw=1.0, label=f"observed, n = {found['n']}")
    for beyond in (True, False):
        points = [(x, y) for x, y in zip(rank, values, strict=True) if (x <= found["beyond"]) == beyond]
        ink = colour("ink")
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=ink, mfc=ink if beyond else "white")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("component")
    axes.set_ylabel("second moment")
    axes.set_title(title)
    axes.legend(loc="upper right")


def _halves(axes: Any, halves: dict[str, list[dict[str, float]]], title: str) -> None:
    longest = max(halves.values(), key=len)
    for name, rows in halves.items():
        ink, mark, words = FAMILIES[name]
        ks, y = [r["k"] for r in rows], [r["overlap"] for r in rows]
        errors = [[max(0.0, v - r["low"]) for v, r in zip(y, rows, strict=True)],
                  [max(0.0, r["high"] - v) for v, r in zip(y, rows, strict=True)]]  # fmt: skip
        axes.errorbar(ks, y, errors, color=ink, marker=mark, lw=1.0, elinewidth=0.6, label=words)
        axes.fill_between(ks, [r["null_low"] for r in rows], [r["null_high"] for r in rows], color=ink, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks([r["k"] for r in longest], [str(r["k"]) for r in longest])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("dimensions K")
    axes.set_ylabel("overlap, mean cos²")
    axes.set_title(title)
    axes.legend(loc="upper right")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "dimension_spectra", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
