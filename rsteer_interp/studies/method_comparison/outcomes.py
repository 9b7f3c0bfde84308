"""One method on the report split, at its own best strength (judged replies) and at matched removal (log-odds)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from rsteer_interp.methods import Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.nulls import false_discovery
from rsteer_interp.prompts import Prompt
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.studies.method_comparison.reading import Reading
from rsteer_interp.studies.method_comparison.selection import Chosen
from rsteer_interp.studies.selective_steering.replies import perplexity, reply_log_probs
from rsteer_interp.studies.study import Study

if TYPE_CHECKING:
    from analyses.compare_methods import Config


def at_own_best(
    reading: Reading, treatment: Treatment, label: str, talks: Sequence[Prompt], config: Config
) -> dict[str, Any]:
    """Shares of refused prompts now answered (removed set) and still refused (kept set), change on the watched sets, KL and
    perplexity; `flags` for paired tests between methods."""
    study, material = reading.study, reading.material
    base = {name: study.replies("report", name, config.watched) for name in config.watch}
    refused = reading.refused_prompts("report", config.judged)
    asked = {"removed": refused[material.remove], "kept": refused[material.keep]}
    replies = reading.replies({**asked, **{name: b.texts for name, b in base.items()}}, treatment, label)
    still = {name: [reply.verdict.refused for reply in found] for name, found in replies.items()}
    flags = {"removed": [not refused for refused in still["removed"]], "kept": still["kept"]}
    log_prob = reply_log_probs(study, asked["removed"], [reply.text for reply in replies["removed"]])
    effects = reading.effects_of_each(talks, [treatment])[0]
    return {
        "removed": asdict(Rate.of(flags["removed"])),
        "kept": asdict(Rate.of(flags["kept"])),
        "watched": {name: asdict(PairedRates.of(b.refused.tolist(), still[name])) for name, b in base.items()},
        "kl": asdict(Estimate.of(effects.kl.tolist())),
        "answer_shift": asdict(Estimate.of(effects.shift.tolist())),
        "perplexity": asdict(perplexity(log_prob)),
        "flags": flags,
    }


def at_matched_removal(reading: Reading, fitted: Fitted, chosen: Chosen, n: int) -> dict[str, Any] | None:
    """The same two shares by log-odds at the interpolated strength; None for a method that cannot be matched."""
    if chosen.matched is None:
        return None
    answered, refused = reading.outcomes("report", [fitted(chosen.matched)], n)[0]
    return {
        "strength": chosen.matched,
        "removed": asdict(Rate.of(answered.tolist())),
        "kept": asdict(Rate.of(refused.tolist())),
        "flags": {"kept": refused.tolist()},
    }


def against(rows: Mapping[str, Mapping[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Every other method against the reference on the same prompts: difference of the share kept and of the share removed,
    McNemar's p, and q over all these tests (Benjamini and Hochberg)."""
    others = [name for name in rows if name != reference]
    found: dict[str, dict[str, Any]] = {name: {} for name in others}
    for share in ("removed", "kept"):
        for name in others:
            paired = PairedRates.of(rows[reference]["flags"][share], rows[name]["flags"][share])
            found[name][share] = {"difference": asdict(paired.difference), "p": paired.p}
    tests = [found[name][share] for share in ("removed", "kept") for name in others]
    for test, q in zip(tests, false_discovery([t["p"] for t in tests]) if tests else (), strict=True):
        test["q"] = q
    return found


def base_answer_perplexity(study: Study, *sets: str) -> Estimate:
    """Perplexity of the unsteered replies that answer, of report prompts: what an ordinary answer costs."""
    replies = [study.replies("report", name) for name in sets]
    return perplexity(torch.cat([r.log_prob[~r.refused] for r in replies]))
