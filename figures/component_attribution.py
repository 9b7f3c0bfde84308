"""Which heads and MLPs write the refusal direction, and what removing the heads that write most does.

(a) What every head writes, as a share of the whole difference; rings: the heads chosen on the select split. (b) Blocks: MLPs and
all heads together, beside permuted labels. (c) Refusal log-odds removed by mean-ablating the chosen heads, beside random heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import FigureConfig, figure_main, study_data
from rsteer_interp.style import DOUBLE, Drawing, colour, style

if TYPE_CHECKING:
    from rsteer_interp.results import Result

KIND = "component_attribution"
_CLASSES = ("answered", "refused")  # from below


@dataclass(frozen=True)
class Config(FigureConfig):
    """Where to read and write."""


def draw(result: Result) -> Drawing:
    """Heads on the left, MLPs and the test by ablation on the right."""
    data = study_data(result)
    if "components" not in data or "ablation" not in data:
        raise UserError(f"'{result.folder}' holds no components; run analyses/component_attribution.py again")
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(DOUBLE, 3.9), layout="constrained")
        left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[1, 1.15]))
        a = left.subplots()
        b, c = right.subplots(2, 1, height_ratios=[1.2, 1])
        _heads(left, a, data)
        _mlps(b, data)
        _ablation(c, data)
    report, total, ablated = data["report"], data["total"], data["ablation"]["refused"]
    return Drawing(
        figure,
        "What writes the refusal direction",
        f"Everything that heads and MLPs write along the mean difference at layer {data['layer']} at the last prompt token, refused "
        f"minus answered, n = {report['n']} report prompts, as a share of the whole difference ({total['value']:.2f}, "
        f"{total['low']:.2f} to {total['high']:.2f}). (a) Single heads; rings: the {len(data['chosen'])} chosen on the select split. "
        "(b) MLPs; bars are 95 % intervals, the grey band holds 95 % of label permutations, filled markers have q <= 0.05. "
        f"(c) Refusal log-odds removed by setting the chosen heads at the last token to their mean, with 95 % intervals, beside "
        f"{ablated['n_random']} random sets of as many heads from the same layers (n = {ablated['effect']['n']} refused, "
        f"{data['ablation']['answered']['effect']['n']} answered prompts). {data['finding']}",
        {k: data[k] for k in ("layer", "components", "report", "total", "chosen", "ablation", "n")},
    )


def _heads(figure: Any, axes: Any, data: dict[str, Any]) -> None:
    share = [[0.0] * data["n_heads"] for _ in range(data["layer"])]
    for value, c in zip(data["report"]["value"], data["components"], strict=True):
        if c["kind"] == "head":
            share[c["layer"]][c["head"]] = 100 * value / data["total"]["value"]
    top = max(abs(x) for row in share for x in row)
    image = axes.imshow(share, cmap="PuOr_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.plot(
        [head for _, head in data["chosen"]],
        [layer for layer, _ in data["chosen"]],
        "o",
        mfc="none",
        mec=colour("ink"),
        ms=5,
    )
    step = max(1, data["n_heads"] // 8)
    axes.set_xticks(range(0, data["n_heads"], step))
    axes.set_yticks(range(0, data["layer"], max(1, data["layer"] // 8)))
    axes.tick_params(length=0)
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    axes.set_title("(a) Heads; rings: chosen on select")
    figure.colorbar(image, ax=axes, label="share of the difference, %", location="bottom", aspect=35)


def _mlps(axes: Any, data: dict[str, Any]) -> None:
    report, whole, ink = data["report"], data["total"]["value"] / 100, colour("refusing")
    mlps = [i for i, c in enumerate(data["components"]) if c["kind"] == "mlp"]
    x = [data["components"][i]["layer"] for i in mlps]
    value, low, high, null_low, null_high = (
        [report[name][i] / whole for i in mlps] for name in ("value", "low", "high", "null_low", "null_high")
    )
    axes.fill_between(
        x, null_low, null_high, color=colour("null"), alpha=0.6, lw=0, step="mid", label="permuted labels, 95 %"
    )
    errors = [[v - w for v, w in zip(value, low, strict=True)], [w - v for v, w in zip(value, high, strict=True)]]
    axes.errorbar(x, value, errors, color=ink, ls="", elinewidth=0.8, label="MLP, 95 % interval")
    for filled in (True, False):
        points = [(i, v) for i, v, m in zip(x, value, mlps, strict=True) if (report["q"][m] <= 0.05) == filled]
        axes.plot(
            [i for i, _ in points], [v for _, v in points], "o", color=ink, mfc=ink if filled else "white", ms=3.5
        )
    heads = [
        sum(
            v
            for v, c in zip(report["value"], data["components"], strict=True)
            if c["kind"] == "head" and c["layer"] == i
        )
        / whole
        for i in x
    ]
    axes.plot(x, heads, color=colour("answering"), marker="s", ms=2.5, lw=0.8, label="all heads of the block")
    axes.axhline(0, color=colour("ink"), lw=0.5)
    axes.set_xlabel("block")
    axes.set_ylabel("share, %")
    axes.set_title(f"(b) MLPs and blocks of heads, n = {report['n']}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.5 * (top - bottom))  # room for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.legend(loc="upper left")


def _ablation(axes: Any, data: dict[str, Any]) -> None:
    for y, name in enumerate(_CLASSES):
        found = data["ablation"][name]
        effect = found["effect"]
        axes.plot(
            found["random"],
            [y - 0.18] * len(found["random"]),
            "|",
            color=colour("neutral"),
            ms=6,
            label="random, same layers" if y == 0 else None,
        )
        axes.errorbar(
            effect["value"],
            y + 0.12,
            xerr=[[effect["value"] - effect["low"]], [effect["high"] - effect["value"]]],
            fmt="o",
            color=colour("refusing"),
            label="chosen, 95 %" if y == 0 else None,
        )
    axes.axvline(0, ymax=0.78, color=colour("ink"), lw=0.5)
    axes.set_yticks(
        range(len(_CLASSES)), [f"{name},\nn = {data['ablation'][name]['effect']['n']}" for name in _CLASSES]
    )
    axes.set_ylim(-0.6, len(_CLASSES) + 0.25)
    axes.set_xlabel("refusal log-odds removed, nats")
    axes.set_title(f"(c) Mean-ablating {len(data['chosen'])} heads")
    axes.legend(loc="upper right", ncols=2, columnspacing=1)


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(Config, draw, "component_attribution", argv, KIND)


if __name__ == "__main__":
    raise SystemExit(main())
