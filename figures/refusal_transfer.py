"""What steering with one kind's direction removes of every kind of refusal, at equal dose and at matched removal of its own kind.

Rows are directions, columns the refused report prompts on which the effect is measured; cells without colour are not beyond
random directions at a false-discovery rate of 5 %; frames mark a direction on its own kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "refusal_geometry"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Three matrices side by side: addition at one dose, ablation, addition at matched removal."""
    data = study_data(result)
    from matplotlib.figure import Figure

    label = {k["name"]: k["label"] for k in data["kinds"]}
    parts = [
        ("(a) adding, equal dose", data["transfer"]["rows"], data["transfer"]["add"]),
        ("(b) ablating", data["transfer"]["rows"], data["transfer"]["ablate"]),
        ("(c) adding, matched", data["matched"]["rows"], data["matched"]["add"]),
    ]
    rows = data["transfer"]["rows"]
    with style():
        figure = Figure(figsize=(DOUBLE, 0.36 * len(rows) + 1.5), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        top = max(c["value"] for _, _, found in parts if found for line in found["cells"] for c in line)
        for at, (title, own, found) in zip(axes, parts, strict=True):
            _matrix(at, title, rows, own, found, label, data["n"], max(top, 1e-6))
        axes[0].set_ylabel("direction of")
        axes[1].set_xlabel("measured on refused prompts of")
    layers, matched = data["window"]["layers"], data["matched"]
    n = ", ".join(f"{label[c]} {data['n'][c]}" for c in data["columns"])
    doses = ", ".join(f"{label[c]} {d:.3f}" if d else f"{label[c]} not reached" for c, d in matched["doses"].items())
    return Drawing(
        figure,
        "What one kind's direction removes of every kind of refusal",
        f"Refusal log-odds removed (nats), mean with its 95 % bootstrap interval below, at layers {layers[0]} to {layers[-1]} (chosen on select). "
        f"(a) adding minus {data['dose']:g} of |resid| along every direction; (b) ablating it; (c) adding so much that each direction removes "
        f"{matched['target']:.2f} nats of its own kind on select (doses: {doses}). Colour: beyond the same edits turned towards random "
        "directions with the covariance of the answered states (lengths, and angles between layers, are kept), scaled to the same size, at "
        f"a false-discovery rate of 5 % over the cells of a panel ({data['transfer']['add']['n_random']} draws in a and c, "
        f"{data['transfer']['ablate']['n_random']} in b); no colour: not "
        f"distinguishable from random. Frames: own kind. n per column: {n}.",
        {"transfer": data["transfer"], "matched": matched, "window": data["window"], "n": data["n"]},
    )


def _matrix(
    axes: Any,
    title: str,
    rows: list[str],
    own: list[str],
    found: dict[str, Any] | None,
    label: dict[str, str],
    n: dict[str, int],
    top: float,
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    columns = found["columns"] if found else []
    for i, name in enumerate(own):
        assert found is not None
        row = rows.index(name)
        for j, cell in enumerate(found["cells"][i]):
            strength = max(min(cell["value"] / top, 1.0), -1.0)
            hit = cell["q"] <= 0.05
            face = colormaps["PuOr_r"](0.5 + 0.5 * strength) if hit else "white"
            axes.add_patch(Rectangle((j, row), 1, 1, facecolor=face, edgecolor="#DDDDDD", lw=0.5))
            if name.removesuffix("_inside") == columns[j]:
                axes.add_patch(
                    Rectangle((j + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor=colour("ink"), lw=1.0, zorder=3)
                )
            ink = "white" if hit and abs(strength) > 0.7 else colour("ink")
            axes.text(j + 0.5, row + 0.38, f"{cell['value']:.1f}", ha="center", va="center", color=ink, fontsize=6.5)
            axes.text(j + 0.5, row + 0.74, f"{cell['low']:.1f}, {cell['high']:.1f}", ha="center", va="center",
                      color=ink, fontsize=4.8)  # fmt: skip
    axes.set(xlim=(0, max(len(columns), 1)), ylim=(len(rows), 0))
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [label[r] for r in rows])
    axes.set_xticks([j + 0.5 for j in range(len(columns))], [label[c] for c in columns],
                    rotation=90)  # fmt: skip
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(title)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "refusal_transfer", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
