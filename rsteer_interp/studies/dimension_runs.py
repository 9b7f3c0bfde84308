"""The model runs of a K-sweep: ablating nested subspaces, the same dose into random ones, and the best push inside each.

The equal-dose null of an ablation moves the same component U^T B h instead of B^T B h. Over several layers a real
ablation finds little left to remove after the first, and the null would move the whole component again at every layer; so it is scaled, per site, to
the dose that the ablation really had there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.interventions import AblateSubspace, Everywhere, add
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.studies.doses import Dosed, RecordShares, mean_doses

Bases = Mapping[Site, Float[Tensor, "r d"]]


@dataclass(frozen=True)
class Bench:
    """Prompts on which edits are tried: their logits without an edit, and what is measured under one."""

    backend: Backend
    rows: Prepared
    tokens: tuple[int, ...]
    base: Float[Tensor, "prompt vocab"]

    @classmethod
    def of(cls, backend: Backend, rows: Sequence[Any], tokens: tuple[int, ...], layer: int) -> Bench:
        """For edits at or after block `layer`."""
        prepared = backend.prepare(rows, layer)
        return cls(backend, prepared, tokens, _first_logits(backend, prepared, None))

    def measure(self, edit: Edit | None) -> Float[Tensor, "measure prompt"]:
        """Refusal log-odds, and KL(base || edited) of the first token's distribution, in nats, per prompt."""
        logits = _first_logits(self.backend, self.rows, edit)
        kl = kl_divergence(self.base[:, None], logits[:, None])[:, 0]
        return torch.stack([refusal_log_odds(logits, self.tokens), kl.double()])


def _first_logits(backend: Backend, rows: Prepared, edit: Edit | None) -> Float[Tensor, "prompt vocab"]:
    parts = [
        (group, logits.float().cpu())
        for group, logits in backend.batches(rows, lambda b: backend.logits(b, edit)[:, -1])
    ]
    out = torch.empty(len(rows), parts[0][1].shape[1])
    for group, logits in parts:
        out[group] = logits
    return out


def reach(bases: Bases, ks: Sequence[int]) -> list[int]:
    """The K of the sweep that a basis has at every site, never more than half of the stream's width."""
    most = min(min(len(b), b.shape[1] // 2) for b in bases.values())
    return [k for k in ks if k <= most]


def ablation_sweep(bench: Bench, bases: Bases, ks: Sequence[int], targets: Sequence[Bases]) -> dict[str, Tensor]:
    """Ablation of the first k rows at every site, then the same dose into each of the targets.

    `outcome` (k, 1 + target, measure, prompt) and `dose` (k, 1 + target): mean |edit| / |resid| over sites.
    """
    shares = RecordShares(bases)
    for _ in bench.backend.batches(bench.rows, lambda batch: bench.backend.run(batch, shares)):
        pass
    unedited = mean_doses(shares.totals)
    outcome, dose = [], []
    for k in ks:
        own, applied = _run(bench, {s: AblateSubspace(s, b[:k]) for s, b in bases.items()})
        scale = {s: float(applied[s] / unedited[s][k - 1]) for s in bases}
        runs = [(own, applied)]
        for into in targets:
            moved = {s: AblateSubspace(s, b[:k], into[s][:k], scale[s]) for s, b in bases.items()}
            runs.append(_run(bench, moved))
        outcome.append(torch.stack([values for values, _ in runs]))
        dose.append(torch.tensor([_mean(doses) for _, doses in runs], dtype=torch.float64))
    return {"outcome": torch.stack(outcome), "dose": torch.stack(dose)}


def control_sweep(bench: Bench, draws: Sequence[Bases], ks: Sequence[int]) -> dict[str, Tensor]:
    """Plain ablation of the first k rows of each draw: `outcome` (k, draw, measure, prompt) and `dose` (k, draw)."""
    outcome, dose = [], []
    for k in ks:
        runs = [_run(bench, {s: AblateSubspace(s, b[:k]) for s, b in bases.items()}) for bases in draws]
        outcome.append(torch.stack([values for values, _ in runs]))
        dose.append(torch.tensor([_mean(doses) for _, doses in runs], dtype=torch.float64))
    return {"outcome": torch.stack(outcome), "dose": torch.stack(dose)}


def push_sweep(
    bench: Bench,
    site: Site,
    gradient: Float[Tensor, " d"],
    draws: Sequence[Float[Tensor, "r d"]],
    ks: Sequence[int],
    amount: float,
) -> dict[str, Tensor]:
    """Adding `amount` against the gradient of the log-odds as far as it lies in the first k rows of each draw (that is the best
    constant push inside the subspace, to first order): `outcome` (k, draw, measure, prompt)."""
    outcome = [torch.stack([bench.measure(push(site, gradient, b[:k], amount)) for b in draws]) for k in ks]
    return {"outcome": torch.stack(outcome)}


def push(site: Site, gradient: Float[Tensor, " d"], basis: Float[Tensor, "k d"], amount: float) -> Edit:
    """h - a u, u the unit vector along the gradient's part in the span of the basis."""
    return add({site: (basis @ gradient) @ basis}, {site: -amount})


def _run(bench: Bench, edits: Mapping[Site, Edit]) -> tuple[Float[Tensor, "measure prompt"], dict[Site, Tensor]]:
    edit = Dosed(Everywhere(edits))
    return bench.measure(edit), mean_doses(edit.totals)


def _mean(doses: Mapping[Site, Tensor]) -> float:
    return float(torch.stack(list(doses.values())).mean())
