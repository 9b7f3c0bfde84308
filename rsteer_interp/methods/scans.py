"""SCANS: refusal is added for prompts that look unsafe and taken away from all others, in the middle layers.

Cao, Yang and Zhao, SCANS (arXiv 2408.11491); what the paper leaves open follows the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.gates import balanced_threshold, roc
from rsteer_interp.interventions import AtPositions, add
from rsteer_interp.lens import anchors
from rsteer_interp.methods.base import Check, Examples, Material, States, Treatment
from rsteer_interp.methods.depth import layers_between
from rsteer_interp.transition import Marker, SteerBySign, TransitionGate, similarity, transition, without_own

N_NORMS = 32  # prompts for the mean length of the stream


def scans_directions(
    harmful: States, benign: Sequence[States], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, " d"]]:
    """v_l = unit(mean harmful - mean benign) of last-token states, float64; every benign set counts the same."""
    found = {}
    for site in sites:
        v = harmful[site].double().mean(0) - torch.stack([x[site].double().mean(0) for x in benign]).mean(0)
        if not bool(v.norm() > 0):
            raise UserError(f"harmful and benign prompts have the same mean at {site}; give other prompts or layers")
        found[site] = v / v.norm()
    return found


@dataclass(frozen=True, eq=False)
class FittedScans:
    """Directions and mean |resid| at the steered sites, and the gate that gives each prompt its sign."""

    directions: Mapping[Site, Float[Tensor, " d"]]
    norms: Mapping[Site, float]
    gate: TransitionGate

    def __call__(self, strength: float) -> Treatment:
        return Treatment(self.edit(strength))

    def edit(self, strength: float) -> SteerBySign:
        """h' = h +- strength |resid| v_l at the positions from the end-of-instruction marker on, and while decoding.

        With a prompt pass of its own for prompts not seen before, so that a first run costs about twice as much.
        """

        def towards(sign: int) -> AtPositions:
            amounts = {site: sign * strength * self.norms[site] for site in self.directions}
            return AtPositions(add(self.directions, amounts), frozenset({"suffix", "generated"}))

        return SteerBySign(towards(1), towards(-1), self.gate)


@dataclass(frozen=True)
class Scans:
    """Vectors from the prompts to be refused against ordinary ones, at block outputs; unsafe is what looks like the former.

    The authors steer blocks 10 to 19 of 32 by 3.5 unit vectors; here the dose is relative, and the blocks are those at that
    depth or, with `layers="lens"`, those whose vector says refusal in the logit lens (the paper looks there, by eye). sigma
    is taken from the first block at that depth to the last block of the model. Every prompt that is not unsafe is steered
    against refusal, ordinary ones too, unless a `dead_band` leaves those near the threshold alone (see `TransitionGate`).
    sigma's level is the model's own (on the demo model every prompt is above the authors' 0.75), so the threshold is by
    default the one with the smallest worst expected error on the fit split, where each anchor is compared with the mean of
    the others; the authors too have one per test set, which they do not say how they chose.
    """

    name: ClassVar[str] = "scans"
    label: ClassVar[str] = "SCANS"
    source: ClassVar[str] = "arXiv 2408.11491"
    strengths: ClassVar[tuple[float, ...]] = (0.03, 0.06, 0.1, 0.15)

    first: float = 10 / 32
    last: float = 19 / 32
    layers: Literal["depth", "lens"] = "depth"
    threshold: float | Literal["fit"] = "fit"
    dead_band: float = 0.0
    opening: str = "Sure"
    marker: Marker = "prompt_end"

    def fit(self, material: Material) -> FittedScans:
        """One pass over the unsafe prompts with the opening, and for a threshold from fit one over the other sets."""
        harmful = material.fit[material.keep]
        benign = [material.fit[name].states for name in material.ordinary]
        depth = layers_between(material.n_layers, self.first, self.last)
        if self.layers == "depth":
            directions = scans_directions(harmful.states, benign, [Site(layer + 1) for layer in depth])
        else:
            everywhere = scans_directions(harmful.states, benign, [Site(x + 1) for x in range(material.n_layers)])
            seen = anchors(material.backend, everywhere, material.refusal_tokens, seed=material.seed)
            directions = {site: v for site, v in everywhere.items() if seen[site].anchored}
            if not directions:
                raise UserError("no layer's direction says refusal in the logit lens; use layers='depth'")
        gate = self._gate(material, [Site(x + 1) for x in range(depth[0], material.n_layers)])
        rows = material.template.encode_all(material.fit[material.remove].texts[:N_NORMS])
        return FittedScans(directions, mean_norms(material.backend, rows, list(directions)), gate)

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """ROC of the transition gate: prompts to be refused against ordinary ones and those to be freed."""
        gate = self.fit(material).gate

        def read(*names: str) -> Float[Tensor, " prompt"]:
            return gate.similarity(material.template.encode_all([t for n in names for t in held[n].texts]))

        names = (material.keep, material.remove, *material.ordinary)
        subjects = [(n, s) for n in names for s in held[n].subjects]
        found = roc(read(names[0]), read(*names[1:]), clusters=subjects, seed=material.seed)
        low, high = found.null
        what = "area under the ROC of the transition gate, prompts to be refused against all others"
        return [Check(what, found.area, f"permuted labels {low:.2f} to {high:.2f}")]

    def _gate(self, material: Material, sites: Sequence[Site]) -> TransitionGate:
        def measured(name: str) -> dict[Site, Float[Tensor, "prompt d"]]:
            rows = material.template.encode_all(material.fit[name].texts)
            return transition(material.backend, rows, sites, opening=self.opening, marker=self.marker)

        unsafe = measured(material.keep)
        reference = {site: t.double().mean(0) for site, t in unsafe.items()}
        threshold = self.threshold
        if threshold == "fit":
            outside = (material.remove, *material.ordinary)
            threshold = balanced_threshold(
                similarity(unsafe, without_own(unsafe)),
                {name: similarity(measured(name), reference) for name in outside},
            )
        return TransitionGate(material.backend, reference, threshold, self.dead_band, self.opening, self.marker)
