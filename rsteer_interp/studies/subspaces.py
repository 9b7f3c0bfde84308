"""Subspaces that may carry refusal, and those that should not, as nested orthonormal bases: the first k rows are the k-dimensional one.

A family's first row is the mean of its vectors, the others the principal directions of what that row leaves: a family
whose vectors agree needs one dimension, and more rows can only add what the mean lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.directions import Evidence
from rsteer_interp.directions.ridge import ridge_path
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.spectrum import principal_angles
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.resampling import bootstrap_counts, halves, permutations

FAMILIES = ("pairs", "subjects", "ridge")
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # ridge strengths, in mean eigenvalues of the answered prompts' covariance
Contrast = Literal["pairs", "subjects"]
K = TypeVar("K", bound=Hashable)
_RANK = 1e-6  # singular values under this share of all are rounding


@dataclass(frozen=True)
class Groups:
    """What the model did with each prompt, and which prompts belong together."""

    role: Int[Tensor, " n"]  # +1 refused, -1 answered, 0 undecided
    sensitive: Bool[Tensor, " n"]  # of the sensitive set, not of the matched one
    subject: Int[Tensor, " n"]
    pair: Int[Tensor, " n"]  # one sensitive subject and its matched one

    def subset(self, index: Int[Tensor, " k"]) -> Groups:
        return Groups(self.role[index], self.sensitive[index], self.subject[index], self.pair[index])

    @property
    def paired_role(self) -> Int[Tensor, " n"]:
        """+1 refused and sensitive, -1 answered and matched, 0 otherwise."""
        return self.role * ((self.role > 0) == self.sensitive)


def families(states: Float[Tensor, "n d"], groups: Groups, k: int) -> dict[str, Float[Tensor, "r d"]]:
    """Bases of at most k rows: of refused sensitive minus answered matched prompts of the paired subject ("pairs"), of refused
    minus answered prompts inside each subject, where no topic differs ("subjects"), of ridge directions ("ridge")."""
    fits = ridge_fits(Evidence(states, groups.role.double()), groups.pair)
    return {
        "pairs": mean_first(vectors(states, groups, "pairs"), k),
        "subjects": mean_first(vectors(states, groups, "subjects"), k),
        "ridge": mean_first(fits, k),
    }


def vectors(states: Float[Tensor, "n d"], groups: Groups, name: Contrast) -> Float[Tensor, "m d"]:
    """The differences of which a family's basis is made: as they are ("pairs"), or of unit length ("subjects")."""
    found = contrasts(states, *_labels(groups, name))
    if name == "pairs":
        return found
    unit: Tensor = found / found.norm(dim=1, keepdim=True)
    return unit


def resampled(
    states: Mapping[K, Float[Tensor, "n d"]], groups: Groups, name: Contrast, k: int, n_draws: int, seed: int
) -> list[dict[K, Float[Tensor, "r d"]]]:
    """A family's bases at every site, with pairs of subjects drawn anew: the same pairs at all sites of a draw."""
    role, group, each = _labels(groups, name)
    pairs = [groups.pair[refused] for refused, _ in _with_both(role, group)]
    clusters = torch.cat([pair if each else pair[:1] for pair in pairs]).numpy()
    counts = torch.from_numpy(bootstrap_counts(len(clusters), n_draws, seed, clusters=clusters))
    rows = {site: vectors(x, groups, name) for site, x in states.items()}
    return [{site: mean_first(x.repeat_interleave(n, 0), k) for site, x in rows.items()} for n in counts]


def _labels(groups: Groups, name: Contrast) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], bool]:
    return (groups.paired_role, groups.pair, True) if name == "pairs" else (groups.role, groups.subject, False)


def contrasts(
    states: Float[Tensor, "n d"], role: Int[Tensor, " n"], group: Int[Tensor, " n"], each: bool
) -> Float[Tensor, "m d"]:
    """Refused (role +1) minus the mean of answered (role -1) prompts of the same group, in float64: one row per refused
    prompt (`each`), or per group. Groups that lack either are left out; role 0 is passed over."""
    x = states.double()
    gaps = [x[refused] - x[answered].mean(0) for refused, answered in _with_both(role, group)]
    rows = gaps if each else [gap.mean(0, keepdim=True) for gap in gaps]
    return torch.cat(rows) if rows else x.new_zeros(0, x.shape[1])


def _with_both(
    role: Int[Tensor, " n"], group: Int[Tensor, " n"]
) -> Iterator[tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]]:
    """Which prompts of a group are refused, and which answered, for every group that has both."""
    for name in distinct(group):
        refused, answered = ((group == name) & (role == sign) for sign in (1, -1))
        if bool(refused.any()) and bool(answered.any()):
            yield refused, answered


def ridge_fits(evidence: Evidence, group: Int[Tensor, " n"]) -> Float[Tensor, "m d"]:
    """Unit ridge directions (RMD) with each group of prompts left out in turn, at every strength of PENALTIES."""
    rows = []
    for name in distinct(group):
        part = evidence.subset(group != name)
        refused, answered = part.refusing, part.complying
        if not refused.count or answered.count < 2:
            continue
        sigma = answered.scatter / answered.weight
        scale = sigma.trace / sigma.d
        rows.append(ridge_path(refused.mean - answered.mean, sigma, [p * scale for p in PENALTIES]))
    found = torch.cat(rows) if rows else evidence.states.double()[:0]
    unit: Tensor = found / found.norm(dim=1, keepdim=True)
    return unit


def topics(states: Float[Tensor, "n d"], groups: Groups, k: int) -> Float[Tensor, "r d"]:
    """Basis of at most k rows of what differs between subjects among answered prompts of one set: topic, not refusal."""
    x, rows = states.double(), []
    for sensitive in (True, False):
        mine = (groups.role < 0) & (groups.sensitive == sensitive)
        means = [x[mine & (groups.subject == s)].mean(0) for s in distinct(groups.subject[mine])]
        if len(means) > 1:
            rows.append(torch.stack(means) - torch.stack(means).mean(0))
    return principal(torch.cat(rows), k) if rows else x.new_zeros(0, x.shape[1])


def mean_first(rows: Float[Tensor, "m d"], k: int) -> Float[Tensor, "r d"]:
    """At most k orthonormal rows: the unit mean, then the principal directions of the rows with the mean projected out."""
    if not len(rows):
        return rows
    lead = rows.mean(0) / rows.mean(0).norm()
    rest = rows - (rows @ lead)[:, None] * lead
    return torch.cat([lead[None], principal(rest, k - 1, float(rows.norm()))])[:k]


def principal(rows: Float[Tensor, "m d"], k: int, size: float | None = None) -> Float[Tensor, "r d"]:
    """At most k right singular vectors, largest first; those under rounding (of `size`, by default |rows|) are left out."""
    if not len(rows):
        return rows
    vectors: Tensor
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > _RANK * (float(rows.norm()) if size is None else size)][: max(k, 0)]


def like_states(k: int, seed: int, like: Moments) -> Float[Tensor, "r d"]:
    """k orthonormal rows: random vectors with the covariance of the moments `like`, made orthonormal in their order. One seed gives
    neighbouring layers the same mixture of prompts, so they agree as real directions do."""
    rows = random_unit_vectors(k, like.d, seed, like)[: like.count - 1]  # no more dimensions than the states span
    q, r = torch.linalg.qr(rows.T)
    basis: Tensor = (q * r.diagonal().sign()).T
    return basis[r.diagonal().abs() > _RANK]


def distinct(group: Int[Tensor, " n"]) -> list[int]:
    """The groups that occur, in order."""
    return sorted(set(group.tolist()))


def overlap(a: Float[Tensor, "k d"], b: Float[Tensor, "k d"]) -> float:
    """Mean squared cosine of the principal angles of two k-dimensional subspaces: 1 for the same one, k / d at random."""
    return float(np.square(np.cos(principal_angles(a, b))).mean())


def shuffled(role: Int[Tensor, " n"], group: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Roles permuted at random inside groups."""
    return role[torch.from_numpy(permutations(len(role), 1, seed, within=group.numpy()))[0]]


def half_overlaps(
    fit: Callable[[Int[Tensor, " half"], int | None], Float[Tensor, "r d"]],
    group: Int[Tensor, " n"],
    ks: Sequence[int],
    n_splits: int,
    seed: int,
) -> list[dict[str, float]]:
    """Overlap of the k-dimensional subspaces that two halves of the groups give, per k that all halves reach: mean and the
    central 95 % of the splits, beside fits of the same halves to shuffled labels (`fit` shuffles when it gets a seed)."""
    found, null = [], []
    for i, first in enumerate(torch.from_numpy(halves(len(group), n_splits, seed, clusters=group.numpy()))):
        both = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        found.append([fit(half, None) for half in both])
        null.append([fit(half, 1000 * seed + 2 * i + side) for side, half in enumerate(both)])
    rank, d = min(len(basis) for pair in (*found, *null) for basis in pair), found[0][0].shape[1]
    rows = []
    for k in (k for k in ks if k <= rank):
        values, shuffles = ([overlap(a[:k], b[:k]) for a, b in pairs] for pairs in (found, null))
        (low, high), (null_low, null_high) = percentiles(values), percentiles(shuffles)
        rows.append({
            "k": k, "overlap": float(np.mean(values)), "low": float(low), "high": float(high), "chance": k / d,
            "null_mean": float(np.mean(shuffles)), "null_low": float(null_low), "null_high": float(null_high),
            "n_splits": n_splits,
        })  # fmt: skip
    return rows
