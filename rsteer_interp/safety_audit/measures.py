"""What a change did to a model, measured: answers and their distributions, coherence of replies, random pushes, shift of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site, compose
from rsteer_interp.batch import Batch
from rsteer_interp.checkpoint_shift import component_cosine, mean_shift, rank_null, shift_spectrum
from rsteer_interp.embedding_integrity import changed_tokens, embedding_digest, embedding_matrix
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import ANSWER_ROWS
from rsteer_interp.judges.base import Judge
from rsteer_interp.measures import kl_divergence, masked_mean, token_log_probs
from rsteer_interp.random_audit import LayerAudit, push_changes, random_audit
from rsteer_interp.random_push import push
from rsteer_interp.reader import validation_of
from rsteer_interp.refusal_scores import replies_of_each
from rsteer_interp.safety_audit.subject import Subject
from rsteer_interp.statistics.intervals import Estimate, Rate

LEAST_PUSHED = 4  # refused prompts with which random pushes are compared before and after


def conversation_effects(
    before: Backend, after: Subject, conversations: Sequence[tuple[str, str]]
) -> tuple[Float[Tensor, " talk"], Float[Tensor, " talk"], Float[Tensor, " talk"]]:
    """Per benign conversation, over its answer's tokens: KL(before || after), and the mean log-probability before and after,
    in nats per token. The two may be two checkpoints, whose templates may differ; UserError if their vocabularies do."""
    asked, answers = [q for q, _ in conversations], [a for _, a in conversations]
    rows = before.template().encode_all(asked, answers)
    theirs = after.rows(asked, answers)
    for ours, other in zip(rows, theirs, strict=True):
        if ours.ids[ours.prompt :] != other.ids[other.prompt :]:
            raise UserError(
                "the two models cut an answer into different tokens; compare checkpoints with one vocabulary"
            )
    partner = dict(zip(rows, theirs, strict=True))
    found = torch.zeros(3, len(rows), dtype=torch.float64)

    def run(batch: Batch) -> Tensor:
        other = after.backend.batch([partner[row] for row in batch.rows])
        longest = max(row.answer_length for row in batch.rows)
        mask, ids = (t[:, -longest:].cpu() for t in (batch.answer_mask, batch.ids))
        p = before.logits(batch, keep=longest + 1)[:, :-1].cpu()
        q = after.backend.logits(other, after.treatment.edit, keep=longest + 1)[:, :-1].cpu()
        if p.shape != q.shape:
            raise UserError(
                f"vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens; compare checkpoints with one vocabulary"
            )
        values = (kl_divergence(p, q), token_log_probs(p, ids), token_log_probs(q, ids))
        return torch.stack([masked_mean(v, mask) for v in values])

    for group, values in before.batches(rows, run, ANSWER_ROWS):
        found[:, group] = values
    return found[0], found[1], found[2]


def random_pushes(
    before: Backend,
    after: Subject,
    prompts: Sequence[str],
    refusal_tokens: Sequence[int],
    conversations: Sequence[tuple[str, str]],
    judge: Judge,
    *,
    subjects: Sequence[str],
    n_vectors: int,
    longest: int,
    seed: int,
) -> dict[str, Any]:
    """Whether refusals became easier to break by random directions: the same pushes (layer, amount, vectors) on the model before and
    after, on prompts that both refuse. Flips are judged replies of `longest` tokens, of which nothing is kept; falls are nats of the
    log-odds. Also where the subject's own direction falls among them."""
    layer = after.layer if after.layer is not None else max(1, before.n_layers // 2)
    talks = before.template().encode_all([q for q, _ in conversations], [a for _, a in conversations])
    audit = random_audit(
        before,
        before.template().encode_all(prompts),
        refusal_tokens,
        talks,
        n_vectors=n_vectors,
        layers=[layer],
        learned=None if after.push is None else {"own": after.push},
        seed=seed,
    )
    (one,) = audit.layers
    rows = after.backend.prepare(after.rows(prompts), layer)
    base, change = push_changes(
        after.backend, rows, refusal_tokens, layer, one.dose * one.mu, audit.vectors, after.treatment.edit
    )
    changed = LayerAudit(layer, one.mu, one.dose, one.guard, base, change)

    def judged(side: str, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
        pushes = [push(subject.backend, layer, v, one.dose * one.mu) for v in audit.vectors.float()]
        replies = replies_of_each(
            subject.backend,
            subject.rows(prompts),
            prompts,
            judge,
            [compose(subject.treatment.edit, each) for each in pushes],
            max_new_tokens=longest,
            refusal_tokens=refusal_tokens,
        )
        flips = [[not reply.verdict.refused for reply in of_vector] for of_vector in replies]
        every = [reply for of_vector in replies for reply in of_vector]
        check = validation_of(f"random pushes, {side}", every, list(subjects) * len(pushes))
        return asdict(Rate.crossed(flips, clusters=subjects)), check.data()

    flipped = {side: judged(side, each) for side, each in (("before", Subject(before)), ("after", after))}
    return {
        "layer": layer,
        "dose": one.dose,
        "coherent": one.coherent,
        "n_vectors": n_vectors,
        "n_prompts": len(prompts),
        "fall_before": asdict(Estimate.crossed(-one.change, clusters=subjects)),
        "fall_after": asdict(Estimate.crossed(-changed.change, clusters=subjects)),
        "difference": asdict(Estimate.crossed(one.change - changed.change, clusters=subjects)),
        "flipped_before": flipped["before"][0],
        "flipped_after": flipped["after"][0],
        "read_out": {side: check for side, (_, check) in flipped.items()},
        "own": None if after.push is None else asdict(one.standing("own")),
    }


def state_shift(
    before: Backend, after: Subject, prompts: Sequence[str], refused: Bool[Tensor, " prompt"], seed: int
) -> list[dict[str, Any]]:
    """How last-token states moved (variant "identity") at two layers and at the final norm's input: effective ranks with their null,
    energy share of the mean shift, and the cosine of the first component with refused minus answered; `moved` False where nothing did."""
    if (before.n_layers, before.d_model) != (after.backend.n_layers, after.backend.d_model):
        raise UserError("the two models differ in depth or width; compare an edited checkpoint with its own base")
    layers = sorted({max(1, before.n_layers // 2), max(1, 2 * before.n_layers // 3), before.n_layers})
    sites = [Site(layer) for layer in layers]
    x = last_states(before, before.template().encode_all(prompts), sites)
    y = last_states(after.backend, after.rows(prompts), sites, after.treatment.edit)
    return [_shift_at(site, x[site], y[site], refused, seed) for site in sites]


def _shift_at(
    site: Site,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    refused: Bool[Tensor, " n"],
    seed: int,
) -> dict[str, Any]:
    size = float((y - x).double().norm(dim=1).div(x.double().norm(dim=1)).mean())
    if size < 1e-5:  # rounding
        return {"site": str(site), "moved": False}
    found = shift_spectrum(x, y)
    both = bool(refused.any()) and not bool(refused.all())
    if both:
        found = found.oriented(x[refused].double().mean(0) - x[~refused].double().mean(0))
    return {
        "site": str(site),
        "moved": True,
        "n": found.n,
        "relative_size": size,
        "ranks": {
            f"{t:g}": asdict(band) for t, band in rank_null(x, y, thresholds=(0.5, 0.9), n_draws=40, seed=seed).items()
        },
        "mean": asdict(mean_shift(x, y, seed=seed)),
        "cosine": asdict(component_cosine(found.components[0], x, refused, seed=seed)) if both else None,
    }


def embedding_check(before: Backend, after: Backend) -> dict[str, Any]:
    """Digests of both embedding matrices, and how many tokens' rows differ."""
    return {
        "before": embedding_digest(before),
        "after": embedding_digest(after),
        "changed": len(changed_tokens(after, before)),
        "vocabulary": len(embedding_matrix(before)),
    }
