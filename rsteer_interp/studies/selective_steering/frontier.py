"""What each family of directions costs in safety for what it removes, without a condition and with one, on report prompts.

Read-out: first-token refusal log-odds above a threshold, set on the unsteered select replies of each kind of prompt. Nothing
is chosen here: every point is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.gates import Gate, balanced_threshold
from rsteer_interp.interventions import AtPositions, add, set_component
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.statistics.rotation import rotations
from rsteer_interp.studies.selective_steering.condition import holds
from rsteer_interp.studies.selective_steering.directions import PAPER, Directions
from rsteer_interp.studies.selective_steering.search import digest
from rsteer_interp.studies.study import Study

if TYPE_CHECKING:
    from analyses.steer import Config

OWN = frozenset({"instruction", "suffix", "generated"})  # the positions that a gated edit touches
RANDOM = 5  # rotations of the mean differences, all layers by the same one
REPOSITION_DOSES = (0.0, 0.04)


def frontier(
    study: Study,
    config: Config,
    families: Mapping[str, Directions],
    references: Directions,
    unit: Mapping[Site, float],
    layers: tuple[int, ...],
    gate: Gate,
) -> dict[str, Any]:
    """Per family, dose and update: refused prompts of the removed set that are read as answered, and refused prompts of the kept
    set that are still read as refused."""
    backend, tokens, sites = study.backend, study.refusal_tokens, [Site(x) for x in layers]
    kept = config.keep[0]
    names = (config.remove, kept)
    chosen = {name: _refused(study, "report", name)[: config.frontier] for name in names}
    texts = {name: [study.replies("report", name).texts[i] for i in rows] for name, rows in chosen.items()}
    edits: list[tuple[dict[str, Any], Edit]] = []

    def added(vectors: Directions, dose: float) -> Edit:
        return add({s: vectors[s] for s in sites}, {s: -dose * unit[s] for s in sites})

    for family, vectors in families.items():
        edits += [(_label(family, "addition", dose), added(vectors, dose)) for dose in config.doses]
        if family in PAPER:
            edits += [
                (
                    _label(family, "reposition", dose),
                    set_component(
                        {s: vectors[s] for s in sites},
                        {s: references[s] for s in sites},
                        {s: -dose * unit[s] for s in sites},
                    ),
                )
                for dose in REPOSITION_DOSES
            ]
    edits += [
        (_label("gated", "addition", dose), AtPositions(added(families["md"], dose), OWN)) for dose in config.doses
    ]
    edits += [
        (_label("random", "addition", max(config.doses)), added(turned, max(config.doses)))
        for turned in rotations({s: families["md"][s] for s in sites}, RANDOM, config.seed)
    ]

    def compute() -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        encoded = {name: study.template.encode_all(texts[name]) for name in names}
        prepared = {name: backend.prepare(rows, layers[0]) for name, rows in encoded.items()}
        every = [None, *(edit for _, edit in edits)]
        with progress("frontier", sum(map(len, encoded.values()))) as advance:
            odds = [log_odds_of_each(backend, prepared[name], tokens, every, advance) for name in names]
        return {}, {"log_odds": torch.cat(odds, 1)}

    key = {
        "prompts": texts,
        "tokens": tokens,
        "layers": layers,
        "points": [label for label, _ in edits],
        "unit": [unit[s] for s in sites],
        "vectors": {name: digest({s: v[s] for s in sites}) for name, v in families.items()},
        "references": digest({s: references[s] for s in sites}),
        "seed": config.seed,
    }
    odds = study.stage("4_frontier", key, compute).tensors["log_odds"]
    n = len(chosen[config.remove])
    held = {name: holds(study, gate, "report", name)[chosen[name]] for name in names}
    cuts = {name: _threshold(study, config, name) for name in names}
    points = []
    for (label, _), row in zip(edits, odds[1:], strict=True):
        values = {config.remove: row[:n], kept: row[n:]}
        if label["family"] == "gated":  # rows for which the condition does not hold are not edited
            values = {
                name: torch.where(held[name], values[name], base)
                for name, base in zip(names, (odds[0][:n], odds[0][n:]), strict=True)
            }
        still = {name: v > cuts[name] for name, v in values.items()}
        points.append(
            label
            | {
                "removed": asdict(Rate.of((~still[config.remove]).tolist())),
                "kept": asdict(Rate.of(still[kept].tolist())),
                "null": label["family"] == "random",
            }
        )
    base = {
        "removed": asdict(Rate.of((odds[0][:n] <= cuts[config.remove]).tolist())),
        "kept": asdict(Rate.of((odds[0][n:] > cuts[kept]).tolist())),
    }
    return {
        "points": points,
        "base": base,
        "layers": list(layers),
        "thresholds": cuts,
        "remove": config.remove,
        "kept": kept,
    }


def _label(family: str, update: str, dose: float) -> dict[str, Any]:
    return {"family": family, "update": update, "dose": dose}


def _refused(study: Study, split: Split, name: str) -> list[int]:
    return study.replies(split, name).refused.nonzero()[:, 0].tolist()


def _threshold(study: Study, config: Config, name: str) -> float:
    """The log-odds that tell refused from answered unsteered select prompts best (of the removed set with its contrast)."""
    sets = (name, config.contrast) if name == config.remove else (name,)
    scored = study.scored("select", *sets)

    def compute() -> tuple[dict[str, Any], None]:
        odds = log_odds(study.backend, study.template.encode_all(scored.texts), study.refusal_tokens)
        return {"log_odds": odds.tolist()}, None

    key = {"prompts": scored.texts, "tokens": study.refusal_tokens}
    values: Float[Tensor, " prompt"] = torch.tensor(
        study.stage(f"4_threshold_{'removed' if name == config.remove else 'kept'}", key, compute).data["log_odds"],
        dtype=torch.float64,
    )
    return balanced_threshold(values[scored.confidence > 0], {"answered": values[scored.confidence < 0]})
