"""One method on the report split, at its own best strength and at matched removal, by judged replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from rsteer_interp.evaluation import reply_log_probs
from rsteer_interp.measures import Fluency, fluency
from rsteer_interp.methods import Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.nulls import false_discovery
from rsteer_interp.prompts import Prompt
from rsteer_interp.reader import validation_of
from rsteer_interp.refusal_scores import Reply
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.studies.method_comparison.reading import Reading
from rsteer_interp.studies.method_comparison.selection import Chosen
from rsteer_interp.studies.study import BaseReplies

if TYPE_CHECKING:
    from analyses.compare_methods import Config


def at_own_best(
    reading: Reading, treatment: Treatment, label: str, talks: Sequence[Prompt], config: Config
) -> dict[str, Any]:
    """Shares of refused prompts now answered (removed set) and still refused (kept set), change on the watched sets, KL, fluency
    of answers where the treatment acts, and how well log-odds would have read all these replies; `flags` for paired tests."""
    study, material = reading.study, reading.material
    refused, own = reading.refused_prompts("report", config.judged), study.replies("report", material.remove)
    watched = {name: study.replies("report", name, config.watched) for name in config.watch}
    asked = {
        "removed": refused[material.remove],
        "kept": refused[material.keep],
        "answered": own.where(~own.refused, config.watched),
        **{f"watched {name}": base for name, base in watched.items()},
    }
    (replies,) = reading.replies_of_each(asked, [treatment], label)
    still = {name: [reply.verdict.refused for reply in found] for name, found in replies.items()}
    flags = {"removed": [reply.answers for reply in replies["removed"]], "kept": still["kept"]}
    effects = reading.effects_of_each(talks, [treatment])[0]
    every = [reply for found in replies.values() for reply in found]
    of_set = {"answered": "removed"}  # both are of one set, and share subjects
    subjects = [f"{of_set.get(name, name)} {s}" for name, base in asked.items() for s in base.subjects]
    return {
        **{name: asdict(Rate.of(flags[name], clusters=asked[name].subjects)) for name in flags},
        "watched": {
            name: asdict(PairedRates.of(b.refused.tolist(), still[f"watched {name}"], clusters=b.subjects))
            for name, b in watched.items()
        },
        "kl": asdict(Estimate.of(effects.kl.tolist(), clusters=[talk.subject for talk in talks])),
        "answer_shift": asdict(Estimate.of(effects.shift.tolist(), clusters=[talk.subject for talk in talks])),
        "fluency": asdict(_fluency(reading, asked["answered"], replies["answered"])),
        "empty": sum(reply.empty for reply in every),
        "read_out": validation_of(label, every, subjects).data(),
        "flags": flags,
        "subjects": {name: asked[name].subjects for name in flags},
    }


def _fluency(reading: Reading, base: BaseReplies, replies: Sequence[Reply]) -> Fluency:
    """Of the replies to prompts of the removed set that the unsteered model answers: there both can be compared, and the edit acts."""
    rows = reading.study.template.encode_all(base.texts)
    log_probs = reply_log_probs(reading.study.backend, rows, [() if r.empty else r.ids for r in replies])
    refused = torch.tensor([r.verdict.refused for r in replies], dtype=torch.bool)
    return fluency(log_probs, refused, base.log_prob, base.refused, base.subjects)


def at_matched_removal(reading: Reading, fitted: Fitted, chosen: Chosen, label: str, n: int) -> dict[str, Any] | None:
    """The same two shares at the interpolated strength; None for a method that cannot be matched."""
    if chosen.matched is None:
        return None
    asked, m = reading.refused_prompts("report", n), reading.material
    (found,) = reading.replies_of_each(asked, [fitted(chosen.matched)], f"{label}: matched")
    answered = [reply.answers for reply in found[m.remove]]
    refused = [reply.verdict.refused for reply in found[m.keep]]
    return {
        "strength": chosen.matched,
        "removed": asdict(Rate.of(answered, clusters=asked[m.remove].subjects)),
        "kept": asdict(Rate.of(refused, clusters=asked[m.keep].subjects)),
        "flags": {"kept": refused},
    }


def against(rows: Mapping[str, Mapping[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Every other method against the reference on the same prompts: difference of the share kept and of the share removed, p
    with both swapped over whole subjects, and q over all these tests (Benjamini and Hochberg)."""
    others = [name for name in rows if name != reference]
    found: dict[str, dict[str, Any]] = {name: {} for name in others}
    for share in ("removed", "kept"):
        for name in others:
            flags = (rows[reference]["flags"][share], rows[name]["flags"][share])
            paired = PairedRates.of(*flags, clusters=rows[reference]["subjects"][share])
            found[name][share] = {"difference": asdict(paired.difference), "p": paired.p}
    tests = [found[name][share] for share in ("removed", "kept") for name in others]
    for test, q in zip(tests, false_discovery([t["p"] for t in tests]) if tests else (), strict=True):
        test["q"] = q
    return found


def beside_null(rows: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Every method's edit beside the rotations of it (`EqualDose`, as plain values): the two shares, their null's mean, two-sided p,
    the least that so many draws can give, and q over all these tests. A single random direction would be one draw of the null."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if row is not None:
            found[name] = {}
            for share in ("removed", "kept"):
                one = Beside.of(row[share], row[f"null_{share}"])
                found[name][share] = {
                    "value": one.value,
                    "null": fmean(one.draws),
                    "p": one.p(),
                    "least_p": one.least_p,
                    "n_draws": len(one.draws),
                }
    tests = [test for shares in found.values() for test in shares.values()]
    for test, q in zip(tests, false_discovery([t["p"] for t in tests]) if tests else (), strict=True):
        test["q"] = q
    return found
