"""How many dimensions have to be removed for refusal to go, each subspace beside its nulls.

(a) Refusal log-odds removed by ablating K dimensions at all block inputs, (b) the same against the relative size of the edit
(matched dose), (c) what it does to answered prompts at matched removal, (d) the best push inside K dimensions at one layer.
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
LOOKS = {  # colour, marker, line, words
    "pairs": (colour("refusing"), "o", "-", "paired differences"),
    "subjects": (colour("md"), "s", "-", "differences inside subjects"),
    "ridge": (colour("rmd"), "v", "-", "ridge"),
    "topics": (colour("neutral"), "^", "--", "topics of answered prompts"),
    "covariance": (colour("neutral"), "x", ":", "random, covariance of answered prompts"),
}


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Removal by K, by dose and by side effect, and the push by K."""
    data = study_data(result)
    if "ablation" not in data or "addition" not in data:
        raise UserError(f"'{result.folder}' holds no sweeps; run analyses/dimensionality.py again")
    everywhere, pushed = data["ablation"]["all"], data["addition"]
    lead = next(iter(everywhere["families"].values()))
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 5.2), layout="constrained")
        (a, b), (c, d) = figure.subplots(2, 2)
        _by_k(a, everywhere, "same dose, random")
        a.axhline(everywhere["gap"], color=colour("ink"), ls=":", lw=0.8)
        a.set_ylabel("log-odds removed, nats")
        a.set_title(f"(a) Ablating at all {len(everywhere['layers'])} block inputs, n = {lead['n']}")
        _by_dose(b, everywhere)
        b.set_ylabel("log-odds removed, nats")
        b.set_title("(b) The same at matched dose")
        _by_cost(c, everywhere)
        c.set_title(f"(c) Side effect at matched removal, n = {lead['kl'][0]['n']}")
        _by_k(d, pushed, "random subspaces")
        d.axhline(pushed["whole_gradient"]["value"], color=colour("ink"), ls=":", lw=0.8)
        d.set_ylabel("log-odds removed, nats")
        d.set_title(f"(d) Best push at layer {pushed['layer']}, {pushed['dose']:g} of |resid|")
        figure.legend(handles=_handles(everywhere), loc="outside lower center", ncols=3, columnspacing=1.5)
    band = {name: curve["enough"] for name, curve in everywhere["families"].items()}
    return Drawing(
        figure,
        "How many dimensions carry refusal",
        f"(a) Refusal log-odds removed on n = {lead['n']} refusing report prompts of subjects that no subspace has seen, by ablating "
        f"nested K-dimensional subspaces; bars are 95 % bootstrap intervals over prompts. Grey band: the same dose moved into random "
        f"subspaces of the same K (95 % for one more draw, {lead['n_null'][0]} draws). Large open marker: smallest K that removes "
        f"{100 * data['share']:.0f} % of the removable refusal beyond random, dotted: the gap to answered prompts, which bounds it; no marker where no K is distinguishable from random (q ≤ 0.05). (b) Against the mean |edit| / |resid| per site; grey line: mean of the "
        "random subspaces. (c) KL of the first token's distribution on answered prompts. (d) The best constant push inside K dimensions, learned "
        f"on select; grey band: inside random subspaces; dotted: along the whole gradient. {data['finding']}",
        {"ablation": everywhere, "addition": pushed, "enough": band, "n": lead["n"]},
    )


def _by_k(axes: Any, found: dict[str, Any], null: str) -> None:
    lead = next(iter(found["families"].values()))
    axes.fill_between(
        lead["ks"], lead["null_low"], lead["null_high"], color=colour("null"), alpha=0.6, lw=0, label=null
    )
    for name, curve in {**found["families"], **found["controls"]}.items():
        ink, mark, line, _ = LOOKS[name]
        y, errors = _bars(curve["removed"])
        axes.errorbar(curve["ks"], y, errors, color=ink, marker=mark, ls=line, lw=1.0, elinewidth=0.6)
        beyond = any(
            q <= 0.05 and e["value"] > 0 for q, e in zip(curve.get("q", []), curve.get("net", []), strict=True)
        )
        if beyond and curve["enough"]:
            at = curve["ks"].index(curve["enough"]["k"])
            axes.plot(curve["ks"][at], y[at], mark, ms=9, mfc="none", mec=ink, mew=1.0)
    ks = max((c["ks"] for c in found["families"].values()), key=len)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_xlabel("dimensions K")


def _by_dose(axes: Any, found: dict[str, Any]) -> None:
    for name, curve in {**found["families"], **found["controls"]}.items():
        ink, mark, line, _ = LOOKS[name]
        axes.plot(curve["dose"], [e["value"] for e in curve["removed"]], color=ink, marker=mark, ls=line, lw=1.0)
        if "null_dose" in curve:
            axes.plot(curve["null_dose"], curve["own_null_mean"], color=colour("null"), lw=1.0, zorder=0)
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_xlabel("mean |edit| / |resid| per site")


def _by_cost(axes: Any, found: dict[str, Any]) -> None:
    for name, curve in {**found["families"], **found["controls"]}.items():
        ink, mark, line, _ = LOOKS[name]
        y, errors = _bars(curve["kl"])
        removed = [e["value"] for e in curve["removed"]]
        axes.errorbar(removed, y, errors, color=ink, marker=mark, ls=line, lw=1.0, elinewidth=0.6)
        if "null_kl" in curve:
            axes.plot(
                curve["own_null_mean"], [e["value"] for e in curve["null_kl"]], color=colour("null"), lw=1.0, zorder=0
            )
    axes.set_xlabel("log-odds removed on refused prompts, nats")
    axes.set_ylabel("KL on answered prompts, nats")


def _bars(estimates: list[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    y = [e["value"] for e in estimates]
    return y, [[v - e["low"] for v, e in zip(y, estimates, strict=True)],
               [e["high"] - v for v, e in zip(y, estimates, strict=True)]]  # fmt: skip


def _handles(found: dict[str, Any]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = []
    for name in (*found["families"], *found["controls"]):
        ink, mark, line, words = LOOKS[name]
        lines.append(Line2D([], [], color=ink, marker=mark, ls=line, lw=1.0, label=words))
    return [*lines, Patch(color=colour("null"), alpha=0.6, lw=0, label="random subspaces, same dose")]


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "dimensionality", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
