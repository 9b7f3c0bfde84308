"""What each family of directions costs in safety for what it removes, without a condition and with one, on report prompts.

Read-out: judged greedy replies to every prompt under every edit. First-token log-odds stand beside them, with how well they read
refusal under each family's edits: what holds without an edit need not hold under one. Nothing is chosen here: every point is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import AtPositions, add, set_component
from rsteer_interp.progress import progress
from rsteer_interp.reader import UNSTEERED, RefusalReader
from rsteer_interp.refusal_scores import replies_of_each
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.statistics.rotation import rotations
from rsteer_interp.studies.selective_steering.condition import holds
from rsteer_interp.studies.selective_steering.directions import PAPER, Directions
from rsteer_interp.studies.study import NotApplicable, Study

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
    """Per family, dose and update: refused prompts of the removed set that are now answered (empty replies are no answers), and
    refused prompts of the kept set that are still refused."""
    backend, tokens, sites = study.backend, study.refusal_tokens, [Site(x) for x in layers]
    names = (config.remove, config.keep[0])
    base = {name: study.replies("report", name) for name in names}
    chosen = {name: base[name].refused.nonzero()[:, 0].tolist()[: config.frontier] for name in names}
    texts, subjects = (
        {name: [getattr(base[name], what)[i] for i in rows] for name, rows in chosen.items()}
        for what in ("texts", "subjects")
    )
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
        every = [None, *(edit for _, edit in edits)]
        found = []
        with progress("frontier, replies", len(every) * sum(map(len, texts.values()))) as advance:
            for asked in texts.values():
                found.append(
                    replies_of_each(
                        backend,
                        study.template.encode_all(asked),
                        asked,
                        study.judge,
                        every,
                        max_new_tokens=config.tokens,
                        refusal_tokens=tokens,
                        on_batch=advance,
                    )
                )
        replies = [[*removed, *kept] for removed, kept in zip(*found, strict=True)]
        return {}, {
            "log_odds": torch.tensor([[r.log_odds for r in row] for row in replies], dtype=torch.float64),
            "refused": torch.tensor([[r.verdict.refused for r in row] for row in replies], dtype=torch.uint8),
            "answers": torch.tensor([[r.answers for r in row] for row in replies], dtype=torch.uint8),
        }

    key = {
        "prompts": texts,
        "tokens": tokens,
        "edits": [edit for _, edit in edits],
        "longest": config.tokens,
        "judge": study.judge,
    }
    tensors = study.stage("4_frontier", key, compute).tensors
    held = torch.cat([holds(study, gate, "report", name)[chosen[name]] for name in names])
    kinds = [UNSTEERED, *(f"{label['family']}, {label['update']}" for label, _ in edits)]
    gated = torch.tensor([kind.startswith("gated") for kind in kinds])
    # Rows for which the condition does not hold are not edited.
    odds, refused, answers = (
        torch.where(gated[:, None] & ~held, x[0], x) for x in (tensors[k] for k in ("log_odds", "refused", "answers"))
    )
    n = len(texts[config.remove])
    parts = dict(zip(names, (slice(n), slice(n, None)), strict=True))
    reader = RefusalReader(backend, tokens)
    cuts = {name: _unsteered(study, config, reader, name) for name in names}
    for kind in dict.fromkeys(kinds[1:]):
        same = [i for i, other in enumerate(kinds) if other == kind]
        for name, part in parts.items():
            read, judged = odds[same, part].flatten(), refused[same, part].flatten()
            reader.validate(f"{kind}: {name}", read, judged, subjects[name] * len(same))

    def point(i: int) -> dict[str, Any]:
        """By judged replies, and what log-odds would say with the threshold of the model as it is."""
        judged = {config.remove: answers[i].bool(), config.keep[0]: refused[i].bool()}
        read = {config.remove: odds[i] <= cuts[config.remove], config.keep[0]: odds[i] > cuts[config.keep[0]]}
        return {
            which + words: asdict(Rate.of(flags[name][parts[name]].tolist(), clusters=subjects[name]))
            for words, flags in (("", judged), ("_by_log_odds", read))
            for which, name in zip(("removed", "kept"), names, strict=True)
        }

    return {
        "points": [
            label | point(i) | {"kind": kinds[i], "null": label["family"] == "random"}
            for i, (label, _) in enumerate(edits, 1)
        ],
        "base": point(0),
        "read_out": {kind: check.data() for kind, check in reader.checked.items()},
        "layers": list(layers),
        "remove": config.remove,
        "kept": config.keep[0],
    }


def _label(family: str, update: str, dose: float) -> dict[str, Any]:
    return {"family": family, "update": update, "dose": dose}


def _unsteered(study: Study, config: Config, reader: RefusalReader, name: str) -> float:
    """The threshold of the log-odds on judged unsteered replies of select (of the removed set with its contrast), checked there."""
    scored = study.scored("select", *((name, config.contrast) if name == config.remove else (name,)))

    def compute() -> tuple[dict[str, Any], None]:
        return {"log_odds": reader.log_odds(study.template.encode_all(scored.texts))[0].tolist()}, None

    key = {"prompts": scored.texts, "tokens": reader.tokens}
    stage = f"4_unsteered_{'removed' if name == config.remove else 'kept'}"
    odds = study.stage(stage, key, compute).data["log_odds"]
    check = reader.validate(f"{UNSTEERED}: {name}", odds, (scored.confidence > 0).tolist(), scored.subjects)
    if check.threshold is None:
        raise NotApplicable(f"not applicable: {check} ('{name}', select)")
    return check.threshold
