"""What the page says in sentences and rows of its own: findings, limits, records."""

from __future__ import annotations

from typing import Any

from rsteer_interp.provenance import Provenance, json_text
from rsteer_interp.report.collection import Collection, FoundStudy
from rsteer_interp.report.schema import HARMFUL, POLITICAL, Rate, Reproduction


def finding(data: Reproduction) -> str:
    """The reproduction's result in one sentence, with intervals."""
    base, best = data.base, data.headline
    if not data.applicable:
        reason = (data.reason or "not applicable").strip().rstrip(".")
        return f"{reason[:1].upper()}{reason[1:]}."
    if base is None or best is None or POLITICAL not in base.rates:
        return "The table has no steered row, so nothing can be said yet."
    words = f"{best.label} takes political refusal {_from_to(base.rates[POLITICAL], best.rates[POLITICAL])}"
    if HARMFUL in base.rates and HARMFUL in best.rates:
        before, after = base.rates[HARMFUL], best.rates[HARMFUL]
        apart = after.high < before.low or after.low > before.high
        words += f"; refusal of harmful requests goes {_from_to(before, after)}"
        words += ", intervals apart" if apart else ", intervals overlap"
    return f"{words}."


def lead(found: Collection) -> str:
    """The page's first sentence."""
    if found.reproduction is not None:
        return finding(found.reproduction.data)
    answered, all_ = sum(s.data.applicable for s in found.studies), len(found.studies)
    studies = f"{all_} {'study' if all_ == 1 else 'studies'} of how this model refuses"
    without = "" if answered == all_ else f", {all_ - answered} of which cannot be asked of it"
    return f"{studies}{without}. The paper's experiment has not been run on it."


def percent(value: float) -> str:
    return f"{value:.0f}\N{NO-BREAK SPACE}%"


def _from_to(before: Rate, after: Rate) -> str:
    def shown(rate: Rate) -> str:
        return f"{percent(100 * rate.rate)} ({100 * rate.low:.0f} to {100 * rate.high:.0f})"

    subjects = f" prompts on {after.units} subjects" if after.units and after.units < after.n else ""
    return f"from {shown(before)} to {shown(after)} of {after.n}{subjects}"


def reproduction_record(provenance: Provenance, data: Reproduction) -> list[tuple[str, str]]:
    """Rows of the provenance table."""
    return _record(provenance, {"model": data.model.name, "weights": data.model.source}, data.seconds, {})


def study_record(study: FoundStudy) -> list[tuple[str, str]]:
    """The same rows of a study, with its numbers of prompts."""
    return _record(study.provenance, {"model": study.data.model.name}, study.data.seconds, study.counts)


def _record(
    provenance: Provenance, model: dict[str, str], seconds: dict[str, float], counts: dict[str, int]
) -> list[tuple[str, str]]:
    times = {name: f"{value:.1f} s" for name, value in seconds.items()}
    machine = [provenance.device, provenance.dtype, provenance.attention]
    config = json_text(provenance.config, "config", indent=None, sort_keys=True) if provenance.config else ""
    rows = [
        ("n", _pairs(counts)),
        ("model", provenance.model_name or model.get("model", "")),
        ("weights from", provenance.model_source or model.get("weights", "")),
        ("fingerprint", provenance.model_fingerprint or ""),
        ("backend", provenance.backend or ""),
        ("device, dtype, attention", ", ".join(filter(None, machine))),
        ("command", provenance.command),
        ("created", provenance.created),
        ("seeds", ", ".join(map(str, provenance.seeds))),
        ("configuration", config),
        ("chat template", provenance.template or ""),
        ("prompt sets", _pairs(provenance.prompt_sets)),
        ("made from", _pairs(provenance.inputs)),
        ("packages", _pairs(provenance.packages)),
        ("platform", provenance.platform),
        ("time by stage", _pairs(times)),
        ("notes", "; ".join(provenance.notes)),
    ]
    return [(name, value) for name, value in rows if value]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def limits(data: Reproduction | None) -> list[str]:
    """What the page's numbers do not show."""
    weights = "The weights named above were measured; another quantisation of the same model gives slightly different numbers."
    judged = "Whether a reply refuses is one judge's verdict on one greedy reply."
    if data is None:
        return ["One model and prompts of this project.", weights, judged]
    if not data.applicable:
        return [weights]
    out = [
        "One model and prompts of this project; the paper's rates are of 4B and 80B models on other prompts. Only the "
        "direction of the effects can be compared, not the rates.",
        weights,
        "Configurations were chosen on other prompts (select split) than those reported, but the directions of all "
        "layers come from one sample of prompts; the table of directions says how much of them is its noise and its topics.",
        "Correlation by layer says where refusal can be read, not where it is caused.",
        "Refused and answered prompts differ in topic between the sets and between the subjects inside a set; the comparisons "
        "within subjects are the fair ones.",
        judged,
    ]
    for row in data.steered:
        if data.silent(row):
            change = f", and ordinary answers change by a KL of {row.kl.value:.2f} nats per token" if row.kl else ""
            out.insert(1, (
                f"Under {row.label} no prompt of any set is refused{change}: that row may be of a model that is broken, not of one "
                "that tells refusals apart."
            ))  # fmt: skip
    base = data.base
    if base is not None and HARMFUL in base.rates and base.rates[HARMFUL].low < 0.5:
        rate = base.rates[HARMFUL]
        out.insert(1, (
            f"This model refuses only {percent(100 * rate.rate)} of the harmful requests before any steering, so no claim "
            "that safety is preserved may rest on that column alone."
        ))  # fmt: skip
    return out
