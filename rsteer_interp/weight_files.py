"""Weight files: the headers of safetensors files, and whether the files of a folder are whole and one model's."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "copy or download the files again"

Header = Mapping[str, Mapping[str, Any]]
"""Of a safetensors file: key -> dtype, shape and data_offsets."""


def header(file: Path) -> Header:
    """The header of a safetensors file; ValueError where it has none."""
    return _header(file)[0]


def headers(folder: Path) -> Header:
    """The headers of a folder's weight files as one; what transformers would load, a single file before an index."""
    merged: dict[str, Mapping[str, Any]] = {}
    for file in _files(folder):
        merged |= header(file)
    return merged


def is_zero(folder: Path, key: str) -> bool:
    """Whether the named tensor of a folder's weight files holds zeros alone."""
    from safetensors import safe_open

    for file in _files(folder):
        if key in header(file):
            with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
                return not bool(opened.get_tensor(key).any())
    return False


def files_fault(folder: Path) -> str | None:
    """What keeps a folder's safetensors files from being one model, with the remedy; None where nothing does.

    Reads headers alone: every file must be whole, every key of an index in the shard it names, and no key in two shards.
    """
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return _index_fault(folder)
    if not any(folder.glob("*.safetensors")):
        return "no safetensors weights in this folder (pickled ones are not read); save it with save_pretrained"
    return _file_fault(folder / SINGLE) if (folder / SINGLE).is_file() else None


def _index_fault(folder: Path) -> str | None:
    try:
        place: dict[str, str] = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(place.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{INDEX} is damaged; {_AGAIN}"
    if other := [shard for shard in shards if not shard.endswith(".safetensors")]:
        return f"{INDEX} names {other[0]}, which is not safetensors (pickled weights are not read); save it again"
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        return f"{len(absent)} weight files are missing, {absent[0]} first; copy them too"
    for shard in shards:
        if fault := _file_fault(folder / shard):
            return fault
    held = {shard: set(header(folder / shard)) for shard in shards}
    if lost := [key for key, shard in place.items() if key not in held[shard]]:
        return (
            f"{place[lost[0]]} does not hold what {INDEX} says: {len(lost)} weights are not in their shard, "
            f"{lost[0]} first; {_AGAIN}"
        )
    if twice := sorted(key for key in place if sum(key in keys for keys in held.values()) > 1):
        return f"{len(twice)} weights are in more than one shard, {twice[0]} first; {_AGAIN}"
    return None


def _file_fault(file: Path) -> str | None:
    try:
        tensors, start = _header(file)
        end = start + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{file.name} is damaged or no safetensors file; {_AGAIN}"
    size = file.stat().st_size
    return None if size == end else f"{file.name} has {size} bytes where its header says {end}; {_AGAIN}"


def _header(file: Path) -> tuple[Header, int]:
    """The header, and where the tensors begin."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            raise ValueError(f"{file.name} has no safetensors header")
        found = json.loads(opened.read(length))
    found.pop("__metadata__", None)
    return found, 8 + length


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / n for n in sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))]
    return []
