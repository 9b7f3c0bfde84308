"""Rounds to ratios: `python -m tests.benchmarks.report` makes result folder, table (terminal and markdown) and figures.

Ratio = median of ours / median of the rival, over the rounds in which both ran; its interval is the percentile bootstrap
over rounds (paired), which for a few rounds is about the range of what they gave.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from rsteer_interp.command_line import run
from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.results import Provenance, save_result

KIND = "benchmarks"
RESAMPLES = 4000
COLUMNS = ("ours against", "ours", "theirs", "ratio", "95 % interval", "goal", "verdict", "rounds")


@dataclass(frozen=True)
class Config:
    rounds: Path = Path("results/benchmarks/rounds.json")
    """What pytest-benchmark wrote: the costs of every round."""
    out: Path = Path("results/benchmarks")
    """Folder of the result, its table and its figures."""
    figures: Path = Path("figures")
    """Folder of the figure scripts."""
    seed: int = 0
    """Seed of the bootstrap."""


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, float]:
    """Ratio of medians with its 95 % interval; the value alone when there is one round."""
    value = float(np.median(ours) / np.median(theirs))
    if len(ours) == 1:
        return {"value": value, "low": value, "high": value}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # rounds that agree exactly: an interval of one point
        found = stats.bootstrap(
            (np.asarray(ours), np.asarray(theirs)),
            lambda a, b, axis=-1: np.median(a, axis) / np.median(b, axis),
            paired=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def verdict(found: dict[str, float], goal: float | None) -> str:
    """Met or missed by the whole interval, else not decided; of the null, whether it covers 1."""
    if goal is None:
        return "covers 1" if found["low"] <= 1 <= found["high"] else "does not cover 1"
    if found["high"] <= goal:
        return "met"
    return "missed" if found["low"] > goal else "not decided"


def comparisons(benchmarks: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One entry per piece of work and rival."""
    out = []
    for case in (b["extra_info"]["comparison"] for b in benchmarks if "comparison" in b["extra_info"]):
        for rival in case["rivals"]:
            found = ratio(case["ours"], rival["costs"], seed)
            out.append(
                {
                    "work": case["work"],
                    "against": rival["name"],
                    "kernel": rival["kernel"],
                    "null": rival["null"],
                    "unit": case["unit"],
                    "ours": float(np.median(case["ours"])),
                    "theirs": float(np.median(rival["costs"])),
                    "ratio": found,
                    "goal": rival["goal"],
                    "verdict": verdict(found, rival["goal"]),
                    "n": len(case["ours"]),
                    "note": case["note"],
                }
            )
    return out


def scaling(benchmarks: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Per axis the seconds of every round, and the exponent b of seconds = a size^b with its interval over rounds."""
    out = []
    for case in (b["extra_info"] for b in benchmarks if "scaling" in b["extra_info"]):
        for curve in case["scaling"]:
            logs, spent = np.log(curve["sizes"]), np.log(np.asarray(curve["seconds"]))  # size; size x round
            n, random = spent.shape[1], np.random.default_rng(seed)
            draws = random.integers(n, size=(RESAMPLES, n))
            slopes = [stats.linregress(logs, np.median(spent[:, draw], axis=1)).slope for draw in draws[:500]]
            exponent = {
                "value": float(stats.linregress(logs, np.median(spent, axis=1)).slope),
                "low": float(np.quantile(slopes, 0.025)),
                "high": float(np.quantile(slopes, 0.975)),
            }
            out.append({**curve, "what": case["scaled_work"][curve["axis"]], "exponent": exponent, "n": n})
    return out


def finding(rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """How many goals were met, which were not, and how far the null strayed from 1."""
    judged = [row for row in rows if row["goal"] is not None]
    counts = {word: sum(row["verdict"] == word for row in judged) for word in ("met", "not decided", "missed")}
    missed = [f"{row['work']} against {_rival(row)} ({row['ratio']['value']:.2f}, goal {row['goal']:g})"
              for row in judged if row["verdict"] == "missed"]  # fmt: skip
    null = [row["ratio"] for row in rows if row["null"]]
    text = (
        f"{counts['met']} of {len(judged)} goals met, {counts['not decided']} not decided by their interval, {counts['missed']} "
        f"missed on {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['dtype']}."
    )
    if missed:
        text += f" Missed: {'; '.join(missed)}."
    if null:
        low, high = min(r["low"] for r in null), max(r["high"] for r in null)
        text += f" The same work timed twice gave ratios between {low:.2f} and {high:.2f}: less than that is noise."
    return text


def _rival(row: dict[str, Any]) -> str:
    return f"{row['against']}, {row['kernel']} kernel" if row["kernel"] else str(row["against"])


def _cells(row: dict[str, Any]) -> list[str]:
    found = row["ratio"]
    return [
        _rival(row),
        f"{row['ours']:.3g} {row['unit']}",
        f"{row['theirs']:.3g} {row['unit']}",
        f"{found['value']:.3f}",
        f"{found['low']:.3f} to {found['high']:.3f}",
        "" if row["goal"] is None else f"{row['goal']:g}",
        row["verdict"],
        str(row["n"]),
    ]


def _show(rows: Sequence[dict[str, Any]], text: str) -> None:
    table = Table(*COLUMNS, title="ours / rival, ratio of medians", title_justify="left", box=box.SIMPLE)
    for work, group in groupby(rows, key=lambda row: row["work"]):
        table.add_row(f"[bold]{escape(work)}")
        for row in group:
            table.add_row(*map(escape, _cells(row)))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    console.print(text, markup=False)


def _markdown(rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], text: str) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for work, group in groupby(rows, key=lambda row: row["work"]):
        lines.append(f"| **{work}** |" + " |" * (len(COLUMNS) - 1))
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in group]
    notes = dict.fromkeys(f"- {row['work']}: {row['note']}." for row in rows if row["note"])
    shapes = [
        f"- seconds grow as {c['axis']} ^ {c['exponent']['value']:.2f} ({c['exponent']['low']:.2f} to {c['exponent']['high']:.2f}, "
        f"{c['axis']} {c['sizes'][0]} to {c['sizes'][-1]}, {c['n']} rounds; {c['what']})."
        for c in curves
    ]
    return "\n".join(["# Benchmarks", "", text, "", *lines, "", *notes, "", *shapes, ""])


def report(config: Config) -> None:
    """Write result.json, table.md and the figures; print the table."""
    if not config.rounds.is_file():
        raise UserError(f"no rounds in '{config.rounds}'; run `make bench`")
    stored = json.loads(config.rounds.read_text(encoding="utf-8"))
    rows = comparisons(stored["benchmarks"], config.seed)
    curves = scaling(stored["benchmarks"], config.seed)
    machine = stored["machine_info"]
    text = finding(rows, machine)
    data = {"applicable": True, "finding": text, "machine": machine, "rows": rows, "scaling": curves}
    save_result(config.out, KIND, data, provenance=Provenance.collect(config=config))
    (config.out / "table.md").write_text(_markdown(rows, curves, text), encoding="utf-8")
    _show(rows, text)
    for path in draw_figures(config.out, config.out / "figures", config.figures):
        print(path)


if __name__ == "__main__":
    raise SystemExit(run(Config, report))
