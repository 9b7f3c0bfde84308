"""Pairs of prompts to patch between, and what patching did, from numbers alone: shares, intervals, nulls, hand-over layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.batch import Tokens
from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.intervals import Clusters, Estimate
from rsteer_interp.statistics.paired import sign_flips
from rsteer_interp.statistics.resampling import bootstrap_counts
from rsteer_interp.studies.layer_curves import held_out_peak

PERMUTATIONS = 9999


@dataclass(frozen=True)
class Pair:
    """Indices of a refused and an answered prompt, and of another prompt of each class, all with spans of equal length."""

    refused: int
    answered: int
    other_refused: int
    other_answered: int


def make_pairs(
    rows: Sequence[Tokens],
    refused: Sequence[int],
    answered: Sequence[int],
    subjects: Sequence[str],
    most: int,
    seed: int,
) -> list[Pair]:
    """At most `most` pairs, each prompt once as a member of its pair, lengths taken in turn.

    The other prompt of a class, whose states are the null, is of another subject where there is one: a pair's two
    prompts differ in subject too.
    """
    rng = np.random.default_rng(seed)

    def by_length(indices: Sequence[int]) -> dict[tuple[int, int, int], list[int]]:
        out: dict[tuple[int, int, int], list[int]] = {}
        for i in rng.permutation(indices).tolist():
            out.setdefault((rows[i].prefix, rows[i].instruction, rows[i].prompt), []).append(i)
        return {length: found for length, found in out.items() if len(found) > 1}

    def other(i: int, same: list[int]) -> int:
        rest = [j for j in same if j != i]
        far = [j for j in rest if subjects[j] != subjects[i]]
        return int(rng.choice(far or rest))

    left, right = by_length(refused), by_length(answered)
    shelves = []
    for length in sorted(set(left) & set(right)):
        a, b = left[length], right[length]
        shelves.append([Pair(i, j, other(i, a), other(j, b)) for i, j in zip(a, b, strict=False)])
    turns = [
        pair
        for turn in range(max(map(len, shelves), default=0))
        for shelf in shelves
        for pair in shelf[turn : turn + 1]
    ]
    return turns[:most]


def patch_map(
    change: Float[Tensor, "pair donor cell"],
    gap: Float[Tensor, " pair"],
    seed: int,
    n_draws: int = 2000,
    *,
    subjects: Clusters = None,
) -> dict[str, Any]:
    """Share of the gap that each cell carries over: mean change / mean gap, donor 0 of the other class, donor 1 of the same.

    change: log-odds with the patch minus without, gap: the other class' prompt minus this one, both in nats. Intervals are
    bootstraps over pairs, or over their subjects. p: change by donor 0 against donor 1, two-sided, donors swapped inside pairs
    (subjects; exact where there are few enough swaps).
    """
    counts = torch.from_numpy(bootstrap_counts(len(gap), n_draws, seed, clusters=subjects)).double()
    base = (counts @ gap)[:, None]

    def share(x: Float[Tensor, "pair cell"]) -> dict[str, list[float]]:
        low, high = percentiles(counts @ x / base)
        return {"value": (x.sum(0) / gap.sum()).tolist(), "low": low.tolist(), "high": high.tolist()}

    return {
        "share": share(change[:, 0]),
        "null": share(change[:, 1]),
        "nats": [asdict(Estimate.of(column.tolist(), clusters=subjects)) for column in change[:, 0].T],
        "p": sign_flips(change[:, 0] - change[:, 1], PERMUTATIONS, seed, clusters=subjects).tolist(),
        "gap": asdict(Estimate.of(gap.tolist(), clusters=subjects)),
        "n": len(gap),
    }


def control(maps: Sequence[dict[str, Any]]) -> None:
    """Puts into each map q, p after false-discovery control over the cells of all maps together, and the cells that carry
    more than the null at q <= 0.05 (`beyond_null`)."""
    q = list(false_discovery([p for found in maps for p in found["p"]]))
    for found in maps:
        found["q"], q = q[: len(found["p"])], q[len(found["p"]) :]
        pairs = zip(found["q"], found["share"]["value"], found["null"]["value"], strict=True)
        found["beyond_null"] = [i for i, (x, share, null) in enumerate(pairs) if x <= 0.05 and share > null]


def hand_over(
    early: Float[Tensor, "pair layer"],
    late: Float[Tensor, "pair layer"],
    gap: Float[Tensor, " pair"],
    layers: Sequence[int],
    seed: int,
    n_draws: int = 2000,
    *,
    subjects: Clusters = None,
) -> dict[str, float | int] | None:
    """First layer at which patching the late place carries more than patching the early one, with a bootstrap interval.

    None when it never does. Draws in which it never does count as one layer past the last.
    """
    ahead = late - early

    def first(x: Float[Tensor, "draw layer"]) -> Float[Tensor, " draw"]:
        past = torch.cat([x * gap.sum().sign() > 0, torch.ones(len(x), 1, dtype=torch.bool)], 1)
        grid = torch.tensor([*layers, 2 * layers[-1] - layers[-2] if len(layers) > 1 else layers[-1] + 1])
        return grid[past.int().argmax(1)].double()

    value = float(first(ahead.sum(0)[None])[0])
    if value > layers[-1]:
        return None
    counts = torch.from_numpy(bootstrap_counts(len(gap), n_draws, seed, clusters=subjects)).to(ahead)
    return asdict(Estimate.of_draws(value, first(counts @ ahead), len(gap)))


def held_out_best(
    change: Float[Tensor, "pair cell"], gap: Float[Tensor, " pair"], subjects: Clusters = None
) -> tuple[int, Estimate]:
    """The best cell, and its share as each pair has it at the cell that is best for other subjects' pairs: no gain from choosing."""
    share = change / gap.mean()
    return int(share.sum(0).argmax()), Estimate.of(held_out_peak(share, subjects), clusters=subjects)
