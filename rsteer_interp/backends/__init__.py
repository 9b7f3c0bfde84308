"""Backends: run a model with an Edit at named Sites. `load_backend` chooses between them by one rule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rsteer_interp.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rsteer_interp.backends.base import Backend
    from rsteer_interp.backends.edits import Site
    from rsteer_interp.checkpoints import Checkpoint
    from rsteer_interp.loading import LoadedModel

__all__ = ["BackendName", "LoadOptions", "configured_backend", "load_backend"]

BackendName = Literal["auto", "transformerlens", "hooks"]

SMALL = 300_000_000
"""Parameters below which "auto" takes TransformerLens: there its cost does not matter yet."""


class LoadOptions(Protocol):
    """What a command's Config says about loading."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device_map(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def verify(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...


def configured_backend(options: LoadOptions, model: str, backend: BackendName) -> Backend:
    """`load_backend` as a command's options say."""
    return load_backend(
        model,
        backend,
        device=options.device,
        dtype=options.dtype,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
        verify=options.verify,
        batch_size=options.batch_size,
    )


def load_backend(
    model: str | Path | PreTrainedModel | Checkpoint,
    backend: BackendName = "auto",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    sites: Iterable[Site | str] | None = None,
    batch_size: int = 64,
) -> Backend:
    """The backend for a model, checked on a few tokens (`self_check`), with its `checkpoint`.

    backend "auto", in this order: hooks with a `device_map` or quantised weights; TransformerLens when `sites` names
    something that only it has, or when the model has fewer than 300M parameters; hooks otherwise. When TransformerLens was
    taken for size alone and cannot hold the model, hooks take its place and `notes` says so. A name given here wins.
    model, verify: what `checkpoints.resolve` takes. A loaded model is copied for TransformerLens, which changes its model.
    Raises UserError, naming the site that neither the chosen backend nor, with "auto", the other one has.
    """
    from rsteer_interp.checkpoints import Checkpoint, resolve
    from rsteer_interp.loading import load

    if backend not in ("auto", "transformerlens", "hooks"):
        raise UserError(f"no backend '{backend}'; choose auto, transformerlens or hooks")
    if backend == "transformerlens" and device_map is not None:
        raise UserError("device_map needs the hooks backend; leave out one of the two")
    checkpoint = (
        model
        if isinstance(model, Checkpoint)
        else resolve(model, revision=revision, tokenizer=tokenizer, verify=verify)
    )
    wanted, hook_names = _split(sites or ())

    def loaded() -> LoadedModel:
        return load(checkpoint, device=device, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)

    def made(name: str, source: LoadedModel) -> Backend:
        made = _make(name, source, batch_size)
        _check_wanted(made, wanted, hook_names)
        return made

    source = loaded()
    if backend != "auto":
        return made(backend, source)
    placed = device_map is not None or getattr(source.model, "hf_quantizer", None) is not None
    small = sum(parameter.numel() for parameter in source.model.parameters()) < SMALL
    first = "transformerlens" if hook_names or (small and not placed) else "hooks"
    try:
        return made(first, source)
    except UserError as error:
        if hook_names or (first == "hooks" and (placed or not wanted)):
            raise
        second = "hooks" if first == "transformerlens" else "transformerlens"
        # TransformerLens may have changed the model before it gave up.
        found = made(second, loaded() if first == "transformerlens" else source)
        found.notes.append(f"{second} backend instead of {first}: {error}")
        return found


def _split(sites: Iterable[Site | str]) -> tuple[frozenset[Site], frozenset[str]]:
    """The wanted sites, and the wanted names that only TransformerLens can know (`blocks.0.attn.hook_pattern`)."""
    from rsteer_interp.backends.edits import Site

    found: set[Site] = set()
    names: set[str] = set()
    for site in sites:
        if isinstance(site, Site):
            found.add(site)
            continue
        try:
            found.add(Site.parse(site))
        except UserError:
            names.add(site)
    return frozenset(found), frozenset(names)


def _make(name: str, source: LoadedModel, batch_size: int) -> Backend:
    import copy

    from rsteer_interp.backends.self_check import self_check

    options: dict[str, Any] = {"fingerprint": source.fingerprint, "batch_size": batch_size}
    backend: Backend
    if name == "hooks":
        from rsteer_interp.backends.hooks import HooksBackend

        backend = HooksBackend(source.model, source.tokenizer, **options)
    else:
        from rsteer_interp.backends.transformerlens import TransformerLensBackend

        given = source.checkpoint.model is not None
        backend = TransformerLensBackend(
            copy.deepcopy(source.model) if given else source.model, source.tokenizer, **options
        )
    backend.checkpoint = source.checkpoint
    self_check(backend)
    return backend


def _check_wanted(backend: Backend, sites: frozenset[Site], names: frozenset[str]) -> None:
    missing = [str(site) for site in sorted(sites - backend.sites)]
    missing += sorted(names - getattr(backend, "hook_names", frozenset()))
    if missing:
        raise UserError(
            f"the {backend.name} backend has no site {missing[0]} on {type(backend.model).__name__}; "
            "leave it out, or try the other backend (transformerlens, hooks)"
        )
