"""Cosines between mean differences of several kinds, corrected for estimation noise, with intervals and a null; numbers only.

Every direction here is a linear combination of prompts' states, so each inner product of any two, under any weights of the
prompts, comes from one Gram matrix: bootstraps and split halves cost nothing that grows with the width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from rsteer_interp.spectrum import principal_angles
from rsteer_interp.statistics.draws import p_value, upper
from rsteer_interp.statistics.intervals import student
from rsteer_interp.statistics.resampling import bootstrap_counts, halves, permutations

Side = Bool[Tensor, "kind n"] | Float[Tensor, "kind n"]  # how much a prompt counts as refused (or answered) of a kind


def coefficients(refused: Side, answered: Side, weights: Float[Tensor, "*draw n"]) -> Float[Tensor, "*draw kind n"]:
    """c with direction = c @ states: weighted mean of refused minus weighted mean of answered prompts. NaN for an empty class."""
    r, a = (mask.double() * weights[..., None, :] for mask in (refused, answered))
    return r / r.sum(-1, keepdim=True) - a / a.sum(-1, keepdim=True)


def cosines(
    a: Float[Tensor, "*draw i n"], b: Float[Tensor, "*draw j n"], gram: Float[Tensor, "n n"]
) -> Float[Tensor, "*draw i j"]:
    """Cosines of the directions a @ states and b @ states, gram = states @ states.T."""
    on = a @ gram
    size_a, size_b = (on * a).sum(-1).sqrt(), ((b @ gram) * b).sum(-1).sqrt()
    return (on @ b.mT) / (size_a[..., :, None] * size_b[..., None, :])


@dataclass(frozen=True)
class Groups:
    """Prompts by subject, subjects by set: what is resampled together, and inside what."""

    member: np.ndarray  # subject of each prompt, 0, 1, ...
    stratum: np.ndarray  # set of each subject

    @classmethod
    def of(cls, sets: Sequence[str], subjects: Sequence[str]) -> Groups:
        names, member = np.unique([f"{s}\0{u}" for s, u in zip(sets, subjects, strict=True)], return_inverse=True)
        return cls(member, np.unique([name.split("\0")[0] for name in names], return_inverse=True)[1])

    def halves(self, n: int, seed: int) -> Bool[Tensor, "split n"]:
        """Random halves of each set's subjects; True is the first half."""
        return torch.from_numpy(
            halves(len(self.member), n, seed, clusters=self.member, strata=self.stratum[self.member])
        )

    def bootstrap(self, n: int, seed: int) -> Float[Tensor, "draw n"]:
        """How often each prompt is drawn when subjects are drawn with replacement, set by set, one fewer than there are."""
        strata = self.stratum[self.member]
        drawn = bootstrap_counts(len(self.member), n, seed, clusters=self.member, strata=strata, fewer=1)
        return torch.from_numpy(drawn).double()

    @property
    def quantile(self) -> float:
        """97.5 % of Student's t with as many degrees of freedom as the set with the fewest subjects allows."""
        return student(max(int(np.bincount(self.stratum).min()) - 1, 1))

    def within(self, refused: Side, answered: Side) -> Bool[Tensor, " kind"]:
        """The kinds whose refused and answered prompts are of the same subjects."""
        belongs = torch.nn.functional.one_hot(torch.from_numpy(self.member)).double()
        r, a = (side.double() @ belongs > 0 for side in (refused, answered))
        return (r == a).all(1)


def cross_half(
    refused: Side,
    answered: Side,
    gram: Float[Tensor, "n n"],
    weights: Float[Tensor, "*draw n"],
    halves: Bool[Tensor, "*draw split n"],
) -> Float[Tensor, "*draw kind kind"]:
    """Mean cosine of kind i fitted on one half of the subjects and kind j on the other: no prompt is in both.

    The diagonal is the split-half reliability r of each kind. Kinds that share prompts share their noise, which inflates the
    plain cosine and not this one.
    """
    w = weights[..., None, :] * halves, weights[..., None, :] * ~halves
    across = cosines(coefficients(refused, answered, w[0]), coefficients(refused, answered, w[1]), gram)
    return ((across + across.mT) / 2).nanmean(-3)


def disattenuated(across: Float[Tensor, "*draw kind kind"]) -> Float[Tensor, "*draw kind kind"]:
    """across_ij / sqrt(r_i r_j): the cosine without estimation noise (Spearman 1904). It may exceed 1; NaN where r <= 0."""
    r = across.diagonal(dim1=-2, dim2=-1)
    root = torch.where(r > 0, r, torch.nan).sqrt()
    return across / (root[..., :, None] * root[..., None, :])


def random_cosines(answered: Float[Tensor, "n d"], n_draws: int, seed: int) -> Float[Tensor, " draw"]:
    """|cosine| of random pairs with the covariance of these states: wider than 1 / sqrt(d) where few dimensions carry most."""
    x = answered.double() - answered.double().mean(0)
    z = torch.randn(2, n_draws, len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x @ x.T
    on = z[0] @ gram
    return ((on * z[1]).sum(1) / ((on * z[0]).sum(1) * ((z[1] @ gram) * z[1]).sum(1)).sqrt()).abs()


def atlas(
    states: Float[Tensor, "n d"],
    refused: Side,
    answered: Side,
    groups: Groups,
    seed: int,
    *,
    n_splits: int = 50,
    n_draws: int = 200,
    n_random: int = 2000,
    n_shuffles: int = 499,
) -> dict[str, Any]:
    """Cosine matrices of all kinds at one site, as plain data (None where not defined).

    `raw`; `disattenuated` from halves without a common prompt; `reliability`, the Spearman-Brown value 2 r / (1 + r) of the
    split-half cosine r. Intervals are value +- t standard deviations of a bootstrap over subjects (a percentile interval of a cosine would
    be off, as resampling adds noise and so lowers cosines). A disattenuated value needs both r above 0 by that
    interval. `null_q95` and `p` are of random pairs with the covariance of the answered states; `isotropic_q95` of pairs uniform on
    the sphere, cos^2 ~ Beta(1/2, (d - 1)/2). `within_subject_p`, of two kinds that are inside their subjects: the same cosine of
    directions from labels permuted within subjects, which differ as prompts on one subject do.
    """
    x = states.double()
    gram = x @ x.T
    one = torch.ones(len(x), dtype=torch.float64)
    plain = coefficients(refused, answered, one)
    raw = cosines(plain, plain, gram)
    across = cross_half(refused, answered, gram, one, groups.halves(n_splits, seed))
    weights = groups.bootstrap(n_draws, seed)
    drawn = coefficients(refused, answered, weights)
    halves = groups.halves(4 * n_draws, seed + 1).view(n_draws, 4, -1)
    boot = cross_half(refused, answered, gram, weights, halves)
    half = across.diagonal()
    half_sd = _spread(boot).diagonal()
    t = groups.quantile
    reliable = half - t * half_sd > 0
    corrected = torch.where(reliable[:, None] & reliable[None], disattenuated(across), torch.nan)
    null = random_cosines(states[(answered > 0).any(0)], n_random, seed)
    size, inside = raw.abs(), groups.within(refused, answered)
    p = p_value(size, null[:, None, None].expand(-1, *size.shape), "greater")
    within: list[list[float | None]] = [[None] * len(refused) for _ in refused]
    if bool(inside.any()):
        orders = torch.from_numpy(permutations(len(x), n_shuffles, seed, within=groups.member))
        r, a = (side[inside].double()[:, orders].transpose(0, 1) for side in (refused, answered))
        c = r / r.sum(-1, keepdim=True) - a / a.sum(-1, keepdim=True)
        found = p_value(size[inside][:, inside], cosines(c, c, gram).abs(), "greater").tolist()
        at = inside.nonzero()[:, 0].tolist()
        for i, line in zip(at, found, strict=True):
            for j, value in zip(at, line, strict=True):
                within[i][j] = value
    return {
        "raw": _matrix(raw, t * _spread(cosines(drawn, drawn, gram)), bound=1.0),
        "disattenuated": _matrix(corrected, t * _spread(disattenuated(boot))),
        "reliability": [2 * r / (1 + r) if r > 0 else 0.0 for r in half.tolist()],
        "half_cosine": _matrix(half[None], t * half_sd[None], bound=1.0)[0],
        "p": p.tolist(),
        "within_subject_p": within,
        "null_q95": float(upper(null)),
        "isotropic_q95": float(np.sqrt(stats.beta(0.5, (x.shape[1] - 1) / 2).ppf(0.95))),
    }


def _spread(draws: Float[Tensor, "draw i j"]) -> Float[Tensor, "i j"]:
    """Standard deviation over bootstrap draws that are defined, robust to ratios with a tiny denominator (quartile range / 1.349)."""
    low, high = draws.nanquantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
    spread: Tensor = (high - low) / 1.349
    return spread


def _matrix(
    value: Float[Tensor, "i j"], margin: Float[Tensor, "i j"], bound: float | None = None
) -> list[list[dict[str, float] | None]]:
    def cell(v: float, m: float) -> dict[str, float] | None:
        if not np.isfinite([v, m]).all():
            return None
        low, high = v - m, v + m
        return {"value": v, "low": max(low, -bound) if bound else low, "high": min(high, bound) if bound else high}

    return [
        [cell(v, m) for v, m in zip(*rows, strict=True)] for rows in zip(value.tolist(), margin.tolist(), strict=True)
    ]


def subject_subspace(
    states: Float[Tensor, "n d"],
    refused: Bool[Tensor, " n"],
    answered: Bool[Tensor, " n"],
    groups: Groups,
    k: int,
    least: int = 2,
) -> Float[Tensor, "k d"] | None:
    """The k leading dimensions of a kind's per-subject directions: unit(mean of a subject's refused prompts - mean answered), of the
    answered ones of the same subject where it has some.

    Subjects with at least `least` refused prompts count; None with fewer than k of them.
    """
    if not bool(answered.any()):
        return None
    x, rows = states.double(), []
    for u in np.unique(groups.member):
        mine = torch.from_numpy(groups.member == u)
        if int((refused & mine).sum()) >= least:
            own = answered & mine
            rows.append(x[refused & mine].mean(0) - x[own if bool(own.any()) else answered].mean(0))
    if len(rows) < k:
        return None
    stacked = torch.stack(rows)
    basis: Tensor = torch.linalg.svd(stacked / stacked.norm(dim=1, keepdim=True), full_matrices=False).Vh
    return basis[:k]


def subspace_cosines(
    states: Float[Tensor, "n d"],
    refused: Side,
    answered: Side,
    groups: Groups,
    k: int,
    seed: int,
    n_splits: int = 20,
) -> dict[str, Any]:
    """Cosines of the k principal angles between kinds' per-subject subspaces, each from another half of the subjects, mean
    over splits. A kind with itself is the most that these n allow; `null_q95` is of k random directions with the covariance of the
    answered states against the kinds' own subspaces. None where a half holds too few subjects.
    """
    n_kinds = len(refused)
    pairs: dict[tuple[int, int], list[Tensor]] = {}
    null: list[Tensor] = []
    x = states[answered.any(0)].double()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(seed)
    for first in groups.halves(n_splits, seed):
        a, b = (
            [subject_subspace(states, r & half, q & half, groups, k) for r, q in zip(refused, answered, strict=True)]
            for half in (first, ~first)
        )
        for i in range(n_kinds):
            if (own := a[i]) is None:
                continue
            noise = torch.randn(k, len(x), generator=generator, dtype=torch.float64) @ x
            null.append(torch.tensor(principal_angles(own, noise)).cos())
            for j in range(n_kinds):
                if (other := b[j]) is not None:
                    pair = (min(i, j), max(i, j))
                    pairs.setdefault(pair, []).append(torch.tensor(principal_angles(own, other)).cos())
    return {
        "k": k,
        "cosines": [
            [torch.stack(found).mean(0).tolist() if (found := pairs.get((min(i, j), max(i, j)))) else None for j in range(n_kinds)]
            for i in range(n_kinds)
        ],
        "null_q95": upper(torch.stack(null)).tolist() if null else None,
    }  # fmt: skip
