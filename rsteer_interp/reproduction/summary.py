"""Step 6: the result as plain data, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsteer_interp.agreement import auc_estimate
from rsteer_interp.report.directions import directions_table
from rsteer_interp.report.schema import Estimate, Finder, Rate, Reproduction, Row
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL, LABELS, POLITICAL
from rsteer_interp.steering import Steering
from rsteer_interp.style import method_label

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
        "notes": [*backend.notes, *context.template.notes],
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
    finder: Mapping[str, Any],
    matched: list[dict[str, Any]],
    cloud: Mapping[str, Any],
    layer_scores: dict[str, Any],
    directions: dict[str, Any],
    left_out: dict[str, str],
    drawn: dict[str, str],
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
        "removal": None,
    }
    found = finder["methods"]
    table = [{"label": "base", **empty, **_measured(base)}]
    table += [
        {
            "label": method_label(m),
            "method": m,
            "k": s.k,
            "alpha": s.alpha,
            "reposition": s.reposition,
            "layers": [site.layer for site in s.sites],
            "dose": doses[m],
            "target_met": found[m]["target_met"],
            "removal": found[m]["chosen"]["removal"],
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
        "directions": directions,
        "left_out": left_out,
        "drawn": drawn,
        "density": density,
        "pca": pca,
        "finder": {"target": finder["target"], **finder["unsteered"], "trials": _trials(found)},
        "matched": [_flat(row) for row in matched],
        "null": dict(cloud),
        "confidence": _confidence(base, steered),
        "judges": _judges(context, base, steered),
        "refusal_tokens": [context.backend.tokenizer.decode([token]) for token in tokens],
        "replies": _replies(base, steered),
    }


def _measured(evaluated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evaluated[name] for name in ("rates", "answer_shift", "kl")}


def _trials(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"method": method, **_flat(trial), "chosen": trial["setting"] == result["chosen"]["setting"]}
        for method, result in found.items()
        for trial in result["trials"]
    ]


def _flat(trial: Mapping[str, Any]) -> dict[str, Any]:
    return {**trial["setting"], **{name: value for name, value in trial.items() if name != "setting"}}


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
    """How well the first token's log-odds agree with the judged replies, per set: of the model as it is, and under each edit."""
    return {
        "default": context.judge.name,
        "log_odds_auc": _areas(base),
        "steered_auc": {method: _areas(evaluated) for method, evaluated in steered.items()},
    }


def _areas(evaluated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    auc = {}
    for name, subjects in evaluated["subjects"].items():
        replies = [r for r in evaluated["replies"] if r["set"] == name]
        found = auc_estimate([r["log_odds"] for r in replies], [r["refused"] for r in replies], clusters=subjects)
        if found is not None:
            auc[name] = asdict(found)
    return auc


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
    """The claim table on standard output, the updates at matched removal, and where the page is."""
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console = Console(width=180)
    if not data["applicable"]:
        console.print(data["reason"], markup=False, soft_wrap=True)
        console.print(f"page: {page}", markup=False, soft_wrap=True)
        return
    result = Reproduction.model_validate(data)
    console.print(_claim_table(result))
    if result.finder is not None:
        console.print(_matched_table(result, result.finder))
    drawn = data["drawn"]
    console.print(directions_table(data, f"Directions. Drawn: {method_label(drawn['method'])}, {drawn['rule']}"))
    console.print(f"page: {page}", markup=False, soft_wrap=True)


def _claim_table(data: Reproduction) -> Table:
    finder, names = data.finder, data.in_order(data.sets)
    table = Table(title=f"Refusal % (95 % interval), {data.model.name}, {data.preset} preset")
    if finder is not None:
        table.caption = (
            f"removal: fall of mean c on select, target {finder.target:g} (*: inside the interval); x: times the smallest L_g, "
            "where the intervals are apart"
        )
    for column in (
        "",
        "setting",
        "removal",
        *(f"{data.set_label(n)} (n={data.sets[n].n})" for n in names),
        "L_g",
        "KL",
        "dose",
    ):
        table.add_column(column)
    for row in data.table:
        factor = data.shift_factor(row)
        undecided = finder is not None and row.removal is not None and finder.open(row.removal)
        table.add_row(
            row.label,
            _setting(row),
            _number(row.removal, 2) + ("*" if undecided else ""),
            *(_percent(row.rates[name]) for name in names),
            _number(row.answer_shift) + (f" x{factor:.1f}" if factor else ""),
            _number(row.kl),
            "" if row.dose is None else f"{row.dose:.3f}",
        )
    for paper in data.paper:
        published = {POLITICAL: f"{paper.political:.1f}", HARMFUL: f"{paper.harmful:.1f}"}
        table.add_row(f"paper {paper.label}", "", "", *(published.get(name, "") for name in names), style="dim")
    return table


def _matched_table(data: Reproduction, finder: Finder) -> Table:
    table = Table(
        title=f"Update at matched removal (target {finder.target:g}, select split): harmful prompts refused, % (95 % interval)"
    )
    for column in ("", "update", "setting", "removal", "L_g", "before", "after", "difference"):
        table.add_column(column)
    for row in data.matched:
        table.add_row(
            row.method.upper(),
            row.update,
            f"k={row.k} α={row.alpha:g}",
            _number(row.removal, 2),
            _number(row.answer_shift),
            f"{_percent(row.harmful.before)} of {row.harmful.before.n}",
            _percent(row.harmful.after),
            "{:+.0f} ({:+.0f} to {:+.0f})".format(
                *(
                    100 * x
                    for x in (row.harmful.difference.value, row.harmful.difference.low, row.harmful.difference.high)
                )
            ),
        )
    return table


def _setting(row: Row) -> str:
    if row.method is None:
        return ""
    missed = "" if row.target_met else " (missed)"
    return f"k={row.k} α={row.alpha:g}{' repos.' if row.reposition else ''}{missed}"


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def _number(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}-{estimate.high:.{digits}f})"
