"""The toolkit's own vector file: directions or a whole steering configuration in one safetensors file with a JSON header.

The header stands in the file's metadata under `rsteer`: sites by TransformerLens name, sign (complying to refusing), units (of
the residual stream of the raw weights), estimator or method, and the fingerprint of the model. Numbers are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions.base import Direction
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate, Score
from rsteer_interp.pooling import Pooling
from rsteer_interp.provenance import json_text
from rsteer_interp.steering import Steering

HEADER = "rsteer"
UNITS = "residual stream of the raw weights"


class _Gate(BaseModel):
    site: str
    threshold: float
    score: Score
    pooling: Pooling


class _Steering(BaseModel):
    method: str
    scales: list[float]
    alpha: float
    reposition: bool
    refusal_tokens: list[int]
    gate: _Gate | None
    while_decoding: bool


class _Direction(BaseModel):
    estimator: str
    hyperparameters: dict[str, Any]
    sets: list[str]
    counts: dict[str, int]
    offset_source: Literal["neutral", "midpoint"]
    diagnostics: dict[str, float]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    sites: list[str]
    sign: Literal["complying to refusing"]
    units: str
    fingerprint: str
    steering: _Steering | None = None
    directions: list[_Direction] | None = None


def packed(content: Steering | Mapping[Site, Direction]) -> bytes:
    """The file's bytes; the same content gives the same bytes."""
    if isinstance(content, Steering):
        header, tensors = _of_steering(content)
    else:
        header, tensors = _of_directions(content)
    text = json_text(header.model_dump(), "header", indent=None, sort_keys=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(stored, {HEADER: text}))


def _of_steering(steering: Steering) -> tuple[_Header, dict[str, Tensor]]:
    gate = steering.gate
    stored = _Steering(
        method=steering.method,
        scales=list(steering.scales),
        alpha=steering.alpha,
        reposition=steering.reposition,
        refusal_tokens=list(steering.refusal_tokens),
        gate=None
        if gate is None
        else _Gate(site=str(gate.site), threshold=gate.threshold, score=gate.score, pooling=gate.pooling),
        while_decoding=steering.while_decoding,
    )
    tensors = {"vectors": steering.directions, "references": steering.references}
    if gate is not None:
        tensors["gate"] = gate.direction
    return _header(list(steering.sites), steering.fingerprint, steering=stored), tensors


def _of_directions(directions: Mapping[Site, Direction]) -> tuple[_Header, dict[str, Tensor]]:
    found = [directions[site] for site in sorted(directions)]
    if len({d.fingerprint for d in found}) != 1:
        raise UserError("a file holds directions of one model; give one or more directions with the same fingerprint")
    stored = [_Direction.model_validate(d.record()) for d in found]
    tensors = {"vectors": torch.stack([d.vector for d in found]), "references": torch.stack([d.offset for d in found])}
    return _header([d.site for d in found], found[0].fingerprint, directions=stored), tensors


def _header(sites: list[Site], fingerprint: str, **content: Any) -> _Header:
    names = [str(site) for site in sites]
    return _Header(format=1, sites=names, sign="complying to refusing", units=UNITS, fingerprint=fingerprint, **content)


def unpacked(path: Path) -> Steering | dict[Site, Direction]:
    """What the file holds, checked; UserError names the fault."""
    try:
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            header = _Header.model_validate_json((file.metadata() or {})[HEADER])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError:
        raise UserError(f"'{path}' has no '{HEADER}' header; it is not a vector file of this toolkit") from None
    except (SafetensorError, OSError, ValidationError) as error:
        raise UserError(f"'{path}' cannot be read ({_reason(error)}); write it again") from None
    sites = [Site.parse(name) for name in header.sites]
    vectors, references = (_rows(path, tensors, name, len(sites)) for name in ("vectors", "references"))
    if vectors.shape != references.shape:
        raise UserError(f"'{path}': 'vectors' and 'references' differ in shape; write it again")
    if header.steering is not None and len(header.steering.scales) == len(sites):
        return _steering(header, header.steering, sites, vectors, references, tensors)
    if header.directions is not None and len(header.directions) == len(sites):
        return {
            site: Direction(
                vectors[i],
                site,
                d.estimator,
                d.hyperparameters,
                tuple(d.sets),
                d.counts,
                header.fingerprint,
                references[i],
                d.offset_source,
                d.diagnostics,
            )
            for i, (site, d) in enumerate(zip(sites, header.directions, strict=True))
        }
    raise UserError(f"'{path}' names {len(sites)} sites but does not describe as many; write it again")


def _steering(
    header: _Header,
    stored: _Steering,
    sites: list[Site],
    vectors: Tensor,
    references: Tensor,
    tensors: Mapping[str, Tensor],
) -> Steering:
    gate = None
    if stored.gate is not None:
        if "gate" not in tensors or tensors["gate"].shape != vectors.shape[1:]:
            raise UserError("the file's gate has no vector of the stream's width; write it again")
        g = stored.gate
        gate = Gate(Site.parse(g.site), tensors["gate"], g.threshold, g.score, g.pooling)
    return Steering(
        stored.method,
        tuple(sites),
        vectors,
        references,
        tuple(stored.scales),
        stored.alpha,
        stored.reposition,
        tuple(stored.refusal_tokens),
        header.fingerprint,
        gate,
        stored.while_decoding,
    )


def _rows(path: Path, tensors: Mapping[str, Tensor], name: str, n: int) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 2 or len(tensor) != n or n == 0:
        shape = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise UserError(f"'{path}': '{name}' is {shape} for {n} sites; write it again")
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise UserError(f"'{path}': '{name}' holds values that are not finite numbers; write it again")
    return tensor


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"header: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
