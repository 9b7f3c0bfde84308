"""ACE (arXiv 2411.09003): refusal as an affine function, h' = h - proj_r(h) + proj_r(r-) + alpha r.

r = r+ - r- is a difference of class means with its length kept and r- the mean of the complying class. The component along
r is then the same for every prompt: at alpha = 0 that of the average complying prompt, at alpha = 1 that of the average
refused one. CAA, h' = h + alpha r, adds to whatever component a prompt has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.batching import Rows
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.directions import MeanDifference, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import add, set_component
from rsteer_interp.methods.base import Check, Examples, Fitted, Material, Treatment
from rsteer_interp.methods.refusal_steering import best_layers, evidence
from rsteer_interp.selection import steerable_layers
from rsteer_interp.statistics.intervals import Clusters, Estimate
from rsteer_interp.statistics.resampling import bootstrap_counts
from rsteer_interp.statistics.rotation import rotations

N_CHECKED = 24  # prompts of either kind on which standardisation is measured
Vectors = Mapping[Site, Float[Tensor, " d"]]


def ace_edit(directions: Vectors, references: Vectors, alpha: float | Float[Tensor, " row"]) -> Edit:
    """The affine operator with kappa = 1, ref = r- and a = alpha |r| at each site (ACE, its main equation); idempotent.

    `directions` are r = r+ - r- with their lengths, `references` are r-. Reference 0 and alpha = 0 is directional ablation.
    """
    return set_component(directions, references, _amounts(directions, alpha))


def caa_edit(directions: Vectors, alpha: float | Float[Tensor, " row"]) -> Edit:
    """Contrastive activation addition h' = h + alpha r at each site, r with its length: what ACE is compared with."""
    return add(directions, _amounts(directions, alpha))


def _amounts(directions: Vectors, alpha: float | Tensor) -> dict[Site, float]:
    # A tensor of alphas gives tensors over the rows, which both operators take; numbers stay numbers.
    return {site: alpha * float(r.double().norm()) for site, r in directions.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class Standardisation:
    """How far ACE evens out prompts that CAA leaves apart, at one alpha.

    `ratio` is the variance of refusal log-odds over prompts under ACE over that under CAA, with a bootstrap interval over
    prompts (paired); below 1 speaks for the paper's claim. `null` holds the ratios of the directions turned by random rotations,
    one for all sites, about the same references: what fixing just any component does. Both variances in squared nats.
    """

    alpha: float
    ratio: Estimate
    ace_variance: float
    caa_variance: float
    null: tuple[float, ...]


def standardisation(
    backend: Backend,
    rows: Rows,
    token_ids: Sequence[int],
    directions: Vectors,
    references: Vectors,
    alpha: float,
    *,
    subjects: Clusters = None,
    n_random: int = 8,
    n_draws: int = 2000,
    seed: int = 0,
) -> Standardisation:
    """Run the prompts under ACE, under CAA and under both along turned directions: 2 (1 + n_random) passes.

    Prompts should be of both kinds. Log-odds near their bounds hide spread: judge an alpha whose mean lies inside.
    """

    def both(vectors: Vectors) -> tuple[Tensor, Tensor]:
        edits = ace_edit(vectors, references, alpha), caa_edit(vectors, alpha)
        ace, caa = (log_odds(backend, rows, token_ids, edit) for edit in edits)
        return ace, caa

    ace, caa = both(directions)
    null = []
    for turned in rotations(directions, n_random, seed):
        a, b = both(turned)
        null.append(float(a.var() / b.var()))
    ratio = variance_ratio(ace, caa, subjects=subjects, n_draws=n_draws, seed=seed)
    return Standardisation(alpha, ratio, float(ace.var()), float(caa.var()), tuple(null))


def variance_ratio(
    a: Float[Tensor, " prompt"],
    b: Float[Tensor, " prompt"],
    *,
    subjects: Clusters = None,
    n_draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """var(a) / var(b) over the same prompts, with the 95 % percentile interval of a paired bootstrap over prompts or subjects.

    UserError for fewer than three prompts or equal values of b.
    """
    x, y = a.double().numpy(), b.double().numpy()
    if len(x) < 3 or np.ptp(y) == 0:
        raise UserError(f"a ratio of variances needs three prompts or more that differ (n = {len(x)}); add prompts")
    counts = bootstrap_counts(len(x), n_draws, seed, clusters=subjects)
    weights = counts / counts.sum(1, keepdims=True)
    above, below = (weights @ z**2 - (weights @ z) ** 2 for z in (x - x.mean(), y - y.mean()))
    some = below > 1e-9 * y.var()  # a draw of equal prompts has no ratio; it is as rare as n^(1 - n)
    return Estimate.of_draws(float(x.var() / y.var()), above[some] / below[some], len(x))


@dataclass(frozen=True)
class ACE:
    """ACE at the layer that reads refusal best on select, at every position and decoding step.

    r+ is the mean of the refused and r- that of the answered prompts of the set whose refusals are to go and of its contrast
    (the paper's are harmful and harmless prompts: there the refusal to be removed is another one). Strength s is
    alpha = 1 - s: at 1 every prompt has the component of the average answered one, and each further 1 takes it another |r|
    away from refusal. Below 1 it would lift ordinary prompts towards refusal, so it starts there.
    """

    name: ClassVar[str] = "ace"
    label: ClassVar[str] = "Affine edit (ACE)"
    source: ClassVar[str] = "arXiv 2411.09003"
    strengths: ClassVar[tuple[float, ...]] = (1.0, 1.5, 2.0, 3.0)

    k: int = 1
    """How many of the best layers; the authors' code edits one or all."""

    def fit(self, material: Material) -> Fitted:
        """Closed form from the states in the material; the model is not run."""
        directions, references = self.learn(material)
        return lambda strength: Treatment(ace_edit(directions, references, 1 - strength))

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """Standardisation: how far prompts of both kinds are brought to one level, beside adding the same difference."""
        both = [held[name] for name in (material.remove, material.contrast)]
        texts, subjects = (
            [x for one in both for x in getattr(one, part)[:N_CHECKED]] for part in ("texts", "subjects")
        )
        found = standardisation(
            material.backend,
            material.template.encode_all(texts),
            material.refusal_tokens,
            *self.learn(material),
            1 - strength,
            subjects=subjects,
            seed=material.seed,
        )
        what = "variance of the refusal log-odds over prompts of both kinds, as a share of that under plain addition"
        return [Check(what, found.ratio, f"{len(found.null)} rotations {min(found.null):.2f} to {max(found.null):.2f}")]

    def learn(self, material: Material) -> tuple[Vectors, Vectors]:
        """Differences r and references r- at the chosen layers."""
        seen = evidence(material, [Site(layer) for layer in steerable_layers(material.n_layers)])
        found = fit_directions(MeanDifference(), seen)
        sites = [Site(layer) for layer in best_layers(material, found, self.k)]
        directions = {site: found[site].vector for site in sites}
        references = {site: seen[site].complying.mean for site in sites}
        return directions, references
