"""Ridge mean differences: RMD and the score-weighted WRMD, (Sigma + lambda I)^-1 (mu_P - mu_N) (Refusal Steering, section 3.2).

Primal for more states than dimensions, dual for fewer; both exact. With fewer complying prompts than dimensions Sigma is
singular and the vector lies almost wholly in its null space (`null_space_share`): a small lambda hardly turns it there. Two
estimators with names of their own do: Ledoit and Wolf's shrinkage, and lambda chosen by leaving out one subject at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.directions.band_form import solve_shifted
from rsteer_interp.directions.evidence import Evidence
from rsteer_interp.directions.left_out import PENALTIES, chosen_penalty
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments, Scatter
from rsteer_interp.symmetric import gram


@dataclass(frozen=True)
class RidgeMeanDifference:
    """RMD: (Sigma + lambda I)^-1 (mu_P - mu_N), Sigma the covariance of the complying class. Its length has units 1 / activation.

    covariance: "centred" is Sigma_N; "literal" is the paper's eq. 4 as printed, which is Sigma_N + o o^T and damps the neutral
    mean o; "pooled" is the covariance within both classes, whose direction is that of a ridge regression on the class labels.
    """

    name: ClassVar[str] = "rmd"
    weighted: ClassVar[bool] = False

    penalty: float | Literal["left_out"] = 1e-2
    """lambda, in squared activation units (the paper's 1e-2). "left_out": that of `left_out.PENALTIES` (in mean eigenvalues
    tr(Sigma) / d) at which refused prompts of a subject are best told from its answered ones by the direction fitted without
    that subject. Needs states with subjects, two of which have both verdicts."""
    covariance: Literal["centred", "literal", "pooled"] = "centred"
    shrinkage: Literal["none", "ledoit_wolf"] = "none"
    """Shrink Sigma towards trace(Sigma) / d times I by Ledoit and Wolf's (2004) intensity; needs states, not only moments."""

    def __post_init__(self) -> None:
        if self.penalty == "left_out":
            if self.covariance == "literal" or self.shrinkage != "none":
                raise UserError("a penalty chosen by leaving subjects out goes with the plain covariances, unshrunk")
        elif not 0 <= self.penalty < float("inf"):
            raise UserError(f"ridge penalty is {self.penalty}; choose a finite number of at least 0")

    def fit(self, evidence: Evidence) -> Float[Tensor, " d"]:
        refusing, complying = self._classes(evidence)
        sigma, ridge = self._inverted(evidence)
        return ridge_solve(sigma, refusing.mean - complying.mean, ridge)

    def diagnose(self, evidence: Evidence, vector: Float[Tensor, " d"]) -> dict[str, float]:
        """lambda and what shrinkage adds to it, relative to tr(Sigma) / d; the shrinkage intensity; the effective rank of
        what is inverted, tr(A)^2 / tr(A^2), from 1 to d."""
        sigma, ridge = self._inverted(evidence)
        mean_eigenvalue = self._sigma(evidence).trace / sigma.d
        return {
            "relative_penalty": ridge / mean_eigenvalue if mean_eigenvalue > 0 else 0.0,
            "shrinkage": self._intensity(evidence),
            "effective_rank": effective_rank(sigma, ridge),
        }

    def _inverted(self, evidence: Evidence) -> tuple[Scatter, float]:
        """(1 - rho) Sigma and the multiple of I that is added to it: lambda, and rho tr(Sigma) / d under shrinkage."""
        sigma, intensity = self._sigma(evidence), self._intensity(evidence)
        return sigma * (1 - intensity), self._penalty(evidence, sigma) + intensity * sigma.trace / sigma.d

    def _classes(self, evidence: Evidence) -> tuple[Moments, Moments]:
        if self.weighted:
            return evidence.refusing_weighted, evidence.complying_weighted
        return evidence.refusing, evidence.complying

    def _sigma(self, evidence: Evidence) -> Scatter:
        refusing, complying = self._classes(evidence)
        if self.covariance == "pooled":
            return (refusing.scatter + complying.scatter) / (refusing.weight + complying.weight)
        sigma = complying.scatter / complying.weight
        return sigma + Scatter(rows=evidence.offset[None]) if self.covariance == "literal" else sigma

    def _penalty(self, evidence: Evidence, sigma: Scatter) -> float:
        if self.penalty != "left_out":
            return self.penalty
        penalties = [p * sigma.trace / sigma.d for p in PENALTIES]
        return chosen_penalty(evidence, penalties, pooled=self.covariance == "pooled", weighted=self.weighted)

    def _intensity(self, evidence: Evidence) -> float:
        """Ledoit-Wolf intensity of the class covariance (of the centred states, for the literal form too)."""
        if self.shrinkage == "none":
            return 0.0
        refusing, complying = self._classes(evidence)
        wanted = [(complying, -1), (refusing, 1)][: 2 if self.covariance == "pooled" else 1]
        states, labels, scores = evidence.states.double(), evidence.labels, evidence.scores.double().abs()
        rows = torch.cat([states[labels == label] - moments.mean for moments, label in wanted])
        weights = torch.cat([scores[labels == label] for _, label in wanted])
        return ledoit_wolf_intensity(rows, weights if self.weighted else torch.ones_like(weights))


@dataclass(frozen=True)
class WeightedRidgeMeanDifference(RidgeMeanDifference):
    """WRMD: RMD with every mean and covariance weighted by w = |c| within its class (Refusal Steering, eqs. 3 to 6)."""

    name: ClassVar[str] = "wrmd"
    weighted: ClassVar[bool] = True


def effective_rank(sigma: Scatter, ridge: float) -> float:
    """tr(A)^2 / tr(A^2) of A = sigma + ridge I: how many equal eigenvalues would carry as much; 1 for rank one, d for I."""
    z = sigma.rows
    squared = float((gram(z) if z is not None else sigma.dense).square().sum())
    total, d = sigma.trace + ridge * sigma.d, sigma.d
    squared += 2 * ridge * sigma.trace + ridge**2 * d
    return total**2 / squared if squared > 0 else 0.0


def ridge_solve(sigma: Scatter, delta: Float[Tensor, " d"], penalty: float) -> Float[Tensor, " d"]:
    """(Sigma + lambda I)^-1 delta in float64: dual from the rows Z of Sigma = Z^T Z, else primal.

        dual: (delta - Z^T (Z Z^T + lambda I)^-1 Z delta) / lambda

    UserError when lambda = 0 meets a singular Sigma.
    """
    delta = delta.double()
    if sigma.rows is not None and penalty > 0:
        z = sigma.rows
        inner = torch.cholesky_solve((z @ delta)[:, None], _cholesky(gram(z), penalty))[:, 0]
        return (delta - z.T @ inner).div(penalty)
    if sigma.rows is not None and len(sigma.rows) < sigma.d:
        raise UserError(
            f"ridge penalty 0 with {len(sigma.rows) + 1} states in {sigma.d} dimensions; give a positive penalty"
        )
    solution: Tensor = torch.cholesky_solve(delta[:, None], _cholesky(sigma.dense, penalty))
    return solution[:, 0]


def _cholesky(matrix: Float[Tensor, "m m"], penalty: float) -> Float[Tensor, "m m"]:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix + penalty * torch.eye(len(matrix)).to(matrix))
    if bool(failed):
        raise UserError(f"the covariance plus ridge penalty {penalty:g} is singular in float64; raise the penalty")
    return factor


def ridge_path(delta: Float[Tensor, " d"], sigma: Scatter, penalties: Sequence[float]) -> Float[Tensor, "penalty d"]:
    """(Sigma + lambda I)^-1 delta for every lambda > 0, from one reduction to band form (of Z Z^T for a Sigma held as rows)."""
    if not all(penalty > 0 for penalty in penalties):
        raise UserError(f"ridge penalties {list(penalties)} are not all positive; give positive numbers")
    delta, z = delta.double(), sigma.rows
    if z is None or len(z) == 0:
        return solve_shifted(sigma.dense, delta, penalties)
    ridge = torch.tensor(list(penalties), dtype=torch.float64)[:, None]
    return (delta - solve_shifted(gram(z), z @ delta, penalties) @ z) / ridge


def null_space_share(vector: Float[Tensor, " d"], sigma: Scatter) -> float:
    """Share of |v|^2 in the null space of Sigma: where variance is under 1e-9 of the mean eigenvalue. In [0, 1].

    Near 1 for a ridge vector from fewer states than dimensions: there Sigma says nothing about it.
    """
    floor = 1e-9 * sigma.trace / sigma.d
    if floor == 0:
        return 1.0
    # floor (Sigma + floor I)^-1 keeps what Sigma does not see and sends the rest to zero.
    residue = floor * ridge_solve(sigma, vector, floor)
    return float((residue.square().sum() / vector.double().square().sum()).clamp(0, 1))


def ledoit_wolf_intensity(rows: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> float:
    """Ledoit and Wolf's (2004) shrinkage of the weighted covariance of centred rows towards a multiple of I, in [0, 1].

        min(1, [sum w^2 |x x^T - S|^2 / W^2] / |S - tr(S)/d I|^2)

    Equal weights give scikit-learn's `ledoit_wolf_shrinkage`.
    """
    share = weights / weights.sum()
    scaled = rows * share.sqrt()[:, None]  # S = scaled^T scaled
    gram = scaled @ scaled.T if rows.shape[0] <= rows.shape[1] else scaled.T @ scaled
    energy, trace, d = gram.square().sum(), gram.diagonal().sum(), rows.shape[1]
    seen = (rows @ scaled.T).square().sum(1) if rows.shape[0] <= d else ((rows @ gram) * rows).sum(1)  # x^T S x
    noise = (share.square() * (rows.square().sum(1).square() - 2 * seen + energy)).sum()
    spread = energy - trace.square() / d
    return float((noise / spread).clamp(0, 1)) if float(spread) > 0 else 0.0
