"""CAST's condition on a prompt, rules that combine conditions, and the search for a layer, threshold and comparison.

Conditional Activation Steering (arXiv 2409.05907), section 3. A condition is a rule of one; `gates.Gated` takes either, and
so decides once per prompt, on its own tokens, and keeps what it decided while decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Condition, Roc, Rule, roc
from rsteer_interp.interventions import check_finite
from rsteer_interp.pooling import Pooling
from rsteer_interp.statistics.intervals import Clusters

Fires = Literal["above", "below"]
FIRES: tuple[Fires, ...] = ("above", "below")
Held = Mapping[Condition, Bool[Tensor, " row"]]


class _Combines:
    """`a & b`, `a | b` and `~a` of rules."""

    def __and__(self: Rule, other: Rule) -> Rule:
        return AllOf((self, other))

    def __or__(self: Rule, other: Rule) -> Rule:
        return AnyOf((self, other))

    def __invert__(self: Rule) -> Rule:
        return Not(self)


@dataclass(frozen=True, eq=False)
class AllOf(_Combines):
    """Holds where every rule does."""

    rules: tuple[Rule, ...]

    @property
    def conditions(self) -> frozenset[Condition]:
        return frozenset().union(*(rule.conditions for rule in self.rules))

    def decide(self, held: Held) -> Bool[Tensor, " row"]:
        return torch.stack([rule.decide(held) for rule in self.rules]).all(0)


@dataclass(frozen=True, eq=False)
class AnyOf(_Combines):
    """Holds where one rule or more does."""

    rules: tuple[Rule, ...]

    @property
    def conditions(self) -> frozenset[Condition]:
        return frozenset().union(*(rule.conditions for rule in self.rules))

    def decide(self, held: Held) -> Bool[Tensor, " row"]:
        return torch.stack([rule.decide(held) for rule in self.rules]).any(0)


@dataclass(frozen=True, eq=False)
class Not(_Combines):
    """Holds where the rule does not."""

    rule: Rule

    @property
    def conditions(self) -> frozenset[Condition]:
        return self.rule.conditions

    def decide(self, held: Held) -> Bool[Tensor, " row"]:
        return ~self.rule.decide(held)


@dataclass(frozen=True, eq=False)
class Similarity(_Combines):
    """CAST's condition: s(h) = cos(h, tanh(P h)) with P = c c^T / (c . c) fires above (s > theta) or below (s <= theta).

    `fires` says when it holds; the authors' code names its comparators after the side on which the threshold lies instead.
    Without tanh, s = |cos(h, c)|; with it too, s is the same for c and -c, so that below means almost no overlap with c. s is
    neither blind to a shift of h nor, with tanh, to a rotation. The state is read at the input of a block and its vector is
    to come from there; the authors' code reads vectors one block later than it uses them.
    """

    site: Site
    vector: Float[Tensor, " d"]
    threshold: float
    fires: Fires = "above"
    tanh: bool = True
    pooling: Pooling = "prompt"

    def __post_init__(self) -> None:
        norm = float(self.vector.double().norm())
        if not 0 < norm < float("inf"):
            raise UserError(f"condition vector at {self.site} has length {norm}; it needs a finite, nonzero length")
        check_finite(f"the threshold of a condition at {self.site}", self.threshold)
        if self.fires not in FIRES:
            raise UserError(f"a condition cannot fire '{self.fires}' its threshold; choose 'above' or 'below'")

    def similarity(self, states: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        """s per row, in [-1, 1]; 0 for a state without any overlap."""
        h, p = self._projected(states)
        p = p.tanh() if self.tanh else p
        length = h.norm(dim=-1) * p.norm(dim=-1)
        return torch.where(length == 0, 0.0, (h * p).sum(-1) / length)

    def saturated(self, states: Float[Tensor, "row d"], level: float = 0.99) -> Float[Tensor, " row"]:
        """Share of coordinates with |tanh(P h)| > level: near 1, h is compared with the signs of c and not with c."""
        return (self._projected(states)[1].tanh().abs() > level).to(torch.float32).mean(-1)

    def _projected(self, states: Tensor) -> tuple[Tensor, Tensor]:
        # float64 on a CPU alone: some accelerators have none.
        wide = torch.float64 if states.device.type == "cpu" else torch.float32
        h, c = states.to(wide), self.vector.to(states.device, wide)
        return h, (h @ c / (c @ c))[:, None] * c

    def holds(self, states: Float[Tensor, "row d"]) -> Bool[Tensor, " row"]:
        above = self.similarity(states) > self.threshold
        return above if self.fires == "above" else ~above

    @property
    def conditions(self) -> frozenset[Condition]:
        return frozenset({self})

    def decide(self, held: Held) -> Bool[Tensor, " row"]:
        return held[self]


@dataclass(frozen=True, eq=False)
class Search:
    """Where a condition was looked for, and the one that was found: F1 = 2 TP / (2 TP + FP + FN) at every point of the grid.

    `f1` is on the fit split, whose best point is `chosen`; `f1_held` and `roc` are the chosen layer's on held-out prompts, which
    chose nothing, `f1_always` is there the F1 of holding for every prompt. `saturation` is the mean share of saturated
    coordinates of the fit prompts.
    """

    sites: tuple[Site, ...]
    thresholds: Float[Tensor, "site threshold"]
    f1: Mapping[Fires, Float[Tensor, "site threshold"]]
    chosen: Similarity
    f1_fit: float
    f1_held: float
    f1_always: float
    roc: Roc
    saturation: Float[Tensor, " site"]


Split = tuple[Mapping[Site, Float[Tensor, "prompt d"]], Mapping[Site, Float[Tensor, "prompt d"]]]  # inside, outside


def search_condition(
    vectors: Mapping[Site, Float[Tensor, " d"]],
    fit: Split,
    held: Split,
    *,
    pooling: Pooling = "prompt",
    tanh: bool = True,
    thresholds: Sequence[float] | int = 400,
    subjects: Clusters = None,
    seed: int = 0,
) -> Search:
    """CAST's grid search: the layer, threshold and comparison with the largest F1 on fit, for pooled states of both sides; measured
    on `held` prompts (whose `subjects` are those of inside, then of outside).

    `thresholds`: the grid itself (the demonstration of the paper has 0 to 0.06 in steps of 1e-4), or how many points, evenly
    spaced between the smallest and the largest s of each layer, which models do not share. Of points that are equally good,
    the middle of the longest run on the grid is taken, so that no single prompt sets it, and of equal runs the first layer's.
    """
    sites = tuple(sorted(vectors))
    free = {site: Similarity(site, vectors[site], 0.0, tanh=tanh, pooling=pooling) for site in sites}
    scores = [(free[site].similarity(fit[0][site]), free[site].similarity(fit[1][site])) for site in sites]
    grids = torch.stack([_grid(torch.cat(pair), thresholds) for pair in scores])
    f1: dict[Fires, Tensor] = {
        fires: torch.stack([f1_scores(*pair, grid, fires) for pair, grid in zip(scores, grids, strict=True)])
        for fires in FIRES
    }
    best = max(float(surface.max()) for surface in f1.values())
    runs = [
        (length, -place, middle, fires)
        for fires in FIRES
        for place in range(len(sites))
        for middle, length in _runs(f1[fires][place] >= best - 1e-12)
    ]
    _, place, middle, fires = max(runs, key=lambda run: (run[0], run[1], run[3] == "above"))
    site, threshold = sites[-place], float(grids[-place, middle])
    chosen = Similarity(site, vectors[site], threshold, fires, tanh, pooling)
    inside, outside = (chosen.similarity(side[site]) for side in held)
    sign = 1 if fires == "above" else -1
    return Search(
        sites,
        grids,
        f1,
        chosen,
        best,
        float(f1_scores(inside, outside, grids.new_tensor([threshold]), fires)),
        2 * len(inside) / (2 * len(inside) + len(outside)),
        roc(sign * inside, sign * outside, clusters=subjects, seed=seed),
        torch.stack([free[site].saturated(torch.cat([side[site] for side in fit])).mean() for site in sites]),
    )


def f1_scores(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"], thresholds: Float[Tensor, " threshold"], fires: Fires
) -> Float[Tensor, " threshold"]:
    """F1 of a condition that should hold for `inside`, at every threshold, in float64."""
    hits, alarms = ((scores.double() > thresholds.double()[:, None]).sum(1).double() for scores in (inside, outside))
    if fires == "below":
        hits, alarms = len(inside) - hits, len(outside) - alarms
    # TP + FN is all that lie inside.
    return 2 * hits / (hits + alarms + len(inside))


def _grid(scores: Float[Tensor, " n"], thresholds: Sequence[float] | int) -> Float[Tensor, " threshold"]:
    if isinstance(thresholds, int):
        if thresholds < 1:
            raise UserError(f"a grid of {thresholds} thresholds; give one or more")
        share = (torch.arange(thresholds, dtype=torch.float64) + 0.5) / thresholds
        return scores.min() + share * (scores.max() - scores.min())
    return torch.tensor(list(thresholds), dtype=torch.float64)


def _runs(flags: Bool[Tensor, " n"]) -> list[tuple[int, int]]:
    """(middle, length) of every run of true flags."""
    found, start = [], None
    for i, flag in enumerate([*flags.tolist(), False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            found.append(((start + i - 1) // 2, i - start))
            start = None
    return found
