"""The read-out under the sweep's own edits: judged greedy replies beside first-token log-odds of the same prompts.

Log-odds that order unsteered prompts well may drift under an edit, so the smallest and the largest K of every basis, and one
rotation of each, are answered and judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.agreement import auc_estimate
from rsteer_interp.backends.edits import Edit
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import AblateSubspace, Everywhere
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import REFUSES_ABOVE, confidence_of, reply_and_judge
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.studies.dimension_inputs import Inputs
from rsteer_interp.studies.dimension_results import Basis, Check, Judged
from rsteer_interp.studies.dimension_steps import ablated
from rsteer_interp.studies.turned_ablation import Bases

Setting = tuple[Basis | None, int, bool]  # whose rows, how many, and whether they are turned
Read = tuple[Bool[Tensor, " prompt"], Float[Tensor, " prompt"]]  # judged refusal, log-odds


def check(inputs: Inputs) -> Check:
    """Replies of refused and of answered report prompts under each edit, refused ones first."""
    read: dict[Setting, Read] = {(None, 0, False): _unedited(inputs)}
    bases: dict[Basis, Bases] = {"site": inputs.families[inputs.lead], **inputs.shared}
    with progress("judging replies under edits", len(bases)) as advance:
        for basis, rows in bases.items():
            read |= _edited(inputs, basis, rows)
            advance(1)
    refused, answered = inputs.judged
    return Check(
        rows=tuple(_row(inputs, setting, *found) for setting, found in read.items()),
        tokens=inputs.config.tokens,
        n_refused=len(refused.texts),
        n_answered=len(answered.texts),
        auc=_pooled([found for (basis, _, turned), found in read.items() if basis and not turned]),
        null_auc=_pooled([found for (_, _, turned), found in read.items() if turned]),
    )


def in_closed_form(bases: Bases, into: Bases, scales: Float[Tensor, " site"]) -> Edit:
    """The null of an ablation where its own displacements are not known, as while decoding: B_s h moved along the rotated rows.

    A site's scale is the ablation's mean dose over what an unedited stream holds there: with the first sites' parts gone, later
    ones have less to take.
    """
    moved = zip(bases.items(), scales.tolist(), strict=True)
    return Everywhere({s: AblateSubspace(s, rows, into[s], scale) for (s, rows), scale in moved})


def _unedited(inputs: Inputs) -> Read:
    texts, confidence = _texts(inputs), torch.cat([each.confidence for each in inputs.judged])

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        study = inputs.study
        return {}, {"log_odds": log_odds(study.backend, study.template.encode_all(texts), study.refusal_tokens)}

    found = inputs.study.stage("5_judged_base", inputs.key() | {"judged": texts}, compute).tensors["log_odds"]
    return confidence > REFUSES_ABOVE, found


def _edited(inputs: Inputs, basis: Basis, bases: Bases) -> dict[Setting, Read]:
    """Both ends of the sweep, and one rotation of each."""
    name = inputs.lead if basis == "site" else basis
    ks, found = ablated(inputs, "all", name, bases, lambda: inputs.bench(inputs.sites[0].layer))
    read: dict[Setting, Read] = {}
    for i in sorted({0, len(ks) - 1}):
        own = {s: rows[: ks[i]] for s, rows in bases.items()}
        scales = found["dose"][i, 0] / found["share"][i]

        def null(own: Bases = own, scales: Tensor = scales) -> Edit:
            return in_closed_form(own, inputs.turned(name, own)[0], scales)

        read[basis, ks[i], False] = _replies(inputs, basis, ks[i], False, partial(_ablation, own))
        read[basis, ks[i], True] = _replies(inputs, basis, ks[i], True, null)
    return read


def _ablation(bases: Bases) -> Edit:
    return Everywhere({s: AblateSubspace(s, rows) for s, rows in bases.items()})


def _replies(inputs: Inputs, basis: Basis, k: int, turned: bool, edit: Callable[[], Edit]) -> Read:
    """Verdicts and log-odds are kept, replies are not."""
    study, texts = inputs.study, _texts(inputs)

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        replies = reply_and_judge(
            study.backend,
            study.template.encode_all(texts),
            texts,
            study.judge,
            max_new_tokens=inputs.config.tokens,
            edit=edit(),
            refusal_tokens=study.refusal_tokens,
        )
        odds = torch.tensor([group[0].log_odds for group in replies], dtype=torch.float64)
        return {}, {"refused": confidence_of(replies) > REFUSES_ABOVE, "log_odds": odds}

    layer = inputs.shared_site.layer if basis == "layer" else None
    key = inputs.key(basis, k, turned, layer) | {
        "judged": texts,
        "judge": study.judge,
        "longest": inputs.config.tokens,
    }
    name = f"5_judged_{basis}_{k}{'_turned' if turned else ''}"
    found = study.stage(name, key, compute).tensors
    return found["refused"], found["log_odds"]


def _row(inputs: Inputs, setting: Setting, refused: Tensor, odds: Tensor) -> Judged:
    asked, others = inputs.judged
    n, subjects = len(asked.texts), [*asked.subjects, *others.subjects]
    opens = odds > 0
    return Judged(
        *setting,
        judged=Rate.of(refused[:n].numpy(), clusters=asked.subjects),
        by_log_odds=Rate.of(opens[:n].numpy(), clusters=asked.subjects),
        judged_answered=Rate.of(refused[n:].numpy(), clusters=others.subjects),
        log_odds=Estimate.of(odds[:n].tolist(), clusters=asked.subjects),
        auc=auc_estimate(odds.numpy(), refused.numpy()),
        drift=PairedRates.of(refused.numpy(), opens.numpy(), clusters=subjects).difference,
    )


def _pooled(read: Sequence[Read]) -> Estimate | None:
    refused, odds = (torch.cat(each).numpy() for each in zip(*read, strict=True))
    return auc_estimate(odds, refused)


def _texts(inputs: Inputs) -> list[str]:
    return [text for each in inputs.judged for text in each.texts]
