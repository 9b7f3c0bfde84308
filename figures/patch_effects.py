"""Where the difference between a refused and an answered prompt sits, by layer and token, in both directions.

Top: share of the pair's gap that the residual stream carries, the instruction against the template tokens after it, beside
donors of the same class. Below: the same for single attention and MLP outputs; dots are beyond same-class donors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "patch_effects"
WRITERS = {"attn_out": "attention output", "mlp_out": "MLP output"}
WORDS = {"refused": "Answered into refused", "answered": "Refused into answered"}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """One column per direction; the stream on top, the writers below."""
    data = study_data(result)
    if "into" not in data:
        raise UserError(f"'{result.folder}' holds no patching map; run analyses/patch_effects.py again")
    points = [point for point in WRITERS if any(c["point"] == point for c in data["cells"])]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 2.5 + 1.35 * len(points)), layout="constrained")
        grid: Any = figure.subplots(1 + len(points), 2, height_ratios=[1.7] + [1.0] * len(points), squeeze=False)
        sizes = [
            abs(into["share"]["value"][i])
            for into in data["into"].values()
            for i, cell in enumerate(data["cells"])
            if cell["point"] != "resid_pre"
        ]
        top = (
            float(np.quantile(sizes, 0.98)) if sizes else 1.0
        )  # a few cells may be far larger; the bar's arrows say so
        for column, name in enumerate(WORDS):
            into = data["into"][name]
            letter = iter("ace" if column == 0 else "bdf")
            _stream(grid[0, column], data, into)
            grid[0, column].set_title(f"({next(letter)}) {WORDS[name]}, n = {into['n']}")
            for row, point in enumerate(points, 1):
                axes = grid[row, column]
                image = _writers(axes, data, into, point, top)
                axes.set_title(f"({next(letter)}) {WRITERS[point]}")
                if column:
                    axes.set_yticklabels([])
                if row == len(points):
                    axes.set_xlabel("block")
        grid[0, 0].set_ylabel("share of the gap, residual stream")
        grid[0, 1].set_yticklabels([])
        low, high = (f(axes.get_ylim()[i] for axes in grid[0]) for i, f in ((0, min), (1, max)))
        for axes in grid[0]:
            axes.set_ylim(low, high)
        if points:
            figure.colorbar(image, ax=list(grid[1:, 1]), label="share of the gap", aspect=30, extend="both")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    gap = data["into"]["answered"]["gap"]
    return Drawing(
        figure,
        "Where refusal sits, and what writes it there",
        f"States of one prompt put into another at one site and span, n = {data['n']} pairs of a refused sensitive and an "
        f"answered ordinary prompt with as many tokens in every span. Share of the pair's gap in refusal log-odds "
        f"({gap['value']:.1f} nats, {gap['low']:.1f} to {gap['high']:.1f}) that is carried over; bars and bands are 95 % "
        "bootstrap intervals over pairs. Grey: the same patches from another prompt of the same class (the null). Dots: more than "
        "the null carries, at a false-discovery rate of 5 % over all cells and both directions. The template prefix is left out: its "
        f"states are the same in all prompts. {data['finding']}",
        {
            "layers": data["layers"],
            "spans": data["spans"],
            "cells": data["cells"],
            "into": data["into"],
            "null": "same class",
            "n": data["n"],
        },
    )


def label(span: str) -> str:
    """A token as a reader sees it."""
    return span.replace("\n", "↵").replace(" ", "␣") if span != "instruction" else span


def _stream(axes: Any, data: dict[str, Any], into: dict[str, Any]) -> None:
    layers, last = data["layers"], len(data["spans"]) - 1

    def curve(kind: str, edge: str, span: int) -> list[float]:
        found = {
            c["layer"]: x
            for c, x in zip(data["cells"], into[kind][edge], strict=True)
            if c["point"] == "resid_pre" and c["span"] == span
        }
        return [found[layer] for layer in layers]

    for span in (0, last):
        axes.fill_between(
            layers,
            curve("null", "low", span),
            curve("null", "high", span),
            color=colour("null"),
            alpha=0.45,
            lw=0,
            label="same class (null), 95 %" if span else None,
        )
    for span in range(1, last):
        axes.plot(
            layers,
            curve("share", "value", span),
            color=colour("neutral"),
            lw=0.8,
            label="template tokens between" if span == 1 else None,
        )
    for span, ink, words, mark in (
        (0, colour("answering"), "instruction", "s"),
        (last, colour("refusing"), "last token", "o"),
    ):
        value = curve("share", "value", span)
        errors = [[v - x for v, x in zip(value, curve("share", "low", span), strict=True)],
                  [x - v for v, x in zip(value, curve("share", "high", span), strict=True)]]  # fmt: skip
        axes.errorbar(layers, value, errors, color=ink, marker=mark, ms=3, elinewidth=0.7, label=words)
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_xlim(layers[0] - 1, layers[-1] + 1)
    step = max(1, len(layers) // 12)
    axes.set_xticks(layers[::step])


def _writers(axes: Any, data: dict[str, Any], into: dict[str, Any], point: str, top: float) -> Any:
    layers, spans = data["layers"], data["spans"]
    values, dots = [[0.0] * len(layers) for _ in spans], []
    for i, cell in enumerate(data["cells"]):
        if cell["point"] == point:
            column = layers.index(cell["layer"])
            values[cell["span"]][column] = into["share"]["value"][i]
            if i in into["beyond_null"]:
                dots.append((column, cell["span"]))
    image = axes.imshow(values, cmap="PuOr_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color=colour("ink"), ms=3)
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_yticks(range(len(spans)), [label(span) for span in spans])
    axes.tick_params(length=0)
    return image


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "patch_effects", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
