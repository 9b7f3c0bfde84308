"""Provenance: what made a result (model, prompts, settings, packages), and plain JSON values for everything on disk.

Nothing here may tell where on the machine something lay or hold a key: absolute paths keep their last part only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from rsteer_interp.errors import UserError

PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "rsteer_interp")
_SECRET_NAME = re.compile(r"(^|[_-])(api[_-]?key|access[_-]?key|secret|password|passwd|token|authorization)$", re.I)
_SECRET_VALUE = re.compile(r"\b(sk-[\w-]{16,}|hf_\w{16,}|Bearer\s+\S+)")
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")
_ABSOLUTE = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"=,;:]*[/\\])?([^\s'\"=,;:/\\]+)[/\\]?")
_REMOVED = "(removed)"


def plain(value: Any, where: str = "value") -> Any:
    """The value in JSON's own types: dataclasses, pydantic models, enums, tuples, sets, paths, numpy and torch values
    are converted. Not-a-number, infinities and unknown types are refused, by name."""
    if value is None or (isinstance(value, bool | int) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value, where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where} is {value}: results hold finite numbers only; is a set empty?")
        return float(value)
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate is not UTF-8
    if isinstance(value, PurePath):
        return value.name if value.is_absolute() else value.as_posix()
    if isinstance(value, BaseModel):
        return plain({name: getattr(value, name) for name in type(value).model_fields}, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, where)
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, set | frozenset):
        return plain(sorted(value), where)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist(), where)
    raise UserError(f"{where} is a {type(value).__name__}, which has no JSON form; convert it to numbers or text first")


def _plain_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        name = key.value if isinstance(key, Enum) else key
        if not isinstance(name, str | int) or str(name) in out:
            raise UserError(f"{where} has the key {key!r}, not a name of its own; use distinct strings")
        out[str(name)] = plain(item, f"{where}.{name}" if where != "value" else str(name))
    return out


def json_text(value: Any, where: str = "value", *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """The value as JSON text, of numbers that JSON has: what is not finite is refused by name. All that is kept goes here."""
    return json.dumps(plain(value, where), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)


def scrub(value: Any) -> Any:
    """A plain value without secrets and without absolute paths: of a path only the last part is kept."""
    if isinstance(value, dict):
        secret = {k for k, v in value.items() if isinstance(v, str) and v and _SECRET_NAME.search(k)}
        return {k: _REMOVED if k in secret else scrub(v) for k, v in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return _scrub_text(value) if isinstance(value, str) else value


def _scrub_text(text: str) -> str:
    return _ABSOLUTE.sub(r"\1", _URL_USER.sub("", _SECRET_VALUE.sub(_REMOVED, text)))


def _scrub_command(arguments: Sequence[str]) -> str:
    out: list[str] = []
    secret_next = False
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if secret_next and not argument.startswith("--"):
            out.append(_REMOVED)
        elif equals and _SECRET_NAME.search(name):
            out.append(f"{name}={_REMOVED}")
        elif Path(argument).is_absolute():  # whole, as it may hold spaces
            out.append(Path(argument).name)
        else:
            out.append(f"{name}={_scrub_text(rest)}" if equals else _scrub_text(argument))
        secret_next = not equals and argument.startswith("-") and bool(_SECRET_NAME.search(argument))
    return " ".join(out)


class Provenance(BaseModel):
    """The record of how a result came about: enough to make it again, nothing about whose machine it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    created: str
    """UTC, ISO 8601. The only thing that differs between two runs of the same command."""
    command: str = ""
    seeds: list[int] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    model_name: str | None = None
    model_source: str | None = None
    model_fingerprint: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    """The attention kernel (eager, sdpa, flash_attention_2, ...)."""
    template: str | None = None
    """Digest of the chat template as it frames a prompt."""
    prompt_sets: dict[str, str] = Field(default_factory=dict)
    """Set name -> digest of its prompts."""
    packages: dict[str, str] = Field(default_factory=dict)
    platform: str = ""
    notes: list[str] = Field(default_factory=list)
    """What was done another way than asked: a smaller batch after out of memory, a prefix that could not be shared."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name -> digest of the results this one was made from."""

    @classmethod
    def collect(
        cls,
        backend: Any = None,
        *,
        config: Any = None,
        seeds: Iterable[int] | int | None = None,
        prompt_sets: Mapping[str, Any] | Sequence[Any] = (),
        template: Any = None,
        inputs: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
        command: Sequence[str] | None = None,
    ) -> Provenance:
        """The record of this process. `backend` is read by attribute (a `Backend` or a stand-in, checkpoint optional);
        `config` is a dataclass, pydantic model or dict; prompt sets, template and inputs are objects with a `digest`,
        or digests. Seeds default to the config's own `seed` or `seeds`."""
        settings = scrub(plain(config if config is not None else {}, "config"))
        if seeds is None:
            seeds = settings.get("seeds", settings.get("seed", []))
        model = getattr(backend, "model", None)
        checkpoint = getattr(backend, "checkpoint", None)
        arguments = list(sys.argv if command is None else command)
        sets = prompt_sets if isinstance(prompt_sets, Mapping) else {given.name: given for given in prompt_sets}
        return cls(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=_scrub_command(arguments),
            seeds=[seeds] if isinstance(seeds, int) else list(seeds),
            config=settings,
            model_name=_text(getattr(checkpoint, "name", None)),
            model_source=_text(getattr(checkpoint, "source", None)),
            model_fingerprint=_text(getattr(backend, "fingerprint", None)),
            backend=_text(getattr(backend, "name", None)),
            device=_text(getattr(backend, "device", getattr(model, "device", None))),
            dtype=_text(getattr(backend, "dtype", getattr(model, "dtype", None))),
            attention=_text(getattr(getattr(model, "config", None), "_attn_implementation", None)),
            template=None if template is None else digest_of(template),
            prompt_sets={name: digest_of(item) for name, item in sets.items()},
            packages=_versions(),
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            notes=[
                _scrub_text(note) for note in (*getattr(backend, "notes", ()), *getattr(template, "notes", ()), *notes)
            ],
            inputs={name: digest_of(item) for name, item in (inputs or {}).items()},
        )


def digest_of(item: Any) -> str:
    """The digest of a thing that has one (attribute or method `digest`), or the digest itself."""
    value = item if isinstance(item, str) else getattr(item, "digest", None)
    value = value() if callable(value) else value
    if not isinstance(value, str):
        raise UserError(f"a {type(item).__name__} has no digest; pass its digest as text")
    return value


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else _scrub_text(str(value).removeprefix("torch."))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
