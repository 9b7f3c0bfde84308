"""Candidate directions, where they are looked for, and how one is taken out of a run or put into it.

    r[i, l] = mean of refusing - mean of complying prompts' states entering block l at template token i after the instruction

Arditi et al. (arXiv 2406.11717) and COSMIC (arXiv 2506.00085) choose among the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine, Everywhere
from rsteer_interp.methods.base import Examples
from rsteer_interp.nulls import cosine

Operator = Literal["linear", "affine"]
Place = tuple[int, int]  # position, layer

_NO_DIFFERENCE = 1e-6  # of the complying mean's length: below it, a difference of float32 states is rounding


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mean difference with its length: position from the prompt's end (-1 is its last token), block it enters."""

    position: int
    layer: int
    vector: Float[Tensor, " d"]
    reference: Float[Tensor, " d"]  # mean state of the complying prompts at the same place

    @property
    def site(self) -> Site:
        return Site(self.layer)

    @property
    def length(self) -> float:
        return float(self.vector.double().norm())


@dataclass(frozen=True)
class Search:
    """Which candidates are tried, on how many prompts. The papers try all (`stride=1`) on 32 (Arditi) or 100 (COSMIC)."""

    n_prompts: int = 16
    """Prompts of the select split per class: refusing, complying, ordinary."""
    stride: int = 5
    """Layers between neighbours of the first grid, which has every position; around its best, steps are halved down to one."""
    positions: tuple[int, ...] | None = None
    """Template tokens, counted from the end (-1 is the last); None for all after the instruction."""
    depth: float = 0.8
    """Only layers l < int(depth * n_layers) are tried: both papers leave the deepest fifth out."""
    evaluation: float = 0.1
    """Share of the layers at which COSMIC reads; one layer at least."""

    def __post_init__(self) -> None:
        if self.n_prompts < 1 or self.stride < 1:
            raise UserError(f"n_prompts is {self.n_prompts} and stride {self.stride}; both must be at least 1")

    def layers(self, n_layers: int) -> range:
        """All layers that may be chosen. Not the first: a template token enters it as the same embedding in every prompt."""
        return range(1, int(self.depth * n_layers))

    def grid(self, n_layers: int) -> range:
        stop = self.layers(n_layers).stop
        return range(max(min(self.stride, stop - 1), 1), stop, self.stride)


def mean_differences(
    refusing: Mapping[Site, Float[Tensor, "n pos d"]], complying: Mapping[Site, Float[Tensor, "m pos d"]]
) -> dict[Place, Candidate]:
    """r = mean refusing - mean complying at every position and block input, in float64; a place without difference has none."""
    found: dict[Place, Candidate] = {}
    for site in refusing:
        above, below = refusing[site].double().mean(0), complying[site].double().mean(0)
        for position, (high, low) in enumerate(zip(above, below, strict=True), start=-len(above)):
            r = high - low
            if float(r.norm()) > _NO_DIFFERENCE * float(low.norm()):
                found[position, site.layer] = Candidate(position, site.layer, r.float(), low.float())
    return found


def evaluation_layers(fit: Mapping[str, Examples], names: Iterable[str], n_layers: int, share: float) -> list[Site]:
    """COSMIC's layers: the max(1, int(share L)) block outputs at which the classes' mean last-token states differ most.

    Lowest cosine of mean refusing and mean complying states. Block l's output is Site(l + 1); the authors' code reads the
    hidden states of the model instead, whose last entry is no state of the stream but what the final norm made of it.
    """
    names = tuple(names)
    cosines: dict[Site, float] = {}
    for layer in range(1, n_layers + 1):
        refused = torch.cat([fit[name].states[Site(layer)][fit[name].refused] for name in names])
        answered = torch.cat([fit[name].states[Site(layer)][fit[name].answered] for name in names])
        cosines[Site(layer)] = cosine(refused.double().mean(0), answered.double().mean(0))
    return sorted(sorted(cosines, key=lambda site: cosines[site])[: max(1, int(share * n_layers))])


def ablate_everywhere(backend: Backend, vector: Float[Tensor, " d"], kappa: float = 1.0) -> Edit:
    """h - kappa <h, v> v of everything that is written to the stream, v the unit vector, at all positions.

    kappa = 1 is the paper's ablation (Arditi et al., eq. 4): at every block input, attention output and MLP output. For another
    kappa, which the paper does not have, only what is written is edited (the embedding, and each output), so that the stream
    holds 1 - kappa times what was written along v, as after W <- W - kappa v v^T W; at the block inputs too, it would compound.
    A block whose outputs the backend does not offer is edited at its input, and the stream before the final norm.
    """
    inputs = {Site(layer) for layer in range(backend.n_layers)}
    writes = {Site(0)} | {site for site in backend.sites if site.point in ("attn_out", "mlp_out")}
    if len(writes) < 2 * backend.n_layers + 1:
        return Everywhere({site: Affine(site, vector, kappa) for site in writes | inputs | {Site(backend.n_layers)}})
    return Everywhere({site: Affine(site, vector, kappa) for site in (writes | inputs if kappa == 1 else writes)})


def removal(backend: Backend, candidate: Candidate, operator: Operator, strength: float = 1.0) -> Edit:
    """Take the candidate out, at all positions. linear: ablation everywhere, kappa = strength. affine: at its own block input,

        h - min(s, 1) <h - ref, v> v - max(s - 1, 0) r        s: strength; ref: the complying mean there; v = r / |r|

    Strength 1 is the papers' (ACE, arXiv 2411.09003, with alpha = 0): every projection becomes that of a typical complying prompt.
    Less goes that share of the way; more goes on beyond, where -1 in units of r is as far as a typical refusing prompt lies
    before it (alpha = 1 - s). What lies between is our choice: alpha in (0, 1) would add refusal to a complying prompt.
    """
    if operator == "linear":
        return ablate_everywhere(backend, candidate.vector, strength)
    beyond = max(strength - 1, 0.0) * candidate.length
    return Affine(candidate.site, candidate.vector, min(strength, 1.0), candidate.reference, -beyond)


def addition(candidate: Candidate, operator: Operator) -> Edit:
    """Put the candidate in at its own block input, at all positions. linear: h + r, with the length of r; affine: every projection
    becomes that of a typical refusing prompt (ACE with alpha = 1)."""
    kappa, reference = (0.0, None) if operator == "linear" else (1.0, candidate.reference)
    return Affine(candidate.site, candidate.vector, kappa, reference, candidate.length)
