"""What one kind's direction does to every other kind, from numbers alone: cells against random directions, matched doses, AUC."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.agreement import auc_estimate, auc_p, auc_within
from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.draws import next_draw, next_draw_p, pair_p
from rsteer_interp.statistics.intervals import Estimate


def cells(
    effect: Float[Tensor, "row prompt"],
    sizes: Sequence[float],
    random: Float[Tensor, "draw prompt"],
    random_sizes: Sequence[float],
    columns: Sequence[str],
    subjects: Sequence[Hashable],
) -> dict[str, Any]:
    """Mean effect of every row on the prompts of every column, with interval over subjects, null and two-sided p; q over all cells.

    `sizes` are those of the edits; a random edit's effect is scaled to the size of the row it is compared with. Null and p are of
    one more random direction (`next_draw`).
    """
    per_unit = random / torch.tensor(random_sizes, dtype=torch.float64)[:, None]
    names, table = list(dict.fromkeys(columns)), list[list[dict[str, Any]]]()
    for row, size in zip(effect, sizes, strict=True):
        line = []
        for name in names:
            mine = torch.tensor([c == name for c in columns])
            null = size * per_unit[:, mine].mean(1)
            found = Estimate.of(row[mine].tolist(), clusters=_where(subjects, mine))
            low, high = next_draw(null)
            beside = {"null": float(null.mean()), "null_low": float(low), "null_high": float(high)}
            line.append(asdict(found) | beside | {"p": float(next_draw_p(found.value, null))})
        table.append(line)
    every = [cell for line in table for cell in line]
    for cell, q in zip(every, false_discovery([cell["p"] for cell in every]), strict=True):
        cell["q"] = q
    return {"columns": names, "cells": table, "n_random": len(random)}


def _where(subjects: Sequence[Hashable], mask: Bool[Tensor, " n"]) -> list[Hashable]:
    return [s for s, chosen in zip(subjects, mask.tolist(), strict=True) if chosen]


def dose_for(removed: Sequence[float], doses: Sequence[float], target: float) -> float | None:
    """The smallest dose at which linear interpolation of the removals (0 at dose 0) reaches the target; None if none does."""
    x, y = [0.0, *doses], [0.0, *removed]
    for i in range(1, len(x)):
        if y[i] >= target > y[i - 1]:
            return float(np.interp(target, y[i - 1 : i + 1], x[i - 1 : i + 1]))
    return None


def dissociation(
    removed: Float[Tensor, "2 prompt"],
    size: float,
    random: Float[Tensor, "draw prompt"],
    random_sizes: Sequence[float],
    columns: Sequence[str],
    subjects: Sequence[Hashable],
    names: tuple[str, str],
) -> dict[str, Any]:
    """On the prompts of each of two kinds: removed by its own direction minus by the other kind's, paired by prompt.

    Both above 0 is a double dissociation: neither direction is just the stronger one. `selectivity` is the mean of the two, in
    which strength cancels: half a difference of the kinds' means of one quantity, with Welch's interval over subjects. Its p is
    two-sided against pairs of random directions scaled to `size`: (tilt of one draw - tilt of another) / 2, normal about 0.
    """
    masks = [torch.tensor([c == name for c in columns]) for name in names]
    own = [(removed[i] - removed[1 - i])[mask].tolist() for i, mask in enumerate(masks)]
    where = [_where(subjects, mask) for mask in masks]
    twice = Estimate.difference(own[0], [-x for x in own[1]], clusters=(where[0], where[1]))
    per_unit = random / torch.tensor(random_sizes, dtype=torch.float64)[:, None]
    tilt = size * (per_unit[:, masks[0]].mean(1) - per_unit[:, masks[1]].mean(1))
    each = zip(names, own, where, strict=True)
    return {
        "selectivity": {
            "value": twice.value / 2,
            "low": twice.low / 2,
            "high": twice.high / 2,
            "n": len(own[0]) + len(own[1]),
            "p": pair_p(twice.value, tilt),
        },
        **{name: asdict(Estimate.of(x, clusters=groups)) for name, x, groups in each},
    }


def auc(
    scores: Float[Tensor, " n"], refused: Bool[Tensor, " n"], subjects: Sequence[Hashable], *, within: bool = False
) -> dict[str, float]:
    """P(refused above answered), `within` of prompts on one subject, with its interval over subjects and two-sided p."""
    x, y = scores.tolist(), refused.tolist()
    if within:
        found, p = auc_within(x, y, subjects)
    else:
        area = auc_estimate(x, y, clusters=subjects)
        assert area is not None  # both sides are there
        found, p = area, auc_p(x, y, clusters=subjects)
    return asdict(found) | {"p": p}
