"""Weight keys: whether a model's weights are all there, and nothing else, before anybody computes with them.

transformers draws what is missing at random, drops what is left over, and reports both in its log at most. Here every
missing, unexpected or mismatched key is an error that names the first ones, how many there are, and the remedy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rsteer_interp.errors import CheckpointError
from rsteer_interp.weight_files import Header, headers, is_zero

# Buffers that older versions of libraries saved: computed from the config (rotary frequencies, position numbers), or
# constants of the causal mask of GPT-2 and its kin.
_COMPUTED = re.compile(r"(^|\.)(rotary_(pos_)?emb\.inv_freq|position_ids|(attn|attention)\.masked_bias)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_WRAPPERS = ("module.", "_orig_mod.")  # of torch's data parallel and of torch.compile
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|base_layer|base_model)\.")
_OTHER_HEAD = re.compile(r"(^|\.)(score|classifier|v_head|value_head|reward_head|regression_head)\.")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}
_SHOWN = 2  # keys that a message names, of each kind


def check_keys(name: str, info: Mapping[str, Any], model: Any, folder: Path | None = None) -> None:
    """CheckpointError unless transformers' loading info says that every weight was read and every key has its place.

    A weight that shares another's tensor (tied) is not missing, which transformers sees to; nor is a buffer that the model
    computes. `folder` is where the files are, if known.
    """
    files = headers(folder) if folder is not None else {}
    buffers = {key for key, _ in model.named_buffers()}
    missing = [key for key in info["missing_keys"] if not (key in buffers and _COMPUTED.search(key))]
    unexpected = [key for key in info["unexpected_keys"] if not _harmless(key, files)]
    if getattr(model.config, "quantization_config", None) is not None and folder is not None:
        # Some quantisers write a bias for every layer: zeros where the model has none.
        unexpected = [key for key in unexpected if not (key.endswith(".bias") and is_zero(folder, key))]
    other = {key: f"{key} {tuple(there)} for {tuple(here)}" for key, there, here in info["mismatched_keys"]}
    faults = [
        counted(missing, "missing from the files"),
        counted(unexpected, "in the files without a place in the model"),
        counted(other.values(), "of another shape in the files than in the model"),
    ]
    if any(faults):
        found = " and ".join(fault for fault in faults if fault)
        raise CheckpointError(f"{name}: {found}; {_remedy(missing, unexpected, list(other), model)}")


def check_kinds(name: str, folder: Path, config: Any) -> None:
    """CheckpointError for weights kept as integers where the config names no quantisation: they would be read as floats."""
    if getattr(config, "quantization_config", None) is not None:
        return
    packed = [k for k, tensor in headers(folder).items() if k.endswith(".weight") and tensor["dtype"] in _INTEGERS]
    if packed:
        raise CheckpointError(
            f"{name}: {counted(packed, 'kept as integers')}, but its config.json names no quantisation; "
            "use the config.json that belongs to these files"
        )


def counted(keys: Collection[str], what: str) -> str:
    """'9 weights are WHAT (the first keys in the model's order, and 7 more)'; empty for none."""
    if not keys:
        return ""
    ordered = sorted(keys, key=_natural)
    more = f", and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    number = "1 weight is" if len(ordered) == 1 else f"{len(ordered)} weights are"
    return f"{number} {what} ({', '.join(ordered[:_SHOWN])}{more})"


def _natural(key: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]


def _harmless(key: str, files: Header) -> bool:
    if _COMPUTED.search(key):
        return True
    # A mask is one square for all heads of all prompts; a bias of that name would be a vector.
    stored = files.get(key) or next((tensor for there, tensor in files.items() if key.endswith(f".{there}")), None)
    shape = stored["shape"] if stored else []
    return bool(_MASK.search(key)) and len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]


def _remedy(missing: list[str], unexpected: list[str], mismatched: list[str], model: Any) -> str:
    """What most likely happened, and what to do."""
    for wrapper in _WRAPPERS:
        if {key.replace(wrapper, "", 1) for key in unexpected if wrapper in key} & set(missing):
            return f"the keys carry the '{wrapper}' of a wrapper; save the model inside it ({wrapper}save_pretrained)"
    if any(map(_ADAPTER.search, unexpected)):
        return "these are an adapter's weights; merge it into its model (peft: merge_and_unload) and save that"
    if any(map(_OTHER_HEAD.search, unexpected)):
        return "this is a reward model or a classifier, which writes no text; give the chat model that it was made from"
    depth = _depth_fault(missing, unexpected, mismatched, model)
    if depth:
        return depth
    head = model.get_output_embeddings()
    own = {key for key, parameter in model.named_parameters() if head is not None and parameter is head.weight}
    if missing and not unexpected and set(missing) <= own:
        return (
            "the model was saved without its head; save the whole of it (AutoModelForCausalLM), or set "
            "tie_word_embeddings in its config.json if the embedding is its head"
        )
    if mismatched or (missing and unexpected):
        return "config.json and the weights are not of one model; copy or download both again"
    if unexpected:
        return "config.json leaves out a part of this model; use the one that belongs to these weights"
    return "the files are not complete; copy or download them again"


def _depth_fault(missing: list[str], unexpected: list[str], mismatched: list[str], model: Any) -> str | None:
    """Whether all that is wrong is that the config has more blocks than the weights, or fewer."""
    blocks = _by_block(key for key, _ in model.named_parameters())
    lacking, surplus = _by_block(missing), _by_block(unexpected)
    outside = [key for key in [*missing, *unexpected] if not _BLOCK.search(key)]
    if mismatched or outside or not blocks:
        return None
    n = len(blocks)
    whole = {block for block in lacking if lacking[block] == blocks.get(block)}
    last = {block for block in range(n) if set(range(block, n)) <= whole}
    if surplus and not lacking and min(surplus) >= n:
        there = max(surplus) + 1
    elif last and not surplus and set(lacking) == last and len(last) < n:
        there = min(last)
    else:
        return None
    return f"config.json says {n} layers, the weights have {there}; use the config.json that belongs to them"


def _by_block(keys: Iterable[str]) -> dict[int, int]:
    """How many keys each block has."""
    return dict(Counter(int(match[1]) for key in keys if (match := _BLOCK.search(key))))
