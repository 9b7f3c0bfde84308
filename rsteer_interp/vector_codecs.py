"""The foreign vector files, read and written: GGUF control vectors, steering-vectors' layer activations, plain tensors.

What each means, and where it comes from, stands in `vector_formats`. Nothing here unpickles anything.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from rsteer_interp.backends.edits import Point, Site
from rsteer_interp.errors import UserError
from rsteer_interp.provenance import json_text

At = Literal["input", "output"]
Content = Literal["gguf", "npy", "safetensors", "json", "pickle", "unknown"]
LAYERS = "layer_activations."
SAFE = "save it as safetensors in the program that made it: safetensors.torch.save_file({'layer_activations.3': vector}, path)"
_ARCHITECTURE, _SIGN_KEY = "controlvector", "rsteer.sign"
_LAYER_TYPES: dict[str, Point] = {"decoder_block": "resid_pre", "self_attn": "attn_out", "mlp": "mlp_out"}


@dataclass(frozen=True, eq=False)
class Vectors:
    """What a file adds to the stream at each site, float32, and which way that is (+1 refusing, -1 complying, None: not said)."""

    added: Mapping[Site, Float[Tensor, " d"]]
    sign: int | None = None
    model_hint: str = "unknown"


def gguf_bytes(vectors: Vectors, first: int) -> bytes:
    """A control vector whose first possible layer is `first`: 1 for llama.cpp, 0 for repeng."""
    for site in vectors.added:
        if site.point != "resid_pre" or site.layer - 1 < first:
            raise UserError(
                f"{site} has no place in this format, whose first vector is added to the output of block {first}; "
                f"leave it out, or use {'repeng or ' if site == Site(1) else ''}rsteer"
            )
    with tempfile.TemporaryDirectory() as folder:  # the writer wants a path
        writer = gguf.GGUFWriter(Path(folder) / "vector.gguf", _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", vectors.model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors.added))
        if vectors.sign is not None:
            writer.add_int32(_SIGN_KEY, vectors.sign)
        for site, v in sorted(vectors.added.items()):
            writer.add_tensor(f"direction.{site.layer - 1}", v.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "vector.gguf").read_bytes()


def read_gguf(path: Path) -> Vectors:
    """A control vector's directions, each at the output of its block."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [(t.name, t.tensor_type.name, np.array(t.data)) for t in reader.tensors]
    except Exception as error:  # the reader raises whatever a wrong offset leads to
        raise UserError(f"'{path}' is a damaged GGUF file ({line_of(error)}); make it again") from None
    if fields.get("general.architecture") != _ARCHITECTURE:
        raise UserError(
            f"'{path}' is a GGUF file of architecture '{fields.get('general.architecture')}', not a {_ARCHITECTURE}; "
            "give a control vector"
        )
    added = {}
    for name, kind, data in tensors:
        prefix, _, index = name.partition(".")
        if prefix != "direction" or not index.isdecimal() or kind != "F32":
            raise UserError(f"'{path}': tensor '{name}' ({kind}) is no direction.<layer> in F32; make it again")
        added[Site(int(index) + 1)] = torch.from_numpy(data)
    sign = fields.get(_SIGN_KEY)
    return Vectors(added, sign if sign in (1, -1) else None, str(fields.get(f"{_ARCHITECTURE}.model_hint", "")))


def steering_vectors_bytes(vectors: Vectors, path: Path) -> bytes:
    """Layer activations of one layer type: JSON for a path that ends so, else safetensors."""
    points = {site.point for site in vectors.added}
    if len(points) != 1 or not points <= set(_LAYER_TYPES.values()):
        raise UserError(
            f"one file holds one layer type, not {', '.join(sorted(points))}; write a file for each, or use rsteer"
        )
    if Site(0) in vectors.added:
        raise UserError(
            f"{Site(0)} is no block's output, so this format has no place for it; leave it out, or use rsteer"
        )
    (kind,) = (name for name, point in _LAYER_TYPES.items() if point in points)
    layers = {site.layer - (kind == "decoder_block"): v for site, v in sorted(vectors.added.items())}
    about = {"layer_type": kind} | ({} if vectors.sign is None else {"sign": str(vectors.sign)})
    if path.suffix == ".json":
        return json_text({**about, "layer_activations": layers}, path.name, indent=None).encode()
    return bytes(safetensors.torch.save({f"{LAYERS}{i}": v for i, v in layers.items()}, about))


def read_steering_vectors(path: Path) -> Vectors:
    """Layer activations, each at the output of its block, attention or MLP."""
    layers, about = _json_layers(path) if content_of(path) == "json" else _safetensors_layers(path)
    kind = str(about.get("layer_type", "decoder_block"))
    if kind not in _LAYER_TYPES:
        raise UserError(f"'{path}' has layer type '{kind}'; known are {', '.join(_LAYER_TYPES)}")
    added = {}
    for name, v in layers.items():
        if not name.isdecimal():
            raise UserError(f"'{path}': '{name}' is no layer; layers are numbers from 0")
        added[Site(int(name) + (kind == "decoder_block"), _LAYER_TYPES[kind])] = v.float()
    sign = about.get("sign")
    return Vectors(added, int(sign) if sign in ("1", "-1") else None)


def _json_layers(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        layers = {str(k): torch.tensor(v, dtype=torch.float32) for k, v in content["layer_activations"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is no JSON of layer_activations ({line_of(error)}); make it again") from None
    return layers, content


def _safetensors_layers(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _, metadata = peek(path)
    return {name.removeprefix(LAYERS): v for name, v in _tensors(path).items()}, metadata


def tensor_bytes(vectors: Vectors, path: Path, n_layers: int | None) -> bytes:
    """Rows of all block inputs and the final norm's (up to the last vector without `n_layers`), zeros where nothing is added."""
    other = [site for site in sorted(vectors.added) if site.point != "resid_pre"]
    if other:
        raise UserError(f"{other[0]} has no row in a plain tensor of block inputs; leave it out, or use rsteer")
    n = max(site.layer for site in vectors.added) if n_layers is None else n_layers
    rows = torch.zeros(n + 1, len(next(iter(vectors.added.values()))))
    for site, v in vectors.added.items():
        rows[site.layer] = v
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, rows.numpy(), allow_pickle=False)
        return buffer.getvalue()
    return bytes(safetensors.torch.save({"vectors": rows}))


def read_tensor(path: Path, n_layers: int | None, layer: int | None, at: At) -> Vectors:
    """Row l at block l's input or output, or the one row that `layer` names; a single vector needs a layer."""
    rows = _one_tensor(path)
    shift = int(at == "output")
    if rows.ndim == 1:
        if layer is None:
            raise UserError(
                f"'{path}' holds one vector of width {len(rows)}; say at which layer (layer, at) it is added"
            )
        return Vectors({Site(layer + shift): rows})
    if rows.ndim != 2:
        raise UserError(f"'{path}' holds a tensor of shape {tuple(rows.shape)}; give (layer, d) or (d,)")
    fits = n_layers is None or len(rows) == n_layers or (len(rows) == n_layers + 1 and not shift)
    if not fits:
        raise UserError(
            f"'{path}' has {len(rows)} rows for a model of {n_layers} blocks; give one per block, or layer= and (d,)"
        )
    if layer is not None:
        if not 0 <= layer < len(rows):
            raise UserError(f"'{path}' has no row {layer}; it has {len(rows)}")
        return Vectors({Site(layer + shift): rows[layer]})
    return Vectors({Site(i + shift): row for i, row in enumerate(rows)})


def _one_tensor(path: Path) -> Tensor:
    if content_of(path) != "npy":
        tensors = _tensors(path)
        if len(tensors) != 1:
            raise UserError(f"'{path}' holds {len(tensors)} tensors; give a file with one, (layer, d) or (d,)")
        return next(iter(tensors.values())).float()
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"'{path}' cannot be read without pickle ({line_of(error)}); {SAFE}") from None
    if rows.dtype.kind != "f":
        raise UserError(f"'{path}' holds {rows.dtype} values; give floating-point numbers")
    return torch.from_numpy(rows.astype(np.float32))


def content_of(path: Path) -> Content:
    """What a file is, from its first bytes and size; UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; give a vector file or a steering folder") from None
    # First, because the length that a safetensors file begins with may look like the start of anything.
    if start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
        return "safetensors"
    kinds: dict[bytes, Content] = {
        b"GGUF": "gguf",
        b"\x93NUMPY": "npy",
        b"{": "json",
        b"PK": "pickle",
        b"\x80": "pickle",
    }
    return next((kind for mark, kind in kinds.items() if start.startswith(mark)), "unknown")


def peek(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names and metadata of a safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is a damaged safetensors file ({line_of(error)}); make it again") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is a damaged safetensors file ({line_of(error)}); make it again") from None
    integers = [name for name, tensor in found.items() if not tensor.is_floating_point()]
    if integers:
        raise UserError(
            f"'{path}': '{integers[0]}' holds {found[integers[0]].dtype} values; give floating-point numbers"
        )
    return found


def line_of(error: Exception) -> str:
    """The first line of an error that some library raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
