"""Fingerprints: sixteen hex digits that identify a model by what it computes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAMPLE = 1024  # values per tensor
_STEP = 2654435761  # odd and near the golden ratio of 2**32, so that the sample visits all rows and columns
_IMMATERIAL = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "gguf_file"}


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that identify a model: blake2b over its config and a fixed sample of every weight.

    Covers the config (without paths, dtype, versions) and, of every parameter, its name, its shape and 1024 values (all
    of them in a smaller tensor). So an edit of a whole matrix shows, and so does another dtype, since rounding changes
    values; an edit of a few entries may not. Of a weight that is not at hand (offloaded, sharded over processes, packed
    in a way that cannot be indexed) only name and shape are covered. Equal in every process and on every device.
    """
    digest = hashlib.blake2b(digest_size=8)
    # Configs may hold an infinity: a limit that is none.
    material = json.dumps(_material(model.config.to_diff_dict()), sort_keys=True, default=str, allow_nan=True)
    digest.update(material.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()


def _material(config: Any) -> Any:
    """A config without what does not change the function computed: private fields, paths, versions."""
    if not isinstance(config, dict):
        return config
    return {k: _material(v) for k, v in config.items() if not str(k).startswith("_") and k not in _IMMATERIAL}


def _sample(parameter: torch.Tensor) -> bytes:
    import torch
    from torch.distributed.tensor import DTensor

    if parameter.device.type == "meta" or isinstance(parameter, DTensor):
        return b"elsewhere"
    try:
        flat = parameter.detach().reshape(-1)
        size = flat.numel()
        if size > _SAMPLE:
            flat = flat[torch.arange(_SAMPLE, device=flat.device) * _STEP % size]
        return flat.to(torch.float32).cpu().numpy().astype("<f4").tobytes()
    except (NotImplementedError, RuntimeError):  # a tensor subclass of a quantisation library
        return b"packed"
