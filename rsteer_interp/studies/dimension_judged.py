"""The read-out under the sweep's own edits: judged greedy replies beside first-token log-odds of the same prompts.

Log-odds that order unsteered prompts well may drift under an edit, so the smallest and the largest K of every basis, and one
rotation of each, are answered and judged.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.edits import Edit
from rsteer_interp.evaluation import log_odds
from rsteer_interp.progress import progress
from rsteer_interp.reader import UNSTEERED, validation
from rsteer_interp.refusal_scores import REFUSES_ABOVE, confidence_of, reply_and_judge
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.studies.dimension_inputs import Inputs
from rsteer_interp.studies.dimension_results import ABLATION, ROTATED, Basis, Check, Judged
from rsteer_interp.studies.dimension_runs import Bases, first, reach, with_nulls

Setting = tuple[Basis | None, int, bool]  # whose rows, how many, and whether they are turned
Read = tuple[Bool[Tensor, " prompt"], Float[Tensor, " prompt"]]  # judged refusal, log-odds
KINDS = (UNSTEERED, ABLATION, ROTATED)


def check(inputs: Inputs) -> Check:
    """Replies of refused and of answered report prompts under each edit, refused ones first."""
    read: dict[Setting, Read] = {(None, 0, False): _unedited(inputs)}
    bases: dict[Basis, Bases] = {"site": inputs.families[inputs.lead], **inputs.shared}
    with progress("judging replies under edits", len(bases)) as advance:
        for basis, rows in bases.items():
            ks = reach(rows, inputs.ks)
            for k in sorted({ks[0], ks[-1]}):
                edits = with_nulls(inputs.study.backend, first(rows, k), inputs.rotations[:1])
                for turned, edit in zip((False, True), edits, strict=True):
                    read[basis, k, turned] = _replies(inputs, (basis, k, turned), edit)
            advance(1)
    asked, others = inputs.judged
    subjects = [*asked.subjects, *others.subjects]
    kinds = {}
    for kind in KINDS:
        refused, odds = (torch.cat(each) for each in zip(*(read[s] for s in read if _kind(s) == kind), strict=True))
        kinds[kind] = validation(kind, odds, refused, subjects * (len(odds) // len(subjects)))
    threshold = kinds[UNSTEERED].threshold or 0.0
    return Check(
        rows=tuple(_row(inputs, setting, *found, threshold) for setting, found in read.items()),
        kinds=kinds,
        threshold=threshold,
        tokens=inputs.config.tokens,
        n_refused=len(asked.texts),
        n_answered=len(others.texts),
    )


def _kind(setting: Setting) -> str:
    basis, _, turned = setting
    return UNSTEERED if basis is None else ROTATED if turned else ABLATION


def _unedited(inputs: Inputs) -> Read:
    texts, confidence = _texts(inputs), torch.cat([each.confidence for each in inputs.judged])

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        study = inputs.study
        return {}, {"log_odds": log_odds(study.backend, study.template.encode_all(texts), study.refusal_tokens)}

    found = inputs.study.stage("5_judged_base", inputs.key() | {"judged": texts}, compute).tensors["log_odds"]
    return confidence > REFUSES_ABOVE, found


def _replies(inputs: Inputs, setting: Setting, edit: Edit) -> Read:
    """Verdicts and log-odds are kept, replies are not."""
    study, texts, (basis, k, turned) = inputs.study, _texts(inputs), setting

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        replies = reply_and_judge(
            study.backend,
            study.template.encode_all(texts),
            texts,
            study.judge,
            max_new_tokens=inputs.config.tokens,
            edit=edit,
            refusal_tokens=study.refusal_tokens,
        )
        odds = torch.tensor([group[0].log_odds for group in replies], dtype=torch.float64)
        return {}, {"refused": confidence_of(replies) > REFUSES_ABOVE, "log_odds": odds}

    key = {
        "judged": texts,
        "judge": study.judge,
        "edit": edit,
        "longest": inputs.config.tokens,
        "tokens": study.refusal_tokens,
    }
    found = study.stage(f"5_judged_{basis}_{k}{'_rotated' if turned else ''}", key, compute).tensors
    return found["refused"], found["log_odds"]


def _row(inputs: Inputs, setting: Setting, refused: Tensor, odds: Tensor, threshold: float) -> Judged:
    asked, others = inputs.judged
    n, subjects = len(asked.texts), [*asked.subjects, *others.subjects]
    above = odds > threshold
    return Judged(
        *setting,
        judged=Rate.of(refused[:n].numpy(), clusters=asked.subjects),
        by_log_odds=Rate.of(above[:n].numpy(), clusters=asked.subjects),
        judged_answered=Rate.of(refused[n:].numpy(), clusters=others.subjects),
        log_odds=Estimate.of(odds[:n].tolist(), clusters=asked.subjects),
        drift=PairedRates.of(refused.numpy(), above.numpy(), clusters=subjects).difference,
    )


def _texts(inputs: Inputs) -> list[str]:
    return [text for each in inputs.judged for text in each.texts]
