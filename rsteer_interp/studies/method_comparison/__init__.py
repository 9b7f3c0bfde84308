"""The related methods under one protocol; `analyses/compare_methods.py` is its command line.

Every method is one stage: fitted on fit, its strength chosen on select, measured on report. A method that is done is not done
again, and a new one is added without touching the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rsteer_interp.errors import UserError
from rsteer_interp.methods import METHODS, Examples, Material, Method
from rsteer_interp.prompts import PromptSet, load_prompts
from rsteer_interp.studies.method_comparison.equal_dose import equal_dose
from rsteer_interp.studies.method_comparison.outcomes import (
    against,
    at_matched_removal,
    at_own_best,
    base_answer_perplexity,
)
from rsteer_interp.studies.method_comparison.reading import Reading
from rsteer_interp.studies.method_comparison.selection import choose, judged_score, try_strengths
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.compare_methods import Config

KIND = "compare_methods"
QUESTION = "Which method removes political refusal at the least cost in safety, over-refusal and ordinary answers?"
NULL = "random"  # the method whose directions are random: what any push of that dose does
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
    reading = Reading(study, material_of(study, config))
    rows = {name: measure(study, config, reading, METHODS[name]()) for name in names}
    leader = max(rows, key=lambda name: rows[name]["select_score"])
    data = {
        "methods": rows,
        "null": NULL,
        "leader": leader,
        "against_null": against({n: r["own_best"] for n, r in rows.items()}, NULL),
        "against_leader": against({n: r["own_best"] for n, r in rows.items()}, leader),
        "base_rates": study.rates("report", config.remove, config.contrast, config.keep, *config.watch),
        "base_answer_perplexity": asdict(base_answer_perplexity(study, config.remove, config.contrast)),
        "n": {name: len(texts) for name, texts in reading.refused_prompts("report", config.judged).items()},
        "target": config.target,
        "names": {"remove": config.remove, "keep": config.keep, "watch": list(config.watch)},
    }
    return {**data, "finding": finding(data)}, None


def material_of(study: Study, config: Config) -> Material:
    """The fit and select splits as methods see them."""

    def examples(split: Any, name: str) -> Examples:
        scored = study.scored(split, name)
        return Examples(scored.texts, scored.confidence, study.states(split, name))

    sets = (config.remove, config.contrast, config.keep, *config.ordinary)
    return Material(
        study.backend,
        study.template,
        study.refusal_tokens,
        {name: examples("fit", name) for name in sets},
        {name: examples("select", name) for name in sets},
        config.remove,
        config.contrast,
        config.keep,
        config.ordinary,
        config.seed,
    )


def conversations(split: Any, n: int, seed: int) -> PromptSet:
    """Benign conversations; strengths are chosen on other ones than those that are reported."""
    loaded = load_prompts("conversations")
    free = PromptSet(loaded.name, tuple(p.model_copy(update={"split": None}) for p in loaded))
    return free.split(split).sample(n, seed)


def measure(study: Study, config: Config, reading: Reading, method: Method) -> dict[str, Any]:
    """Everything about one method, as plain data."""

    def compute() -> tuple[dict[str, Any], None]:
        fitted, fit_cost = reading.material.account.charged(lambda: method.fit(reading.material))
        begin = time.perf_counter()
        talks = list(conversations("select", config.conversations // 2, config.seed))
        trials = try_strengths(reading, fitted, method.strengths, talks, config.screened)
        chosen = choose(trials, target=config.target, bound=config.bound)
        treatment = fitted(chosen.best.strength)
        score = judged_score(reading, treatment, method.name, config.screened)
        select_seconds = time.perf_counter() - begin
        talks = list(conversations("report", config.conversations, config.seed))
        own = at_own_best(reading, treatment, method.name, talks, config)
        matched = at_matched_removal(reading, fitted, chosen, config.judged)
        beside = equal_dose(reading, treatment, config.screened, config.draws, config.seed)
        return {
            "label": method.label,
            "source": method.source,
            "best": asdict(chosen.best),
            "select_score": score,
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

    settings = {k: v for k, v in asdict(config).items() if k not in _NOT_OF_A_METHOD}
    key = {"method": method.name, "fields": repr(method), "strengths": method.strengths, "settings": settings}
    sets = (config.remove, config.contrast, config.keep, *config.ordinary, *config.watch)
    key["prompts"] = [p.prompt for s in ("fit", "select", "report") for name in sets for p in study.prompts(s, name)]  # type: ignore[arg-type]
    return study.stage(f"method_{method.name}", key, compute).data


_NOT_OF_A_METHOD = ("methods", "out", "scores", "batch_size", "device_map")


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
    test = data["against_null"].get(data["leader"])
    beyond = f" (q = {test['removed']['q']:.2g} against random directions)" if test else ""
    return (
        f"Of {len(rows)} methods, each at the strength chosen for it on other prompts, {lead['label']} separates the two refusals best: "
        f"{_percent(own['removed'])} of refused {names['remove']} prompts are answered{beyond} and {_percent(own['kept'])} of refused "
        f"{names['keep']} prompts stay refused, KL {interval(own['kl'], 3)} nats per token; under random "
        f"directions {_percent(random['removed'])} and {_percent(random['kept'])}.{matched}"
    )


def _percent(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.0%} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f}, n = {rate['n']})"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.0%} to {max(values):.0%}"


def tables(data: dict[str, Any]) -> list[Table]:
    """One row per method, best on select first."""
    names = data["names"]
    table = Table(title=f"Own best strength (report, judged), and {names['keep']} kept at matched removal (log-odds)")
    watched = [f"{name}, change" for name in names["watch"]]
    columns = (
        "method",
        "strength",
        "dose",
        "removed",
        "kept",
        "q removed",
        "q kept",
        *watched,
        "KL",
        "perplexity / base",
    )
    for column in (*columns, "matched: removed", "kept", "random, equal dose: removed", "kept", "fit s", "fit prompts"):
        table.add_column(column)
    base = data["base_answer_perplexity"]["value"]
    for name, row in sorted(data["methods"].items(), key=lambda item: -item[1]["select_score"]):
        own, matched, test = row["own_best"], row["matched"], data["against_null"].get(name)
        beside = row["equal_dose"]
        table.add_row(
            row["label"],
            f"{row['best']['strength']:g}",
            f"{beside['dose']:.2g}" if beside else "",
            _percent(own["removed"]),
            _percent(own["kept"]),
            *([f"{test[s]['q']:.2g}" for s in ("removed", "kept")] if test else ["", ""]),
            *[interval(own["watched"][w]["difference"]) for w in names["watch"]],
            interval(own["kl"], 3),
            f"{own['perplexity']['value'] / base:.2f}",
            *([_percent(matched["removed"]), _percent(matched["kept"])] if matched else ["not reached", ""]),
            *([_range(beside["null_removed"]), _range(beside["null_kept"])] if beside else ["", ""]),
            f"{row['cost']['fit_seconds']:.0f}",
            str(row["cost"]["fit_prompts"]),
        )
    return [table]
