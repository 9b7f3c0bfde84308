"""The answers of a K-sweep, from numbers alone: what each K removes beyond its null, and the smallest K that is enough.

    net(K)    = removed(K) - mean over the null's draws of the same K and dose
    removable = min(max of net over every K of every curve of the sweep, gap)
    gap       = log-odds of refused minus of answered prompts, both without an edit
    K90       = smallest K of the sweep with net(K) >= 0.9 removable

The gap bounds what can be called refusal: a model that an edit has destroyed opens no refusals either, at log-odds far below
those of prompts that it answers. Where the gap is not positive (log-odds do not tell the prompts apart) it bounds nothing.
What is removable is one number for all curves: a subspace that removes little at any K has no K90, not a small one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.draws import next_draw, next_draw_p, percentiles
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.resampling import bootstrap_counts
from rsteer_interp.studies.dimension_results import Curve, Enough, Removable


@dataclass(frozen=True, eq=False)
class Swept:
    """What was measured of one subspace: removal per K and prompt, and the same of every draw of its null."""

    ks: Sequence[int]
    removed: Float[Tensor, "k prompt"]
    null: Float[Tensor, "k draw prompt"]

    @property
    def net(self) -> Float[Tensor, "k prompt"]:
        return self.removed - self.null.mean(1)


@dataclass(frozen=True, eq=False)
class Base:
    """Log-odds without an edit, and the subjects (clusters) of the prompts."""

    refused: Float[Tensor, " prompt"]
    answered: Float[Tensor, " answered"]
    refused_subjects: Sequence[Hashable]
    answered_subjects: Sequence[Hashable]

    @property
    def gap(self) -> float:
        return float(self.refused.mean() - self.answered.mean())


def sweep_curves(
    swept: Mapping[str, Swept], base: Base, share: float = 0.9, seed: int = 0, n_draws: int = 2000
) -> tuple[dict[str, Curve], Removable]:
    """The curves of one sweep and what is removable in it. UserError for prompts of fewer than two subjects.

    p is that of one more draw of the null (`next_draw_p`), q after false-discovery control over the K of a curve. Bands are the
    central 95 % over resampled subjects: of K90 they are values of the sweep, as fine as its grid.
    """
    draws = _Resampled.of(base, seed, n_draws)
    with_null = {name: each.net for name, each in swept.items()}
    plain = {name: each.removed for name, each in swept.items()}
    beyond, without = (_enough(effects, swept, draws, share) for effects in (with_null, plain))
    sizes = draws.removable(with_null)
    low, high = percentiles(sizes[1:])
    size = Estimate(float(sizes[0]), float(low), float(high), len(base.refused))
    bounded = 0 < base.gap < max(float(net.mean(1).max()) for net in with_null.values())
    return {name: _curve(each, base, seed, beyond[name], without[name]) for name, each in swept.items()}, Removable(
        size, bounded
    )


def _curve(swept: Swept, base: Base, seed: int, enough: Enough | None, without: Enough | None) -> Curve:
    means = swept.null.mean(2).T  # draw, k
    low, high = next_draw(means)
    p = next_draw_p(swept.removed.mean(1), means)
    removed, net = (
        tuple(Estimate.of(row.tolist(), clusters=base.refused_subjects, seed=seed) for row in values)
        for values in (swept.removed, swept.net)
    )
    return Curve(
        ks=tuple(swept.ks),
        n=len(base.refused),
        n_null=len(means),
        removed=removed,
        net=net,
        null_mean=tuple(means.mean(0).tolist()),
        null_low=tuple(low.tolist()),
        null_high=tuple(high.tolist()),
        p=tuple(p.tolist()),
        q=false_discovery(p.tolist()),
        enough=enough,
        enough_without_null=without,
    )


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Weights of the prompts in each resample of subjects; the first is the sample itself."""

    refused: Float[Tensor, "draw prompt"]
    gaps: Float[Tensor, " draw"]

    @classmethod
    def of(cls, base: Base, seed: int, n_draws: int) -> _Resampled:
        refused = _weights(base.refused_subjects, n_draws, seed)
        answered = _weights(base.answered_subjects, n_draws, seed + 1)
        return cls(refused, refused @ base.refused.double() - answered @ base.answered.double())

    def means(self, effect: Float[Tensor, "k prompt"]) -> Float[Tensor, "draw k"]:
        return self.refused @ effect.double().T

    def removable(self, effects: Mapping[str, Float[Tensor, "k prompt"]]) -> Float[Tensor, " draw"]:
        """The most that any K of any curve removes, or the gap where that is smaller and positive."""
        top = torch.cat([self.means(effect) for effect in effects.values()], 1).max(1).values
        return torch.where(self.gaps > 0, torch.minimum(top, self.gaps), top)


def _weights(subjects: Sequence[Hashable], n_draws: int, seed: int) -> Float[Tensor, "draw prompt"]:
    n = len(subjects)
    counts = np.concatenate([np.ones((1, n)), bootstrap_counts(n, n_draws, seed, clusters=subjects)])
    return torch.from_numpy(counts / counts.sum(1, keepdims=True))


def _enough(
    effects: Mapping[str, Float[Tensor, "k prompt"]], swept: Mapping[str, Swept], draws: _Resampled, share: float
) -> dict[str, Enough | None]:
    sizes = draws.removable(effects)
    if not float(sizes[0]) > 0:
        return dict.fromkeys(effects)
    found: dict[str, Enough | None] = {}
    for name, effect in effects.items():
        ks: list[int | None] = [*swept[name].ks, None]
        first = smallest_enough(draws.means(effect), sizes, share)
        low, high = np.quantile(first[1:].numpy(), [0.025, 0.975], method="nearest").tolist()
        often = first[1:].bincount(minlength=len(ks)).double() / (len(first) - 1)
        *frequency, never = often.tolist()
        found[name] = Enough(ks[int(first[0])], ks[low], ks[high], share, tuple(frequency), never)
    return found


def smallest_enough(
    means: Float[Tensor, "draw k"], sizes: Float[Tensor, " draw"], share: float
) -> Int[Tensor, " draw"]:
    """Index of the first K that removes `share` of the size; the number of K where none does, or nothing is removable."""
    reached = (means >= share * sizes[:, None]) & (sizes > 0)[:, None]
    return torch.where(reached.any(1), reached.int().argmax(1), means.shape[1])


def to_match(target: float, removed: Sequence[float], ks: Sequence[int]) -> int | None:
    """The smallest K of the sweep that removes `target` or more; None when none does."""
    return next((k for k, value in zip(ks, removed, strict=True) if value >= target), None)
