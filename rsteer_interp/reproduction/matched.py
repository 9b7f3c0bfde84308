"""Step 3, what the update does to safety: addition and reposition of every method, compared where they remove alike.

The methods' own choices differ in update, k and removal at once, so that their harmful refusals cannot say which of these matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.finder import UPDATES, refused, steering_for
from rsteer_interp.reproduction.presets import HARMFUL
from rsteer_interp.reproduction.vectors import Vectors
from rsteer_interp.selection import Setting
from rsteer_interp.statistics.paired import PairedRates


def at_matched_removal(
    context: Context,
    vectors: Mapping[str, Vectors],
    found: Mapping[str, dict[str, Any]],
    tokens: tuple[int, ...],
    target: float,
) -> list[dict[str, Any]]:
    """Per method and update, the setting whose judged removal is nearest the target, with harmful select prompts refused before and
    under it: greedy replies, judged, intervals over subjects."""
    prompts = context.prompts("select", {HARMFUL: context.preset.harmful})
    chosen = [(m, nearest(found[m]["trials"], update, target)) for m in vectors for update in UPDATES]

    def compute() -> tuple[dict[str, Any], None]:
        steerings = [steering_for(context, vectors[m], Setting(**trial["setting"]), tokens) for m, trial in chosen]
        edits = [None, *(steering.edit() for steering in steerings)]
        base, *flags = refused(context, prompts, edits, "harmful prompts at matched removal")
        subjects = [prompt.subject for prompt in prompts]
        rows = [
            {"method": m, **trial, "harmful": asdict(PairedRates.of(base, after, clusters=subjects))}
            for (m, trial), after in zip(chosen, flags, strict=True)
        ]
        return {"rows": rows}, None

    key = {"chosen": chosen, "vectors": vectors, "tokens": tokens}
    rows: list[dict[str, Any]] = context.stage("3_finder_matched", key, compute).data["rows"]
    return rows


def nearest(trials: list[dict[str, Any]], reposition: bool, target: float) -> dict[str, Any]:
    """The trial of this update, judged on all prompts, that removes what is nearest the target."""
    complete = [t for t in trials if t["complete"] and t["setting"]["reposition"] == reposition]
    return min(complete, key=lambda t: abs(t["removal"]["value"] - target))
