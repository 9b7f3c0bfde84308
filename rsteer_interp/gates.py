"""Gates: an edit for the prompts that meet a condition, decided once per prompt; and how a condition is found and judged.

A condition is read from the prompt's tokens at a block input, before the first edited one, in the same forward pass that
it gates; what it decides holds for the prompt's own tokens and for every decoding step (after CAST, arXiv 2409.05907, with
a row for each prompt of a batch). The template prefix, which all prompts share, is never edited. `conditions.py` has
CAST's own condition and the rules that make one gate of several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from rsteer_interp.agreement import auc_estimate
from rsteer_interp.backends.edits import At, Edit, Site, rowwise
from rsteer_interp.directions.ridge import ridge_solve
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import check_finite
from rsteer_interp.moments import Moments
from rsteer_interp.pooling import Pooling, pooled
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.intervals import Clusters, Estimate, membership
from rsteer_interp.statistics.resampling import permutations

Score = Literal["projection", "cosine"]


class Condition(Protocol):
    """What is read of a prompt, where, and whether it holds given that."""

    @property
    def site(self) -> Site: ...

    @property
    def pooling(self) -> Pooling: ...

    def holds(self, states: Float[Tensor, "row d"]) -> Bool[Tensor, " row"]: ...


class Rule(Protocol):
    """What opens a gate: the conditions it reads, and a decision per row from whether each of them holds."""

    @property
    def conditions(self) -> frozenset[Condition]: ...

    def decide(self, held: Mapping[Condition, Bool[Tensor, " row"]]) -> Bool[Tensor, " row"]: ...


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition on a prompt's state h at a site; it holds where the score is above the threshold.

    projection: <h, w>, a linear discriminant's score. cosine: |cos(h, w)|, CAST's condition without its tanh (section 3;
    blind to the sign of w). h is the last prompt token's state or the mean over the instruction's tokens.
    """

    site: Site
    direction: Float[Tensor, " d"]
    threshold: float
    score: Score = "projection"
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        check_finite(f"the threshold of a gate at {self.site}", self.threshold)
        check_finite(f"the direction of a gate at {self.site}", self.direction)

    def scores(self, states: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        wide = torch.float64 if states.device.type == "cpu" else torch.float32
        h, w = states.to(wide), self.direction.to(states.device, wide)
        along: Tensor = h @ w
        return along if self.score == "projection" else along.abs() / (h.norm(dim=-1) * w.norm())

    def holds(self, states: Float[Tensor, "row d"]) -> Bool[Tensor, " row"]:
        return self.scores(states) > self.threshold

    @property
    def conditions(self) -> frozenset[Condition]:
        return frozenset({self})

    def decide(self, held: Mapping[Condition, Bool[Tensor, " row"]]) -> Bool[Tensor, " row"]:
        return held[self]


@dataclass(frozen=True, eq=False)
class Gated:
    """The edit on the rows for which the gate holds, from the end of the template prefix on; nothing on the others.

    With `first_pass` False the prompt is only read, and the edit waits for the decoding steps (CAST, section 3: optional).
    """

    edit: Edit
    gate: Rule
    first_pass: bool = True

    pointwise = False
    leaves_prefix = True

    @property
    def rowwise(self) -> bool:
        return rowwise(self.edit)

    def __post_init__(self) -> None:
        first = min(self.edit.sites)
        last = max(condition.site for condition in self.gate.conditions)
        if last > first:
            raise UserError(f"the gate reads {last}, after the first edit at {first}; read it before")

    @property
    def sites(self) -> frozenset[Site]:
        return self.edit.sites | {condition.site for condition in self.gate.conditions}

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prefix":
            return x
        if at.phase == "prompt":
            for condition in self.gate.conditions:
                if condition.site == at.site:
                    at.memory[self, condition] = condition.holds(pooled(x, at, condition.pooling)).cpu()
        if at.site not in self.edit.sites or (at.phase == "prompt" and not self.first_pass):
            return x
        if self not in at.memory:
            at.memory[self] = self.gate.decide({c: at.memory[self, c] for c in self.gate.conditions})
        held = at.memory[self].to(x.device)[at.rows]
        if not bool(held.any()):
            return x
        own = at.positions >= at.batch.span_end("prefix").to(x.device)[at.rows][:, None]
        return torch.where((own & held[:, None])[..., None], self.edit(x, at), x)


def discriminant(inside: Sequence[Moments], outside: Sequence[Moments], penalty: float = 0.3) -> Float[Tensor, " d"]:
    """w = (Sigma + lambda I)^-1 (mean inside - mean outside): regularised linear discriminant of prompt sets.

    Every set counts the same in its side's mean, and Sigma is the covariance within sets, so that what tells apart the sets
    of one side does not matter. lambda = penalty * tr(Sigma) / d. w is scaled to unit variance within sets.
    """
    sets = [*inside, *outside]
    scatter, weight = sets[0].scatter, sets[0].weight
    for moments in sets[1:]:
        scatter, weight = scatter + moments.scatter, weight + moments.weight
    sigma = scatter / weight
    delta = torch.stack([m.mean for m in inside]).mean(0) - torch.stack([m.mean for m in outside]).mean(0)
    w = ridge_solve(sigma, delta, penalty * sigma.trace / sigma.d)
    spread = sigma.rows @ w if sigma.rows is not None else torch.linalg.cholesky(sigma.dense).T @ w
    scaled: Tensor = w / spread.norm()
    return scaled


@dataclass(frozen=True)
class Roc:
    """Receiver operating characteristic of a condition: rates by threshold (falling), its area with interval, and the area's
    null: its 2.5 and 97.5 % quantiles under labels permuted over clusters."""

    thresholds: tuple[float, ...]
    false_rate: tuple[float, ...]
    true_rate: tuple[float, ...]
    area: Estimate
    null: tuple[float, float]


def roc(
    inside: Float[Tensor, " n"],
    outside: Float[Tensor, " m"],
    *,
    clusters: Clusters = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> Roc:
    """The ROC of scores; the condition should hold for `inside`. `clusters`: the subjects of inside, then of outside."""
    scores = torch.cat([inside, outside]).double().numpy()
    labels = np.arange(len(scores)) < len(inside)
    false_rate, true_rate, thresholds = roc_curve(labels, scores)
    area = auc_estimate(scores, labels, clusters=clusters)
    if area is None:
        raise UserError(f"an ROC of {len(inside)} and {len(outside)} prompts; give one or more of either side")
    member = np.arange(len(scores)) if clusters is None else membership(clusters)
    sides = labels[np.unique(member, return_index=True)[1]]  # subjects change sides whole
    null = [roc_auc_score(sides[order][member], scores) for order in permutations(len(sides), n_draws, seed)]
    low, high = percentiles(null)
    # roc_curve starts at an infinite threshold, at which nothing holds; results hold finite numbers.
    finite = np.where(np.isfinite(thresholds), thresholds, scores.max() + 1)
    return Roc(
        tuple(finite.tolist()), tuple(false_rate.tolist()), tuple(true_rate.tolist()), area, (float(low), float(high))
    )


def balanced_threshold(inside: Float[Tensor, " n"], outside: Mapping[str, Float[Tensor, " m"]]) -> float:
    """The threshold whose worst expected error is smallest: misses of `inside`, false alarms of each set outside.

        t = max over sets k of (m_k s + m s_k) / (s + s_k)        m, s: mean and standard deviation of a set's scores

    Errors are those of normal distributions with the sets' moments. Counts of errors would leave the threshold to the few
    most extreme prompts, and anywhere between two sets that do not overlap. UserError for a set of fewer than two scores.
    """

    def moments(name: str, scores: Tensor) -> tuple[float, float]:
        if len(scores) < 2:
            raise UserError(f"a threshold needs two scores or more of '{name}', there are {len(scores)}; add prompts")
        return float(scores.double().mean()), float(scores.double().std())

    m, s = moments("inside", inside)
    crossings = []
    for name, scores in outside.items():
        mean, spread = moments(name, scores)
        crossings.append((mean * s + m * spread) / (s + spread) if s + spread > 0 else (mean + m) / 2)
    return max(crossings)
