"""Steering vectors from and to other programs: llama.cpp, repeng, steering-vectors, plain tensors, and one file of our own.

| format           | file                                        | what layer i in it means                                      |
| rsteer           | safetensors with a header (`vector_file`)   | sites by name; everything is kept                             |
| gguf             | GGUF control vector, as llama.cpp loads it  | direction.i is added to the output of block i; no direction.0 |
| repeng           | the same container (`export_gguf`)          | the same, and direction.0 is allowed                          |
| steering-vectors | safetensors or JSON, see below              | output of block i (decoder_block), of its attention or MLP    |
| tensor           | .npy or safetensors with one tensor, (L, d) | row l is block l's input (`at="input"`) or its output         |

The output of block i is our Site(i + 1). llama.cpp counts blocks from 0, adds direction.i after block i's last residual addition
and refuses direction.0; repeng trains direction i on hidden_states[i + 1] and adds it there (both as their public sources do).
steering-vectors has no file of its own, and its objects are pickled, which is never read here; in that program write instead

    save_file({f"layer_activations.{i}": v for i, v in sv.layer_activations.items()}, path, {"layer_type": sv.layer_type})

All but `rsteer` hold vectors that are added as they are; they say nothing about which way is refusal. `sign` +1, the default,
says that they point from complying to refusing, -1 the other way; files written here carry their sign (not plain tensors) and
it is read back. The sign changes what the configuration says of itself, never what it adds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions.base import Direction
from rsteer_interp.errors import UserError
from rsteer_interp.steering import Steering, load_steering
from rsteer_interp.vector_codecs import (
    LAYERS,
    SAFE,
    At,
    Vectors,
    content_of,
    gguf_bytes,
    peek,
    read_gguf,
    read_steering_vectors,
    read_tensor,
    steering_vectors_bytes,
    tensor_bytes,
)
from rsteer_interp.vector_file import HEADER, packed, unpacked

Format = Literal["rsteer", "gguf", "repeng", "steering-vectors", "tensor"]
Sign = Literal[1, -1]
MOST_LAYERS = 10_000  # a file that names more is damaged


def save_vectors(
    path: Path | str,
    content: Steering | Mapping[Site, Direction],
    format: Format = "rsteer",
    *,
    n_layers: int | None = None,
    model_hint: str = "unknown",
) -> None:
    """Write one file, all of it or nothing; an existing file is not replaced.

    `content`: a configuration (other formats than rsteer take additions only, with amounts multiplied in) or directions by
    site, with their lengths. `n_layers` sizes a plain tensor; `model_hint` is llama.cpp's and repeng's name of the model.
    """
    path = Path(path)
    if format == "rsteer":
        return _publish(path, packed(content))
    vectors = replace(added_by(content), model_hint=model_hint)
    if format == "tensor":
        return _publish(path, tensor_bytes(vectors, path, n_layers))
    if format == "steering-vectors":
        return _publish(path, steering_vectors_bytes(vectors, path))
    return _publish(path, gguf_bytes(vectors, first=1 if format == "gguf" else 0))


def load_vectors(
    path: Path | str,
    *,
    format: Format | Literal["auto"] = "auto",
    backend: Backend | None = None,
    other_model: bool = False,
    layer: int | None = None,
    at: At = "input",
    sign: Sign | None = None,
    strength: float = 1.0,
) -> Steering:
    """The configuration in a file (format by its content) or in a saved steering folder; `strength` multiplies its amounts.

    With a `backend`, width, sites and, where the file says it, the model's fingerprint (unless `other_model`) are checked.
    `layer` places a single vector of a plain tensor, `at` says what its layers mean. `sign`: see the module's docstring.
    Directions are kept in float64, so that exporting again gives the file's float32 values to the bit.
    """
    path = Path(path)
    kind = None if path.is_dir() else _kind(path) if format == "auto" else format
    if kind in (None, "rsteer"):
        content = load_steering(path) if kind is None else unpacked(path)
        steering = content if isinstance(content, Steering) else _from_directions(content)
        if sign is not None:
            raise UserError(f"'{path}' says itself which way its vectors point; leave out sign")
    else:
        steering = _from_vectors(path, _read(path, kind, backend, layer, at), sign)
    steering = replace(steering, alpha=steering.alpha * strength)
    if backend is not None:
        _check_model(path, steering, backend, other_model)
    return steering


def added_by(content: Steering | Mapping[Site, Direction]) -> Vectors:
    """What a configuration adds: alpha s_l v_l in float64, rounded once to float32; or directions as they are.

    UserError for a configuration that does anything but add at every position.
    """
    if not isinstance(content, Steering):
        return Vectors({site: d.vector.float() for site, d in content.items()}, 1)
    for name, there in (
        ("repositions", content.reposition),
        ("has a gate", content.gate is not None),
        ("leaves generated tokens alone", not content.while_decoding),
        ("adds nothing (alpha is 0)", content.alpha == 0),
    ):
        if there:
            raise UserError(f"this configuration {name}, which a control vector cannot say; use the format rsteer")
    units = {site: v.double() / v.double().norm() for site, v in zip(content.sites, content.directions, strict=True)}
    signs = {1 if amount > 0 else -1 for amount in content.amounts.values()}
    added = {site: (content.amounts[site] * v).float() for site, v in units.items()}
    return Vectors(added, signs.pop() if len(signs) == 1 else None)


def _from_vectors(path: Path, vectors: Vectors, sign: Sign | None) -> Steering:
    if sign is not None and vectors.sign not in (None, sign):
        raise UserError(f"'{path}' says itself which way its vectors point ({vectors.sign:+d}); leave out sign")
    towards = sign or vectors.sign or 1
    kept = {site: v.double() for site, v in sorted(vectors.added.items()) if bool(v.any())}
    if not kept:
        raise UserError(f"'{path}' holds only vectors of zeros, which add nothing; give another file")
    lengths = {site: float(v.norm()) for site, v in kept.items()}
    return Steering(
        "imported",
        tuple(kept),
        torch.stack([towards * v / lengths[site] for site, v in kept.items()]),
        torch.stack([torch.zeros_like(v) for v in kept.values()]),
        tuple(lengths.values()),
        float(towards),
        reposition=False,
    )


def _from_directions(directions: Mapping[Site, Direction]) -> Steering:
    found = list(directions.values())
    return Steering(
        found[0].estimator,
        tuple(directions),
        torch.stack([d.vector.double() / d.length for d in found]),
        torch.stack([d.offset for d in found]),
        tuple(d.length for d in found),
        alpha=1.0,
        reposition=False,
        fingerprint=found[0].fingerprint,
    )


def _check_model(path: Path, steering: Steering, backend: Backend, other_model: bool) -> None:
    width = steering.directions.shape[1]
    if width != backend.d_model:
        raise UserError(f"'{path}' is for a stream of width {width}, this one has {backend.d_model}; use its own model")
    if steering.fingerprint and steering.fingerprint != backend.fingerprint and not other_model:
        raise UserError(
            f"'{path}' was made for another model (fingerprint {steering.fingerprint}, this one is {backend.fingerprint}); "
            "use that model, or allow another with other_model"
        )
    backend.check_sites(steering.edit())


def _kind(path: Path) -> Format:
    """The format of a file, from its content; UserError for a pickle."""
    content = content_of(path)
    if content == "pickle":
        raise UserError(f"'{path}' is a pickle, or a zip of them, which can run code when it is read; {SAFE}")
    if content == "unknown":
        raise UserError(f"'{path}' is no vector file (safetensors, GGUF, .npy, JSON); {SAFE}")
    if content == "safetensors":
        names, metadata = peek(path)
        if HEADER in metadata:
            return "rsteer"
        return "steering-vectors" if any(name.startswith(LAYERS) for name in names) else "tensor"
    return "gguf" if content == "gguf" else "tensor" if content == "npy" else "steering-vectors"


def _read(path: Path, kind: Format | None, backend: Backend | None, layer: int | None, at: At) -> Vectors:
    if kind in ("gguf", "repeng"):
        vectors = read_gguf(path)
    elif kind == "steering-vectors":
        vectors = read_steering_vectors(path)
    else:
        vectors = read_tensor(path, backend.n_layers if backend is not None else None, layer, at)
    shapes = {tuple(v.shape) for v in vectors.added.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        said = ", ".join(map(str, sorted(shapes))) or "none at all"
        raise UserError(f"'{path}' holds vectors of shape {said}; give one or more of one width, (d,)")
    for site, v in sorted(vectors.added.items()):
        if not bool(v.isfinite().all()):
            raise UserError(f"'{path}': the vector at {site} holds values that are not finite; make it again")
        if not 0 <= site.layer < MOST_LAYERS or (backend is not None and site not in backend.sites):
            which = "a model" if backend is None else f"this model of {backend.n_layers} blocks"
            raise UserError(f"'{path}' has a vector at {site}, which is no site of {which}; use its own model")
    return vectors


def _publish(path: Path, content: bytes) -> None:
    if path.exists():
        raise UserError(f"'{path}' exists already; name another file, or delete it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; name another file") from None
    finally:
        partial.unlink(missing_ok=True)
