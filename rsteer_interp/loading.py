"""Loading: a checkpoint's model, ready for reading (eval mode, no gradients), its tokenizer and its fingerprint.

A model loads with every weight of its files in place and no other, or not at all. Remote code runs only when asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rsteer_interp.checkpoints import Checkpoint, files_of
from rsteer_interp.errors import CheckpointError
from rsteer_interp.fingerprints import fingerprint
from rsteer_interp.library_messages import pass_on, quiet_libraries, reported
from rsteer_interp.processes import TENSOR_PARALLEL
from rsteer_interp.weight_keys import check_keys, check_kinds

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


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
    `from_pretrained`, and the model is not moved afterwards; "tp" is transformers' tensor parallel under torchrun. A model
    in memory is neither moved nor cast, but its mode changes.
    Raises CheckpointError, naming the checkpoint and the remedy; also for every weight that the files lack, have besides
    the model's, or have in another shape.
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
        with quiet_libraries(bars=sys.stderr.isatty()) as said, _named_errors(checkpoint, said):
            model, tokenizer = _from_pretrained(checkpoint, device, dtype, device_map, trust_remote_code)
        pass_on(checkpoint.name, said)
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
    model, info = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=wanted,
        device_map=placed,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
        **options,
    )
    if getattr(model, "_hf_peft_config_loaded", False):  # then `info` is the adapter's alone
        raise CheckpointError(f"{checkpoint.name}: a model with an adapter; merge it (peft: merge_and_unload)")
    folder = files_of(checkpoint)
    check_keys(checkpoint.name, info, model, folder)
    if folder is not None:
        check_kinds(checkpoint.name, folder, config)
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
def _named_errors(checkpoint: Checkpoint, said: list[str]) -> Iterator[None]:
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
        if "above report" in reason:  # weights that cannot be put together: an expert is missing, for one
            reason = reported(said)
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
