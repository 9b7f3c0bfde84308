"""How alike the directions of the kinds of refusal are: matrix at one layer, and the political one's cosines at every layer.

(a) below the diagonal the plain cosine, above it the cosine without estimation noise, on it the reliability; grey cells are
within random pairs, empty ones too unreliable to correct; (b) the corrected cosine of political refusal with
safety refusal and with over-refusal by layer, interval and random pairs.
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
FIRST = ("safety", "over_matched")
COLOURS = {
    "safety": "harmful",
    "over_matched": "answering",
    "over_borderline": "matched",
    "over_harmless": "neutral",
    "world": "general",
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Matrix on the left, curves by layer on the right."""
    data = study_data(result)
    from matplotlib.figure import Figure

    atlas, label = data["atlas"], {k["name"]: k["label"] for k in data["kinds"]}
    with style():
        figure = Figure(figsize=(DOUBLE, 3.5), layout="constrained")
        a, b = figure.subplots(1, 2, width_ratios=[1.0, 0.85])
        _matrix(a, data["kinds"], atlas, data["chosen"]["layer"])
        _curves(b, data, label)
    counts = data["counts"]["fit"]
    n = "; ".join(
        f"{label[k['name']]} {counts[k['name']]['refused']}, {counts[k['name']]['answered']}" for k in data["kinds"]
    )
    return Drawing(
        figure,
        "How alike the directions of political, safety and over-refusal are",
        "Mean differences, refused minus answered fit prompts. (a) Below the diagonal the plain cosine; above it the cosine "
        "without estimation noise (halves without a common prompt, over their reliability); on it the reliability (Spearman-Brown). Grey: "
        f"within 95 % of random pairs with the covariance of the answered states (|cos| under {atlas['null_q95']:.2f}; "
        f"{atlas['isotropic_q95']:.2f} on the sphere), or of labels permuted within subjects, for kinds that are inside them. Empty: too unreliable to correct. (b) The corrected cosine with its 95 % "
        "interval (bootstrap over subjects), beside the random pairs' 95 % band; dotted: the layer of (a), chosen on select. Fit "
        f"prompts refused, answered: {n}. " + " ".join(_said(data, label)),
        {"kinds": data["kinds"], "atlas": atlas, "pairs": data["pairs"], "layers": data["layers"], "n": counts},
    )


def _said(data: dict[str, Any], label: dict[str, str]) -> list[str]:
    """What the drawn pairs are at the layer of the matrix, with intervals."""
    at, out = data["layers"].index(data["chosen"]["layer"]), []
    for name, curve in _drawn(data):
        raw, clean, p = (curve[key][at] for key in ("raw", "disattenuated", "p"))
        tail = f", corrected {clean['value']:.2f} ({clean['low']:.2f} to {clean['high']:.2f})" if clean else ""
        out.append(
            f"{label[name].capitalize()}: {raw['value']:.2f} ({raw['low']:.2f} to {raw['high']:.2f}){tail}, p = {p:.2g}."
        )
    return out


def _matrix(axes: Any, kinds: list[dict[str, Any]], atlas: dict[str, Any], layer: int) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    size, scale = len(kinds), Normalize(-1, 1)
    for i in range(size):
        for j in range(size):
            cell = atlas["raw" if i > j else "disattenuated"][i][j]
            value = atlas["reliability"][i] if i == j else cell["value"] if cell else None
            face: Any = "white" if value is None else colormaps["RdBu_r"](scale(np.clip(value, -1, 1)))
            if i == j:
                face = "white"
            elif value is not None and max(atlas["p"][i][j], atlas["within_subject_p"][i][j] or 0.0) > 0.05:
                face = "#E3E3E3"
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=face, edgecolor="white", lw=1))
            ink = "white" if i != j and value is not None and face != "#E3E3E3" and abs(value) > 0.65 else colour("ink")
            text = "" if value is None else f"{value:.2f}"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink, fontsize=5.5,
                      weight="bold" if i == j else "normal")  # fmt: skip
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
    places = [i + 0.5 for i in range(size)]
    axes.set_yticks(places, [f"{k['label']}  {i}" for i, k in enumerate(kinds, 1)])
    axes.set_xticks(places, [str(i) for i in range(1, size + 1)])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"(a) Cosines at layer {layer}")


def _curves(axes: Any, data: dict[str, Any], label: dict[str, str]) -> None:
    x = data["layers"]
    band = data["pairs"][0]["null_q95"]
    axes.fill_between(x, [-v for v in band], band, color=colour("null"), alpha=0.5, lw=0, label="random pairs, 95 %")
    for name, curve in _drawn(data):
        there = [(layer, c) for layer, c in zip(x, curve["disattenuated"], strict=True) if c]
        points, ink = [layer for layer, _ in there], colour(COLOURS[name])
        axes.fill_between(
            points, [c["low"] for _, c in there], [c["high"] for _, c in there], color=ink, alpha=0.25, lw=0
        )
        axes.plot(points, [c["value"] for _, c in there], color=ink, marker="o", ms=2.5, label=label[name])
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.axhline(1, color=colour("ink"), lw=0.5)
    axes.axvline(data["chosen"]["layer"], color=colour("ink"), ls=":", lw=0.8)
    axes.set_ylim(-0.75, 1.3)
    axes.set_xlabel("layer (state entering the block)")
    axes.set_ylabel("cosine without estimation noise")
    axes.set_title("(b) Political with others")
    axes.legend(loc="lower left")


def _drawn(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The curves of safety and of political over-refusal, where they are; else the first two."""
    curves = {c["pair"][1]: c for c in data["pairs"] if c["pair"][1] in COLOURS}
    return [(name, curve) for name, curve in curves.items() if name in FIRST] or list(curves.items())[:2]


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "refusal_geometry", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
