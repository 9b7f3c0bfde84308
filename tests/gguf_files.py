"""Tiny GGUF files with random weights, whole or with a fault put in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.checkpoint_material import ALPHABET, SPECIAL

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(
    path: Path,
    architecture: str = "qwen2",
    *,
    blocks: int = 1,
    block_count: int | None = None,
    left_out: Collection[str] = (),
    added: Mapping[str, np.ndarray[Any, Any]] | None = None,
    fields: Mapping[str, Any] | None = None,
    template: str = TEMPLATE,
) -> None:
    """A small model with a byte vocabulary, quantised to Q8_0 where rows allow, with llama.cpp's placeholders.

    `fields` are calls of the writer: name without `add_` -> value.
    """
    tokens = [*ALPHABET, *SPECIAL, "ab", *(f"[PAD{n}]" for n in range(260, 264))]
    writer = gguf.GGUFWriter(str(path), architecture)
    said = {
        "context_length": 64,
        "block_count": blocks if block_count is None else block_count,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 1,
        "rope_freq_base": 10000.0,
        "layer_norm_rms_eps": 1e-6,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "qwen2",
        "token_list": tokens,
        "token_types": [1] * 256 + [3] * 3 + [1] + [5] * 4,
        "token_merges": ["a b"],
        "eos_token_id": 258,
        "pad_token_id": 256,
        "add_bos_token": False,
        "chat_template": template,
    }
    for name, value in (said | dict(fields or {})).items():
        getattr(writer, f"add_{name}")(value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (264, 32), "output.weight": (264, 32)}
    shapes["output_norm.weight"] = (32,)
    block: dict[str, tuple[int, ...]] = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    block |= {"attn_norm": (32,), "ffn_norm": (32,)}
    for n in range(blocks):
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in block.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{n}.attn_{name}.bias": (size,) for name, size in (("q", 32), ("k", 16), ("v", 16))}
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | dict(added or {})
    for name, values in weights.items():
        if name in left_out:
            continue
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
