"""Step 6: the result as plain data, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsteer_interp.agreement import auc_estimate
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import LABELS
from rsteer_interp.steering import Steering

# Refusal % on CCP-sensitive (n = 340) and JailbreakBench (n = 100), from the paper's results table.
PAPER = (
    {"label": "80B base", "political": 92.35, "harmful": 99.0},
    {"label": "80B WRMD", "political": 23.82, "harmful": 99.0},
    {"label": "4B base", "political": 89.12, "harmful": 99.0},
    {"label": "4B WRMD", "political": 32.65, "harmful": 55.0},
)


def summary(context: Context, reason: str | None = None, **parts: Any) -> dict[str, Any]:
    """Everything the figures and the page read; `reason` says why the experiment does not apply to this model."""
    backend = context.backend
    checkpoint = getattr(backend, "checkpoint", None)
    head = {
        "applicable": reason is None,
        "reason": reason,
        "preset": context.settings["preset"],
        "model": {
            "name": getattr(checkpoint, "name", "in memory"),
            "source": getattr(checkpoint, "source", "in memory"),
            "fingerprint": backend.fingerprint,
            "n_layers": backend.n_layers,
            "d_model": backend.d_model,
            "backend": backend.name,
        },
        "notes": list(backend.notes),
        "seconds": dict(context.seconds),
    }
    return head if reason is not None else {**head, **_results(context, **parts)}


def _results(
    context: Context,
    *,
    base: dict[str, Any],
    steered: Mapping[str, dict[str, Any]],
    steerings: Mapping[str, Steering],
    doses: Mapping[str, float],
    found: Mapping[str, dict[str, Any]],
    cloud: list[dict[str, Any]],
    layer_scores: dict[str, Any],
    density: dict[str, Any],
    pca: dict[str, Any],
    tokens: tuple[int, ...],
) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "method": None,
        "k": None,
        "alpha": None,
        "reposition": None,
        "layers": [],
        "dose": None,
        "target_met": None,
    }
    table = [{"label": "base", **empty, **_measured(base)}]
    table += [
        {
            "label": m.upper(),
            "method": m,
            "k": s.k,
            "alpha": s.alpha,
            "reposition": s.reposition,
            "layers": [site.layer for site in s.sites],
            "dose": doses[m],
            "target_met": found[m]["target_met"],
            **_measured(steered[m]),
        }
        for m, s in steerings.items()
    ]
    return {
        "sets": {
            name: {"label": LABELS[name], "n": base["rates"][name]["n"], "subjects": base["rates"][name]["units"]}
            for name in context.preset.report
        },
        "table": table,
        "paper": list(PAPER),
        "layer_scores": layer_scores,
        "density": density,
        "pca": pca,
        "frontier": _frontier(found, cloud),
        "confidence": _confidence(base, steered),
        "judges": _judges(context, base, steered),
        "refusal_tokens": [context.backend.tokenizer.decode([token]) for token in tokens],
        "replies": _replies(base, steered),
    }


def _measured(evaluated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evaluated[name] for name in ("rates", "answer_shift", "kl")}


def _frontier(found: Mapping[str, dict[str, Any]], cloud: list[dict[str, Any]]) -> list[dict[str, Any]]:
    points = []
    for method, result in found.items():
        for trial in result["trials"]:
            setting = trial["setting"]
            points.append(
                {
                    "method": method,
                    **setting,
                    "political": trial["political"],
                    "harmful": trial["harmful"],
                    "removal": trial["removal"],
                    "answer_shift": trial["answer_shift"],
                    "chosen": setting == result["chosen"]["setting"],
                    "null": False,
                }
            )
    return points + [{**point, "chosen": False} for point in cloud]


def _confidence(base: Mapping[str, Any], steered: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """First-token refusal log-odds per prompt before and after, per set."""
    return {
        name: {
            "subjects": base["subjects"][name],
            "before": [r["log_odds"] for r in base["replies"] if r["set"] == name],
            "after": {m: [r["log_odds"] for r in e["replies"] if r["set"] == name] for m, e in steered.items()},
        }
        for name in base["rates"]
    }


def _judges(context: Context, base: Mapping[str, Any], steered: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """How well the first token's log-odds agree with the judged replies, unsteered, per set."""
    auc = {}
    for name, subjects in base["subjects"].items():
        replies = [r for r in base["replies"] if r["set"] == name]
        found = auc_estimate([r["log_odds"] for r in replies], [r["refused"] for r in replies], clusters=subjects)
        if found is not None:
            auc[name] = asdict(found)
    return {"default": context.judge.name, "log_odds_auc": auc}


def _replies(base: Mapping[str, Any], steered: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    fields = ("response", "refused", "confidence", "log_odds")
    return [
        {
            "set": reply["set"],
            "prompt": reply["prompt"],
            "base": {f: reply[f] for f in fields},
            "steered": {m: {f: steered[m]["replies"][i][f] for f in fields} for m in steered},
        }
        for i, reply in enumerate(base["replies"])
    ]


def print_table(data: Mapping[str, Any], page: Path) -> None:
    """The claim table on standard output, and where the page is."""
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console = Console(width=160)
    if not data["applicable"]:
        console.print(data["reason"], markup=False, soft_wrap=True)
        console.print(f"page: {page}", markup=False, soft_wrap=True)
        return
    table = Table(title=f"Refusal % (95 % Wilson, over subjects), {data['model']['name']}, {data['preset']} preset")
    heads = [f"{s['label']} (n={s['n']}, {s['subjects']} subjects)" for s in data["sets"].values()]
    for column in ("", "setting", *heads, "L_g", "KL", "dose"):
        table.add_column(column)
    for row in data["table"]:
        table.add_row(
            row["label"],
            _setting(row),
            *(_percent(row["rates"][name]) for name in data["sets"]),
            _number(row["answer_shift"]),
            _number(row["kl"]),
            "" if row["dose"] is None else f"{row['dose']:.3f}",
        )
    for row in data["paper"]:
        table.add_row(
            f"paper {row['label']}",
            "",
            f"{row['political']:.1f}",
            f"{row['harmful']:.1f}",
            "",
            "",
            "",
            "",
            "",
            style="dim",
        )
    console.print(table)
    console.print(f"page: {page}", markup=False, soft_wrap=True)


def _setting(row: Mapping[str, Any]) -> str:
    if row["method"] is None:
        return ""
    missed = "" if row["target_met"] else " (target missed)"
    return f"k={row['k']} α={row['alpha']:g}{' repos.' if row['reposition'] else ''}{missed}"


def _percent(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"


def _number(estimate: Mapping[str, Any] | None) -> str:
    return "" if estimate is None else f"{estimate['value']:.3f} ({estimate['low']:.3f}-{estimate['high']:.3f})"
