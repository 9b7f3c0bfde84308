"""Checkpoints: every reference resolves or fails in one line, what loads is what the files hold, identity is stable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from rsteer_interp import checkpoints, demo_models, fingerprints
from rsteer_interp.checkpoints import resolve
from rsteer_interp.demo_archives import cached_demo
from rsteer_interp.demo_models import DemoModel
from rsteer_interp.errors import CheckpointError
from rsteer_interp.fingerprints import fingerprint
from rsteer_interp.loading import load
from rsteer_interp.model_cache import models_folder
from tests.checkpoint_material import ALPHABET, cache, llama_folder, tiny, tiny_llama, tiny_tokenizer

__all__ = ["cache", "llama_folder", "tiny"]

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
        "from rsteer_interp.checkpoints import resolve\nfrom rsteer_interp.loading import load\n"
        f"print(load(resolve({str(llama_folder)!r})).fingerprint)"
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
    index = np.arange(fingerprints._SAMPLE) * fingerprints._STEP % size
    assert len(np.unique(index)) == fingerprints._SAMPLE
    assert len(np.unique(index // columns)) > 0.6 * rows and len(np.unique(index % columns)) > 0.6 * columns


def test_a_fingerprint_survives_weights_that_are_not_at_hand() -> None:
    with torch.device("meta"):
        absent = LlamaForCausalLM(tiny_llama().config)
    assert fingerprint(absent) == fingerprint(absent) != fingerprint(tiny_llama())
    packed = tiny_llama()
    packed.lm_head.weight = torch.nn.Parameter(torch.ones(259, 32, dtype=torch.int8), requires_grad=False)
    assert fingerprint(packed) != fingerprint(tiny_llama())


def test_importing_is_light() -> None:
    code = "import rsteer_interp.loading, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
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
    if cached_demo(demo) is None:
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
    if cached_demo(demo_models.SMOLLM2) is None:
        pytest.skip("smollm2 is not in the cache")
    tokenizer = AutoTokenizer.from_pretrained(models_folder() / demo_models.SMOLLM2.name)
    # Blanks before a number are one token; GPT-2's rule, which the GGUF loader falls back to, cuts them in two.
    assert tokenizer.tokenize("\n    12") == ["ĊĠĠĠĠ", "1", "2"]
