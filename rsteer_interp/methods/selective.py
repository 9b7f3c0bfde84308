"""Selective steering: a mean difference subtracted from those prompts alone for which a linear discriminant holds. Ours.

The condition is a topic gate after CAST (arXiv 2409.05907), with a discriminant in place of its cosine; the edit is made in
the prompt pass alone, as in AlphaSteer (arXiv 2506.07022), after the template prefix:

    h' = h - strength |resid|_l v_l      where      <h_gate, w> > t

Where the condition fails nothing is changed, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import MeanDifference, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate, Gated, balanced_threshold, discriminant
from rsteer_interp.interventions import OnPrompt, add
from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.methods.refusal_steering import evidence
from rsteer_interp.moments import Moments


def band(n_layers: int, depth: tuple[float, float]) -> list[Site]:
    """Block inputs whose share of the depth lies in a range, without the first; of a model too shallow for the range, the one
    nearest to its middle. UserError for a single layer."""
    low, high = depth
    layers = range(1, n_layers)
    if not layers:
        raise UserError("a model of one layer has no block input after the first; use a deeper model")
    nearest = min(layers, key=lambda layer: abs(layer / n_layers - (low + high) / 2))
    return [Site(layer) for layer in layers if low <= layer / n_layers <= high] or [Site(nearest)]


def norms(material: Material, sites: list[Site]) -> dict[Site, float]:
    """Mean |resid| over the own tokens of the refused prompts whose refusals are to go: the unit of relative doses."""
    fit = material.fit[material.remove]
    return mean_norms(material.backend, material.template.encode_all(fit.where(fit.refused).texts), sites)


@dataclass(frozen=True)
class Selective:
    """One discriminant gate before a band of middle layers, and there one mean difference per layer.

    Strength: |edit| / |resid| at each layer of the band, on the prompts for which the gate holds.
    """

    name: ClassVar[str] = "selective"
    label: ClassVar[str] = "Mean difference, conditional (ours)"
    source: ClassVar[str] = "this toolkit; after arXiv 2409.05907 and 2506.07022"
    strengths: ClassVar[tuple[float, ...]] = (0.04, 0.06, 0.08, 0.11)

    depth: tuple[float, float] = (0.5, 0.67)
    """Where it steers, as shares of the depth."""
    gate_depth: tuple[float, float] = (0.15, 0.45)
    """Where the condition may be read, before the first steered layer."""
    penalty: float = 0.3
    """Ridge of the discriminant, in mean eigenvalues of the covariance within sets."""

    def fit(self, material: Material) -> Fitted:
        """One forward pass over the refused fit prompts, for |resid|; all else from the states in the material."""
        sites, gate = band(material.n_layers, self.depth), self.condition(material)
        directions = fit_directions(MeanDifference(), evidence(material, sites))
        units, sizes = {site: d.unit for site, d in directions.items()}, norms(material, sites)

        def treatment(strength: float) -> Treatment:
            edit = add(units, {site: -strength * size for site, size in sizes.items()})
            return Treatment(Gated(OnPrompt(edit), gate))

        return treatment

    def condition(self, material: Material) -> Gate:
        """The gate with the largest ROC area on select (the first of equals), at its balanced threshold there.

        Inside are all prompts of the set whose refusals are to go, refused or not: the condition is on the subject. Outside
        are the set whose refusals stay and the ordinary ones, each counting the same.
        """
        outside = (material.keep, *material.ordinary)
        gates = [self._gate(material, site, outside) for site in band(material.n_layers, self.gate_depth)]
        best = max(gates, key=lambda gate: (_area(material, gate, outside), -gate.site.layer))
        select = material.select
        inside = best.scores(select[material.remove].states[best.site])
        return replace(
            best,
            threshold=balanced_threshold(inside, {n: best.scores(select[n].states[best.site]) for n in outside}),
        )

    def _gate(self, material: Material, site: Site, outside: tuple[str, ...]) -> Gate:
        moments = {name: Moments.of(material.fit[name].states[site]) for name in (material.remove, *outside)}
        w = discriminant([moments[material.remove]], [moments[name] for name in outside], self.penalty)
        return Gate(site, w, 0.0)


def _area(material: Material, gate: Gate, outside: tuple[str, ...]) -> float:
    inside = gate.scores(material.select[material.remove].states[gate.site])
    others: Tensor = torch.cat([gate.scores(material.select[name].states[gate.site]) for name in outside])
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(others))])
    return float(roc_auc_score(labels.numpy(), torch.cat([inside, others]).numpy()))
