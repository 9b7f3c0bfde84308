"""How the time of reading states grows with prompts, tokens and layers, beside growth in proportion.

Points are single rounds, the line is the fitted power of the size, the grey line the null: time in proportion to size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "benchmarks"


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """One panel per axis, on logarithmic scales of the same decades."""
    curves = result.data.get("scaling")
    if not curves:
        raise UserError(f"'{result.folder}' holds no scaling curves; run `make bench`")
    machine = result.data["machine"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 2.3), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, curve in zip(panels, curves, strict=True):
            _panel(axes, curve)
        panels[0].set_ylabel("seconds")
        panels[0].legend(loc="upper left", handlelength=1.2)
    words = "; ".join(
        f"{c['axis']}: {c['exponent']['value']:.2f} ({c['exponent']['low']:.2f} to {c['exponent']['high']:.2f}), {c['what']}"
        for c in curves
    )
    return Drawing(
        figure,
        "Reading states takes time in proportion to the work",
        f"Seconds to read the last token's state; n = {curves[0]['n']} rounds, points. Exponents of the size with 95 % bootstrap "
        f"interval over rounds: {words}. Grey: the null of time in proportion to size, through the largest size. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['dtype']}.",
        {"curves": curves, "null_exponent": 1, "n": curves[0]["n"], "machine": machine},
    )


def _panel(axes: Any, curve: dict[str, Any]) -> None:
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    sizes, spent = np.asarray(curve["sizes"], float), np.asarray(curve["seconds"])
    medians = np.median(spent, axis=1)
    power = curve["exponent"]
    centre = np.exp(np.log(medians).mean() - power["value"] * np.log(sizes).mean())
    axes.loglog(sizes, medians[-1] * sizes / sizes[-1], color=colour("neutral"), ls=":", label="in proportion (null)")
    axes.loglog(sizes, centre * sizes ** power["value"], color=colour("answering"), label="fitted power")
    for each in spent.T:
        axes.loglog(sizes, each, "o", ms=2.5, color=colour("ink"), mfc="none", mew=0.7)
    axes.set_xlabel(curve["axis"])
    axes.xaxis.set_major_locator(FixedLocator(sizes.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"exponent {power['value']:.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "benchmark_scaling", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
