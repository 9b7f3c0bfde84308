"""Parity certificate: how far two backends differ on one model, per site, in the prompt pass and in decoding.

Both run the same prompts unedited and with one seeded edit (an ablation at one layer, an addition at another), and decode
greedily. States are compared at real tokens; in decoding as long as both chose the same tokens so far.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError

PACKAGES = ("torch", "transformers", "transformer-lens")
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference that passes, by dtype, when both backends run the same attention kernel."""
OTHER_KERNEL = 3.0
"""What the tolerance is multiplied by when they do not. Measured on Qwen2.5-Coder-0.5B in float32: the bridge (eager) and
hooks (eager) agree exactly; eager and sdpa are each 4e-6 of the stream away from float64, each in its own way."""


class Difference(BaseModel):
    """Largest difference of a quantity over tokens, by coordinate and relative to the length of the stream."""

    model_config = ConfigDict(frozen=True)

    absolute: float
    relative: float
    tokens: int

    @classmethod
    def between(
        cls, a: Float[Tensor, "token d"], b: Float[Tensor, "token d"], stream: Float[Tensor, "token d"] | None = None
    ) -> Difference:
        """absolute = max |a_ti - b_ti|, relative = max_t |a_t - b_t| / max(|a_t|, |stream_t|).

        What a block adds is measured against the stream it is added to: it can all but vanish at a token, and what is left
        is then rounding. Not a number where a or b holds one.
        """
        if len(a) == 0:
            return cls(absolute=0.0, relative=0.0, tokens=0)
        off, length = (a.double() - b.double()), a.double().norm(dim=-1)
        if stream is not None:
            length = torch.maximum(length, stream.double().norm(dim=-1))
        relative = off.norm(dim=-1) / length.clamp(min=1e-30)
        return cls(absolute=float(off.abs().max()), relative=float(relative.max()), tokens=len(a))


class SiteParity(BaseModel):
    """The differences at one site: in the prompt pass and in decoding, unedited and edited."""

    model_config = ConfigDict(frozen=True)

    site: str
    prompt: Difference
    prompt_edited: Difference
    decode: Difference
    decode_edited: Difference

    @property
    def relative(self) -> float:
        parts = (self.prompt, self.prompt_edited, self.decode, self.decode_edited)
        return max((part.relative for part in parts), key=lambda value: (value != value, value))


class ParityCertificate(BaseModel):
    """How far two backends differ on one model and some prompts, with what is needed to make it again."""

    model_config = ConfigDict(frozen=True)

    backends: tuple[str, str]
    fingerprints: tuple[str, str]
    attention: tuple[str, str]
    dtype: str
    versions: dict[str, str]
    n_prompts: int
    new_tokens: int
    seed: int
    edit: list[str]
    sites: list[SiteParity]
    only_in_one: list[str]
    logits: Difference
    logits_edited: Difference
    greedy_agreement: float
    """Share of the greedy tokens that agree, counted up to each row's first disagreement."""
    greedy_agreement_edited: float
    tolerance: float

    @property
    def worst(self) -> SiteParity:
        return max(self.sites, key=lambda site: (site.relative != site.relative, site.relative))

    @property
    def passed(self) -> bool:
        """Same model; every relative difference within the tolerance; the same greedy tokens."""
        differences = [self.worst.relative, self.logits.relative, self.logits_edited.relative]
        return (
            self.fingerprints[0] == self.fingerprints[1]
            and all(value <= self.tolerance for value in differences)  # false for not-a-number
            and self.greedy_agreement == self.greedy_agreement_edited == 1.0
        )

    def __str__(self) -> str:
        return (
            f"parity of {' and '.join(self.backends)}: {'passed' if self.passed else 'FAILED'}; "
            f"largest relative difference {self.worst.relative:.1e} at {self.worst.site}, logits {self.logits.relative:.1e} "
            f"(edited {self.logits_edited.relative:.1e}), greedy tokens {self.greedy_agreement:.1%} "
            f"(edited {self.greedy_agreement_edited:.1%}), n = {self.n_prompts} prompts, tolerance {self.tolerance:.0e}"
        )


def parity_certificate(
    a: Backend,
    b: Backend,
    rows: Sequence[Tokens],
    *,
    new_tokens: int = 8,
    sites: Collection[Site] | None = None,
    seed: int = 0,
) -> ParityCertificate:
    """Compare two backends on some prompts, at all sites that both have, or at the given ones.

    Memory: 4 x prompts x tokens x sites x d_model x 4 bytes; give fewer sites or prompts for a large model.
    """
    common = a.sites & b.sites if sites is None else frozenset(sites)
    missing = sorted(common - (a.sites & b.sites))
    if missing or not common:
        raise UserError(
            f"no parity at {missing[0] if missing else 'any site'}: {a.name} and {b.name} do not both have it"
        )
    layers = (a.n_layers // 3, 2 * a.n_layers // 3)
    edit = _RandomEdit(Site(layers[0]), Site(layers[1]), a.d_model, seed)
    plain = _compare(a, b, rows, new_tokens, common, None)
    edited = _compare(a, b, rows, new_tokens, common, edit)
    dtype = str(a.model.dtype).removeprefix("torch.")
    return ParityCertificate(
        backends=(a.name, b.name),
        fingerprints=(a.fingerprint, b.fingerprint),
        attention=(_attention(a), _attention(b)),
        dtype=dtype,
        versions={name: version(name) for name in PACKAGES},
        n_prompts=len(rows),
        new_tokens=new_tokens,
        seed=seed,
        edit=[f"ablate a random direction at {edit.ablated}", f"add a random vector at {edit.added}"],
        sites=[
            SiteParity(
                site=str(site),
                prompt=plain.prompt[site],
                prompt_edited=edited.prompt[site],
                decode=plain.decode[site],
                decode_edited=edited.decode[site],
            )
            for site in sorted(common)
        ],
        only_in_one=[str(site) for site in sorted(a.sites ^ b.sites)],
        logits=plain.logits,
        logits_edited=edited.logits,
        greedy_agreement=plain.agreement,
        greedy_agreement_edited=edited.agreement,
        tolerance=TOLERANCES.get(dtype, 5e-2) * (1.0 if _attention(a) == _attention(b) else OTHER_KERNEL),
    )


@dataclass(frozen=True)
class _RandomEdit:
    """Ablates a seeded random direction at one site, and at another adds a seeded random vector of half the mean length."""

    ablated: Site
    added: Site
    d_model: int
    seed: int

    pointwise = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.ablated, self.added})

    def __call__(self, x: Tensor, at: At) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        units = torch.nn.functional.normalize(torch.randn(2, self.d_model, generator=generator), dim=-1)
        ablated, added = units.to(x.device, x.dtype)
        if at.site == self.ablated:
            x = x - (x @ ablated)[..., None] * ablated
        if at.site == self.added:
            x = x + 0.5 * x.norm(dim=-1, keepdim=True) * added
        return x


@dataclass(frozen=True, eq=False)
class _Recorder:
    """Keeps every state by row and position id, so that it does not matter how a backend cut the tokens into passes."""

    sites: frozenset[Site]
    shape: tuple[int, int, int]  # rows, positions, d_model
    states: dict[Site, Float[Tensor, "row pos d"]] = field(default_factory=dict)
    seen: dict[Site, Bool[Tensor, "row pos"]] = field(default_factory=dict)

    pointwise = True  # it changes nothing

    def __call__(self, x: Tensor, at: At) -> Tensor:
        states = self.states.setdefault(at.site, torch.zeros(self.shape))
        seen = self.seen.setdefault(at.site, torch.zeros(self.shape[:2], dtype=torch.bool))
        row, column = at.mask.cpu().nonzero(as_tuple=True)
        # A prefix that all rows share is run on one row: it stands for all of them, and is compared once.
        place = at.rows.cpu()[row], at.positions.cpu()[row, column]
        states[place] = x.detach().cpu()[row, column].float()
        seen[place] = True
        return x


@dataclass(frozen=True)
class _Comparison:
    prompt: dict[Site, Difference]
    decode: dict[Site, Difference]
    logits: Difference
    agreement: float


def _compare(
    a: Backend, b: Backend, rows: Sequence[Tokens], new_tokens: int, sites: frozenset[Site], edit: Edit | None
) -> _Comparison:
    ran = [_run(backend, backend.batch(rows), new_tokens, sites, edit) for backend in (a, b)]
    (recorded, logits, ids), (recorded_b, logits_b, ids_b) = ran
    agrees = (ids == ids_b).long().cumprod(-1).bool()  # up to and without the first disagreement
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    positions = torch.arange(recorded.shape[1])[None]
    # The state at decoding step s reads token s - 1, so it can be compared while the first s tokens agree.
    in_prompt = positions < lengths
    in_decode = (positions >= lengths) & (positions < lengths + agrees.sum(-1, keepdim=True))
    prompt: dict[Site, Difference] = {}
    decode: dict[Site, Difference] = {}
    for site in sites:
        both = recorded.seen[site] & recorded_b.seen[site]
        for kind, where in ((prompt, both & in_prompt), (decode, both & in_decode)):
            stream = recorded.states[Site(site.layer) if site.point in ("attn_out", "mlp_out") else site][where]
            kind[site] = Difference.between(recorded.states[site][where], recorded_b.states[site][where], stream)
    return _Comparison(prompt, decode, Difference.between(logits, logits_b), float(agrees.float().mean()))


def _run(
    backend: Backend, batch: Batch, new_tokens: int, sites: frozenset[Site], edit: Edit | None
) -> tuple[_Recorder, Tensor, Tensor]:
    shape = (len(batch), max(len(row.ids) for row in batch.rows) + new_tokens, backend.d_model)
    recorder = _Recorder(sites | {Site(site.layer) for site in sites}, shape)
    both = compose(edit, recorder)
    assert both is not None
    replies = backend.generate(batch, new_tokens, both)
    return recorder, backend.logits(batch, edit)[:, -1].float().cpu(), replies.ids


def _attention(backend: Backend) -> str:
    config: Any = backend.model.config
    return str(getattr(config, "_attn_implementation", None) or "unknown")
