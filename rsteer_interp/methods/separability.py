"""How well a linear classifier tells two classes of states apart: k-fold cross-validated accuracy."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.gates import discriminant
from rsteer_interp.moments import Moments


def cross_validated_accuracy(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], folds: int = 5, seed: int = 0
) -> float:
    """Balanced accuracy (mean of the two classes' hit rates, 0.5 for no skill whatever the class sizes) on the folds left out.

    Classifier: the regularised linear discriminant of `gates.discriminant`, cut midway between the class means. Folds hold
    equal parts of both classes. UserError for fewer prompts of a class than folds.
    """
    states = torch.cat([first, second]).double()
    labels = torch.arange(len(states)) < len(first)
    fold = _folds(labels, folds, seed)
    hit = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(folds):
        train, test = fold != k, fold == k
        sides = [Moments.of(states[train & (labels == label)]) for label in (True, False)]
        w = discriminant([sides[0]], [sides[1]])
        middle = w @ (sides[0].mean + sides[1].mean) / 2
        hit[test] = (states[test] @ w > middle) == labels[test]
    return float((hit[labels].double().mean() + hit[~labels].double().mean()) / 2)


def _folds(labels: Bool[Tensor, " n"], folds: int, seed: int) -> Int[Tensor, " n"]:
    """A fold per prompt, with each class shared out evenly."""
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(labels), dtype=torch.long)
    for label in (True, False):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < folds:
            raise UserError(
                f"{len(members)} prompts of one class for {folds} folds; add prompts, or fix the layer instead of choosing it"
            )
        shuffled = members[torch.randperm(len(members), generator=generator)]
        fold[shuffled] = torch.arange(len(members)) % folds
    return fold
