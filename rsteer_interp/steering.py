"""Steering: one saved configuration (method, layers, vectors, scales, alpha, reposition) that becomes an Edit.

Refusal Steering (arXiv 2512.16602), section 3.3: at all positions and every decoding step, at each chosen block input,

    addition:    h' = h + alpha s v                  reposition:    h' = h - <h - o, v> v + alpha s v

With a gate, only on prompts that meet its condition, and from the end of the template prefix on; with `while_decoding`
False on the prompt alone, as in AlphaSteer (arXiv 2506.07022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate, Gated, Score
from rsteer_interp.interventions import OnPrompt, add, check_finite, set_component
from rsteer_interp.pooling import Pooling
from rsteer_interp.results import Provenance, load_result, save_result

KIND = "steering"


@dataclass(frozen=True, eq=False)
class Steering:
    """What is steered, and by how much. `amounts` are alpha s_l in units of the residual stream, signed: negative
    moves away from refusal."""

    method: str
    sites: tuple[Site, ...]
    directions: Float[Tensor, "site d"]  # unit vectors, complying to refusing
    references: Float[Tensor, "site d"]  # neutral means o_l
    scales: tuple[float, ...]
    alpha: float
    reposition: bool
    refusal_tokens: tuple[int, ...] = ()
    fingerprint: str = ""
    gate: Gate | None = None
    while_decoding: bool = True

    def __post_init__(self) -> None:
        check_finite("alpha of a steering", self.alpha)
        for site, amount in self.amounts.items():
            check_finite(f"the amount (alpha times scale) of a steering at {site}", amount)
        check_finite("a direction of a steering", self.directions)
        check_finite("a reference of a steering", self.references)

    @property
    def k(self) -> int:
        return len(self.sites)

    @property
    def amounts(self) -> dict[Site, float]:
        return {site: self.alpha * scale for site, scale in zip(self.sites, self.scales, strict=True)}

    def edit(self) -> Edit | None:
        """The edit; None for alpha = 0 without reposition, which is no edit."""
        if self.alpha == 0 and not self.reposition:
            return None
        vectors = dict(zip(self.sites, self.directions, strict=True))
        references = dict(zip(self.sites, self.references, strict=True))
        edit = set_component(vectors, references, self.amounts) if self.reposition else add(vectors, self.amounts)
        if not self.while_decoding:
            edit = OnPrompt(edit)
        return edit if self.gate is None else Gated(edit, self.gate)

    def dose(self, states: Mapping[Site, Float[Tensor, "prompt d"]]) -> float:
        """Relative dose: mean over sites and prompts of |edit| / |resid|, on unsteered states at those sites."""
        shares = []
        for site, v, o in zip(self.sites, self.directions, self.references, strict=True):
            h = states[site].double()
            change = torch.full((len(h),), self.amounts[site], dtype=torch.float64)
            if self.reposition:
                change = change - (h - o.double()) @ v.double()
            shares.append((change.abs() / h.norm(dim=-1)).mean())
        return float(torch.stack(shares).mean())

    def save(self, folder: Path, provenance: Provenance, extra: Mapping[str, Any] | None = None) -> None:
        """Write the configuration as a result folder of kind `steering`."""
        data = _Stored(
            method=self.method,
            sites=[str(site) for site in self.sites],
            scales=list(self.scales),
            alpha=self.alpha,
            reposition=self.reposition,
            refusal_tokens=list(self.refusal_tokens),
            fingerprint=self.fingerprint,
            gate=None if self.gate is None else _StoredGate.of(self.gate),
            while_decoding=self.while_decoding,
        ).model_dump() | dict(extra or {})
        tensors = {"directions": self.directions.float(), "references": self.references.float()}
        if self.gate is not None:
            tensors["gate"] = self.gate.direction.double()
        save_result(folder, KIND, data, tensors, provenance=provenance)


class _StoredGate(BaseModel):
    site: str
    threshold: float
    score: Score
    pooling: Pooling

    @classmethod
    def of(cls, gate: Gate) -> _StoredGate:
        return cls(site=str(gate.site), threshold=gate.threshold, score=gate.score, pooling=gate.pooling)

    def gate(self, direction: Float[Tensor, " d"]) -> Gate:
        return Gate(Site.parse(self.site), direction, self.threshold, self.score, self.pooling)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore")

    method: str
    sites: list[str]
    scales: list[float]
    alpha: float
    reposition: bool
    refusal_tokens: list[int]
    fingerprint: str
    gate: _StoredGate | None = None
    while_decoding: bool = True


def load_steering(folder: Path, backend: Backend | None = None, *, other_model: bool = False) -> Steering:
    """A saved configuration, checked against the backend's model: fingerprint (unless `other_model`), width and sites."""
    fingerprint = backend.fingerprint if backend is not None and not other_model else None
    result = load_result(folder, kind=KIND, fingerprint=fingerprint)
    stored = _Stored.model_validate(result.data)
    steering = Steering(
        stored.method,
        tuple(Site.parse(site) for site in stored.sites),
        result.tensor("directions", len(stored.sites), -1),
        result.tensor("references", len(stored.sites), -1),
        tuple(stored.scales),
        stored.alpha,
        stored.reposition,
        tuple(stored.refusal_tokens),
        stored.fingerprint,
        None if stored.gate is None else stored.gate.gate(result.tensor("gate", -1)),
        stored.while_decoding,
    )
    if backend is not None:
        width = steering.directions.shape[1]
        if width != backend.d_model:
            raise UserError(
                f"'{folder}' steers a model of width {width}, this one has {backend.d_model}; use its own model"
            )
        backend.check_sites(steering.edit())
    return steering


def make_steering(
    method: str,
    directions: Mapping[Site, Float[Tensor, " d"]],
    references: Mapping[Site, Float[Tensor, " d"]],
    scales: Mapping[Site, tuple[float, float]],
    sites: Sequence[Site],
    *,
    alpha: float,
    reposition: bool,
    refusal_tokens: Sequence[int] = (),
    fingerprint: str = "",
    gate: Gate | None = None,
    while_decoding: bool = True,
) -> Steering:
    """The configuration for given sites; s_l is s+ for alpha > 0 and s- for alpha < 0 (the paper's sign rule)."""
    ordered = tuple(sorted(sites))
    return Steering(
        method,
        ordered,
        torch.stack([directions[site] / directions[site].norm() for site in ordered]).float(),
        torch.stack([references[site] for site in ordered]).float(),
        tuple(scales[site][0 if alpha > 0 else 1] for site in ordered),
        alpha,
        reposition,
        tuple(refusal_tokens),
        fingerprint,
        gate,
        while_decoding,
    )
