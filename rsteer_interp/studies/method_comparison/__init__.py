"""The related methods under one protocol; `analyses/compare_methods.py` is its command line.

Every method is one stage: fitted on fit, its strength chosen on select, measured on report. A method that is done is not done
again, and a new one is added without touching the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from rsteer_interp.directions import CannotFit
from rsteer_interp.errors import UserError
from rsteer_interp.key import UNKEYED
from rsteer_interp.methods import METHODS, Method
from rsteer_interp.prompts import Prompt, Split, load_prompts
from rsteer_interp.studies.material import examples, material_of
from rsteer_interp.studies.method_comparison.equal_dose import equal_dose
from rsteer_interp.studies.method_comparison.outcomes import (
    against,
    at_matched_removal,
    at_own_best,
    beside_null,
)
from rsteer_interp.studies.method_comparison.reading import Reading
from rsteer_interp.studies.method_comparison.selection import WIDENED, find_strength
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.compare_methods import Config

KIND = "compare_methods"
QUESTION = "Which method removes political refusal at the least cost in safety, over-refusal and ordinary answers?"
NULL = "random"  # the method whose directions are random: what any push of that dose does
PROTECTED = 512  # most unjudged fit prompts of a set that methods learn to leave alone
LEAST = 8  # fewest refused prompts of either set


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise UserError(f"no method '{unknown[0]}'; choose from {', '.join(METHODS)}")
    names = tuple(dict.fromkeys((*(config.methods or METHODS), NULL)))
    study.check_applicable()
    for split in ("select", "report"):
        refused = int(study.replies(split, config.keep).refused.sum())
        if refused < LEAST:
            raise NotApplicable(
                f"not applicable: {refused} of {len(study.replies(split, config.keep).refused)} {split} prompts of "
                f"'{config.keep}' are refused, too few to see whether refusal of them is kept"
            )
    sets = (config.remove, config.contrast, config.keep, config.ordinary)
    reading = Reading(study, material_of(study, *sets, protected_prompts(study, config)))
    rows, left_out = {}, {}
    for name in names:
        try:
            rows[name] = measure(study, config, reading, METHODS[name]())
        except CannotFit as reason:
            left_out[name] = str(reason)
    rows = {
        name: row | own_checks(study, config, reading, METHODS[name](), row["best"]["strength"])
        for name, row in rows.items()
    }
    leader = max(rows, key=lambda name: rows[name]["select_score"])
    data = {
        "methods": rows,
        "left_out": left_out,
        "null": NULL,
        "leader": leader,
        "beside_null": beside_null({n: r["equal_dose"] for n, r in rows.items() if n != NULL}),
        "against_leader": against({n: r["own_best"] for n, r in rows.items()}, leader),
        "base_rates": study.rates("report", config.remove, config.contrast, config.keep, *config.watch),
        "n": {name: len(base.texts) for name, base in reading.refused_prompts("report", config.judged).items()},
        "target": config.target,
        "names": {"remove": config.remove, "keep": config.keep, "watch": list(config.watch)},
    }
    return {**data, "finding": finding(data)}, None


def protected_prompts(study: Study, config: Config) -> tuple[str, ...]:
    """Fit prompts to be left alone that nobody judges: what is left of the kept and ordinary sets, and the sets to protect. A null
    space of protected states needs hundreds of them, as many as it leaves out dimensions."""
    judged = {p.prompt for name in (config.keep, *config.ordinary) for p in study.prompts("fit", name)}
    texts: list[str] = []
    for name in dict.fromkeys((config.keep, *config.ordinary, *config.protect)):
        found = load_prompts(name)
        own = any(prompt.split == "fit" for prompt in found)  # the conversations have no fit prompts of their own
        part = (found if own else found.unsplit).split("fit").sample(PROTECTED, config.seed)
        study.apart.check("fit", part)
        texts += part.texts
    return tuple(text for text in dict.fromkeys(texts) if text not in judged)


def measure(study: Study, config: Config, reading: Reading, method: Method) -> dict[str, Any]:
    """Everything about one method, as plain data."""

    def compute() -> tuple[dict[str, Any], None]:
        fitted, fit_cost = reading.material.account.charged(lambda: method.fit(reading.material))
        begin = time.perf_counter()
        talks = _talks("select", config.conversations // 2, config.seed)
        chosen = find_strength(
            reading,
            fitted,
            method.strengths,
            talks,
            config.screened,
            method.name,
            target=config.target,
            bound=config.bound,
        )
        treatment = fitted(chosen.best.strength)
        select_seconds = time.perf_counter() - begin
        talks = _talks("report", config.conversations, config.seed)
        own = at_own_best(reading, treatment, method.name, talks, config)
        matched = at_matched_removal(reading, fitted, chosen, method.name, config.judged)
        beside = equal_dose(reading, treatment, method.name, config.screened, config.draws, config.seed)
        return {
            "label": method.label,
            "source": method.source,
            "best": asdict(chosen.best),
            "edge": chosen.edge,
            "select_score": chosen.best.score,
            "trials": [asdict(t) for t in chosen.trials],
            "own_best": own,
            "matched": matched,
            "equal_dose": asdict(beside) if beside is not None else None,
            "cost": {
                "fit_seconds": fit_cost.seconds,
                "fit_prompts": round(fit_cost.prompts),
                "select_seconds": select_seconds,
                "report_seconds": time.perf_counter() - begin - select_seconds,
            },
        }, None

    return study.stage(f"method_{method.name}", _key(study, config, method), compute).data


def _talks(split: Split, n: int, seed: int) -> list[Prompt]:
    """Benign conversations; strengths are chosen on other ones than those that are reported."""
    return list(load_prompts("conversations").unsplit.split(split).sample(n, seed))


def own_checks(study: Study, config: Config, reading: Reading, method: Method, strength: float) -> dict[str, Any]:
    """`checks`: what the method's own paper claims, where the method says how to measure it; `unchecked`: why it could not be."""
    checks = getattr(method, "checks", None)
    if checks is None:
        return {"checks": [], "unchecked": None}

    def compute() -> tuple[dict[str, Any], None]:
        held = examples(study, "report", (config.remove, config.contrast, config.keep, *config.ordinary))
        try:
            found = checks(reading.material, strength, held)
        except UserError as reason:  # too few prompts or candidates: the comparison itself can be made all the same
            return {"checks": [], "unchecked": str(reason)}, None
        return {"checks": [asdict(check) for check in found], "unchecked": None}, None

    key = {**_key(study, config, method), "strength": strength, "measured": "report"}
    stored = study.stage(f"checks_{method.name}", key, compute).data
    return {name: stored[name] for name in ("checks", "unchecked")}


def _key(study: Study, config: Config, method: Method) -> dict[str, Any]:
    """All that a method's results depend on."""
    settings = {k: v for k, v in asdict(config).items() if k not in UNKEYED | {"methods"}}
    sets, splits = (config.remove, config.contrast, config.keep, *config.ordinary, *config.watch), get_args(Split)
    return {
        "method": method,
        "strengths": method.strengths,
        "widened": WIDENED,
        "settings": settings,
        "judge": study.judge,
        "prompts": [study.prompts(split, name) for split in splits for name in sets],
        "protected": protected_prompts(study, config),
        "conversations": load_prompts("conversations"),
    }


def finding(data: Mapping[str, Any]) -> str:
    rows, names = data["methods"], data["names"]
    lead, null = rows[data["leader"]], rows[data["null"]]
    own, random = lead["own_best"], null["own_best"]
    kept_at = {name: row["matched"]["kept"] for name, row in rows.items() if row["matched"]}
    safe = [rows[name]["label"] for name, kept in kept_at.items() if kept["low"] > 0.5]
    matched = (
        f" At matched removal ({data['target']:.0%} on select) {len(kept_at)} methods can be compared; more than half of the "
        f"refused {names['keep']} prompts stay refused, beyond doubt, under {', '.join(safe) if safe else 'none'}."
        if kept_at
        else ""
    )
    edges = sum(row["edge"] for row in rows.values())
    beyond = _beyond(data["beside_null"].get(data["leader"]))
    return (
        f"Of {len(rows)} methods, each at the strength chosen for it on other prompts, {lead['label']} separates the two refusals best: "
        f"{_percent(own['removed'])} of refused {names['remove']} prompts are answered{beyond} and {_percent(own['kept'])} of refused "
        f"{names['keep']} prompts stay refused, KL {interval(own['kl'], 3)} nats per token; under random "
        f"directions {_percent(random['removed'])} and {_percent(random['kept'])}.{matched} All by judged replies; the strength of {edges} methods "
        f"is at the edge of what was tried."
    )


def _percent(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.0%} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f}, n = {rate['n']})"


def _beyond(test: Mapping[str, Any] | None) -> str:
    """How the removal stands among that of rotations of the edit; nothing for a treatment without an edit."""
    if test is None:
        return ""
    one = test["removed"]
    return (
        f" ({one['n_draws']} random rotations of the edit remove {one['null']:.0%}: p = {one['p']:.2g}, the least that so many can give "
        f"{one['least_p']:.2g})"
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.0%} to {max(values):.0%}"


def tables(data: dict[str, Any]) -> list[Table]:
    """One row per method, best on select first."""
    names = data["names"]
    reasons = [f"{METHODS[name].label} is not applicable: {reason}." for name, reason in data["left_out"].items()]
    title = "Every method at its own best strength (report, judged replies)"
    own_best = Table(title=title, caption=" ".join(reasons) or None, caption_justify="left")
    for column in (
        "method",
        "strength",
        "dose",
        "removed",
        "kept",
        "p removed (least)",
        "p kept (least)",
        "KL, nats",
        "perplexity / own answers (n)",
        "log-odds: ROC area",
    ):
        own_best.add_column(column)
    n_draws = max(
        (len(row["equal_dose"]["null_removed"]) for row in data["methods"].values() if row["equal_dose"]), default=0
    )
    beside = Table(
        title=f"Change of refusal rates; at matched removal, and of {n_draws} random rotations of the edit: removed, "
        f"{names['keep']} kept; cost of fitting"
    )
    for column in ("method", *names["watch"], "matched", "kept", "random", "kept", "s", "prompts"):
        beside.add_column(column)
    for name, row in sorted(data["methods"].items(), key=lambda item: -item[1]["select_score"]):
        own, matched, test = row["own_best"], row["matched"], data["beside_null"].get(name)
        null = row["equal_dose"]
        own_best.add_row(
            row["label"],
            f"{row['best']['strength']:.3g}{' (edge)' if row['edge'] else ''}",
            f"{null['dose']:.2g}" if null else "",
            _percent(own["removed"]),
            _percent(own["kept"]),
            *([f"{test[s]['p']:.2g} ({test[s]['least_p']:.2g})" for s in ("removed", "kept")] if test else ["", ""]),
            interval(own["kl"], 3),
            _ratio(own["fluency"]),
            _area(own["read_out"]),
        )
        beside.add_row(
            row["label"],
            *[interval(own["watched"][w]["difference"]) for w in names["watch"]],
            *([_percent(matched[share]) for share in ("removed", "kept")] if matched else ["not reached", ""]),
            *([_range(null[f"null_{share}"]) for share in ("removed", "kept")] if null else ["", ""]),
            f"{row['cost']['fit_seconds']:.0f}",
            str(row["cost"]["fit_prompts"]),
        )
    return [own_best, beside, *_checks(data)]


def _ratio(said: Mapping[str, Any]) -> str:
    """Perplexity of answers beside the unsteered answers to the same prompts."""
    found = said["ratio"]
    return f"{interval(found)} ({found['n']})" if found else f"{said['answered']} answers of {said['n']}"


def _area(check: Mapping[str, Any]) -> str:
    """How well log-odds tell these judged replies apart, and whether that would do."""
    if check["area"] is None:
        return "one verdict"
    return f"{interval(check['area'])}{'' if check['valid'] else ', not valid'}"


def _checks(data: Mapping[str, Any]) -> list[Table]:
    methods = data["methods"].values()
    if not any(row["checks"] or row["unchecked"] for row in methods):
        return []
    table = Table(title="What the methods' own papers claim, on report prompts")
    for column in ("method", "what", "value (95 %)", "n", "without it"):
        table.add_column(column)
    for row in methods:
        for check in row["checks"]:
            table.add_row(
                row["label"], check["what"], interval(check["value"]), str(check["value"]["n"]), check["null"]
            )
        if row["unchecked"]:
            table.add_row(row["label"], f"not measured: {row['unchecked']}", "", "", "")
    return [table]
