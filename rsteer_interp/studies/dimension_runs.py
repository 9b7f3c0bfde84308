"""The model runs of a K-sweep: ablating nested subspaces, the same displacements turned, and the best push inside each.

Over several sites a real ablation finds little left to remove after the first, so its null is not a projection of its own but the
displacements of that very run, turned by one rotation (`turned_ablation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Batch
from rsteer_interp.interventions import add
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.studies.doses import Dosed, RecordShares, Totals, mean_doses
from rsteer_interp.studies.turned_ablation import Ablated, Bases, Turned


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
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        for group, found in backend.batches(prepared, lambda batch: backend.logits(batch)[:, -1].float().cpu()):
            for i, one in zip(group, found, strict=True):
                logits[i] = one
        return cls(backend, prepared, tokens, torch.stack(logits))

    def measure(self, edit: Edit | None) -> Float[Tensor, "measure prompt"]:
        """Refusal log-odds, and KL(base || edited) of the first token's distribution, in nats, per prompt."""
        return self.measure_each(lambda: [edit])[0]

    def measure_each(self, edits: Callable[[], Sequence[Edit | None]]) -> Float[Tensor, "edit measure prompt"]:
        """The same of several edits, made anew for every batch and run on it in order: one may replay what another did there."""

        def run(batch: Batch) -> Tensor:
            return torch.stack([self.backend.logits(batch, edit)[:, -1].float().cpu() for edit in edits()])

        parts = []
        for group, logits in self.backend.batches(self.rows, run):
            base = self.base[group][:, None]
            kl = torch.stack([kl_divergence(base, each[:, None])[:, 0].double() for each in logits])
            parts.append((group, torch.stack([refusal_log_odds(logits, self.tokens), kl], 1)))
        out = torch.empty(*parts[0][1].shape[:2], len(self.rows), dtype=torch.float64)
        for group, values in parts:
            out[..., group] = values
        return out


def reach(bases: Bases, ks: Sequence[int]) -> list[int]:
    """The K of the sweep that a basis has at every site, never more than half of the stream's width."""
    most = min(min(len(b), b.shape[1] // 2) for b in bases.values())
    return [k for k in ks if k <= most]


def ablation_sweep(bench: Bench, bases: Bases, ks: Sequence[int], turned: Sequence[Bases]) -> dict[str, Tensor]:
    """Ablation of the first k rows at every site, then the same displacements in each of the `turned` bases.

    `outcome` (k, 1 + turned, measure, prompt); `dose` (k, 1 + turned, site): mean |edit| / |resid|; `share` (k, site): the mean
    |B h| / |h| of the unedited stream.
    """
    shares = RecordShares(bases)
    for _ in bench.backend.batches(bench.rows, lambda batch: bench.backend.run(batch, shares)):
        pass
    unedited = mean_doses(shares.totals)
    outcome, dose = [], []
    for k in ks:
        first = [{s: b[:k] for s, b in each.items()} for each in (bases, *turned)]
        totals: list[Totals] = [{} for _ in first]
        outcome.append(bench.measure_each(partial(_with_null, first, totals)))
        dose.append(torch.stack([_by_site(kept, bases) for kept in totals]))
    share = torch.stack([torch.stack([unedited[s][k - 1] for s in bases]) for k in ks])
    return {"outcome": torch.stack(outcome), "dose": torch.stack(dose), "share": share}


def _with_null(bases: Sequence[Bases], totals: Sequence[Totals]) -> list[Edit]:
    """The ablation of the first bases, and its displacements in each of the others; doses go to the totals."""
    ablated = Ablated(bases[0])
    edits: list[Edit] = [ablated, *(Turned(ablated, into) for into in bases[1:])]
    return [Dosed(edit, kept) for edit, kept in zip(edits, totals, strict=True)]


def control_sweep(bench: Bench, draws: Sequence[Bases], ks: Sequence[int]) -> dict[str, Tensor]:
    """Plain ablation of the first k rows of each draw: `outcome` (k, draw, measure, prompt) and `dose` (k, draw, site)."""
    outcome, dose = [], []
    for k in ks:
        edits = [Dosed(Ablated({s: b[:k] for s, b in bases.items()})) for bases in draws]
        outcome.append(torch.stack([bench.measure(edit) for edit in edits]))
        dose.append(torch.stack([_by_site(edit.totals, draws[0]) for edit in edits]))
    return {"outcome": torch.stack(outcome), "dose": torch.stack(dose)}


def _by_site(totals: Totals, bases: Bases) -> Float[Tensor, " site"]:
    found = mean_doses(totals)
    return torch.cat([found[s] for s in bases])


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
