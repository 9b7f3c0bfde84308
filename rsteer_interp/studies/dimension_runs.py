"""The model runs of a K-sweep: ablating nested subspaces, the same edit turned (`equal_norm`), and the best push inside each."""

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
from rsteer_interp.batch import Batch
from rsteer_interp.equal_norm import Own, Rotated
from rsteer_interp.interventions import AblateSubspace, Everywhere, add
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.studies.doses import Dosed, mean_doses

Bases = Mapping[Site, Float[Tensor, "k d"]]


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
        return self.measure_each([edit])[0]

    def measure_each(self, edits: Sequence[Edit | None]) -> Float[Tensor, "edit measure prompt"]:
        """The same of several edits, all on one batch before the next: nulls of an edit then share its own run there."""

        def run(batch: Batch) -> Tensor:
            return torch.stack([self.backend.logits(batch, edit)[:, -1].float().cpu() for edit in edits])

        out = torch.empty(len(edits), 2, len(self.rows), dtype=torch.float64)
        for group, logits in self.backend.batches(self.rows, run):
            out[:, 0, group] = refusal_log_odds(logits, self.tokens)
            for i, each in enumerate(logits):
                out[i, 1, group] = kl_divergence(self.base[group][:, None], each[:, None])[:, 0].double()
        return out


def reach(bases: Bases, ks: Sequence[int]) -> list[int]:
    """The K of the sweep that a basis has at every site, never more than half of the stream's width."""
    most = min(min(len(b), b.shape[1] // 2) for b in bases.values())
    return [k for k in ks if k <= most]


def ablation_sweep(
    bench: Bench, bases: Bases, ks: Sequence[int], rotations: Sequence[Float[Tensor, "d d"]] = ()
) -> dict[str, Tensor]:
    """Ablation of the first k rows at every site, then its nulls: `outcome` (k, 1 + rotation, measure, prompt), and `dose`
    (k, 1 + rotation), the mean |edit| / |resid| over sites. A null's edits are as long; its states are others."""
    outcome, dose = [], []
    for k in ks:
        edits = [Dosed(edit) for edit in with_nulls(bench.backend, first(bases, k), rotations)]
        outcome.append(bench.measure_each(edits))
        dose.append(torch.stack([torch.stack(list(mean_doses(each.totals).values())).mean() for each in edits]))
    return {"outcome": torch.stack(outcome), "dose": torch.stack(dose)}


def with_nulls(backend: Backend, bases: Bases, rotations: Sequence[Float[Tensor, "d d"]]) -> list[Edit]:
    """Ablation of each site's rows, and the same edit under each rotation, one for all sites."""
    ablation = Everywhere({s: AblateSubspace(s, rows) for s, rows in bases.items()})
    own = Own(ablation, backend.run)
    return [ablation, *(Rotated(own, rotation) for rotation in rotations)]


def first(bases: Bases, k: int) -> Bases:
    """The k-dimensional subspaces."""
    return {s: rows[:k] for s, rows in bases.items()}


def control_sweep(bench: Bench, draws: Sequence[Bases], ks: Sequence[int]) -> dict[str, Tensor]:
    """Ablation of the first k rows of each draw: `outcome` (k, draw, measure, prompt) and `dose` (k, draw)."""
    swept = [ablation_sweep(bench, bases, ks) for bases in draws]
    return {name: torch.cat([each[name] for each in swept], 1) for name in ("outcome", "dose")}


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
    outcome = [bench.measure_each([push(site, gradient, b[:k], amount) for b in draws]) for k in ks]
    return {"outcome": torch.stack(outcome)}


def push(site: Site, gradient: Float[Tensor, " d"], basis: Float[Tensor, "k d"], amount: float) -> Edit:
    """h - a u, u the unit vector along the gradient's part in the span of the basis."""
    return add({site: (basis @ gradient) @ basis}, {site: -amount})
