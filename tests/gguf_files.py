"""Tiny GGUF files with random weights, whole or with a fault put in."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.checkpoint_material import ALPHABET, SPECIAL


def write_gguf(path: Path) -> None:
    """A one-layer qwen2 with a byte vocabulary, quantised to Q8_0 where rows allow, with llama.cpp's placeholders."""
    tokens = [*ALPHABET, *SPECIAL, "ab", *(f"[PAD{n}]" for n in range(260, 264))]
    writer = gguf.GGUFWriter(str(path), "qwen2")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_block_count, 1),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
    ):
        add(value)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1] + [5] * 4)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {"token_embd.weight": (264, 32), "output.weight": (264, 32), "output_norm.weight": (32,)}
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"blk.0.attn_{name}.bias": (size,) for name, size in (("q", 32), ("k", 16), ("v", 16))}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
