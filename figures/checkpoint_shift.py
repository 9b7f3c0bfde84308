"""In how many dimensions two checkpoints differ: effective rank by threshold with its nulls, and the leading eigenvalues by layer.

(a) number of dimensions that hold a share of the shift's energy, at the last depth, beside shifts of the same sizes in random
directions and beside other prompts' states; the other two published variants as lines; (b) leading shares of the energy by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "checkpoint_shift"
SHOWN = 20  # eigenvalues


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Two panels."""
    data = result.data
    shifted = [one for one in data["sites"] if one["shift"] is not None]
    if not shifted:
        raise UserError(f"'{result.folder}' holds no shift: the two checkpoints have the same states")
    last = shifted[-1]
    spectra, nulls = last["shift"]["spectra"], last["shift"]["rank_null"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
        a, b = figure.subplots(1, 2)
        x = [float(t) for t in nulls["isotropic"]]
        for kind, words, tone in (
            ("isotropic", "null: random directions", "null"),
            ("pairing", "null: other prompts' states", "matched"),
        ):
            low, high = ([band[end] for band in nulls[kind].values()] for end in ("low", "high"))
            a.fill_between(x, low, high, color=colour(tone), alpha=0.7, lw=1.5, edgecolor=colour(tone), label=words)
        for variant, line in (("identity", "-"), ("matrix", "--"), ("map", ":")):
            if variant in spectra:
                ranks = list(spectra[variant]["effective_ranks"].values())
                a.plot(x, ranks, line, marker="o", ms=2.5, color=colour("ink"), label=variant)
        a.set_yscale("log")
        a.set_xlabel("share of the shift's energy")
        a.set_ylabel("dimensions needed")
        a.set_title(f"(a) Effective rank, layer {last['layer']}")
        a.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=6)
        for i, one in enumerate(shifted):
            shares = one["shift"]["spectra"]["identity"]["shares"][:SHOWN]
            grey = 0.75 * (1 - i / max(len(shifted) - 1, 1))
            b.plot(
                range(1, len(shares) + 1),
                shares,
                color=str(grey),
                marker=".",
                ms=3,
                lw=0.9,
                label=f"layer {one['layer']}",
            )
        b.set_yscale("log")
        b.set_xlabel("component")
        b.set_ylabel("share of the energy")
        b.set_title("(b) Spectra of Y - X")
        b.legend(loc="upper right")
        for axes in (a, b):
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    return Drawing(
        figure,
        "The shift between two checkpoints",
        f"Last-prompt-token states of the same n = {data['n']} prompts in both checkpoints. (a) identity: of Y - X; matrix: of what a linear map "
        "leaves; map: of the map minus one (where there are more prompts than dimensions). Bands: 95 % of draws of two nulls, shifts of "
        f"the same sizes in random directions, and differences to the states of other prompts. (b) Darker is deeper. {data['finding']}",
        {"sites": data["sites"], "n": data["n"], "null": ["isotropic", "pairing"]},
    )


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "checkpoint_shift", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
