"""Self-check at load: on a few tokens, that this backend reads and edits this model where it says it does.

Every block's input is edited in a row of its own, so one pass of a small batch shows for all of them at once that an edit
changes the logits and leaves earlier states alone. A fault of the stream is an error; a fault of `attn_out` or
`mlp_out` withdraws that site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend, adds_up
from rsteer_interp.backends.edits import POINTS, At, Site, compose
from rsteer_interp.batch import Tokens, make_batch
from rsteer_interp.errors import UserError


@dataclass(frozen=True, eq=False)
class _Read:
    """Keeps what passes at each site, and complains when a site is passed twice."""

    sites: frozenset[Site]
    states: dict[Site, Float[Tensor, "row pos d"]] = field(default_factory=dict)

    pointwise = False  # so that no prefix is shared and every row is seen whole

    def __call__(self, x: Tensor, at: At) -> Tensor:
        if at.site in self.states:
            raise UserError(f"{at.site} fires twice in one pass of this model; blocks that run twice are not supported")
        self.states[at.site] = x.detach().clone()
        return x


@dataclass(frozen=True, eq=False)
class _Push:
    """Adds to each site, in one row, a fixed random vector as long as the stream is there."""

    rows: Mapping[Site, int]
    sizes: Mapping[Site, Float[Tensor, "pos 1"]]  # root mean square of the stream that enters each block

    pointwise = False

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.rows)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        row, seed = self.rows[at.site], 3 * at.site.layer + POINTS.index(at.site.point)
        signs = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).sign().to(x.device, x.dtype)
        push = self.sizes[Site(at.site.layer)].to(x.device, x.dtype) * signs
        return torch.cat([x[:row], x[row : row + 1] + push, x[row + 1 :]])


def self_check(backend: Backend) -> None:
    """Raises UserError, naming the site and the remedy, when the stream of a model cannot be read and edited as promised.

    Sites that fail singly are withdrawn, and a model whose padded rows go wrong is run one prompt at a time; both are noted.
    """
    model = type(backend.model).__name__
    hooks = _hook_count(backend)
    try:
        _check(backend, model)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the {backend.name} backend cannot run {model} ({reason}); {_other(backend)}") from error
    if _hook_count(backend) != hooks:
        raise UserError(f"the {backend.name} backend leaves hooks behind on {model}; {_other(backend)}")


def _check(backend: Backend, model: str) -> None:
    stream = [Site(layer) for layer in range(backend.n_layers + 1)]
    missing = [site for site in stream if site not in backend.sites]
    if missing:
        raise UserError(f"the {backend.name} backend has no {missing[0]} on {model}; {_other(backend)}")

    # Reading, on a padded short row and a long one.
    short, long = _tokens(backend, 2), _tokens(backend, 5)
    padded = make_batch([short, long], 0, backend.device)
    plain = backend.logits(padded)
    read = _Read(backend.sites)
    if _change(plain, backend.logits(padded, read)) > _rounding(plain):
        raise UserError(f"reading changes the logits of {model} on the {backend.name} backend; {_other(backend)}")
    for site in sorted(backend.sites):
        shape = tuple(read.states[site].shape) if site in read.states else None
        if shape != (2, 5, backend.d_model):
            _reject(backend, site, f"is never passed on {model}" if shape is None else f"has shape {shape} on {model}")
    for layer in range(backend.n_layers):
        post = Site(layer, "resid_post")
        if _change(read.states[post][1], read.states[Site(layer + 1)][1]) > _rounding(plain):
            raise UserError(f"{post} is not {Site(layer + 1)} on {model}; {_other(backend)}")

    # Editing: row 0 is left alone, row 1 + l is edited at the input of block l, the last one at every writer.
    writers = {site: len(stream) + 1 for site in backend.sites if site.point in ("attn_out", "mlp_out")}
    rows = {site: 1 + site.layer for site in stream} | writers
    sizes = {site: read.states[site][0, -2:].float().square().mean(-1, keepdim=True).sqrt() for site in stream}
    after = _Read(backend.sites)  # reads behind the edits
    batch = make_batch([short] * (len(stream) + 2), 0, backend.device)
    logits = backend.logits(batch, compose(_Push(rows, sizes), after))
    for site in stream:
        if _change(logits[0], logits[rows[site]]) <= _rounding(plain):
            _reject(backend, site, f"can be edited without any effect on the logits of {model}")
        for other in stream:
            same = _change(after.states[other][0], after.states[other][rows[site]]) <= _rounding(plain)
            if same != (other < site):
                effect = "does not change" if same else "changes"
                _reject(backend, site, f"is out of place on {model} (an edit there {effect} {other})")
    for site in sorted(writers):
        block = [
            after.states[Site(site.layer, point)][-1] for point in POINTS if Site(site.layer, point) in after.states
        ]
        if not adds_up(*block):
            _reject(backend, site, f"can be edited without being added to the stream of {model}")
    loose = 3 * torch.finfo(plain.dtype).eps ** 0.5  # for passes of other shapes, which round differently
    if _change(logits[0], _continued(backend, short, model)) > loose:
        raise UserError(f"decoding {model} with its cache differs from running it whole; {_other(backend)}")
    if _change(logits[0], plain[0]) > loose:
        backend.batch_size = 1
        backend.notes.append("padding changes this model's logits; prompts are run one at a time")


def _continued(backend: Backend, row: Tokens, model: str) -> Float[Tensor, "1 vocab"]:
    """Logits after a row whose last token is run by itself, on the cache of the tokens before."""
    batch, cache, logits = make_batch([row], 0, backend.device), None, None
    n = len(row.ids) - 1
    with torch.inference_mode():
        for part in (slice(0, n), slice(n, n + 1)):
            logits, cache = backend._forward(
                batch.ids[:, part],
                batch.mask[:, : part.stop],
                batch.positions[:, part],
                cache=cache,
                hooks={},
                keep=1,
                use_cache=True,
            )
            if cache is None:
                raise UserError(
                    f"{model} returns no key-value cache, so it cannot be decoded; such models are not supported"
                )
    assert logits is not None
    return logits[0]


def _tokens(backend: Backend, length: int) -> Tokens:
    vocab = backend.model.get_input_embeddings().weight.shape[0]
    return Tokens(tuple((17 * i + 11) % vocab for i in range(length)), 0, length, length)


def _change(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| / |a| over the vectors along the last axis."""
    a, b = a.float().cpu(), b.float().cpu()
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-30)).max())


def _rounding(like: Tensor) -> float:
    """What equal rows of one batch may differ by, far below the effect of the edits made here."""
    return float(min(32 * torch.finfo(like.dtype).eps, 0.02))


def _reject(backend: Backend, site: Site, fault: str) -> None:
    if site.point not in ("attn_out", "mlp_out"):
        raise UserError(f"{site} {fault}; {_other(backend)}")
    if site in backend.sites:
        backend.withdraw(site)
        backend.notes.append(f"{site} {fault}; it is not offered")


def _other(backend: Backend) -> str:
    return "use backend='transformerlens'" if backend.name == "hooks" else "use backend='hooks'"


def _hook_count(backend: Backend) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backend.model.modules())
