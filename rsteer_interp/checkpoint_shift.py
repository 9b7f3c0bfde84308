"""Checkpoint shift: how the last-token states of one model differ from those of another, and in how many dimensions.

X and Y are states of the same prompts before and after (base and instruct, or a checkpoint and its edited copy), n x d at one
site. The Hidden Dimensions of LLM Alignment (arXiv 2502.09674) and its code give several things one name; all are here:

    identity    R = Y - X                                  the code's rank plot
    matrix      R = Y - X W, W by least squares            the code's interventions: what is left AFTER the linear fit
    map         W - I of the affine fit Y = X W + b        the paper's text; right singular vectors of its (column) W - I

SVD is uncentred unless asked for, as in the code: a mean shift is a dimension like any other, and its energy share is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.nulls import CosineNull, cosine, cosine_null, random_unit_vectors
from rsteer_interp.statistics.draws import p_value, percentiles, upper
from rsteer_interp.statistics.resampling import halves, permutations

Variant = Literal["identity", "matrix", "map"]
VARIANTS: tuple[Variant, ...] = ("identity", "matrix", "map")
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RankNull = Literal["isotropic", "pairing", "signs"]


def paired_states(
    before: Backend, after: Backend, rows: Sequence[Tokens], sites: Sequence[Site], *, edit: Edit | None = None
) -> dict[Site, tuple[Float[Tensor, "prompt d"], Float[Tensor, "prompt d"]]]:
    """Last-token states of the same token rows in two checkpoints, or in one given twice, `after` with an edit if there is one.

    UserError when widths, depths or vocabularies differ.
    """
    sizes = [(each.n_layers, each.d_model) for each in (before, after)]
    check_comparable(sizes[0], len(before.tokenizer), sizes[1], len(after.tokenizer))
    x, y = last_states(before, rows, sites), last_states(after, rows, sites, edit)
    return {site: (x[site], y[site]) for site in sites}


def check_comparable(size: tuple[int, int], n_tokens: int, other: tuple[int, int], n_other: int) -> None:
    """UserError unless two models, by (layers, width) and vocabulary, may be checkpoints of one."""
    if size != other:
        raise UserError(
            f"models of {size[0]} layers, width {size[1]} and {other[0]} layers, width {other[1]} have no states in common; "
            "compare two checkpoints of one model"
        )
    if n_tokens != n_other:
        raise UserError(f"vocabularies of {n_tokens} and {n_other} tokens; the same ids must mean the same words")


def shift_rows(
    before: Float[Tensor, "n d"], after: Float[Tensor, "n d"], variant: Variant = "identity"
) -> Float[Tensor, "m d"]:
    """The matrix R whose right singular vectors are the shift's components, in float64: n x d, for "map" d x d.

    UserError for the fits unless n > d ("map": n > d + 1): with fewer prompts the least-squares remainder is exactly 0 and W is not
    determined. With n little above d the remainder is shrunk by (n - d) / n.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant '{variant}' of a shift; choose from {', '.join(VARIANTS)}")
    x, y = before.double(), after.double()
    if x.shape != y.shape or len(x) < 2:
        raise UserError(
            f"states of shape {tuple(x.shape)} and {tuple(y.shape)}; give the same two or more prompts, in order"
        )
    if variant == "identity":
        return y - x
    n, d = x.shape
    needed = d + (2 if variant == "map" else 1)
    if n < needed:
        raise UserError(
            f"variant '{variant}' fits {d} x {d} numbers and needs {needed} prompts or more (n = {n}), else the fit is "
            "perfect and says nothing; add prompts or use variant 'identity'"
        )
    if variant == "matrix":
        remainder: Tensor = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        return remainder
    fitted = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution
    # Rows are states here: the paper's W, which acts on columns, is the transpose.
    change: Tensor = (fitted - torch.eye(d, dtype=fitted.dtype)).T
    return change


@dataclass(frozen=True, eq=False)
class ShiftSpectrum:
    """Eigenvalues s^2 / (n - 1), largest first, and unit components as rows ("map": s^2, as W has no n). `n` is of prompts.

    `mean_share`: n |mean r|^2 / sum |r|^2, the share of the energy that a shift common to all prompts has; None for "map".
    The sign of a component is arbitrary until `oriented` fixes it.
    """

    values: Float[Tensor, " r"]
    components: Float[Tensor, "r d"]
    n: int
    variant: Variant
    centred: bool
    mean_share: float | None

    def effective_rank(self, threshold: float) -> int:
        """How many leading eigenvalues reach the share `threshold` of their sum."""
        return effective_rank(self.values, threshold)

    @property
    def effective_ranks(self) -> dict[float, int]:
        return {t: self.effective_rank(t) for t in THRESHOLDS}

    def oriented(self, difference: Float[Tensor, " d"]) -> ShiftSpectrum:
        """Components turned to have a positive inner product with `difference` (of the means of two groups of prompts)."""
        signs = (self.components @ difference.to(self.components)).sign()
        return replace(self, components=self.components * torch.where(signs == 0, 1.0, signs)[:, None])


def effective_rank(values: Float[Tensor, " r"], threshold: float) -> int:
    """Number of leading values needed to reach the share `threshold` of the total, 0 < threshold <= 1."""
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} of an effective rank; choose a share above 0 and up to 1")
    shares = values.double().cumsum(0) / values.double().sum()
    return int((shares < threshold - 1e-12).sum()) + 1


def shift_spectrum(
    before: Float[Tensor, "n d"],
    after: Float[Tensor, "n d"],
    variant: Variant = "identity",
    *,
    centred: bool = False,
) -> ShiftSpectrum:
    """SVD of the shift (see the module). UserError where nothing is shifted, and for "map" centred (its intercept centres)."""
    if centred and variant == "map":
        raise UserError("variant 'map' is fitted with an intercept, which centres already; leave out centred")
    rows = shift_rows(before, after, variant)
    energy = float(rows.square().sum())
    if not energy > 1e-20 * float(before.double().square().sum()):
        raise UserError("the states before and after are the same, so there is no shift; are these two models?")
    mean_share = None if variant == "map" else float(len(rows) * rows.mean(0).square().sum()) / energy
    values, components = _spectrum(rows, centred, 1 if variant == "map" else len(rows) - 1)
    return ShiftSpectrum(values, components, len(before), variant, centred, mean_share)


def _spectrum(rows: Tensor, centred: bool, divisor: int) -> tuple[Tensor, Tensor]:
    held = rows - rows.mean(0) if centred else rows
    _, singular, components = torch.linalg.svd(held, full_matrices=False)
    keep = singular > max(held.shape) * torch.finfo(torch.float64).eps * singular[0]
    return singular[keep].square() / divisor, components[keep]


# -- nulls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankBand:
    """An effective rank with the 95 % range of the same under a null, and its p: small where there are fewer dimensions."""

    rank: int
    low: float
    high: float
    p: float


def rank_null(
    before: Float[Tensor, "n d"],
    after: Float[Tensor, "n d"],
    kind: RankNull = "isotropic",
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    centred: bool = False,
    n_draws: int = 100,
    seed: int = 0,
) -> dict[float, RankBand]:
    """Effective ranks of the identity shift beside a null; small p: fewer dimensions than under it.

    isotropic: every prompt is shifted as far, in a direction of its own. pairing: the states after belong to other prompts (no
    prompt keeps its own), so that only what differs between prompts is left. signs: before and after are swapped at random per prompt
    (a random label); only for the centred spectrum, since an uncentred one does not change: sum r r^T is blind to signs.
    """
    if kind == "signs" and not centred:
        raise UserError(
            "swapping before and after leaves an uncentred spectrum as it is; use null 'isotropic' or 'pairing'"
        )
    rows = shift_rows(before, after)
    values = _spectrum(rows, centred, 1)[0]

    def isotropic() -> Iterator[Tensor]:
        sizes = rows.norm(dim=1, keepdim=True)
        n, d = rows.shape
        return (sizes * random_unit_vectors(n, d, 1000 * seed + i) for i in range(n_draws))

    def pairing() -> Iterator[Tensor]:
        orders = torch.from_numpy(permutations(len(rows), n_draws, seed))
        return (after.double()[order.roll(1)] - before.double()[order] for order in orders)

    def signs() -> Iterator[Tensor]:
        return (rows * sign[:, None] for sign in _signs(n_draws, len(rows), seed))

    draws: Callable[[], Iterator[Tensor]] = {"isotropic": isotropic, "pairing": pairing, "signs": signs}[kind]
    null = [_spectrum(draw, centred, 1)[0] for draw in draws()]
    found = {}
    for threshold in thresholds:
        rank, ranks = effective_rank(values, threshold), [effective_rank(v, threshold) for v in null]
        low, high = percentiles(ranks)
        found[threshold] = RankBand(rank, float(low), float(high), float(p_value(rank, ranks, "less")))
    return found


def _signs(n_draws: int, n: int, seed: int) -> Float[Tensor, "draw n"]:
    drawn = torch.randint(2, (n_draws, n), generator=torch.Generator().manual_seed(seed))
    return 2 * drawn.double() - 1


@dataclass(frozen=True)
class MeanShift:
    """Energy share of the mean shift, the 95 % point of the same when before and after are swapped at random per prompt, and p."""

    share: float
    null_high: float
    p: float


def mean_shift(
    before: Float[Tensor, "n d"], after: Float[Tensor, "n d"], n_draws: int = 1000, seed: int = 0
) -> MeanShift:
    """Whether the shift has a part that all prompts share; null by sign flips of whole rows (swapped labels)."""
    rows = shift_rows(before, after)
    energy = rows.square().sum()
    share = float(len(rows) * rows.mean(0).square().sum() / energy)
    null = (_signs(n_draws, len(rows), seed) @ rows).square().sum(1) / (len(rows) * energy)
    return MeanShift(share, float(upper(null)), float(p_value(share, null, "greater")))


@dataclass(frozen=True)
class SplitOverlap:
    """mean cos^2 of the principal angles between the leading k components of two halves of the prompts, over random splits:
    1 = the same span; random spans have k / d (`chance`). `low`, `high`: 2.5 and 97.5 % of the splits."""

    overlap: float
    low: float
    high: float
    chance: float


def split_overlap(
    before: Float[Tensor, "n d"],
    after: Float[Tensor, "n d"],
    k: int = 1,
    *,
    centred: bool = False,
    n_splits: int = 20,
    seed: int = 0,
) -> SplitOverlap:
    """How repeatable the first k components of the identity shift are (bootstrap split)."""
    rows = shift_rows(before, after)
    if len(rows) < 2 * k + 2:
        raise UserError(f"halves of {len(rows)} prompts have no {k} components each; add prompts or ask for fewer")
    overlaps = []
    for first in torch.from_numpy(halves(len(rows), n_splits, seed)):
        a, b = (_spectrum(rows[half], centred, 1)[1][:k] for half in (first, ~first))
        overlaps.append(float((a @ b.T).square().sum()) / k)
    low, high = percentiles(overlaps)
    return SplitOverlap(float(np.mean(overlaps)), float(low), float(high), k / rows.shape[1])


@dataclass(frozen=True)
class ComponentCosine:
    """Cosine of a component with the difference of two groups' mean states, beside random vectors (exact null) and permuted labels.

    `label_high` is the 95 % point of |cosine| with mean differences of permuted labels, `label_p` its p. The second null is the
    harder one: states share large directions, so differences of any two groups of prompts look somewhat alike.
    """

    random: CosineNull
    label_high: float
    label_p: float


def component_cosine(
    component: Float[Tensor, " d"],
    states: Float[Tensor, "prompt d"],
    first: Bool[Tensor, " prompt"],
    n_permutations: int = 1000,
    seed: int = 0,
) -> ComponentCosine:
    """The component against the mean of `states` of the first group minus that of the others: prompt sets, or refused against
    answered prompts, as the caller says. The sign is the component's own (see `oriented`)."""
    x, labels = states.double(), first.bool()
    if not 0 < int(labels.sum()) < len(labels):
        raise UserError(
            f"{int(labels.sum())} of {len(labels)} prompts are of the first group; a mean difference needs both groups"
        )
    shuffles = labels[torch.from_numpy(permutations(len(labels), n_permutations, seed))]
    null = [abs(cosine(component, x[chosen].mean(0) - x[~chosen].mean(0))) for chosen in shuffles]
    found = cosine_null(component, x[labels].mean(0) - x[~labels].mean(0))
    return ComponentCosine(found, float(upper(null)), float(p_value(abs(found.cosine), null, "greater")))
