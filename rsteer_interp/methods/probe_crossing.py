"""What a benign vector does to harm: prompts that cross a harmfulness probe's boundary, and the first tokens' KL.

Steering Externalities (arXiv 2602.04896) counts crossings of a line drawn in a t-SNE plane, whose share depends on the embedding.
Here the probe is linear in the full space and its threshold is from held-out prompts. At the first edited site its score
shifts by a <w, v> exactly, for an edit h + a v; further on that is a prediction. Harmful texts serve as prompts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import ANSWER_ROWS
from rsteer_interp.gates import Gate, balanced_threshold, discriminant
from rsteer_interp.interventions import add
from rsteer_interp.measures import kl_divergence
from rsteer_interp.moments import Moments
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.rotation import rotations

Amounts = Mapping[Site, float]
Vectors = Mapping[Site, Float[Tensor, " d"]]


def harm_probe(
    site: Site,
    harmful: Float[Tensor, "n d"],
    harmless: Float[Tensor, "m d"],
    held_harmful: Float[Tensor, "k d"],
    held_harmless: Float[Tensor, "j d"],
    penalty: float = 0.3,
) -> Gate:
    """A linear probe that holds for harmful prompts: regularised discriminant of the fit states, threshold from held-out ones.

    With fewer prompts than dimensions the fit prompts lie far outside the boundary that they draw; others do not.
    """
    w = discriminant([Moments.of(harmful)], [Moments.of(harmless)], penalty)
    free = Gate(site, w, 0.0)
    return replace(
        free, threshold=balanced_threshold(free.scores(held_harmful), {"harmless": free.scores(held_harmless)})
    )


@dataclass(frozen=True)
class Crossing:
    """How an added direction moves harmful prompts against the probe at one site.

    Shifts of the score are in standard deviations within the probe's sets. `predicted_shift` is the sum of a <w, v> over the
    edited sites up to the probe's: exact where `exact`, else what it would be if later blocks passed the change on
    unaltered. `largest_error` is the largest |measured - predicted| of a prompt. The shares count, among prompts on the harmful side
    before the edit, those that are not after it; `null` holds the observed share under random rotations of the edit.
    """

    site: Site
    exact: bool
    predicted_shift: float
    shift: Estimate
    largest_error: float
    predicted: Rate
    observed: Rate
    null: tuple[float, ...]

    @property
    def p(self) -> float:
        """One-sided: that as many cross under a random rotation."""
        return Beside.of(self.observed.rate, self.null).p("greater")


def crossings(
    backend: Backend,
    rows: Sequence[Tokens],
    probes: Sequence[Gate],
    directions: Vectors,
    amounts: Amounts,
    *,
    subjects: Sequence[str] | None = None,
    n_null: int = 20,
    seed: int = 0,
) -> list[Crossing]:
    """One Crossing per probe for the edit h + a v at each site: 2 + n_null passes over the (harmful) prompts, nothing is generated.

    UserError for a probe that reads before the first edit, or when no prompt is on its harmful side.
    """
    first = min(directions)
    sites = [probe.site for probe in probes]
    early = [site for site in sites if site < first]
    if early:
        raise UserError(f"a probe reads {early[0]}, before the first edit at {first}; read at or behind it")
    edits = [None, add(directions, amounts), *_nulls(directions, amounts, n_null, seed)]
    states = [last_states(backend, rows, sites, edit) for edit in edits]
    groups = list(subjects) if subjects is not None else [str(i) for i in range(len(rows))]
    return [_crossing(probe, [x[probe.site] for x in states], groups, directions, amounts) for probe in probes]


def _crossing(
    probe: Gate,
    states: Sequence[Float[Tensor, "n d"]],
    subjects: Sequence[str],
    directions: Vectors,
    amounts: Amounts,
) -> Crossing:
    before, *after = [probe.scores(x) for x in states]
    harmful = before > probe.threshold
    n = int(harmful.sum())
    if n == 0:
        raise UserError(
            f"none of {len(before)} prompts is on the harmful side of the probe at {probe.site}; check the probe"
        )
    w = probe.direction.double()
    predicted = sum(
        amounts[s] * float(w @ v.double() / v.double().norm()) for s, v in directions.items() if s <= probe.site
    )

    def share(scores: Float[Tensor, " n"]) -> Rate:
        of = [subject for subject, counted in zip(subjects, harmful.tolist(), strict=True) if counted]
        return Rate.of((scores[harmful] <= probe.threshold).numpy(), clusters=of)

    measured = after[0] - before
    return Crossing(
        probe.site,
        probe.site == min(directions),
        predicted,
        Estimate.of(measured.numpy(), clusters=subjects),
        float((measured - predicted).abs().max()),
        share(before + predicted),
        share(after[0]),
        tuple(share(scores).rate for scores in after[1:]),
    )


def _nulls(directions: Vectors, amounts: Amounts, n: int, seed: int) -> list[Edit]:
    """The edit's directions turned by one random rotation for all sites."""
    return [add(turned, amounts) for turned in rotations(directions, n, seed)]


@dataclass(frozen=True)
class TokenKl:
    """KL(original || steered) in nats at each of the first tokens of given answers, with the mean under random rotations of the edit.

    Entry 0 is the distribution of the answer's first token, entry t that after t given tokens.
    """

    steered: tuple[Estimate, ...]
    null: tuple[float, ...]


def first_token_kl(
    backend: Backend,
    rows: Sequence[Tokens],
    directions: Vectors,
    amounts: Amounts,
    n_tokens: int = 16,
    *,
    subjects: Sequence[str] | None = None,
    n_null: int = 5,
    seed: int = 0,
) -> TokenKl:
    """Mean over rows (benign prompts with benign answers) of the per-token KL, and the same for the edit under random rotations.

    Tokens that fewer than two answers reach are left out. 2 + n_null passes, a few rows at a time.
    """
    edits = [add(directions, amounts), *_nulls(directions, amounts, n_null, seed)]
    steered, *nulls = token_kl(backend, rows, edits, n_tokens)
    reached = [t for t in range(n_tokens) if int((~steered[:, t].isnan()).sum()) >= 2]

    def mean(t: int) -> Estimate:
        there = (~steered[:, t].isnan()).nonzero()[:, 0].tolist()
        of = None if subjects is None else [subjects[i] for i in there]
        return Estimate.of(steered[there, t].numpy(), clusters=of, seed=seed)

    return TokenKl(
        tuple(map(mean, reached)),
        tuple(float(torch.stack(nulls)[:, :, t].nanmean()) for t in reached) if nulls else (),
    )


def token_kl(
    backend: Backend, rows: Sequence[Tokens], edits: Sequence[Edit], n_tokens: int = 16
) -> Float[Tensor, "edit row token"]:
    """KL(original || edited) in nats at the first n_tokens of each row's given answer; nan behind a shorter answer's end.

    What comes later cannot matter, so answers are cut there. UserError for a row without an answer.
    """
    if not all(row.answer_length for row in rows):
        raise UserError("a row has no answer to follow; encode every prompt with its benign answer")
    cut = [replace(row, ids=row.ids[: row.prompt + n_tokens]) for row in rows]
    out = torch.full((len(edits), len(rows), n_tokens), float("nan"), dtype=torch.float64)

    def run(batch: Batch) -> Float[Tensor, "edit row pos"]:
        keep = max(row.answer_length for row in batch.rows) + 1  # the column before a token predicts it
        base = backend.logits(batch, keep=keep)[:, :-1]
        return torch.stack([kl_divergence(base, backend.logits(batch, e, keep=keep)[:, :-1]).cpu() for e in edits])

    for group, kl in backend.spread(cut, run, ANSWER_ROWS):
        for i, values in zip(group, kl.unbind(1), strict=True):
            n = cut[i].answer_length
            # Rows are padded on the left, so an answer is at the end of its row.
            out[:, i, :n] = values[:, -n:].double()
    return out
