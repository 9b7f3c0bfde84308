"""The direction of paired states: first principal component of pairs, after one of two centrings.

CAST (arXiv 2409.05907), whose procedure STEER-COMPLIANCE (arXiv 2602.04896) and, read as an SVD of differences, DBDI
(arXiv 2511.06852) use too. A principal component has no sign of its own; here the class means give it one.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.spectrum import spectrum

Centring = Literal["pairs", "global"]


def paired_direction(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], centring: Centring = "pairs"
) -> Float[Tensor, " d"]:
    """Unit vector in float64: first principal component of states that come in pairs, pointing from `second` to `first`.

        pairs:  a_i - (a_i + b_i) / 2 and b_i - (a_i + b_i) / 2        CAST's code
        global: a_i - mu and b_i - mu, mu the mean of all 2 n states   one reading of the paper's (H+ + H-) / 2

    With `pairs`, this is the top right singular vector of the uncentred differences a_i - b_i, so what the two states of a pair
    share is gone. With `global` it stays, and the component may be about what tells pairs apart. The sign is that of the
    mean of a minus the mean of b along it. UserError when the pairs do not match, are not finite or do not differ.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) == 0:
        raise UserError(
            f"paired states of shape {tuple(first.shape)} and {tuple(second.shape)}; give one of each per pair"
        )
    a, b = first.detach().double(), second.detach().double()
    difference = a - b
    largest = float(difference.abs().amax())
    if not 0 < largest < float("inf"):
        raise UserError(
            f"the largest difference within {len(a)} pairs is {largest}; a direction needs finite, unlike pairs"
        )
    halves = [difference / 2, -difference / 2] if centring == "pairs" else [a, b]
    component = spectrum(Moments.of(torch.cat(halves))).components[0]
    return -component if float(difference.mean(0) @ component) < 0 else component
