"""What noise on embeddings does, dose by dose: single coordinates beside random directions of equal norm, the null.

(a) median KL of the next token with the regimes' bounds; (b) change of the refusal log-odds; (c) share of perturbed tokens whose
nearest embedding is still their own, with the norm below which that check can notice nothing.
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

KIND = "embedding_noise"
LEAST_KL = 1e-4  # nats, where the axis begins to be linear


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Three panels on one axis of doses."""
    data = study_data(result)
    doses, null = data["doses"], data["null"]
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 3.1), layout="constrained")
        a, b, c = figure.subplots(1, 3)
        for name, kinds in data["sets"].items():
            for kind, found in kinds.items():
                line = {
                    "color": colour(name), "marker": marker(name), "ms": 3, "ls": "--" if kind == null else "-",
                    "mfc": "white" if kind == null else colour(name),
                }  # fmt: skip
                words = "random directions (null)" if kind == null else "single coordinates"
                _curve(a, doses, found["kl"], line, f"{name.replace('_', ' ')}, {words}")
                _curve(b, doses, found["log_odds"], line, None)
                _curve(c, doses, found["own_token"], line, None)
        for name, bound in data["regimes"].items():
            a.axhline(bound, color=colour("neutral"), lw=0.6, ls=":")
            a.text(0.02, bound * 1.1, name, fontsize=6, color=colour("neutral"), transform=a.get_yaxis_transform())
        a.set_yscale("symlog", linthresh=LEAST_KL)
        a.set_ylim(0, 20)
        a.set_yticks([0, 1e-3, 1e-2, 0.1, 1, 10], ["0", "0.001", "0.01", "0.1", "1", "10"])
        a.minorticks_off()
        a.set_ylabel("median KL, nats")
        a.set_title("(a) Next token")
        b.axhline(0, color=colour("ink"), lw=0.5)
        b.set_ylabel("change of log-odds, nats")
        b.set_title("(b) Refusal opening")
        radius = data["blind_radius"]
        edges = [_place(doses, radius[end]) for end in ("low", "high")]
        c.axvspan(*edges, color=colour("null"), alpha=0.5, lw=0)
        c.set_ylabel("share of tokens")
        c.set_ylim(-0.03, 1.03)
        c.set_title("(c) Map to themselves")
        for axes in (a, b, c):
            axes.set_xticks(range(len(doses)), [f"{d:g}" for d in doses])
            axes.set_xlabel("|noise| / |embedding|")
        figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncol=2)
    ns = {name: kinds[null]["n"] for name, kinds in data["sets"].items()}
    return Drawing(
        figure,
        "Noise on embeddings",
        f"Benign and borderline report prompts ({', '.join(f'{k.replace(chr(95), chr(32))} n = {v}' for k, v in ns.items())}), 95 % intervals "
        "(over subjects; in (c) over subjects and directions). Solid: noise along single embedding coordinates; dashed: the null, random directions of equal norm. "
        "Grey band: 95 % of the tokens' half distance to the nearest other token, below which the check in (c) is blind. "
        f"{data['finding']}",
        {name: data[name] for name in ("doses", "sets", "null", "regimes", "blind_radius")},
    )


def _place(doses: Sequence[float], dose: float) -> float:
    """Where a dose stands on an axis that has the doses at 0, 1, 2, ..."""
    return float(np.interp(dose, doses, range(len(doses))))


def _curve(
    axes: Any, doses: Sequence[float], found: Sequence[dict[str, float]], line: dict[str, Any], label: str | None
) -> None:
    value = [e["value"] if "value" in e else e["rate"] for e in found]
    errors = [[max(v - e["low"], 0) for v, e in zip(value, found, strict=True)],
              [max(e["high"] - v, 0) for v, e in zip(value, found, strict=True)]]  # fmt: skip
    axes.errorbar(range(len(doses)), value, errors, lw=0.9, elinewidth=0.5, label=label, **line)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "embedding_noise", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
