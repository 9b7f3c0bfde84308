"""DBDI: project out what carries a refusal out, and shift against what detects harm, at one layer.

Zhang and Sun, Differentiated Bi-Directional Intervention (arXiv 2511.06852), known to us from descriptions that disagree in
part. What they leave open is a named parameter here: pairing, share of coordinates kept, alpha, order. Our reading throughout:
last prompt token, uncentred differences.

    h1 = h - alpha <h, r> r          h' = h1 - beta g          r execution, g detection, unit vectors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Compose, Edit, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.directions.paired import paired_direction
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.gates import discriminant
from rsteer_interp.interventions import Affine
from rsteer_interp.methods.base import Check, Examples, Fitted, Material, Treatment
from rsteer_interp.methods.probe_crossing import harm_probe
from rsteer_interp.methods.separability import cross_validated_accuracy
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import cosine
from rsteer_interp.prompts import BUILT_IN, load_prompts
from rsteer_interp.selection import steerable_layers
from rsteer_interp.statistics.intervals import Estimate

Order = Literal["project_first", "shift_first"]
Support = Literal["classifier", "random"]
Pairing = Literal["aligned", "nearest"]
Pairs = tuple[Float[Tensor, "pair d"], Float[Tensor, "pair d"]]
LEAST_ALIGNED = 8  # fewer aligned pairs than this, and pairs are nearest states
N_NORM = 16  # prompts over which |resid| is averaged
N_BORDERLINE = 24  # prompts of the dissociation


def dbdi_edit(
    site: Site,
    execution: Float[Tensor, " d"],
    detection: Float[Tensor, " d"],
    *,
    alpha: float = 1.0,
    beta: float,
    order: Order = "project_first",
) -> Edit:
    """h1 = h - alpha <h, r> r, then h' = h1 - beta g; or, with `shift_first`, the other way round. beta in units of the stream."""
    project, shift = Affine(site, execution, kappa=alpha), Affine(site, detection, amount=-beta)
    return Compose((project, shift) if order == "project_first" else (shift, project))


def order_gap(
    execution: Float[Tensor, " d"], detection: Float[Tensor, " d"], *, alpha: float, beta: float
) -> Float[Tensor, " d"]:
    """Project-then-shift minus shift-then-project: -alpha beta <r, g> r, the same for every state, in float64.

    Order can matter only through the overlap <r, g>: report it beside any claim about order.
    """
    r, g = (v.double() / v.double().norm() for v in (execution, detection))
    gap: Tensor = -alpha * beta * (r @ g) * r
    return gap


@dataclass(frozen=True, eq=False)
class TwoDirections:
    """What DBDI learned: unit directions towards refusal (r) and harm (g) in float64, at the site they are used at.

    `accuracy` is the cross-validated balanced accuracy of refused against answered prompts by layer; empty where the layer was
    given. `pairing` is the one that was used.
    """

    site: Site
    execution: Float[Tensor, " d"]
    detection: Float[Tensor, " d"]
    pairing: Pairing
    accuracy: dict[int, float]

    @property
    def overlap(self) -> float:
        """<r, g>."""
        return cosine(self.execution, self.detection)

    def edit(self, beta: float, *, alpha: float = 1.0, order: Order = "project_first") -> Edit:
        return dbdi_edit(self.site, self.execution, self.detection, alpha=alpha, beta=beta, order=order)


@dataclass(frozen=True)
class Dbdi:
    """DBDI with the strength as relative dose of the shift, beta = strength |resid|; the projection has a strength of its own.

    Execution is learned from refused against answered prompts of `material.remove` and `material.contrast`, detection from
    `material.keep` against the ordinary set named first. The published edit shifts against harm itself, so it is not made to
    keep refusals of harmful prompts; how far it does is what a comparison shows.
    """

    name: ClassVar[str] = "dbdi"
    label: ClassVar[str] = "DBDI"
    source: ClassVar[str] = "arXiv 2511.06852"
    strengths: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4)

    alpha: float = 1.0
    """Share of the execution component that is removed. The paper's value is not known to us; 1 removes all of it."""
    order: Order = "project_first"
    kept: float = 0.3
    """Share k of the coordinates that stay after sparsifying. The paper's is not known to us; 0.3 is our choice."""
    support: Support = "classifier"
    """Which coordinates stay: those that a linear classifier ranks first, or as many at random (the control)."""
    pairing: Pairing = "aligned"
    """Execution pairs: prompts at the same place of two built-in sets that share the form of a request (of refused and answered
    ones; with fewer than 8 of them, and for other sets, nearest states), or always nearest states."""
    layer: int | None = None
    """The edited block input; None chooses it by 5-fold cross-validated linear accuracy."""
    slack: float = 1.0
    """The earliest layer within so many standard errors of the best accuracy is chosen, ours; 0 takes the best, the paper's. With
    some hundred prompts the best of a plateau is chance, and an early edit has more of the model after it."""

    def fit(self, material: Material) -> Fitted:
        """From the states in the material, and one pass over a few ordinary prompts for |resid|."""
        found = self.directions(material)
        texts = material.fit[material.ordinary[0]].texts[:N_NORM]
        norm = mean_norms(material.backend, material.template.encode_all(texts), [found.site])[found.site]
        return lambda strength: Treatment(found.edit(strength * norm, alpha=self.alpha, order=self.order))

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """The double dissociation on borderline prompts: what projecting and what shifting does to refusal and to a harm probe."""
        from rsteer_interp.methods.dissociation import dissociation  # which knows TwoDirections

        found, keep, ordinary = self.directions(material), material.keep, material.ordinary[0]
        site = found.site
        texts = material.fit[ordinary].texts[:N_NORM]
        norm = mean_norms(material.backend, material.template.encode_all(texts), [site])[site]
        fit, select = (
            [part[name].states[site] for name in (keep, ordinary)] for part in (material.fit, material.select)
        )
        borderline = load_prompts("borderline").split("report").sample(N_BORDERLINE, material.seed)
        rows, subjects = material.template.encode_all(borderline.texts), [p.subject for p in borderline]
        seen = dissociation(
            material.backend,
            rows,
            material.refusal_tokens,
            found,
            harm_probe(site, fit[0], fit[1], select[0], select[1]),
            alpha=self.alpha,
            beta=strength * norm,
            subjects=subjects,
            seed=material.seed,
        )
        words = {
            "refusal_log_odds": "refusal log-odds",
            "harm_probe": "a harm probe",
            "project_execution": "projecting",
        }
        order = self._order(material, rows, subjects, found, strength * norm, norm)
        return [order] + [
            Check(
                f"change of {words[read]} by {words.get(cause, 'shifting')} on borderline prompts (overlap of the directions "
                f"{found.overlap:+.2f})",
                effect.value,
                f"{len(effect.null)} random directions {min(effect.null):+.2f} to {max(effect.null):+.2f}, p = {effect.beside.p():.2g}",
            )
            for (cause, read), effect in seen.effects.items()
        ]

    def _order(
        self,
        material: Material,
        rows: Sequence[Tokens],
        subjects: Sequence[str],
        found: TwoDirections,
        beta: float,
        norm: float,
    ) -> Check:
        """What projecting before shifting changes against shifting before, beside what the identity of `order_gap` allows."""
        gap = order_gap(found.execution, found.detection, alpha=self.alpha, beta=beta)
        edits = [found.edit(beta, alpha=self.alpha, order=order) for order in ("project_first", "shift_first")]
        first, second = log_odds_of_each(material.backend, rows, material.refusal_tokens, edits)
        return Check(
            "change of refusal log-odds on borderline prompts by projecting first in place of shifting first",
            Estimate.of((first - second).numpy(), clusters=subjects, seed=material.seed),
            f"the states differ by alpha beta <r, g> = {float(gap.norm()) / norm:.2g} |resid|; 0 for orthogonal directions",
        )

    def directions(self, material: Material) -> TwoDirections:
        """Both directions at the chosen layer. UserError where a class is empty or the layer cannot be edited."""
        removed, contrast = material.fit[material.remove], material.fit[material.contrast]
        if not bool(removed.refused.any()):
            raise UserError(f"no refused prompts in the fit split of '{material.remove}'; there is nothing to remove")
        if not bool(removed.answered.any() | contrast.answered.any()):
            raise UserError(
                f"no answered prompts in the fit splits of '{material.remove}' and '{material.contrast}'; add ordinary ones"
            )
        accuracy: dict[int, float] = {}
        if self.layer is None:
            accuracy = layer_accuracies(removed, contrast, steerable_layers(material.n_layers), material.seed)
        layer = self.layer if self.layer is not None else self._earliest(accuracy, removed, contrast)
        site = Site(layer)
        if site not in removed.states:
            raise UserError(f"no states at {site}; choose a layer from 1 to {material.n_layers}")
        aligned = aligned_pairs(material, site) if self.pairing == "aligned" else None
        pairs = aligned or nearest_pairs(*_sides(removed, contrast, site))
        harm = nearest_pairs(material.fit[material.keep].states[site], material.fit[material.ordinary[0]].states[site])
        return TwoDirections(
            site,
            self._sparse(pairs, material.seed),
            self._sparse(harm, material.seed + 1),
            "aligned" if aligned else "nearest",
            accuracy,
        )

    def _earliest(self, accuracy: dict[int, float], removed: Examples, contrast: Examples) -> int:
        refused, answered = (
            sum(int(mask.sum()) for mask in masks)
            for masks in ((removed.refused, contrast.refused), (removed.answered, contrast.answered))
        )
        best = max(accuracy.values())
        # Of the mean of two independent hit rates, taken as equal; one hit and one miss are added, or a perfect layer has none.
        rate = (best * (refused + answered) + 1) / (refused + answered + 2)
        error = (rate * (1 - rate) * (1 / refused + 1 / answered)) ** 0.5 / 2
        return min(layer for layer, value in accuracy.items() if value >= best - self.slack * error)

    def _sparse(self, pairs: Pairs, seed: int) -> Float[Tensor, " d"]:
        first, second = pairs
        direction = paired_direction(first, second)
        size = support_size(len(direction), self.kept)
        if self.support == "random":
            support = random_support(len(direction), size, seed)
        else:
            support = coordinate_ranks(first, second)[:size]
        sparse = sparsify(direction, support)
        towards = float((first.double() - second.double()).mean(0) @ sparse)
        # With few coordinates left, the class means may have changed sides.
        return -sparse if towards < 0 else sparse


def layer_accuracies(removed: Examples, contrast: Examples, layers: Sequence[int], seed: int) -> dict[int, float]:
    """Cross-validated balanced accuracy, by layer, of the refused against the answered prompts of both sets together."""
    return {layer: cross_validated_accuracy(*_sides(removed, contrast, Site(layer)), seed=seed) for layer in layers}


def _sides(removed: Examples, contrast: Examples, site: Site) -> Pairs:
    """States of the refused and of the answered prompts of both sets."""

    def side(masks: tuple[Bool[Tensor, " n"], Bool[Tensor, " m"]]) -> Float[Tensor, "k d"]:
        return torch.cat([x.states[site][mask] for x, mask in zip((removed, contrast), masks, strict=True)])

    return side((removed.refused, contrast.refused)), side((removed.answered, contrast.answered))


def aligned_pairs(material: Material, site: Site) -> Pairs | None:
    """Refused prompts of `remove`, each with the prompt at its place in `contrast` if that was answered: two requests of one form
    (subject i of political_sensitive and of political_matched follow the same schedule of forms). None where the two sets
    are not built in and of equal length, or fewer than LEAST_ALIGNED pairs are left."""
    names = material.remove, material.contrast
    if not all(name in BUILT_IN for name in names):
        return None
    places = [{text: i for i, text in enumerate(load_prompts(name).texts)} for name in names]
    if len(places[0]) != len(places[1]):
        return None
    removed, contrast = (material.fit[name] for name in names)
    partner = {places[1][text]: row for row, text in enumerate(contrast.texts) if text in places[1]}
    found = [
        (row, partner[places[0][text]])
        for row, text in enumerate(removed.texts)
        if bool(removed.refused[row])
        and places[0].get(text) in partner
        and bool(contrast.answered[partner[places[0][text]]])
    ]
    if len(found) < LEAST_ALIGNED:
        return None
    first, second = zip(*found, strict=True)
    return removed.states[site][list(first)], contrast.states[site][list(second)]


def nearest_pairs(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Pairs:
    """Every state of `first` with its nearest of `second` (Euclidean; one may serve several): the least different pairs."""
    return first, second[torch.cdist(first.double(), second.double()).argmin(1)]


def coordinate_ranks(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Int[Tensor, " d"]:
    """Coordinates by |w_i|, largest first: w the weights of a linear discriminant of coordinates scaled to deviation 1 within the
    classes. Residual streams have coordinates hundreds of times as large as others, which would lead any unscaled ranking.
    """
    scatter = Moments.of(first).scatter + Moments.of(second).scatter
    spread = scatter.diagonal.sqrt()
    scale = torch.where(spread > 0, 1 / spread, 0.0)  # a constant coordinate tells nothing
    w = discriminant([Moments.of(first.double() * scale)], [Moments.of(second.double() * scale)])
    return w.abs().argsort(descending=True)


def support_size(d: int, kept: float) -> int:
    """Number of coordinates in a share `kept` of d, at least one. UserError outside (0, 1]."""
    if not 0 < kept <= 1:
        raise UserError(f"kept is {kept}; choose a share of the coordinates above 0 and up to 1")
    return max(1, round(kept * d))


def random_support(d: int, size: int, seed: int) -> Int[Tensor, " size"]:
    """`size` of d coordinates, uniformly at random: what choosing the coordinates must beat."""
    return torch.randperm(d, generator=torch.Generator().manual_seed(seed))[:size]


def sparsify(direction: Float[Tensor, " d"], support: Int[Tensor, " size"]) -> Float[Tensor, " d"]:
    """The direction on the given coordinates alone, scaled to unit length, in float64. UserError when nothing is left."""
    sparse = torch.zeros_like(direction, dtype=torch.float64)
    sparse[support] = direction.double()[support]
    length = float(sparse.norm())
    if length == 0:
        raise UserError(f"the direction is zero on all of its {len(support)} kept coordinates; keep more of them")
    return sparse.div(length)
