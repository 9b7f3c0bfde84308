"""Refusal cones: bases whose non-negative combinations all mediate refusal, and a test of that against random vectors.

Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420): an orthonormal basis B, by Gram-Schmidt after each step,
trained with the loss of RDO on random unit vectors of the cone and on each basis vector. Dimension n starts from the basis
of n - 1. The paper draws 8 to 16 vectors per step; each costs a pass of RDO, so the default here is for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.methods.rdo import ablation, displacements
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.training import Descent, Loss, Trained, gram_schmidt, train


def cone_weights(n: int, dimension: int, seed: int) -> Float[Tensor, "n k"]:
    """n random unit vectors of non-negative coordinates: absolute values of Gaussians, normalised."""
    return random_unit_vectors(n, dimension, seed).abs()


def cone_directions(basis: Float[Tensor, "k d"], n: int, seed: int) -> Float[Tensor, "n d"]:
    """n random unit vectors of the cone of an orthonormal basis."""
    return cone_weights(n, len(basis), seed) @ basis.double()


@dataclass(frozen=True, eq=False)
class ConeLoss:
    """Mean of a one-row loss over `samples` random unit vectors of the cone, plus its mean over the basis vectors."""

    one: Loss
    samples: int = 2
    seed: int = 0

    def __call__(self, basis: Float[Tensor, "k d"], step: int) -> Iterator[Float[Tensor, ""]]:
        k = len(basis)
        # A cone of one dimension is its basis vector: there is nothing to sample.
        drawn = cone_weights(self.samples, k, self.seed * 1_000_003 + step) if k > 1 else torch.zeros(0, 1)
        for count, group in ((self.samples, drawn), (k, torch.eye(k))):
            for weights in group.to(basis):
                for part in self.one((weights @ basis)[None], step):
                    yield part / count
                    del part  # and with it its graph, before the next is made


def fit_cones(
    start: Float[Tensor, " d"],
    loss: Loss,
    dimension: int,
    descent: Descent | None = None,
    *,
    samples: int = 2,
    seed: int = 0,
) -> list[Trained]:
    """Orthonormal bases of the cones of dimension 1 to `dimension`, each started from the one before and a random vector.

    `loss` is one of a single direction, such as `methods.rdo.RefusalLoss`. The first is RDO.
    """
    found: list[Trained] = []
    basis = start.double()[None]
    for k in range(1, dimension + 1):
        if k > 1:
            new = random_unit_vectors(1, len(start), seed * 1_000_003 + k).to(basis)
            basis = gram_schmidt(torch.cat([found[-1].value, new]))
        found.append(train(basis, ConeLoss(loss, samples, seed), descent))
    return found


@dataclass(frozen=True)
class SampleTest:
    """Mean effect of each of n directions of a cone, and of n random edits of equal size; p of the Mann-Whitney test that the
    cone's are larger.

    p is about the directions of this cone, not about cones drawn anew: directions of one cone are alike.
    """

    cone: tuple[float, ...]
    random: tuple[float, ...]
    p: float


Effects = Callable[[Float[Tensor, " d"], Float[Tensor, "n d"]], Float[Tensor, "1+n prompt"]]
"""Of a direction that is ablated everywhere, and of as much moved along each of n others instead (`rdo.displacements`)."""


def sample_test(basis: Float[Tensor, "k d"], effects: Effects, n: int = 16, seed: int = 0) -> SampleTest:
    """n directions of the cone, and for each the same amounts moved along a random direction. The paper compares with
    ablations of random directions, of which a state has so little that they change next to nothing."""
    drawn = cone_directions(basis, n, seed).float()
    random = random_unit_vectors(n, basis.shape[1], seed + 1).float()
    both = torch.stack([effects(r, u[None]).mean(1) for r, u in zip(drawn, random, strict=True)])
    cone, null = both.T.tolist()
    return SampleTest(tuple(cone), tuple(null), float(stats.mannwhitneyu(cone, null, alternative="greater").pvalue))


def bypass_effects(backend: Backend, rows: Sequence[Tokens], token_ids: Sequence[int]) -> Effects:
    """By how much each edit lowers each prompt's refusal log-odds, in nats."""
    base = log_odds(backend, rows, token_ids)

    def effects(r: Float[Tensor, " d"], into: Float[Tensor, "n d"]) -> Float[Tensor, "1+n prompt"]:
        edits = [ablation(backend, r), *displacements(backend, r, into)]
        return base - log_odds_of_each(backend, rows, token_ids, edits)

    return effects
