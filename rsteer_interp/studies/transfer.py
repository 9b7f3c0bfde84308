"""What one kind's direction does to every other kind, from numbers alone: cells against random directions, matched doses, AUC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rsteer_interp.nulls import false_discovery
from rsteer_interp.statistics.intervals import Estimate


def cells(
    effect: Float[Tensor, "row prompt"],
    sizes: Sequence[float],
    random: Float[Tensor, "draw prompt"],
    random_sizes: Sequence[float],
    columns: Sequence[str],
) -> dict[str, Any]:
    """Mean effect of every row on the prompts of every column, with interval, null and two-sided p; q over all cells.

    `sizes` are those of the edits; a random edit's effect is scaled to the size of the row it is compared with. p is from the t
    prediction interval of one more random direction: t = z / sqrt(1 + 1/R), R - 1 degrees of freedom.
    """
    per_unit = random / torch.tensor(random_sizes, dtype=torch.float64)[:, None]
    count, names = len(random), list(dict.fromkeys(columns))
    widen, p = math.sqrt(1 + 1 / count), []
    table: list[list[dict[str, Any]]] = []
    for row, size in zip(effect, sizes, strict=True):
        line = []
        for name in names:
            mine = torch.tensor([c == name for c in columns])
            null = size * per_unit[:, mine].mean(1)
            mean, sd = float(null.mean()), max(float(null.std()), 1e-12)
            half = float(stats.t.ppf(0.975, count - 1)) * widen * sd
            found = Estimate.of(row[mine].tolist())
            p.append(2 * float(stats.t.sf(abs(found.value - mean) / (widen * sd), count - 1)))
            line.append(asdict(found) | {"null": mean, "null_low": mean - half, "null_high": mean + half, "p": p[-1]})
        table.append(line)
    for cell, q in zip([c for line in table for c in line], false_discovery(p), strict=True):
        cell["q"] = q
    return {"columns": names, "cells": table, "n_random": count}


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
    names: tuple[str, str],
) -> dict[str, Any]:
    """On the prompts of each of two kinds: removed by its own direction minus by the other kind's, paired by prompt.

    Both above 0 is a double dissociation: neither direction is just the stronger one. `selectivity` is the mean of the two,
    in which strength cancels; its p is two-sided against pairs of random directions scaled to `size` (t, R - 1 degrees of
    freedom), its interval Student's t with the variances of both kinds' prompts.
    """
    masks = [torch.tensor([c == name for c in columns]) for name in names]
    own = [(removed[i] - removed[1 - i])[mask] for i, mask in enumerate(masks)]
    value = float(sum(x.mean() for x in own)) / 2
    spread = math.sqrt(sum(float(x.var()) / len(x) for x in own)) / 2
    half = float(stats.t.ppf(0.975, min(len(x) for x in own) - 1)) * spread
    per_unit = random / torch.tensor(random_sizes, dtype=torch.float64)[:, None]
    tilt = size * (per_unit[:, masks[0]].mean(1) - per_unit[:, masks[1]].mean(1))
    chance = max(float(tilt.std()), 1e-12) / math.sqrt(2)  # of (tilt of one draw - tilt of another) / 2
    p = 2 * float(stats.t.sf(abs(value) / chance, len(tilt) - 1))
    n = sum(len(x) for x in own)
    return {
        "selectivity": {"value": value, "low": value - half, "high": value + half, "n": n, "p": p},
        **{name: asdict(Estimate.of(x.tolist())) for name, x in zip(names, own, strict=True)},
    }


def auc(refused: Float[Tensor, " m"], answered: Float[Tensor, " n"]) -> dict[str, float]:
    """P(refused above answered) + P(equal) / 2, with DeLong's (1988) interval and the Mann-Whitney p."""
    above = (refused[:, None] > answered).double() + 0.5 * (refused[:, None] == answered).double()
    value = float(above.mean())
    spread = math.sqrt(float(above.mean(1).var()) / len(refused) + float(above.mean(0).var()) / len(answered))
    p = float(stats.mannwhitneyu(refused.numpy(), answered.numpy()).pvalue)
    half = 1.96 * spread
    return {
        "value": value,
        "low": max(value - half, 0.0),
        "high": min(value + half, 1.0),
        "p": p,
        "n": len(refused) + len(answered),
    }
