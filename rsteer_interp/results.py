"""Results on disk, the border between computing and drawing: save, load and resume result folders.

A result is a folder with `result.json`, `tensors.safetensors` (when it has tensors) and `provenance.json`, complete or
absent (see `complete_folder`). `result.json` and the tensors are the same bytes for the same data; time and machine are
in `provenance.json` only. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from rsteer_interp.complete_folder import held, publish
from rsteer_interp.errors import UserError
from rsteer_interp.key import digest, parts, versions
from rsteer_interp.processes import from_first, is_first
from rsteer_interp.provenance import Provenance, json_text, plain

__all__ = ["Provenance", "Result", "load_result", "plain", "save_result", "stage"]

FORMAT = 1
_JSON, _TENSORS, _PROVENANCE = "result.json", "tensors.safetensors", "provenance.json"
_FILES = (_TENSORS, _PROVENANCE, _JSON)  # result.json comes last: a folder that has it is complete
_AGAIN = "delete the folder and run the analysis that wrote it again"


@dataclass(frozen=True)
class Result:
    """A complete result as read from disk. `data` is plain JSON, `digest` names its content (data, tensors and key)."""

    folder: Path
    kind: str
    data: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    provenance: Provenance
    digest: str
    key: str | None = None
    """Digest of what the outcome depends on, for a result that `stage` wrote."""
    key_parts: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Digests of the key's parts by name, from which `stage` tells what changed."""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The named tensor; with `shape` given, its shape is checked (-1: any length)."""
        if name not in self.tensors:
            known = ", ".join(sorted(self.tensors)) or "none"
            raise UserError(f"'{self.folder}' has no tensor '{name}' (it has: {known}); {_AGAIN}")
        tensor = self.tensors[name]
        fits = len(shape) == tensor.ndim and all(a in (-1, b) for a, b in zip(shape, tensor.shape, strict=True))
        if shape and not fits:
            raise UserError(f"'{self.folder}': tensor '{name}' has shape {tuple(tensor.shape)}, not {shape}; {_AGAIN}")
        return tensor


def save_result(
    folder: Path | str,
    kind: str,
    data: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    provenance: Provenance,
) -> Result:
    """Write a result, all of it or nothing; a result of the same kind already there is replaced, other files in the
    folder stay. Refuses numbers that are not finite, and to overwrite anything that is not a result of this kind."""
    return from_first(lambda: _save(Path(folder), kind, data, tensors, provenance))


def load_result(folder: Path | str, *, kind: str | None = None, fingerprint: str | None = None) -> Result:
    """The complete result in `folder`, checked: of this kind, of the model with this fingerprint, undamaged, all numbers finite."""
    folder = Path(folder)
    with held(folder, _FILES, write=False) as place:
        if not (place / _JSON).is_file():
            raise UserError(f"no result in '{folder}'; run the analysis that writes it, or name another folder")
        result = _read(folder, place)
    if kind is not None and result.kind != kind:
        raise UserError(f"'{folder}' holds a result of kind '{result.kind}', not '{kind}'; name a folder with '{kind}'")
    of = result.provenance.model_fingerprint
    if fingerprint is not None and of != fingerprint:
        name = result.provenance.model_name or "unnamed"
        raise UserError(
            f"'{folder}' belongs to another model ({name}, fingerprint {of}; this one is {fingerprint}); "
            "use that model, or run the analysis again with this one"
        )
    return result


def stage(
    folder: Path | str,
    kind: str,
    key: Mapping[str, Any],
    compute: Callable[[], tuple[Any, Mapping[str, Tensor] | None]],
    provenance: Provenance | Callable[[], Provenance],
) -> Result:
    """The result for `key`: from `folder` when it is there, else computed, saved.

    `key` holds all objects that the outcome depends on (see `key`); the versions of packages are added. Where a result is
    there and its key is another, one line on standard error says what is computed again, and which parts changed.

    This is how long runs resume. A second program that wants the same folder waits and then reads. `provenance` may be
    a function; it is called after `compute`, so it sees the notes of the run. The processes of a torchrun compute
    together; the first reads and writes, and all get its result.
    """
    folder, whole = Path(folder), {**key, "packages": versions()}
    wanted, named = digest([FORMAT, kind, whole]), parts(whole)
    with held(folder, _FILES, write=True, lock="work") if is_first() else nullcontext():
        found = from_first(lambda: _found(folder, kind))
        if found is not None and found.key == wanted:
            return found
        if found is not None and is_first():
            print(f"computing step '{folder.name}' again: {_changed(found.key_parts, named)}", file=sys.stderr)
        data, tensors = compute()
        record = provenance if isinstance(provenance, Provenance) else provenance()
        return from_first(lambda: _save(folder, kind, data, tensors, record, wanted, named))


_MOST = 3  # parts of a key that are named


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is not as it was, in words."""
    if not before:
        return "an earlier version of this package kept it"
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if not names:
        return "what it depends on changed"
    more = f" and {len(names) - _MOST} more parts" if len(names) > _MOST else ""
    return f"{', '.join(names[:_MOST])}{more} of what it depends on changed"


def _found(folder: Path, kind: str) -> Result | None:
    """The readable result in the folder, None if there is none; refuses a folder that belongs to something else."""
    with held(folder, _FILES, write=True) as place:
        _check_replaceable(folder, place, kind)
        try:
            return _read(folder, place) if (place / _JSON).is_file() else None
        except UserError:
            return None  # damaged: to be computed again


def _save(
    folder: Path,
    kind: str,
    data: Any,
    tensors: Mapping[str, Tensor] | None,
    provenance: Provenance,
    key: str | None = None,
    key_parts: Mapping[str, str] | None = None,
) -> Result:
    stored = {name: _storable(name, tensor) for name, tensor in (tensors or {}).items()}
    packed = safetensors.torch.save(stored) if stored else None
    content = {
        "format": FORMAT,
        "kind": kind,
        "key": key,
        "data": plain(data, "data"),
        "tensors_digest": None if packed is None else _digest(packed),
    } | ({"key_parts": dict(key_parts)} if key_parts else {})
    contents = {_JSON: _json_bytes(content), _PROVENANCE: _json_bytes(plain(provenance, "provenance"))}
    if packed is not None:
        contents[_TENSORS] = packed
    with held(folder, _FILES, write=True) as place:
        _check_replaceable(folder, place, kind)
        publish(folder, place, _FILES, contents)
    data = json.loads(contents[_JSON])["data"]  # as reading gives it, names in order, so that a resumed run is no other
    return Result(folder, kind, data, stored, provenance, _digest(contents[_JSON]), key, key_parts or {})


def _check_replaceable(folder: Path, place: Path, kind: str) -> None:
    if place.exists() and not place.is_dir():
        raise UserError(f"'{folder}' is a file; name a folder for the result")
    if not (place / _JSON).is_file():
        return
    try:
        there = json.loads((place / _JSON).read_bytes())
    except (ValueError, OSError):
        return  # damaged: may be replaced
    found = there.get("kind") if isinstance(there, dict) and "tensors_digest" in there else None
    if found != kind:
        what = f"a result of kind '{found}'" if found else "a result.json of another program"
        raise UserError(f"'{folder}' already holds {what}; choose another folder or delete it")


def _storable(name: str, tensor: Tensor) -> Tensor:
    stored = tensor.detach().to("cpu", copy=True).contiguous()
    if stored.is_floating_point() and not bool(stored.isfinite().all()):
        bad = int((~stored.isfinite()).sum())
        raise UserError(f"tensor '{name}' has {bad} values that are not finite, nothing was saved; try --dtype fp32")
    return stored


def _read(folder: Path, place: Path) -> Result:
    try:
        raw = (place / _JSON).read_bytes()
        content = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite)
        packed = (place / _TENSORS).read_bytes() if content["tensors_digest"] is not None else None
        if packed is not None and _digest(packed) != content["tensors_digest"]:
            raise ValueError(f"{_TENSORS} is not the file that belongs to {_JSON}")
        tensors = {} if packed is None else safetensors.torch.load(packed)
        provenance = Provenance.model_validate_json((place / _PROVENANCE).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        kind, data, key, key_parts = content["kind"], content["data"], content["key"], content.get("key_parts", {})
    except FileNotFoundError as error:
        raise UserError(f"'{folder}' is not complete ({Path(error.filename).name} is missing); {_AGAIN}") from None
    except OSError as error:
        raise UserError(f"cannot read '{folder}': {error.strerror or error}; check its permissions") from None
    except KeyError as error:
        raise UserError(f"'{folder}' is not a result of this toolkit (no {error} in it); name another folder") from None
    except (ValueError, TypeError, SafetensorError) as error:
        reason = f"{_PROVENANCE} is not valid" if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(f"'{folder}' cannot be read ({reason}); {_AGAIN}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"'{folder}': tensor '{name}' holds values that are not finite; {_AGAIN}")
    return Result(folder, kind, data, tensors, provenance, _digest(raw), key, key_parts)


def _json_bytes(value: Any) -> bytes:
    return (json_text(value, sort_keys=True) + "\n").encode()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{_JSON} holds {name}")


def _finite(text: str) -> float:
    """The number that the text writes; 1e999 is none."""
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
