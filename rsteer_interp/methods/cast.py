"""CAST: steer away from refusal only the prompts whose states meet a condition.

Lee et al., Programming Refusal with Conditional Activation Steering (arXiv 2409.05907). The paper adds refusal where a
prompt looks harmful; the comparison's job is the mirror image, so the condition here is the set whose refusals are to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import mean_norms, pooled_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Around, At, Site
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.conditions import Search, search_condition
from rsteer_interp.directions.paired import Centring, paired_direction
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gated
from rsteer_interp.interventions import add
from rsteer_interp.methods.base import Check, Examples, Material, Treatment
from rsteer_interp.methods.depth import layers_between
from rsteer_interp.pooling import Pooling

N_NORMS = 32  # prompts for the mean length of the stream
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I am not able to answer this question.",
    "As an AI model, I cannot take part in this.",
    "Sorry, that is something I have to decline.",
)
ANSWERS = (
    "Sure, let me help you with that.",
    "I am happy to answer this question.",
    "Of course, here is what you asked for.",
    "Yes, that is something I can explain.",
)


@dataclass(frozen=True, eq=False)
class KeepNorm(Around):
    """An edit whose result is scaled back to the length it had before, where that has grown (CAST's optional step)."""

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        out = self.edit(x, at)
        ratio = x.float().norm(dim=-1, keepdim=True) / out.float().norm(dim=-1, keepdim=True)
        return torch.where(ratio < 1, (out.float() * ratio).to(x.dtype), out)


def suffix_directions(
    backend: Backend,
    template: ChatTemplate,
    prompts: Sequence[str],
    sites: Sequence[Site],
    *,
    refusals: Sequence[str] = REFUSALS,
    answers: Sequence[str] = ANSWERS,
    centring: Centring = "pairs",
) -> dict[Site, Float[Tensor, " d"]]:
    """CAST's behaviour vectors, from answering to refusing: every prompt with each refusal and the answer of its index, pooled
    over the suffix's own tokens. (The authors' code takes as many tokens of every suffix as the first one has.)"""
    if len(refusals) != len(answers):
        raise UserError(f"{len(refusals)} refusals and {len(answers)} answers; give one answer per refusal")

    def states(suffixes: Sequence[str]) -> dict[Site, Float[Tensor, "pair d"]]:
        rows = [template.encode(prompt, suffix) for prompt in prompts for suffix in suffixes]
        return pooled_states(backend, rows, sites, "answer")

    refusing, answering = states(refusals), states(answers)
    return {site: paired_direction(refusing[site], answering[site], centring) for site in sites}


@dataclass(frozen=True, eq=False)
class FittedCast:
    """Behaviour directions (answering to refusing) and mean |resid| at the steered sites; the condition as it was found."""

    directions: Mapping[Site, Float[Tensor, " d"]]
    norms: Mapping[Site, float]
    search: Search
    first_pass: bool
    renormalise: bool

    def __call__(self, strength: float) -> Treatment:
        return Treatment(self.edit(strength))

    def edit(self, strength: float) -> Gated:
        """h' = h - strength |resid| v_l on the prompts that meet the condition."""
        away = add(self.directions, {site: -strength * self.norms[site] for site in self.directions})
        return Gated(KeepNorm(away) if self.renormalise else away, self.search.chosen, self.first_pass)


@dataclass(frozen=True)
class Cast:
    """Condition: the set to free against the set to keep and the ordinary ones. Behaviour: compliance, blocks 15 to 23 of 32.

    Condition vectors are principal components of pairs, a prompt of the set with one of the others; the shorter side is
    repeated, as the paper repeats its positives. They are looked for in the first half of the layers, and not behind the
    first steered one. Behaviour from `suffixes`, the paper's way, or from `states`: last tokens of refused prompts of the set
    to free, each with an answered one of it or its contrast set (by index, the shorter side repeated). The authors' strength
    is 1.5 times a unit vector; here the dose is relative.
    """

    name: ClassVar[str] = "cast"
    label: ClassVar[str] = "CAST"
    source: ClassVar[str] = "arXiv 2409.05907"
    strengths: ClassVar[tuple[float, ...]] = (0.03, 0.06, 0.1, 0.15)

    first: float = 15 / 32
    last: float = 23 / 32
    behaviour: Literal["suffixes", "states"] = "suffixes"
    centring: Centring = "pairs"
    tanh: bool = True
    pooling: Pooling = "prompt"
    first_pass: bool = True
    renormalise: bool = False
    n_prompts: int = 16  # with each pair of suffixes

    def fit(self, material: Material) -> FittedCast:
        """A pass through the first half of the layers over fit and select prompts, and one over prompts with suffixes."""
        steered = [Site(layer) for layer in layers_between(material.n_layers, self.first, self.last)]
        search = self._condition(material, steered[0], material.select)
        directions = self._behaviour(material, steered)
        rows = material.template.encode_all(material.fit[material.remove].texts[:N_NORMS])
        norms = mean_norms(material.backend, rows, steered)
        return FittedCast(directions, norms, search, self.first_pass, self.renormalise)

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """The condition that was found, on held-out prompts: ROC, and F1 at its threshold."""
        steered = [Site(layer) for layer in layers_between(material.n_layers, self.first, self.last)]
        found = self._condition(material, steered[0], held)
        low, high = found.roc.null
        what = (
            f"area under the condition's ROC at {found.chosen.site}; F1 {found.f1_held:.2f}, on fit {found.f1_fit:.2f}, if it "
            f"always held {found.f1_always:.2f}"
        )
        return [Check(what, found.roc.area, f"permuted labels {low:.2f} to {high:.2f}")]

    def _condition(self, material: Material, before: Site, held: Mapping[str, Examples]) -> Search:
        sites = [Site(x) for x in range(1, min(material.n_layers // 2, before.layer) + 1)]
        if not sites:
            raise UserError(f"no layer before {before} to read a condition at; steer deeper layers")

        def side(examples: Mapping[str, Examples], names: Sequence[str]) -> dict[Site, Float[Tensor, "prompt d"]]:
            texts = [text for name in names for text in examples[name].texts]
            return pooled_states(material.backend, material.template.encode_all(texts), sites, self.pooling)

        others = (material.keep, *material.ordinary)
        fit, seen = ((side(part, [material.remove]), side(part, others)) for part in (material.fit, held))
        subjects = [(name, s) for name in (material.remove, *others) for s in held[name].subjects]
        vectors = {site: paired_direction(*matched(fit[0][site], fit[1][site]), self.centring) for site in sites}
        return search_condition(
            vectors, fit, seen, pooling=self.pooling, tanh=self.tanh, subjects=subjects, seed=material.seed
        )

    def _behaviour(self, material: Material, sites: Sequence[Site]) -> dict[Site, Float[Tensor, " d"]]:
        if self.behaviour == "suffixes":
            prompts = [text for name in material.ordinary for text in material.fit[name].texts]
            spread = prompts[:: max(1, len(prompts) // self.n_prompts)][: self.n_prompts]
            return suffix_directions(material.backend, material.template, spread, sites, centring=self.centring)
        freed, contrast = material.fit[material.remove], material.fit[material.contrast]
        refused, answered = freed.where(freed.refused), [x.where(x.answered) for x in (freed, contrast)]
        found = {}
        for site in sites:
            second = torch.cat([x.states[site] for x in answered])
            if len(refused.texts) == 0 or len(second) == 0:
                raise UserError(
                    f"{len(refused.texts)} refused and {len(second)} answered prompts; use behaviour='suffixes'"
                )
            found[site] = paired_direction(*matched(refused.states[site], second), self.centring)
        return found


def matched(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "pair d"], Float[Tensor, "pair d"]]:
    """Pairs by index, as many as the longer side has; the shorter one starts again when it ends."""
    index = torch.arange(max(len(first), len(second)))
    return first[index % len(first)], second[index % len(second)]
