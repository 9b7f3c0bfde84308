"""Interventions: ablation, addition, reposition and their kind, as one affine operator along unit directions.

    h' = h - kappa <h - ref, v> v + a v         (v a unit vector; methods: one operator covers most edits)

| edit                              | kappa | ref            | a            |
| directional ablation (Arditi)     | 1     | 0              | 0            |
| reposition (Refusal Steering)     | 1     | neutral mean o | alpha s      |
| addition                          | 0     | any            | alpha s      |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Around, At, Edit, Site, rowwise
from rsteer_interp.errors import UserError

Key = tuple[torch.device, torch.dtype]
Copies = tuple[Tensor, Tensor]


def check_finite(what: str, value: float | Tensor | None) -> None:
    """UserError for a number, or a tensor with one, that is NaN or infinite."""
    finite = value is None or (
        bool(value.detach().isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value)
    )
    if not finite:
        shown = "not finite" if isinstance(value, Tensor) else f"{value}, which is not finite"
        raise UserError(f"{what} is {shown}; give a finite number")


def _kept(copies: dict[Key, Copies], key: Key, make: Callable[[Key], Copies], of: tuple[Tensor | None, ...]) -> Copies:
    """The copies for a device and dtype, made once; made at each call when a tensor that they are `of` takes gradients."""
    if any(tensor is not None and tensor.requires_grad for tensor in of):
        return make(key)  # what is trained changes between calls, and each needs a graph of its own
    if key not in copies:
        with torch.inference_mode(False):  # made in a plain pass, they must serve one with gradients too
            copies[key] = make(key)
    return copies[key]


@dataclass(frozen=True, eq=False)
class Affine:
    """The affine operator at one site: `h - kappa <h - ref, v> v + a v`, v scaled to unit length here.

    `amount` (a, in units of the residual stream) and `kappa` may be numbers or tensors over the rows of the batch, so
    that one batch can hold many settings; then the edit is not pointwise (it depends on the row). Tensors that require a
    gradient receive it, through the scaling to unit length too: of a direction, its part across the direction.
    """

    site: Site
    direction: Float[Tensor, " d"]
    kappa: float | Float[Tensor, " row"] = 0.0
    reference: Float[Tensor, " d"] | None = None
    amount: float | Float[Tensor, " row"] = 0.0
    _copies: dict[Key, Copies] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        norm = float(self.direction.detach().double().norm())
        if not norm > 0 or norm == float("inf"):
            raise UserError(f"direction at {self.site} has length {norm}; a direction needs a finite, nonzero length")
        for name, value in (("kappa", self.kappa), ("reference", self.reference), ("amount", self.amount)):
            check_finite(f"the {name} of an edit at {self.site}", value)

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    @property
    def pointwise(self) -> bool:
        return not isinstance(self.kappa, Tensor) and not isinstance(self.amount, Tensor)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        unit, offset = self._on(x)
        kappa, amount = self._per_row(self.kappa, unit, at), self._per_row(self.amount, unit, at)
        # Inner products in float32 at least: a half-precision stream loses the projection to rounding.
        projection = (x.to(unit.dtype) @ unit)[..., None] - offset
        return (x + ((amount - kappa * projection) * unit).to(x.dtype)).to(x.dtype)

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vector and <ref, v> on the tensor's device, in float32 (float64 for a float64 stream)."""
        key = (x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        return _kept(self._copies, key, self._scaled, (self.direction, self.reference))

    def _scaled(self, key: Key) -> Copies:
        unit = self.direction.double() / self.direction.double().norm()
        offset = unit @ self.reference.double() if self.reference is not None else torch.zeros(())
        return unit.to(*key), offset.to(*key)

    @staticmethod
    def _per_row(value: float | Tensor, like: Tensor, at: At) -> float | Tensor:
        if not isinstance(value, Tensor):
            return value
        return value.to(like)[at.rows.cpu()][:, None, None]


@dataclass(frozen=True, eq=False)
class Everywhere:
    """Edits at several sites as one edit, at most one per site."""

    edits: Mapping[Site, Edit]

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.edits)

    @property
    def pointwise(self) -> bool:
        return all(edit.pointwise for edit in self.edits.values())

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return self.edits[at.site](x, at)


def ablate(directions: Mapping[Site, Float[Tensor, " d"]]) -> Edit:
    """Directional ablation `h - <h, v> v` at each site (Arditi et al., eq. 4); idempotent."""
    return Everywhere({site: Affine(site, v, kappa=1.0) for site, v in directions.items()})


def add(
    directions: Mapping[Site, Float[Tensor, " d"]], amounts: Mapping[Site, float] | Mapping[Site, Float[Tensor, " row"]]
) -> Edit:
    """Addition `h + a v` with v unit and the amount a in units of the stream, at each site."""
    return Everywhere({site: Affine(site, v, amount=amounts[site]) for site, v in directions.items()})


def set_component(
    directions: Mapping[Site, Float[Tensor, " d"]],
    references: Mapping[Site, Float[Tensor, " d"]],
    amounts: Mapping[Site, float] | Mapping[Site, Float[Tensor, " row"]],
) -> Edit:
    """Reposition: the component along v becomes `<ref, v> + a` (Refusal Steering, eq. 9; ACE with ref = neutral mean)."""
    return Everywhere(
        {
            site: Affine(site, v, kappa=1.0, reference=references[site], amount=amounts[site])
            for site, v in directions.items()
        }
    )


@dataclass(frozen=True, eq=False)
class Displace:
    """h' = h - <h, v> u, u and v unit vectors: ablation for u = v, else its null, as large at every position.

    For one site: at later ones a displacement finds what an ablation has taken away (`equal_norm` has the null of several).
    """

    site: Site
    v: Float[Tensor, " d"]
    u: Float[Tensor, " d"]

    pointwise = True

    def __post_init__(self) -> None:
        check_finite(f"a vector of a displacement at {self.site}", torch.stack([self.v, self.u]))

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        v, u = self.v.to(x.device, torch.float32), self.u.to(x.device, torch.float32)
        return (x - ((x.float() @ v)[..., None] * u).to(x.dtype)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class AblateSubspace:
    """h' = h - s U^T B h with orthonormal rows B and U: ablation of the span of B for U = B and s = 1, the defaults.

    Only the span of B matters then, and one row is directional ablation. Another U of as many rows moves every state s
    times as far but elsewhere: the null of equal dose (`Displace` is its case of one row).
    """

    site: Site
    basis: Float[Tensor, "k d"]
    into: Float[Tensor, "k d"] | None = None
    scale: float = 1.0
    _copies: dict[Key, Copies] = field(default_factory=dict, repr=False, compare=False)

    pointwise = True

    def __post_init__(self) -> None:
        check_finite(f"the scale of an ablation at {self.site}", self.scale)
        into = self.basis if self.into is None else self.into
        if into.shape != self.basis.shape:
            raise UserError(
                f"bases of shape {tuple(self.basis.shape)} and {tuple(into.shape)} at {self.site}; give equal"
            )
        for rows in (self.basis.detach().double(), into.detach().double()):
            off = (rows @ rows.T - torch.eye(len(rows)).to(rows)).abs().amax()
            if not float(off) < 1e-4:
                raise UserError(f"the rows of a basis at {self.site} are not orthonormal (off by {float(off):.2g})")

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        key = (x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        basis, into = _kept(self._copies, key, self._scaled, (self.basis, self.into))
        return (x - ((x.to(basis.dtype) @ basis.T) @ into).to(x.dtype)).to(x.dtype)

    def _scaled(self, key: Key) -> Copies:
        target = self.basis if self.into is None else self.into
        # Copies: a basis that is an inference tensor itself could not serve a pass with gradients.
        return self.basis.to(*key, copy=True), self.scale * target.to(*key, copy=True)


@dataclass(frozen=True, eq=False)
class OnPrompt(Around):
    """An edit of the prompt pass alone: generated tokens see it through the keys and values that the prompt left."""

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return x if at.phase == "decode" else self.edit(x, at)


@dataclass(frozen=True, eq=False)
class AtPositions:
    """An edit restricted to some positions: the template prefix, the instruction, the suffix, or generated tokens.

    `spans` names them; everything outside is left as it is.
    """

    edit: Edit
    spans: frozenset[str] = frozenset({"suffix", "generated"})

    SPANS = frozenset({"prefix", "instruction", "suffix", "generated"})

    def __post_init__(self) -> None:
        unknown = sorted(self.spans - self.SPANS)
        if unknown:
            raise UserError(f"unknown span '{unknown[0]}'; choose from {', '.join(sorted(self.SPANS))}")

    @property
    def sites(self) -> frozenset[Site]:
        return self.edit.sites

    @property
    def pointwise(self) -> bool:
        return False  # where a span ends depends on the row

    @property
    def leaves_prefix(self) -> bool:
        return "prefix" not in self.spans

    @property
    def rowwise(self) -> bool:
        return rowwise(self.edit)

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        ends = [at.batch.span_end(name).to(x.device)[at.rows][:, None] for name in ("prefix", "instruction", "prompt")]
        index = sum((at.positions >= end).long() for end in ends)
        assert isinstance(index, Tensor)
        wanted = torch.tensor(
            [name in self.spans for name in ("prefix", "instruction", "suffix", "generated")], device=x.device
        )
        return torch.where(wanted[index][..., None], self.edit(x, at), x)
