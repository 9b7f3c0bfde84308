"""Retain-constrained directions: what moves the prompts to be changed, and does not move those to be kept, in closed form.

Both start from a mean difference Delta of the refusal to be removed and know the refusal to be kept from its own mean
difference R and from the moments of the kept prompts. Ours, after the retain losses of Geometry of Refusal (arXiv
2502.17420), the null space of AlphaSteer (arXiv 2506.07022) and the generalised ridge of Refusal Steering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.directions.ridge import ridge_solve
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments, Scatter


def null_space(
    delta: Float[Tensor, " d"], retain: Sequence[Float[Tensor, " d"]] | Float[Tensor, "k d"]
) -> Float[Tensor, " d"]:
    """(I - U U^T) Delta with U an orthonormal basis of the retain directions: adding it leaves their projections unchanged.

    UserError when nothing of Delta is left.
    """
    rows = torch.stack([r.double() for r in retain])
    basis = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    u = basis.Vh[basis.S / basis.S[0] > 1e-6]
    left: Tensor = delta.double() - u.T @ (u @ delta.double())
    if float(left.norm()) <= 1e-8 * float(delta.double().norm()):
        raise UserError("the direction lies in the span of those to be retained; nothing of it is left to steer with")
    return left


def opposite_pair(remove: Float[Tensor, " d"], keep: Float[Tensor, " d"], ratio: float) -> Float[Tensor, " d"]:
    """unit(remove) - ratio * unit(keep): subtracting it takes one refusal away and adds the other."""
    a, b = remove.double(), keep.double()
    pair: Tensor = a / a.norm() - ratio * b / b.norm()
    return pair


def retain_ridge(
    delta: Float[Tensor, " d"], complying: Moments, kept: Moments, penalty: float = 1.0, retain: float = 10.0
) -> Float[Tensor, " d"]:
    """(Sigma + mu M + lambda I)^-1 Delta: ridge that also shuns where the kept prompts lie.

    Sigma is the covariance of the complying prompts, M = E (h - o)(h - o)^T the second moment of the kept (refused, to stay
    so) prompts about the complying mean o; lambda = penalty tr(Sigma) / d, and mu = retain makes <v, h - o> small on them.
    """
    sigma = complying.scatter / complying.weight
    gap = (kept.mean - complying.mean)[None]
    second = kept.scatter / kept.weight + Scatter(rows=gap)
    return ridge_solve(sigma + second * retain, delta, penalty * sigma.trace / sigma.d)
