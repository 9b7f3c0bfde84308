"""Representational independence (RepInd): does ablating one direction change how much there is of another, downstream?

Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420). With h_l the state entering block l at the last prompt
token, and h_l^r the same when r is ablated everywhere, in means over prompts and chosen layers,

    RepInd(r, u) = mean (cos(h_l, u) - cos(h_l^r, u))^2 + mean (cos(h_l, r) - cos(h_l^u, r))^2

Zero for independent directions. Orthogonal ones need not be: later blocks may write one where they read the other.
Ablation also shortens the state, which moves every cosine a little; the null here does the same. `studies.independence`
measures another thing: shifts of projections, in shares of the refusal gap, without what geometry alone explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.methods.rdo import ablation, displacements
from rsteer_interp.nulls import cosine, random_unit_vectors
from rsteer_interp.pooling import pooled
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.training import Descent, Loss, Trained, gram_schmidt, train


@dataclass(frozen=True, eq=False)
class _Keep:
    """Keeps each row's state at the last prompt token as it is, with its graph."""

    sites: frozenset[Site]
    states: dict[Site, Float[Tensor, "row d"]] = field(default_factory=dict)

    pointwise = True  # it changes nothing

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        if at.phase == "prompt":
            self.states[at.site] = pooled(x, at, "last")
        return x


def block_inputs(backend: Backend) -> tuple[Site, ...]:
    """The default layers of the statistic: every block input but the first."""
    return tuple(Site(layer) for layer in range(1, backend.n_layers))


def _states(
    backend: Backend, batch: Batch, sites: Sequence[Site], edit: Edit | None, *, grad: bool = False
) -> Float[Tensor, "row site d"]:
    keep = _Keep(frozenset(sites))
    both = compose(edit, keep)
    assert both is not None
    backend.run(batch, both, grad=grad)
    # A copy outside inference mode, so that it may stand in a graph.
    return torch.stack([keep.states[site].to("cpu", torch.float64, copy=True) for site in sites], 1)


def _cosines(states: Float[Tensor, "row site d"], v: Float[Tensor, " d"]) -> Float[Tensor, "row site"]:
    w = v.to(states)
    along: Tensor = states @ (w / w.norm())
    return along.div(states.norm(dim=-1))


@dataclass(frozen=True, eq=False)
class RepInd:
    """The statistic of any r with a given u on given prompts: what of it does not depend on r is had once, by `of`."""

    backend: Backend
    other: Float[Tensor, " d"]
    sites: tuple[Site, ...]
    batches: tuple[Batch, ...]
    plain: tuple[Float[Tensor, "row site d"], ...]
    without: tuple[Float[Tensor, "row site d"], ...]  # with u ablated

    @classmethod
    def of(
        cls,
        backend: Backend,
        rows: Sequence[Tokens],
        other: Float[Tensor, " d"],
        sites: Sequence[Site] | None = None,
        batch_size: int | None = None,
    ) -> RepInd:
        """For u = `other`; at every block input but the first, unless `sites` are given."""
        chosen = tuple(sites) if sites is not None else block_inputs(backend)
        batches = tuple(batch for _, batch in backend.batches(rows, lambda batch: batch, batch_size))
        plain = tuple(_states(backend, batch, chosen, None) for batch in batches)
        without = tuple(_states(backend, batch, chosen, ablation(backend, other)) for batch in batches)
        return cls(backend, other, chosen, batches, plain, without)

    def changes(
        self, r: Float[Tensor, " d"], i: int, *, grad: bool = False
    ) -> tuple[Float[Tensor, "row site"], Float[Tensor, "row site"]]:
        """Signed changes of cosine in batch i: of u when r is ablated, and of r when u is."""
        ablated = _states(self.backend, self.batches[i], self.sites, ablation(self.backend, r), grad=grad)
        return (
            _cosines(self.plain[i], self.other) - _cosines(ablated, self.other),
            _cosines(self.plain[i], r) - _cosines(self.without[i], r),
        )

    def loss(self, r: Float[Tensor, " d"], step: int) -> Float[Tensor, ""]:
        """The statistic on one batch, in turn, with gradients."""
        there, back = self.changes(r, step % len(self.batches), grad=True)
        return there.square().mean() + back.square().mean()

    def by_layer(self, r: Float[Tensor, " d"]) -> Float[Tensor, "way site"]:
        """Mean squared change of u without r, and of r without u, at each site; the statistic is the rows' means, added."""
        both = [self.changes(r, i) for i in range(len(self.batches))]
        return torch.stack([torch.cat(way).square().mean(0) for way in zip(*both, strict=True)])

    def __call__(self, r: Float[Tensor, " d"]) -> float:
        return float(self.by_layer(r).mean(1).sum())


@dataclass(frozen=True)
class Dependence:
    """RepInd of two directions beside their cosine and its null; p one-sided, of `statistics.draws`.

    `there` and `back` are the two ways' mean squared changes at each block input.
    """

    cosine: float
    value: float
    there: tuple[float, ...]
    back: tuple[float, ...]
    null: tuple[float, ...]
    p: float


def dependence(
    backend: Backend,
    rows: Sequence[Tokens],
    r: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    *,
    n_random: int = 19,
    seed: int = 0,
) -> Dependence:
    """RepInd(r, u) with its null: every state is moved as far, but along a random direction z orthogonal to both in place of r,
    then of u (`rdo.displacements`). Two passes per draw."""
    one = RepInd.of(backend, rows, u)
    layers = one.by_layer(r)
    value = float(layers.mean(1).sum())
    across = torch.stack([_across(z, r, u) for z in random_unit_vectors(n_random, len(r), seed)])
    null = _displaced(one, r, across, u) + _displaced(one, u, across, r)
    beside = Beside.of(value, null.tolist())
    there, back = layers.tolist()
    return Dependence(cosine(r, u), value, tuple(there), tuple(back), beside.draws, beside.p("greater"))


def _across(z: Tensor, r: Tensor, u: Tensor) -> Tensor:
    """The unit vector of z's part orthogonal to r and u, which may be parallel."""
    span = torch.linalg.svd(torch.stack([r.double() / r.double().norm(), u.double() / u.double().norm()]))
    basis = span.Vh[: int((span.S > 1e-6).sum())]
    left: Tensor = z - basis.T @ (basis @ z)
    return left.div(left.norm())


def _displaced(
    one: RepInd, taken: Float[Tensor, " d"], across: Float[Tensor, "n d"], read: Float[Tensor, " d"]
) -> Float[Tensor, " n"]:
    """Mean squared change of cosine with `read` under each null of taking `taken` out."""
    edits = displacements(one.backend, taken, across)
    changes = [
        torch.stack([_cosines(plain, read) - _cosines(_states(one.backend, batch, one.sites, e), read) for e in edits])
        for batch, plain in zip(one.batches, one.plain, strict=True)
    ]
    return torch.cat(changes, 1).square().mean((1, 2))


def independent_direction(
    backend: Backend,
    known: Sequence[Float[Tensor, " d"]],
    start: Float[Tensor, " d"],
    loss: Loss,
    rows: Sequence[Tokens],
    descent: Descent | None = None,
    *,
    weight: float = 200.0,
    batch_size: int = 8,
) -> Trained:
    """A refusal direction trained with `loss` plus weight * RepInd with every known one, started orthogonal to them.

    The paper's code has weight 200 and, in the loss of RDO, 0.1 for the KL in place of 1 (`rdo.Weights(same=0.1)`). Called again
    with what it found, it gives the paper's sets of independent directions.
    """
    terms = [RepInd.of(backend, rows, v, batch_size=batch_size) for v in known]

    def total(parameter: Float[Tensor, "1 d"], step: int) -> Iterator[Float[Tensor, ""]]:
        yield from loss(parameter, step)
        for term in terms:
            yield weight * term.loss(parameter[0], step)

    basis = gram_schmidt(torch.stack([*(v.double() for v in known), start.double()]))
    return train(basis[-1:], total, descent)
