"""One method on the report split, at its own best strength (judged replies) and at matched removal (log-odds)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rsteer_interp.methods import Treatment
from rsteer_interp.methods.base import Fitted
from rsteer_interp.nulls import Estimate, Rate, false_discovery
from rsteer_interp.paired import PairedRates
from rsteer_interp.prompts import Prompt
from rsteer_interp.studies.method_comparison.reading import Reading
from rsteer_interp.studies.method_comparison.selection import Chosen
from rsteer_interp.studies.selective_steering.replies import perplexity
from rsteer_interp.studies.study import Study


def refused_prompts(study: Study, name: str, n: int) -> list[str]:
    """Report prompts of a set whose unsteered reply refuses, at most n."""
    base = study.replies("report", name)
    return [text for text, refused in zip(base.texts, base.refused.tolist(), strict=True) if refused][:n]


def at_own_best(
    reading: Reading, treatment: Treatment, label: str, watched: Sequence[str], talks: Sequence[Prompt], n: int
) -> dict[str, Any]:
    """Shares of refused prompts now answered (removed set) and still refused (kept set), change on the watched sets, KL and
    perplexity; `flags` for paired tests between methods."""
    study, material = reading.study, reading.material
    flags: dict[str, list[bool]] = {}
    texts = refused_prompts(study, material.remove, n)
    still, log_prob = reading.judged(texts, treatment, f"{label}: {material.remove}")
    flags["removed"] = (~still).tolist()
    kept, _ = reading.judged(refused_prompts(study, material.keep, n), treatment, f"{label}: {material.keep}")
    flags["kept"] = kept.tolist()
    changes = {}
    for name in watched:
        base = study.replies("report", name, n)
        after, _ = reading.judged(base.texts, treatment, f"{label}: {name}")
        changes[name] = asdict(PairedRates.of(base.refused.tolist(), after.tolist()))
    effects = reading.effects(talks, treatment)
    return {
        "removed": asdict(Rate.of(flags["removed"])),
        "kept": asdict(Rate.of(flags["kept"])),
        "watched": changes,
        "kl": asdict(Estimate.of(effects.kl.tolist())),
        "answer_shift": asdict(Estimate.of(effects.shift.tolist())),
        "perplexity": asdict(perplexity(log_prob)),
        "flags": flags,
    }


def at_matched_removal(reading: Reading, fitted: Fitted, chosen: Chosen, n: int) -> dict[str, Any] | None:
    """The same two shares by log-odds at the interpolated strength; None for a method that cannot be matched."""
    if chosen.matched is None:
        return None
    treatment, material = fitted(chosen.matched), reading.material
    still: Mapping[str, Bool[Tensor, " prompt"]] = {
        name: reading.refused(name, refused_prompts(reading.study, name, n), treatment)
        for name in (material.remove, material.keep)
    }
    return {
        "strength": chosen.matched,
        "removed": asdict(Rate.of((~still[material.remove]).tolist())),
        "kept": asdict(Rate.of(still[material.keep].tolist())),
        "flags": {"kept": still[material.keep].tolist()},
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
