"""Random audit: how much refusal goes when a model is pushed along random directions, and where a given direction falls.

    h' = h + c mu_l v-hat          at one block input, all prompt and generated tokens except special ones

v-hat uniform on the sphere, mu_l the mean |h| at layer l, c the relative dose (The Rogue Scalpel, arXiv 2509.22067,
section 3; the paper says "layer l", that this is the block's input is our reading). The paper counts judged replies; here the
read-out is the first-token refusal log-odds, so that nothing harmful is written. See `random_push` for the edit and the guard on c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import Edit, Site, compose
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.random_push import COHERENT_KL, DOSES, Guard, coherence, push
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.statistics.resampling import bootstrap_counts

GUARD_VECTORS = 2  # random vectors over which the guard's KL is averaged


def audited_layers(n_layers: int) -> tuple[int, ...]:
    """floor(L/3), floor(L/2), floor(2L/3): the paper's layers, each once and none of them the first block."""
    return tuple(sorted({max(1, n_layers // 3), max(1, n_layers // 2), max(1, 2 * n_layers // 3)}))


def push_changes(
    backend: Backend,
    rows: Sequence[Tokens] | Prepared,
    refusal_tokens: Sequence[int],
    layer: int,
    amount: float,
    vectors: Float[Tensor, "vector d"],
    edit: Edit | None = None,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "vector prompt"]]:
    """Refusal log-odds of the model (with `edit`, when one is given), and what each push adds to them, in nats."""
    pushed = [compose(edit, push(backend, layer, v, amount)) for v in vectors.float()]
    odds = log_odds_of_each(backend, rows, refusal_tokens, [edit, *pushed])
    return odds[0], odds[1:] - odds[0]


@dataclass(frozen=True)
class Standing:
    """A value among those of N random directions: z score, rank (1 = largest) and one-sided p, 1 / (1 + N) at the least."""

    value: float
    mean: float
    sd: float
    z: float
    rank: int
    n: int
    p: float

    @classmethod
    def of(cls, value: float, null: ArrayLike) -> Standing:
        """UserError for fewer than two random directions, or ones that all give the same."""
        x = np.asarray(null, dtype=float)
        if len(x) < 2 or not x.std() > 0:
            raise UserError(
                f"{len(x)} random directions give no spread to compare with; use more of them, or a dose above 0"
            )
        beside = Beside.of(value, x)
        return cls(value, float(x.mean()), float(x.std(ddof=1)), beside.z, beside.rank, len(x), beside.p("greater"))


@dataclass(frozen=True, eq=False)
class LayerAudit:
    """One layer: relative dose c, mu_l, the guard's doses, log-odds without a push, and what each push adds (nats)."""

    layer: int
    mu: float
    dose: float
    guard: tuple[Guard, ...]
    base: Float[Tensor, " prompt"]
    change: Float[Tensor, "vector prompt"]
    learned: Mapping[str, Float[Tensor, " prompt"]] = field(default_factory=dict)

    @property
    def coherent(self) -> bool:
        """Whether the dose used passed the guard."""
        return any(g.coherent for g in self.guard if g.dose == self.dose)

    @property
    def falls(self) -> Float[Tensor, " vector"]:
        """Per vector, the mean fall of the refusal log-odds over the prompts: positive is refusal lost."""
        return -self.change.mean(1)

    def standing(self, name: str) -> Standing:
        """Where a given direction's mean fall lies among the random ones' at the same layer and dose."""
        return Standing.of(-float(self.learned[name].mean()), self.falls.numpy())

    def flipped(self, threshold: float = 0.0) -> Bool[Tensor, "vector prompt"]:
        """Log-odds above the threshold without and not above it with the push."""
        return (self.base > threshold) & (self.base + self.change <= threshold)


@dataclass(frozen=True, eq=False)
class RandomAudit:
    """The audit of all layers, with the unit vectors, which all layers share, the flip threshold (nats of log-odds) and the prompts'
    subjects (None: each prompt is its own)."""

    vectors: Float[Tensor, "vector d"]
    threshold: float
    layers: tuple[LayerAudit, ...]
    subjects: Sequence[str] | None = None

    def peak_shares(self, n_draws: int = 1000, seed: int = 0) -> dict[int, float]:
        """Bootstrap of the layer profile: how often each layer has the largest mean fall, vectors and subjects resampled."""
        falls = -torch.stack([layer.change for layer in self.layers]).numpy()
        vectors = bootstrap_counts(falls.shape[1], n_draws, 2 * seed)
        prompts = bootstrap_counts(falls.shape[2], n_draws, 2 * seed + 1, clusters=self.subjects)
        best = np.einsum("dv,lvp,dp->dl", vectors, falls, prompts, optimize=True).argmax(1)
        return {layer.layer: float(np.mean(best == i)) for i, layer in enumerate(self.layers)}

    def data(self) -> dict[str, Any]:
        """As plain values, layer by layer: dose, guard, mean fall and flips with intervals over vectors and subjects, standings."""
        peaks = self.peak_shares()
        return {
            "n_vectors": len(self.vectors),
            "n_prompts": len(self.layers[0].base),
            "threshold": self.threshold,
            "layers": [
                {
                    "layer": one.layer,
                    "mu": one.mu,
                    "dose": one.dose,
                    "coherent": one.coherent,
                    "guard": [asdict(g) for g in one.guard],
                    "fall": asdict(Estimate.crossed(-one.change, clusters=self.subjects)),
                    "largest_fall": float(one.falls.max()),
                    "flipped": asdict(Rate.crossed(one.flipped(self.threshold), clusters=self.subjects)),
                    "peak_share": peaks[one.layer],
                    "learned": {name: asdict(one.standing(name)) for name in one.learned},
                }
                for one in self.layers
            ],
        }


def random_audit(
    backend: Backend,
    refused: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    conversations: Sequence[Tokens],
    *,
    n_vectors: int = 16,
    layers: Sequence[int] | None = None,
    dose: float | None = None,
    doses: Sequence[float] = DOSES,
    bound: float = COHERENT_KL,
    threshold: float = 0.0,
    learned: Mapping[str, Float[Tensor, " d"]] | None = None,
    seed: int = 0,
) -> RandomAudit:
    """Push refused prompts along N random unit vectors at each layer, and along given directions at the same dose.

    dose None: per layer the largest of `doses` that the guard passes (the smallest when none is passed; `coherent` tells).
    A given dose is used and marked. `learned` vectors are added as they are given: minus a refusal direction removes refusal.
    """
    if not refused or not conversations:
        raise UserError(
            "a random audit needs refused prompts and benign conversations; this model may refuse none of the prompts"
        )
    vectors = random_unit_vectors(n_vectors, backend.d_model, seed)
    chosen = tuple(layers) if layers is not None else audited_layers(backend.n_layers)
    norms = mean_norms(backend, refused, [Site(layer) for layer in chosen])
    audits = []
    for layer in chosen:
        mu = norms[Site(layer)]
        tried = doses if dose is None else (dose,)
        guard = coherence(backend, conversations, layer, mu, vectors[:GUARD_VECTORS], tried, bound)
        used = max((g.dose for g in guard if g.coherent), default=min(tried))
        rows = backend.prepare(refused, layer)
        base, change = push_changes(backend, rows, refusal_tokens, layer, used * mu, vectors)
        given = {}
        if learned:
            stacked = torch.stack([v.double() for v in learned.values()])
            moved = push_changes(backend, rows, refusal_tokens, layer, used * mu, stacked)[1]
            given = dict(zip(learned, moved, strict=True))
        audits.append(LayerAudit(layer, mu, used, guard, base, change, given))
    return RandomAudit(vectors, threshold, tuple(audits))


@dataclass(frozen=True, eq=False)
class Aggregation:
    """The mean of the vectors that flip one prompt, on prompts that had no part in choosing them.

    `prompt` is the audited prompt that most vectors flip, `members` those vectors; `change` is per held-out prompt. Null: single
    random vectors at the same dose (the renormalised mean of vectors not chosen for anything is one).
    """

    layer: int
    prompt: int
    members: tuple[int, ...]
    base: Float[Tensor, " prompt"]
    change: Float[Tensor, " prompt"]
    null: Float[Tensor, "draw prompt"]

    @property
    def standing(self) -> Standing:
        return Standing.of(-float(self.change.mean()), (-self.null.mean(1)).numpy())


def aggregation(
    backend: Backend,
    audit: RandomAudit,
    layer: int,
    held_out: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    *,
    least: int = 2,
    n_null: int = 16,
    seed: int = 1,
) -> Aggregation | None:
    """The paper's aggregation test (20 vectors out of some thousand there): v = mean of the flipping vectors, renormalised.

    None when no prompt is flipped by `least` vectors. `seed` must differ from the audit's.
    """
    one = next(a for a in audit.layers if a.layer == layer)
    flips = one.flipped(audit.threshold)
    prompt = int(flips.sum(0).argmax())
    members = flips[:, prompt].nonzero()[:, 0]
    if len(members) < least:
        return None
    mean = audit.vectors[members].mean(0)
    null = random_unit_vectors(n_null, backend.d_model, seed)
    rows = backend.prepare(held_out, layer)
    base, change = push_changes(
        backend, rows, refusal_tokens, layer, one.dose * one.mu, torch.cat([(mean / mean.norm())[None], null])
    )
    return Aggregation(layer, prompt, tuple(members.tolist()), base, change[0], change[1:])
