"""Key: what a kept step depends on, as a digest of the objects themselves.

`digest(value)` is blake2b over type and content:

| value                                  | what enters                                                              |
| None, truth, number, text, bytes       | type and value (1, 1.0 and "1" differ)                                   |
| tensor, numpy array                    | dtype, shape, bytes (v and -v differ; the device does not count)         |
| dataclass, pydantic model              | qualified name of the class, every field (but those of `compare=False`)  |
| mapping, set                           | entries, whatever their order                                            |
| other sequence                         | items, in order                                                          |
| object with `identity` (a property)    | qualified name of the class, and the identity                            |
| object without attributes              | qualified name of the class                                              |

Of a class from outside this package the code of its methods and its plain attributes enter too, since no version stands
for it (what the methods call outside the class does not). Anything else is an error, paths and functions among them: a
name, an id or a repr may stay the same while what it stands for changes.

Numbers move with the packages that compute them: `results.stage` puts the versions of `PACKAGES` into every key. Below
float32 they move with more (see `of_model`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import cached_property
from importlib import metadata
from types import CodeType, FunctionType, NoneType
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from rsteer_interp.errors import UserError
from rsteer_interp.processes import count

__all__ = ["PACKAGES", "UNKEYED", "digest", "of_model", "parts", "versions"]

PACKAGES = ("torch", "transformers", "transformer-lens", "rsteer_interp")
"""Packages whose version is part of every key."""

UNKEYED = frozenset(
    {
        "out",
        "scores",
        "model",
        "backend",
        "device",
        "dtype",
        "device_map",
        "batch_size",
        "trust_remote_code",
        "verify",
        "judge",
    }
)
"""Options of a command that no key holds as they are written: places, and what a key holds as an object (model, judge)."""

_SCALARS = (NoneType, bool, int, float, complex, str, bytes, torch.dtype)
_SETTINGS = (*_SCALARS, Tensor, np.ndarray, tuple, list, dict)  # attributes of a class that are no code
_VERSIONED = {*sys.stdlib_module_names, __name__.partition(".")[0], "numpy", "pydantic", "torch", "transformers"}


def digest(value: Any) -> str:
    """Sixteen hex digits that stand for the value; UserError for what does not show what it holds."""
    return _hashed(value)[:8].hex()


def parts(key: Mapping[str, Any]) -> dict[str, str]:
    """Digests of a key's entries by name, and of named entries inside them (`settings.dose`): which part changed?"""
    found: dict[str, str] = {}
    for name, value in key.items():
        inside = _entries(value)
        found |= {f"{name}.{part}": digest(item) for part, item in inside.items()} if inside else {name: digest(value)}
    return found


def versions() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed, without what a build adds to them (2.9.0+cpu is 2.9.0)."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def of_model(backend: Any) -> dict[str, Any]:
    """What of a loaded model (a `Backend`, read by attribute) results depend on.

    Always its fingerprint (all weights, where it has none), backend and dtype. Another batch size, attention kernel or
    device moves log-odds by rounding: in float32 by less than anything that is reported. Below float32, in TF32 and with
    quantised weights verdicts move with them: then the batch size asked for, the kernel, the kinds of devices and the
    number of processes that share the prompts out enter too. The make of a GPU does not.
    """
    weights = dict(backend.model.named_parameters())
    found = {
        "fingerprint": backend.fingerprint or digest(weights),
        "backend": backend.name,
        "dtypes": {weight.dtype for weight in weights.values()},
    }
    if torch.get_float32_matmul_precision() == "highest" and all(w.element_size() >= 4 for w in weights.values()):
        return found
    return found | {
        "batch_size": backend.batch_size,
        "attention": getattr(getattr(backend.model, "config", None), "_attn_implementation", None),
        "devices": {weight.device.type for weight in weights.values()},
        "processes": count(),
    }


# -- content as bytes ------------------------------------------------------------------------------------------------


def _hashed(value: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for piece in _pieces(value):
        found.update(len(piece).to_bytes(8, "big") + piece)
    return found.digest()


def _pieces(value: Any) -> Iterator[bytes]:
    """Type, size and content. Where one value ends and the next begins can be told from them."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _SCALARS) and not isinstance(value, Enum):
        yield next(kind for kind in _SCALARS if isinstance(value, kind)).__name__.encode()
        yield _text(value)
    elif isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield _bytes(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"array {value.dtype.descr} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        yield from sorted(_hashed([name, item]) for name, item in value.items())
    elif isinstance(value, Set):
        yield f"set {len(value)}".encode()
        yield from sorted(map(_hashed, value))
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        content = _content(value)
        yield f"object {type(value).__qualname__}".encode()
        if not isinstance(value, Enum):
            yield from _class(type(value))
        yield from _pieces(content)


def _text(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value.hex() if isinstance(value, float) else str(value)).encode("utf-8", "surrogatepass")


def _bytes(value: Tensor) -> bytes:
    if value.is_meta or value.layout != torch.strided:
        raise _hidden(value)
    flat = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


class _Bare:
    """The size of an object that holds nothing but attributes."""


def _content(value: Any) -> Any:
    """What an object holds: its value, identity or fields; None where it holds nothing."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(getattr(type(value), "identity", None), property | cached_property):
        return value.identity
    if isinstance(value, BaseModel):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.compare}
    # What is written in C may hold more than its attributes show; it is larger, or has none at all.
    if getattr(value, "__dict__", None) == {} and type(value).__basicsize__ <= _Bare.__basicsize__:
        return None
    raise _hidden(value)


def _entries(value: Any) -> Mapping[str, Any] | None:
    """The value's entries by name, where it has such."""
    if isinstance(value, (*_SCALARS, Tensor, np.ndarray, Set, Sequence, Enum)):
        return None
    found = value if isinstance(value, Mapping) else _content(value)
    return found if isinstance(found, Mapping) and all(isinstance(name, str) for name in found) else None


def _class(found: type) -> Iterator[bytes]:
    """Code and plain attributes of a class and its bases, as far as no version of a package stands for them."""
    for base in found.__mro__:
        if base.__module__.partition(".")[0] in _VERSIONED:
            continue
        yield f"class {base.__qualname__}".encode()
        for name, member in sorted(vars(base).items()):
            if isinstance(member, _SETTINGS) and not name.startswith("__"):
                yield name.encode()
                yield from _pieces(member)
            for function in _functions(member):
                yield name.encode()
                yield from _code(function.__code__)


def _functions(member: Any) -> list[FunctionType]:
    inside = [getattr(member, name, None) for name in ("__func__", "func", "fget", "fset")]
    return [f for f in map(inspect.unwrap, filter(callable, (member, *inside))) if isinstance(f, FunctionType)]


def _code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield "\0".join(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield from _pieces(str(constant) if constant is Ellipsis else constant)


def _hidden(value: Any) -> UserError:
    return UserError(
        f"a {type(value).__name__} does not show what it holds, so what depends on it cannot be kept; pass what is in it, "
        "or make its class a dataclass or give it a property `identity`"
    )
