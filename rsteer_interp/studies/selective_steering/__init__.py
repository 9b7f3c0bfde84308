"""Study: remove one kind of refusal and keep the others, and induce refusal of one subject only, by an edit with a condition."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate
from rsteer_interp.steering import Steering
from rsteer_interp.studies.reader_checks import checks_table
from rsteer_interp.studies.selective_steering.condition import find_condition
from rsteer_interp.studies.selective_steering.directions import LABELS, Directions, families
from rsteer_interp.studies.selective_steering.frontier import frontier
from rsteer_interp.studies.selective_steering.report_split import (
    evaluate,
    induction_targets,
    removal_targets,
)
from rsteer_interp.studies.selective_steering.search import (
    SCREENED,
    Candidate,
    Found,
    best_bands,
    norms,
    search,
    steering_for,
)
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.steer import Config

KIND = "steer"
QUESTION = "Can political refusal be removed while safety refusal stays, and refusal of one subject be induced?"
INDUCED_AIM = 0.95
UNGATED_N = 32  # report prompts per set for the comparison without a condition


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if len(config.keep) < 2 or not config.doses or min(config.doses) <= 0:
        raise UserError(
            "--keep needs the set whose refusals are kept and one or more ordinary sets; --doses positive numbers"
        )
    study.check_applicable()
    if not study.replies("report", config.keep[0]).refused.any():
        raise NotApplicable(f"not applicable: no report prompt of '{config.keep[0]}' is refused")
    vectors, references = families(study, config)
    fit = study.scored("fit", config.remove, config.contrast)
    unit = norms(study, [fit.texts[i] for i in fit.refusing])
    removal = _remove(study, config, vectors["md"], references, unit)
    induction = _induce(study, config, vectors["md"], references, unit)
    gate, chosen = removal.pop("gate"), removal.pop("steering")
    layers = tuple(removal["chosen"]["layers"])
    bare = Steering(**{**vars(chosen), "gate": None, "method": "md, no condition"})
    data = {
        "remove": removal,
        "ungated": evaluate(
            study, config, "ungated", bare, (config.remove, config.keep[0], *config.keep[-2:]), UNGATED_N
        ),
        "induce": induction,
        "frontier": frontier(study, config, vectors, references, unit, layers, gate),
        "labels": LABELS | {"gated": "MD with a condition", "random": "random directions"},
        "refusal_tokens": [study.backend.tokenizer.decode([t]) for t in study.refusal_tokens],
        "names": {
            "remove": config.remove,
            "contrast": config.contrast,
            "keep": list(config.keep),
            "induce": config.induce,
        },
    }
    return {**data, "finding": finding(data)}, None


def _remove(
    study: Study, config: Config, directions: Directions, references: Directions, unit: dict[Site, float]
) -> dict[str, Any]:
    gate, condition = find_condition(study, config.remove, config.keep, (config.contrast, *config.watch, config.induce))
    select = study.scored("select", config.remove)
    texts = [select.texts[i] for i in select.refusing[:SCREENED]]
    middle = sorted(config.doses)[len(config.doses) // 2]
    kept_bands, ranking = best_bands(study, "2_bands_remove", directions, unit, texts, gate.site.layer, -middle)

    def steering_of(candidate: Candidate) -> Steering:
        return steering_for(study, "md, gated", directions, references, unit, candidate, -1.0, gate)

    places = [*((band, False) for band in kept_bands), (kept_bands[0], True)]
    searched = search(
        study, config, "3_search_remove", steering_of, config.remove, places, lambda r: r.rate <= config.aim
    )
    steering = steering_of(searched.chosen)
    steering.save(config.out / "steering" / "remove", study.provenance(), {"judge": study.judge.name})
    sets = (config.remove, config.contrast, *config.keep, *config.watch, config.induce)
    found = evaluate(study, config, "remove", steering, tuple(dict.fromkeys(sets)))
    return {
        "gate": gate,
        "steering": steering,
        "condition": condition,
        "bands": ranking,
        **_plain(searched, steering, study, config.remove),
        "report": found,
        "targets": removal_targets(config, found),
    }


def _induce(
    study: Study, config: Config, directions: Directions, references: Directions, unit: dict[Site, float]
) -> dict[str, Any]:
    others = tuple(dict.fromkeys((*config.keep, config.remove, config.contrast, *config.watch)))
    gate, condition = find_condition(study, config.induce, others, ())
    texts = study.scored("select", config.induce).texts[:SCREENED]
    middle = sorted(config.doses)[len(config.doses) // 2]
    kept_bands, ranking = best_bands(study, "2_bands_induce", directions, unit, texts, gate.site.layer, middle)

    def steering_of(candidate: Candidate) -> Steering:
        return steering_for(study, "md, gated, induced", directions, references, unit, candidate, 1.0, gate)

    searched = search(
        study,
        config,
        "3_search_induce",
        steering_of,
        config.induce,
        [(kept_bands[0], decoding) for decoding in (False, True)],
        lambda r: r.rate >= INDUCED_AIM,
        refusing=True,
    )
    steering = steering_of(searched.chosen)
    steering.save(config.out / "steering" / "induce", study.provenance(), {"judge": study.judge.name})
    found = evaluate(study, config, "induce", steering, (config.induce, *others))
    return {
        "condition": condition,
        "bands": ranking,
        **_plain(searched, steering, study, config.induce),
        "report": found,
        "targets": induction_targets(config.induce, found),
    }


def _plain(found: Found, steering: Steering, study: Study, name: str) -> dict[str, Any]:
    gate: Gate | None = steering.gate
    assert gate is not None
    states = study.states("select", name)
    return {
        "trials": [asdict(trial) for trial in found.trials],
        "aim_met_on_select": found.met,
        "chosen": asdict(found.chosen)
        | {
            "edge": found.edge,
            "relative_dose": steering.dose({s: states[s] for s in steering.sites}),
            "gate_layer": gate.site.layer,
        },
    }


def finding(data: dict[str, Any]) -> str:
    names, sets = data["names"], data["remove"]["report"]["sets"]
    removed, kept = sets[names["remove"]], sets[names["keep"][0]]
    bare = data["ungated"]["sets"]
    frontier_random = [p["removed"]["rate"] for p in data["frontier"]["points"] if p["null"]]
    induced = data["induce"]["report"]["sets"][names["induce"]]
    missed = [t["name"] for part in ("remove", "induce") for t in data[part]["targets"] if not t["met"]]
    return (
        f"With a condition (ROC area {interval(data['remove']['condition']['roc']['area'], 3)} on report), refusal of {names['remove']} "
        f"falls from {percent(removed['before'])} to {percent(removed['after'])}, and {percent(kept['stay_refused'])} of the "
        f"refused {names['keep'][0]} prompts stay refused; the same edit without it leaves {percent(bare[names['keep'][0]]['stay_refused'])} of "
        f"them. KL on benign conversations {interval(data['remove']['report']['kl'], 4)} nats per token; random directions of the "
        f"largest dose remove {min(frontier_random):.0%} to {max(frontier_random):.0%} ({len(frontier_random)} draws, judged). Induced: "
        f"refusal of {names['induce']} from {percent(induced['before'])} to {percent(induced['after'])}. "
        + ("All targets are met." if not missed else f"Missed: {'; '.join(missed)}.")
    )


def percent(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return "none"
    return f"{rate['rate']:.0%} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f}, n = {rate['n']})"


def tables(data: dict[str, Any]) -> list[Table]:
    """Refusal by set, before and after, for removal and induction; and the targets."""
    out = []
    for part, title in (
        ("remove", f"Removing refusal of {data['names']['remove']}"),
        ("induce", f"Inducing refusal of {data['names']['induce']}"),
    ):
        chosen = data[part]["chosen"]
        table = Table(
            title=f"{title}: layers {chosen['layers']}, dose {chosen['dose']:g}{' (edge)' if chosen['edge'] else ''}, condition at "
            f"layer {chosen['gate_layer']}"
        )
        for column in ("set", "n", "refused before", "after", "difference", "McNemar p", "edited"):
            table.add_column(column)
        for name, row in data[part]["report"]["sets"].items():
            table.add_row(
                name,
                str(row["before"]["n"]),
                interval(row["before"]),
                interval(row["after"]),
                interval(row["difference"]),
                f"{row['p']:.2g}",
                interval(row["edited"]),
            )
        targets = Table(title="Targets, report split")
        for column in ("", "value", "bound", "n", "met"):
            targets.add_column(column)
        for t in data[part]["targets"]:
            targets.add_row(
                t["name"], interval(t), f"{t['relation']} {t['bound']:g}", str(t["n"]), "yes" if t["met"] else "no"
            )
        out += [table, targets]
    return [*out, checks_table(data["frontier"]["read_out"])]
