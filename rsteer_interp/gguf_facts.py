"""What a GGUF file says that transformers does not read, and whether all that it holds has reached the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsteer_interp.errors import CheckpointError
from rsteer_interp.weight_keys import counted

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message
_ROPE = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufFacts:
    """The header of a GGUF file, as far as it is used here."""

    architecture: str
    tensors: dict[str, int]
    """Number of values of each tensor."""
    n_blocks: int
    """As the metadata says."""
    n_predicting: int
    """How many of them, the last, predict tokens further on and are no part of a model here."""
    pre_tokenizer: str | None
    turn_ends: tuple[int, ...]
    """Ids of every token that the file calls an end, without repetition."""
    rope_scaling: str | None
    rope_factors: tuple[float, ...] | None
    """By what the rotary frequencies are divided, one for each; None when the file has none."""

    @classmethod
    def read(cls, gguf: Path) -> GgufFacts:
        """CheckpointError for a damaged file."""
        from gguf import GGUFReader

        try:
            reader = GGUFReader(gguf)
            architecture = str(_value(reader, "general.architecture"))
            ends = (_value(reader, f"tokenizer.ggml.{name}") for name in _ENDS)
            factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE), None)
            return cls(
                architecture=architecture,
                tensors={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
                n_blocks=int(_value(reader, f"{architecture}.block_count")),
                n_predicting=int(_value(reader, f"{architecture}.nextn_predict_layers") or 0),
                pre_tokenizer=_value(reader, "tokenizer.ggml.pre"),
                turn_ends=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
                rope_scaling=_value(reader, f"{architecture}.rope.scaling.type"),
                rope_factors=None if factors is None else tuple(float(factor) for factor in factors),
            )
        except Exception as error:  # the reader raises whatever numpy and struct raise on a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{gguf}: damaged GGUF file ({reason}); download it again") from error


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def take_rope(gguf: Path, facts: GgufFacts, config: Any) -> None:
    """Write the file's rotary factors into the config, which transformers leaves as if there were none (Llama 3.1 has some).

    LongRoPE with the same factors at every length is frequency / factor and nothing else. CheckpointError for another kind
    of scaling that transformers did not take over.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return
    if facts.rope_factors is not None and set(facts.rope_factors) != {1.0}:
        factors = list(facts.rope_factors)
        config.rope_parameters = rope | {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    elif facts.rope_scaling not in (None, "none"):
        raise CheckpointError(
            f"{gguf}: its rotary scaling '{facts.rope_scaling}' is not read by transformers; "
            "use a safetensors folder of the same model"
        )


def check_blocks(gguf: Path, facts: GgufFacts) -> None:
    """CheckpointError unless the file has the blocks that its metadata counts."""
    there = {int(match[1]) for name in facts.tensors if (match := _BLOCK.match(name))}
    if there != set(range(facts.n_blocks)):
        raise CheckpointError(
            f"{gguf}: its block_count says {facts.n_blocks}, its weights have {len(there)} blocks; "
            "convert the model again, or download the file again"
        )


def check_all_read(gguf: Path, facts: GgufFacts, model: Any) -> None:
    """CheckpointError unless the model has as many values as the file: transformers drops tensors that it cannot place.

    Weights that share a tensor count once; rotary factors and blocks that predict further tokens do not count.
    """
    last = facts.n_blocks - facts.n_predicting
    ours = {
        name: size
        for name, size in facts.tensors.items()
        if name != _ROPE and not ((match := _BLOCK.match(name)) and int(match[1]) >= last)
    }
    here = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(ours.values()) == sum(here.values()):
        return
    dropped = sorted(set(ours) - _placed(facts, model))
    what = counted(dropped, "not read by transformers") or (
        f"the file has {sum(ours.values())} values where the model has {sum(here.values())}"
    )
    raise CheckpointError(f"{gguf}: {what}; use a safetensors folder of the same model")


def _placed(facts: GgufFacts, model: Any) -> set[str]:
    """GGUF names of the model's weights."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == facts.architecture)
    names, found = get_tensor_name_map(architecture, facts.n_blocks), set()
    for key in model.state_dict():
        stem, dot, kind = key.rpartition(".")
        found.add(f"{names.get_name(stem)}{dot}{kind}")
    return found
