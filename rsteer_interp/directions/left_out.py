"""Ridge directions with one subject left out, at every penalty, in closed form: what the choice of lambda is judged by.

Without the prompts I of a subject, the scatter about the mean that is left is

    S_-g = S - U^T M U,        M = I + u u^T / (W - W_I),        M^-1 = I - u u^T / W,

U the rows of I centred on the mean of all and scaled by u = sqrt(w_I); W sums the weights w of a class, W_I those of I. So one
eigendecomposition of S, and a system as large as the subject (Woodbury), give every (S_-g / (W - W_I) + lambda I)^-1 Delta_-g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.linalg import block_diag
from torch import Tensor

from rsteer_interp.directions.evidence import CannotFit, Evidence
from rsteer_interp.statistics.intervals import membership

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-6, 9))
"""Mean eigenvalues of the covariance, 1e-3 to 1e4: from the null space's vector to the mean difference."""


@dataclass(frozen=True)
class _Class:
    """Prompts of one class in coordinates: weights, their sum, and the class mean."""

    inside: Bool[Tensor, " n"]
    w: Float[Tensor, " n"]
    mean: Float[Tensor, " r"]

    @classmethod
    def of(cls, x: Float[Tensor, "n r"], weights: Float[Tensor, " n"], inside: Bool[Tensor, " n"]) -> _Class:
        w = weights * inside
        return cls(inside, w, (w @ x) / w.sum())

    def rows(self, x: Float[Tensor, "n r"], where: Bool[Tensor, " n"]) -> Float[Tensor, "m r"]:
        """sqrt(w) (x - mean) of the class' prompts there."""
        chosen = self.inside & where
        return self.w[chosen].sqrt()[:, None] * (x[chosen] - self.mean)

    def left(self, out: Bool[Tensor, " n"]) -> float:
        """Sum of the weights without those prompts."""
        return float(self.w[~out].sum())

    def mean_without(self, x: Float[Tensor, "n r"], out: Bool[Tensor, " n"]) -> Float[Tensor, " r"]:
        return (self.w * ~out) @ x / self.left(out)

    def inverse_of_m(self, out: Bool[Tensor, " n"]) -> Float[Tensor, "m m"]:
        """I - u u^T / W."""
        u = self.w[self.inside & out].sqrt()
        return torch.eye(len(u), dtype=torch.float64) - torch.outer(u, u) / self.w.sum()


def left_out_scores(
    evidence: Evidence, penalties: Sequence[float], *, pooled: bool = False, weighted: bool = False
) -> tuple[Float[Tensor, "penalty n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """<h, v> of every refused and answered prompt, v the unit ridge direction fitted without the prompt's subject; with
    their labels (+1, -1) and subjects.

    `penalties` are absolute. The covariance is that of the complying class, or of both (`pooled`); weights are |c| or 1. NaN for a
    subject without whom a class is empty. States are taken about their mean. CannotFit for evidence without subjects.
    """
    if evidence.subjects is None:
        raise CannotFit("lambda is chosen by leaving subjects out, and these prompts have none; give their subjects")
    keep = evidence.labels != 0
    x, labels = evidence.states[keep].double(), evidence.labels[keep]
    member = torch.from_numpy(membership(list(evidence.subjects)))[keep]
    weights = evidence.scores[keep].double().abs() if weighted else torch.ones(len(x), dtype=torch.float64)
    x = x - x.mean(0)
    if len(x) < x.shape[1]:
        x = torch.linalg.qr(x.T).R.T  # coordinates in the span of the states: nothing else is seen
    answered, refused = (_Class.of(x, weights, labels == sign) for sign in (-1, 1))
    rows = torch.cat([c.rows(x, c.inside) for c in ([answered, refused] if pooled else [answered])])
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, x = values.clamp(min=0), x @ vectors
    answered, refused = (_Class.of(x, weights, labels == sign) for sign in (-1, 1))
    seen = [answered, refused] if pooled else [answered]
    ridge = torch.tensor(list(penalties), dtype=torch.float64)[:, None]
    scores = torch.full((len(ridge), len(x)), torch.nan, dtype=torch.float64)
    for subject in sorted(set(member.tolist())):
        out = member == subject
        if min(c.left(out) for c in (answered, refused)) < 1e-9:
            continue
        delta = refused.mean_without(x, out) - answered.mean_without(x, out)
        shrink = 1 / (values + ridge * sum(c.left(out) for c in seen))  # of the whole scatter, plus the penalty
        u = torch.cat([c.rows(x, out) for c in seen])
        small = torch.from_numpy(block_diag(*(c.inverse_of_m(out) for c in seen))) - (u * shrink[:, None]) @ u.T
        v = shrink * delta
        v = v + shrink * (torch.linalg.solve(small, (v @ u.T)[..., None])[..., 0] @ u)
        scores[:, out] = v @ x[out].T / v.norm(dim=1, keepdim=True)
    return scores, labels, member


def discrimination(
    scores: Float[Tensor, "penalty n"], labels: Int[Tensor, " n"], member: Int[Tensor, " n"]
) -> Float[Tensor, " penalty"]:
    """Pearson r of score and label, both centred inside subjects: how well refused prompts are told from answered ones of the
    same subject, where no topic helps. Subjects with a NaN score are left out; NaN where no subject has both."""
    kept = torch.isfinite(scores).all(0)
    s, y = (_centred(values[..., kept].double(), member[kept]) for values in (scores, labels))
    r: Tensor = (s @ y) / (s.norm(dim=1) * y.norm())
    return r


def _centred(values: Float[Tensor, "*k n"], member: Int[Tensor, " n"]) -> Float[Tensor, "*k n"]:
    """Without the means of the subjects."""
    same = (member[:, None] == member).double()
    return values - values @ (same / same.sum(1))


def chosen_penalty(
    evidence: Evidence, penalties: Sequence[float], *, pooled: bool = False, weighted: bool = False
) -> float:
    """The penalty whose left-out directions discriminate best inside subjects.

    CannotFit where fewer than two subjects have both refused and answered prompts.
    """
    scores, labels, member = left_out_scores(evidence, penalties, pooled=pooled, weighted=weighted)
    both = [s for s in sorted(set(member.tolist())) if len(set(labels[member == s].tolist())) == 2]
    found = discrimination(scores, labels, member)
    if len(both) < 2 or not bool(torch.isfinite(found).all()):
        raise CannotFit(
            f"lambda is chosen on subjects with both refused and answered prompts, and there are {len(both)}; add prompts"
        )
    return max(zip(found.tolist(), penalties, strict=True))[1]
