"""Train the parameters of an edit by gradient: AdamW on unit vectors, orthonormal rows or free ones.

The model's weights stay as they are. A loss is any function of the parameter that runs a backend with
`logits(..., grad=True)` or `run(..., grad=True)` under an edit made from it.

After the training of refusal directions in Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420, file
`rdo.py`): AdamW (betas 0.9 and 0.98, amsgrad, no weight decay) with lr 1e-2, the gradient made tangent to each unit
vector and clipped, the vectors brought back to unit length after every step, two cuts of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit
from rsteer_interp.batch import Batch
from rsteer_interp.errors import UserError
from rsteer_interp.measures import masked_mean, token_log_probs

Loss = Callable[[Float[Tensor, "k d"], int], Iterable[Float[Tensor, ""]]]
Constraint = Literal["orthonormal", "free"]


@dataclass(frozen=True)
class Descent:
    """How a parameter is trained.

    The learning rate is multiplied by `cut` when the mean loss of the last `patience` steps has not fallen below its best
    for `patience` steps; after `cuts` of them the next such time ends the training. The paper names patience 5 and two
    cuts; what is averaged and how far is cut is our reading, for minibatches whose losses differ.
    """

    steps: int = 30
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 10.0  # largest norm of the gradient
    patience: int = 5
    cuts: int = 2
    cut: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.patience < 1:
            raise UserError(f"{self.steps} steps with patience {self.patience}; both must be at least 1")


@dataclass(frozen=True, eq=False)
class Trained:
    """The parameter after the last step, and the loss before every step (the first is the start's)."""

    value: Float[Tensor, "k d"]
    losses: tuple[float, ...]


def train(
    start: Float[Tensor, "k d"], loss: Loss, descent: Descent | None = None, constraint: Constraint = "orthonormal"
) -> Trained:
    """Descend on `loss(parameter, step)`, which yields the loss in parts: each has its backward pass before the next is made,
    so that one graph is alive at a time.

    "orthonormal": k orthonormal rows, a unit vector for k = 1; their gradient is tangent to each row's sphere, and
    Gram-Schmidt follows every step. "free": any rows. In float64. UserError for a loss that is not finite.
    """
    descent = descent or Descent()
    parameter = start.detach().double().clone()
    if constraint == "orthonormal":
        parameter = gram_schmidt(parameter)
    parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        [parameter], lr=descent.lr, betas=descent.betas, weight_decay=0.0, amsgrad=True, foreach=False
    )
    losses: list[float] = []
    best, waited, cuts = float("inf"), 0, 0
    for step in range(descent.steps):
        losses.append(_backward(parameter, loss, step))
        assert parameter.grad is not None
        if constraint == "orthonormal":
            parameter.grad = tangent(parameter.grad, parameter.detach())
        torch.nn.utils.clip_grad_norm_([parameter], descent.clip)
        optimiser.step()
        if constraint == "orthonormal":
            with torch.no_grad():
                parameter.copy_(gram_schmidt(parameter))
        recent = losses[-descent.patience :]
        mean = sum(recent) / len(recent)
        waited = 0 if mean < best else waited + 1
        best = min(best, mean)
        if waited == descent.patience:
            if cuts == descent.cuts:
                break
            cuts, waited = cuts + 1, 0
            optimiser.param_groups[0]["lr"] *= descent.cut
    return Trained(parameter.detach(), tuple(losses))


def _backward(parameter: Tensor, loss: Loss, step: int) -> float:
    """The loss; its gradient is left in `parameter.grad`."""
    parameter.grad = torch.zeros_like(parameter)
    total = 0.0
    with torch.enable_grad():
        for part in loss(parameter, step):
            value = float(part.detach())
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} at step {step}; use a wider dtype or a smaller lr")
            if part.requires_grad:  # a hinge may be flat
                # Kept until `part` is gone, since parts may share what makes one direction of a basis.
                part.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            total += value
            del part  # and with it its graph, before the next is made
    return total


def tangent(gradient: Float[Tensor, "k d"], rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """g_i - <g_i, b_i> b_i: the part of each row's gradient that does not change the unit row's length."""
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


def gram_schmidt(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Orthonormal rows of the same spans: row i lies in the span of the first i, on the side of the one given.

    By QR in float64, whose triangle gets a positive diagonal. UserError for rows that are not independent.
    """
    q, r = torch.linalg.qr(rows.double().T)
    diagonal = r.diagonal()
    if len(rows) > rows.shape[1] or not bool((diagonal.abs() > 1e-10 * rows.double().norm(dim=1)).all()):
        raise UserError(f"the {len(rows)} rows are not linearly independent; give independent directions")
    basis: Tensor = (q * diagonal.sign()).T
    return basis


def target_logits(backend: Backend, batch: Batch, edit: Edit | None, *, grad: bool) -> Float[Tensor, "row pos vocab"]:
    """Logits that predict the tokens of the answers after the prompts: at the last prompt token and all answer tokens but
    the last."""
    return backend.logits(batch, edit, keep=_longest(batch) + 1, grad=grad)[:, :-1]


def answer_mean(values: Float[Tensor, "row pos"], batch: Batch) -> Float[Tensor, " row"]:
    """Mean of values at `target_logits`' columns over each row's answer, in float64."""
    return masked_mean(values, batch.answer_mask[:, -_longest(batch) :])


def cross_entropy(logits: Float[Tensor, "row pos vocab"], batch: Batch) -> Float[Tensor, " row"]:
    """Mean negative log-probability per answer token of `target_logits`, in nats."""
    return -answer_mean(token_log_probs(logits, batch.ids[:, -_longest(batch) :]), batch)


def _longest(batch: Batch) -> int:
    return max(row.answer_length for row in batch.rows)
