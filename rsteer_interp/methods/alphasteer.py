"""AlphaSteer (arXiv 2506.07022): a linear gate in the null space of the prompts to be left alone, times one direction.

The paper learns Delta = P Delta~, P the projector on the smallest singular directions of the protected states H_b and Delta~
the ridge solution of (H_m P) Delta~ = R. Every row of R is the same vector r, so Delta has rank one, and the edit is

    h' = h + lambda <h_last, w> r        w = pinv(X^T X + 10 P) X^T 1,   X = H_m P

the ridge regression, without intercept, of "1 on the prompts to be edited" inside the null space. It is made once, in the
prompt pass, from the last prompt token's state at the block input, and added to all prompt positions; decoding is unedited.
The paper steers towards refusal, at each layer by a gate of its own; away from it, one reading serves all layers here (see
`AlphaSteer.read`), and the template prefix is left alone. Both have the paper's form as an option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import At, Site, compose
from rsteer_interp.directions import MeanDifference, fit_directions
from rsteer_interp.directions.ridge import ridge_solve
from rsteer_interp.errors import UserError
from rsteer_interp.methods.base import Check, Examples, Fitted, Material, Treatment
from rsteer_interp.methods.refusal_steering import evidence
from rsteer_interp.methods.selective import band, norms
from rsteer_interp.moments import Moments, Scatter
from rsteer_interp.pooling import pooled
from rsteer_interp.prompts import Prompt, load_prompts
from rsteer_interp.spectrum import EnergyShares, energy_shares, spectrum
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.resampling import bootstrap_counts

N_UNUSUAL = 32  # prompts on which leakage is checked
PENALTY = 10.0  # the authors' code, in squared activation units


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The projector P = I - U^T U on the smallest singular directions of the protected states, held as what it removes.

    `removed` is U, orthonormal rows; `origin` is what states are measured from: 0 in the paper, the protected mean when
    centred. P is what `project` multiplies with.
    """

    removed: Float[Tensor, "k d"]
    origin: Float[Tensor, " d"]

    @classmethod
    def of(cls, protected: Moments, null: float, centred: bool = False) -> NullSpace:
        """P of rank round(null * d), from the second moment about the origin or, centred, about the mean.

        UserError for fewer protected states than the (1 - null) d directions that P leaves out: the second moment is then
        singular, which of its zero directions to take is left to rounding, and the fraction says nothing (see `least_null`).
        """
        if not 0 < null <= 1:
            raise UserError(f"the null fraction is {null:g}; choose a share of the dimensions above 0, up to 1")
        seen, removed = _seen(protected, centred), protected.d - round(null * protected.d)
        if removed > len(seen):
            raise UserError(
                f"a null fraction of {null:g} leaves out {removed} of {protected.d} dimensions, and {protected.count} protected "
                f"prompts show {len(seen)}; add prompts to be left alone, or choose {least_null(protected, centred):.2f} or more"
            )
        return cls(seen[:removed], protected.mean if centred else torch.zeros_like(protected.mean))

    @property
    def rank(self) -> int:
        return int(self.removed.shape[1] - self.removed.shape[0])

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """P as a dense matrix: d x d float64 numbers."""
        return torch.eye(self.removed.shape[1]).to(self.removed) - self.removed.T @ self.removed

    def project(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """(h - origin) P in float64."""
        x = states.double() - self.origin
        return x - (x @ self.removed.T) @ self.removed


def least_null(protected: Moments, centred: bool = False) -> float:
    """The smallest null fraction that the protected states determine: 1 - (directions in which there are states) / d."""
    return 1 - len(_seen(protected, centred)) / protected.d


def _seen(protected: Moments, centred: bool) -> Float[Tensor, "r d"]:
    """Singular directions of the protected states, the largest first."""
    if protected.count < 2:
        raise UserError(f"{protected.count} protected prompts give no null space; add prompts to be left alone")
    # The second moment about the origin is the scatter with the mean as one more row.
    return spectrum(protected if centred else _about_origin(protected)).components


def _about_origin(moments: Moments) -> Moments:
    mean = Scatter(rows=moments.mean[None] * math.sqrt(moments.weight))
    zero = torch.zeros_like(moments.mean)
    return Moments(moments.count, moments.weight, moments.squared_weight, zero, moments.scatter + mean)


@dataclass(frozen=True, eq=False)
class LinearGate:
    """The score <h, w> - offset of a prompt's state: about 1 on prompts to be edited, about 0 on protected ones."""

    weights: Float[Tensor, " d"]
    offset: float

    def scores(self, states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        wide = torch.float64 if states.device.type == "cpu" else torch.float32
        return states.to(wide) @ self.weights.to(states.device, wide) - self.offset


def linear_gate(edited: Float[Tensor, "n d"], space: NullSpace, penalty: float = PENALTY) -> LinearGate:
    """w = pinv(X^T X + penalty P) X^T 1 with X = H_m P; the offset is <origin, w>, 0 in the paper's uncentred form.

    X lies in the range of P, so there the matrix is X^T X + penalty I and the pseudo-inverse is its ridge solution.
    """
    x = space.project(edited)
    if not float(x.square().sum()) > 1e-12 * float(edited.double().square().sum()):
        raise UserError(
            f"nothing of the prompts to be edited lies in the null space (rank {space.rank}); raise the null fraction"
        )
    w = ridge_solve(Scatter.of(x), x.sum(0), penalty)
    return LinearGate(w, float(space.origin @ w))


def steering_matrix(
    edited: Float[Tensor, "n d"], space: NullSpace, targets: Float[Tensor, "n d"], penalty: float = PENALTY
) -> Float[Tensor, "d d"]:
    """Delta = P pinv(X^T X + penalty P) X^T R for a target per prompt (rows of R); the edit is lambda (h - origin) Delta.

    Equal targets r give w r^T of `linear_gate`, which needs d numbers in place of d^2.
    """
    x = space.project(edited)
    # pinv(X^T X + c P) X^T = X^T (X X^T + c I)^-1: n x n in place of d x d.
    inner: Tensor = torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x)).to(x), targets.double())
    return x.T @ inner


@dataclass(frozen=True, eq=False)
class LastTokenShift:
    """h' = h + (<h_last, w> - offset) shift at the prompt's positions, h_last the last prompt token's state at `site`.

    In the prompt pass alone, and not on a given answer, which stands where decoding steps would be. `shifts` are by site: the
    paper's edit reads and shifts at one site, and several such edits each read what those before have left; one edit with
    shifts at later sites too reads once. The template prefix is left as it is unless `prefix` (the paper's version): a
    prefix that depends on the prompt's end cannot be shared between prompts.
    """

    site: Site
    gate: LinearGate
    shifts: Mapping[Site, Float[Tensor, " d"]]
    prefix: bool = False

    pointwise = False
    rowwise = True

    def __post_init__(self) -> None:
        if self.site > min(self.shifts):
            raise UserError(
                f"the score is read at {self.site}, after the first shift at {min(self.shifts)}; read it before"
            )

    @property
    def leaves_prefix(self) -> bool:
        return not self.prefix

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site, *self.shifts})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase != "prompt":
            return x

        def end(span: str) -> Tensor:
            return at.batch.span_end(span).to(x.device)[at.rows][:, None]

        if at.site == self.site:
            at.memory[self] = self.gate.scores(pooled(x, at, "last"))
        if at.site not in self.shifts:
            return x
        own = at.mask & (at.positions < end("prompt"))
        if not self.prefix:
            own = own & (at.positions >= end("prefix"))
        scores = at.memory[self].to(x.device)
        moved = (scores[:, None] * self.shifts[at.site].to(scores)).to(x.dtype)
        return torch.where(own[..., None], x + moved[:, None], x)


@dataclass(frozen=True)
class Leakage:
    """How much of the edit reaches prompts that it should not: |Delta h_b| / |Delta h_m|, means over held-out prompts.

    Delta has rank one, so this is the ratio of mean |score|. `ratios` by set, with a bootstrap interval over the subjects of
    both sides and n the set's prompts. `rank` is P's; null = 1 (P = I) is the ridge gate without a null space, the null to
    compare with. `energy` says what the protected second moment is about (mean and largest coordinates).
    """

    null: float
    centred: bool
    rank: int
    ratios: Mapping[str, Estimate]
    energy: EnergyShares


def leakage(
    material: Material,
    site: Site,
    held: Mapping[str, Examples],
    extra: Mapping[str, Sequence[Prompt]] | None = None,
    *,
    nulls: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0),
    forms: Sequence[bool] = (False, True),
    penalty: float = PENALTY,
    seed: int = 0,
) -> list[Leakage]:
    """Leakage at a site for every null fraction, uncentred (the paper's) and centred (`forms`); fitted on fit, read on `held` prompts.

    Sets: the kept and the ordinary ones, and `extra` prompts by name (such as unusual ones), for which the model is run once.
    """
    edited = _edited(material, material.fit)
    moments = protected_moments(material, [site])[site]
    read = {name: (held[name].states[site], held[name].subjects) for name in (material.keep, *material.ordinary)}
    for name, prompts in (extra or {}).items():
        rows = material.template.encode_all([p.prompt for p in prompts])
        read[name] = last_states(material.backend, rows, [site])[site], [p.subject for p in prompts]
    wanted = held[material.remove].where(held[material.remove].refused)
    found = []
    for centred in forms:
        for null in nulls:
            space = NullSpace.of(moments, null, centred)
            gate = linear_gate(edited[site], space, penalty)
            below = gate.scores(wanted.states[site]).abs(), wanted.subjects
            ratios = {n: _mean_ratio((gate.scores(x).abs(), of), below, seed) for n, (x, of) in read.items()}
            found.append(Leakage(null, centred, space.rank, ratios, energy_shares(moments)))
    return found


Scores = tuple[Float[Tensor, " n"], Sequence[str]]  # with their subjects


def _mean_ratio(above: Scores, below: Scores, seed: int, n_draws: int = 2000) -> Estimate:
    sizes = len(above[1]), len(below[1])
    if min(sizes) < 2:
        raise UserError(
            f"a ratio with an interval needs two prompts on each side ({sizes[0]} and {sizes[1]}); add prompts"
        )
    drawn = []
    for i, (scores, subjects) in enumerate((above, below)):
        counts = bootstrap_counts(len(subjects), n_draws, 2 * seed + i, clusters=subjects)
        drawn.append(counts @ scores.double().numpy() / counts.sum(1))
    value = float(above[0].double().mean() / below[0].double().mean())
    return Estimate.of_draws(value, drawn[0] / drawn[1], sizes[0])


def _edited(material: Material, examples: Mapping[str, Examples]) -> dict[Site, Tensor]:
    """States of the refused prompts whose refusals are to go."""
    remove = examples[material.remove]
    return dict(remove.where(remove.refused).states)


def protected_moments(material: Material, sites: Sequence[Site]) -> dict[Site, Moments]:
    """Of the fit prompts to be left alone: the sets whose refusals stay, ordinary ones, the answered contrast, and those that nobody
    judged, for which the model is run once."""
    contrast = material.fit[material.contrast]
    judged = [material.fit[name] for name in (material.keep, *material.ordinary)] + [contrast.where(contrast.answered)]
    parts = {site: [x.states[site] for x in judged] for site in sites}
    if material.protected:
        rows = material.template.encode_all(material.protected)
        for site, states in last_states(material.backend, rows, sites).items():
            parts[site].append(states)
    return {site: Moments.of(torch.cat(states)) for site, states in parts.items()}


@dataclass(frozen=True)
class AlphaSteer:
    """Edited are the refused prompts of the set whose refusals are to go; protected the set whose refusals stay, the ordinary
    sets, the answered contrast and the material's unjudged prompts; r = -|resid| v, v the unit mean difference, away from refusal.

    Strength: |edit| / |resid| at each layer of the band, on average over the fitted prompts to be edited. lambda is scaled so,
    since the ridge of 10 shrinks <h, w> the more the fewer those prompts are.
    """

    name: ClassVar[str] = "alphasteer"
    label: ClassVar[str] = "AlphaSteer"
    source: ClassVar[str] = "arXiv 2506.07022"
    strengths: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.15, 0.2)

    null: float = 0.6
    """Share of the dimensions that P keeps. Where the protected prompts are too few to determine it P keeps the least share that
    they do determine, and the run's notes say so."""
    centred: bool = False
    """Measure states from the protected mean: the paper's uncentred P is mostly about that mean and a few huge coordinates."""
    penalty: float = PENALTY
    depth: tuple[float, float] = (0.57, 0.7)
    """The layers that are steered, as shares of the depth; the paper chooses some ten by model, between 0.18 and 0.68."""
    read: Literal["first", "each"] = "first"
    """Whether the score is read once, at the first steered layer (ours), or at each layer by a gate of its own (the paper).

    Towards refusal, the paper's use, an edit feeds the gates after it. Away from it, along the very difference that they
    read, it starves them: then neither more layers nor more strength remove much more."""
    prefix: bool = False
    """Whether the template prefix is moved too, as in the paper; it is left alone unless asked, so that it can be shared."""

    def fit(self, material: Material) -> Fitted:
        """A forward pass over the refused fit prompts, for |resid|, and one over the unjudged ones; all else from the states in
        the material."""
        sites = band(material.n_layers, self.depth)
        units = {site: d.unit for site, d in fit_directions(MeanDifference(), evidence(material, sites)).items()}
        sizes, gates = norms(material, sites), self.gates(material, sites)
        edited = _edited(material, material.fit)
        mean_score = {site: float(gates[site].scores(edited[site]).mean()) for site in sites}

        def treatment(strength: float) -> Treatment:
            def shifts(read: Site, moved: list[Site]) -> LastTokenShift:
                vectors = {s: -strength / mean_score[read] * sizes[s] * units[s] for s in moved}
                return LastTokenShift(read, gates[read], vectors, self.prefix)

            if self.read == "first":
                return Treatment(shifts(sites[0], sites))
            return Treatment(compose(*(shifts(site, [site]) for site in sites)))

        return treatment

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """Rank of P, and leakage on unusual benign prompts (maths, code, other languages) beside the gate without a null space."""
        site = band(material.n_layers, self.depth)[0]
        moments = protected_moments(material, [site])[site]
        null = self.attainable(moments)
        share = NullSpace.of(moments, null, self.centred).rank / moments.d
        unusual = {"unusual": load_prompts("unusual").split("report").sample(N_UNUSUAL, material.seed).prompts}
        own, without = (
            found.ratios["unusual"]
            for found in leakage(
                material,
                site,
                held,
                unusual,
                nulls=(null, 1.0),
                forms=(self.centred,),
                penalty=self.penalty,
                seed=material.seed,
            )
        )
        return [
            Check(
                f"rank of P as a share of d = {moments.d}, at {site}",
                Estimate(share, share, share, moments.count),
                f"{self.null:g} asked for; {moments.count} protected prompts",
            ),
            Check(
                f"|edit| on unusual benign prompts as a share of that on prompts to be freed, at {site}",
                own,
                f"without the null space {without}",
            ),
        ]

    def attainable(self, protected: Moments) -> float:
        """The null fraction, or the smallest that the protected prompts determine where that is larger."""
        return max(self.null, least_null(protected, self.centred))

    def gates(self, material: Material, sites: Sequence[Site]) -> dict[Site, LinearGate]:
        """The linear gate of each site."""
        edited, protected = _edited(material, material.fit), protected_moments(material, sites)
        nulls = {site: self.attainable(protected[site]) for site in sites}
        if max(nulls.values()) > self.null:
            material.backend.notes.append(
                f"AlphaSteer: {protected[sites[0]].count} protected prompts do not determine a null fraction of {self.null:g}; "
                f"P keeps {max(nulls.values()):.2f} of the dimensions"
            )
        spaces = {site: NullSpace.of(protected[site], nulls[site], self.centred) for site in sites}
        return {site: linear_gate(edited[site], spaces[site], self.penalty) for site in sites}
