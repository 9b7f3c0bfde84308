"""Weight keys: a model loads with every weight of its files and no other, or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsteer_interp.checkpoints import resolve
from rsteer_interp.errors import CheckpointError
from rsteer_interp.fingerprints import fingerprint
from rsteer_interp.loading import LoadedModel, load
from tests.tiny_models import N_LAYERS, tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]
KEY = "model.layers.{}.self_attn.q_proj.weight"


def saved(folder: Path, family: str = "llama", **options: Any) -> Path:
    tiny_model(family).save_pretrained(folder, **options)
    return folder


def rewritten(folder: Path, change: Callable[[Weights], Weights], name: str = "model.safetensors") -> None:
    save_file(change(load_file(folder / name)), folder / name, {"format": "pt"})


def configured(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def loaded(folder: Path) -> LoadedModel:
    return load(resolve(folder, tokenizer=tiny_tokenizer()), device="cpu")


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if part not in key}


def beginning(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: tensor for key, tensor in weights.items()}


def adding(**extra: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {key.replace("__", "."): tensor for key, tensor in extra.items()}


def unheaded(weights: Weights) -> Weights:
    return {key.removeprefix("model."): tensor for key, tensor in weights.items() if "lm_head" not in key}


FAULTS: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "a layer is missing": (
        without("layers.2."),
        {},
        r"9 weights are missing .*layers\.2\..*, and 7 more.*not complete",
    ),
    "the head is missing": (without("lm_head"), {}, r"1 weight is missing .*lm_head.weight\); .*without its head"),
    "a base model": (unheaded, {}, r"1 weight is missing .*lm_head.weight\); .*without its head"),
    "fewer layers in the config": (dict, {"num_hidden_layers": 2}, r"18 weights .* place.*says 2 layers, .* have 4"),
    "more layers in the config": (dict, {"num_hidden_layers": 6}, r"18 weights are missing.*says 6 layers, .* have 4"),
    "module.": (beginning("module."), {}, r"39 weights are missing .* and 39 weights are .*carry the 'module.'"),
    "_orig_mod.": (beginning("_orig_mod."), {}, r"39 weights are missing .*carry the '_orig_mod.'"),
    "_orig_mod. inside": (
        lambda weights: {key.replace("model.layers", "model._orig_mod.layers"): t for key, t in weights.items()},
        {},
        "carry the '_orig_mod.'",
    ),
    "a bias that the config denies": (
        lambda weights: weights | {KEY.format(0).replace("weight", "bias"): torch.zeros(32)},
        {"attention_bias": False},
        r"1 weight is in the files without a place .*q_proj.bias\)",
    ),
    "another family's config": (
        dict,
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 1},
        r"52 weights are missing .*transformer\.h\.0.* and 38 weights .*not of one model",
    ),
    "a reward model": (
        lambda weights: without("lm_head")(weights) | {"score.weight": torch.ones(1, 32)},
        {},
        r"lm_head.weight\) and 1 weight .*score.weight\); this is a reward model",
    ),
    "a value head": (adding(v_head__summary__weight=torch.ones(1, 32)), {}, "a reward model or a classifier"),
    "an adapter's weights": (
        adding(base_model__model__layers__0__q_proj__lora_A__weight=torch.ones(2, 32)),
        {},
        "merge it into its model",
    ),
    "another shape": (
        lambda weights: weights | {"model.norm.weight": torch.ones(31)},
        {},
        r"1 weight is of another shape .*model.norm.weight \(31,\) for \(32,\)",
    ),
    "a transposed matrix": (
        lambda weights: {k: t.T.contiguous() if "up_proj" in k else t for k, t in weights.items()},
        {},
        r"4 weights are of another shape .*up_proj.weight \(32, 64\) for \(64, 32\)",
    ),
    "quantised, and the config does not say so": (
        lambda weights: {k: t.to(torch.int8) if "q_proj" in k else t for k, t in weights.items()},
        {},
        r"4 weights are kept as integers .*names no quantisation",
    ),
    "a scale of quantised weights": (
        lambda weights: weights | {KEY.format(1) + "_scale_inv": torch.ones(1)},
        {},
        r"1 weight is in the files without a place .*weight_scale_inv",
    ),
    "a mask's name on a vector": (
        lambda weights: weights | {"model.layers.0.attn.bias": torch.ones(32)},
        {},
        r"1 weight is in the files without a place .*attn.bias",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_named(tmp_path: Path, fault: str) -> None:
    change, fields, message = FAULTS[fault]
    folder = saved(tmp_path / "broken")
    rewritten(folder, change)
    configured(folder, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(folder)
    assert str(caught.value).startswith("broken: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "phi3", "gpt_neox", "qwen3_next"])
def test_no_key_can_be_lost_or_added(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / family, family)
    weights = load_file(folder / "model.safetensors")
    sound = fingerprint(tiny_model(family))
    assert loaded(folder).fingerprint == sound
    for key in sorted(weights)[:: 1 + len(weights) // 5]:
        rewritten(folder, lambda _, key=key: {k: t for k, t in weights.items() if k != key})
        with pytest.raises(CheckpointError, match=f"{family}: "):
            loaded(folder)
        rewritten(folder, lambda _, key=key: weights | {f"{key.rpartition('.')[0]}.more": torch.ones(3)})
        with pytest.raises(CheckpointError, match=r"1 weight is in the files without a place in the model \(.*more\)"):
            loaded(folder)
    rewritten(folder, lambda _: weights)
    assert loaded(folder).fingerprint == sound


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mixed", "mixtral")
    rewritten(folder, without("layers.1.block_sparse_moe.experts.3.w1"))
    with pytest.raises(CheckpointError, match=r"mixed: .*layers\.1\.mlp\.experts\.gate_up_proj"):
        loaded(folder)


# --- shards ------------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> tuple[Path, list[Path]]:
    saved(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return folder, shards


def test_shards_load_as_the_whole(tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path / "sharded")
    assert loaded(folder).fingerprint == fingerprint(tiny_model("llama"))
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights are never looked at")
    assert loaded(folder).fingerprint == fingerprint(tiny_model("llama"))


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_an_index_that_names_one_shard_alone_is_refused(tmp_path: Path) -> None:
    folder, shards = sharded(tmp_path / "sharded")
    path, index = index_of(folder)
    index["weight_map"] = {key: shard for key, shard in index["weight_map"].items() if shard == shards[0].name}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weights are missing from the files .*; the files are not complete"):
        loaded(folder)


def test_a_shard_copied_over_another_is_refused(tmp_path: Path) -> None:
    folder, shards = sharded(tmp_path / "sharded")
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} does not hold what .* says: \d+ weights are not"):
        loaded(folder)


def test_a_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder, shards = sharded(tmp_path / "sharded")
    key, tensor = next(iter(load_file(shards[0]).items()))
    rewritten(folder, lambda weights: weights | {key: tensor + 1}, shards[1].name)
    with pytest.raises(CheckpointError, match="1 weights are in more than one shard"):
        loaded(folder)


def test_a_shard_cut_short_and_a_pickled_one_are_refused(tmp_path: Path) -> None:
    folder, shards = sharded(tmp_path / "sharded")
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=f"{shards[1].name} has {len(content) - 4} bytes where .* {len(content)}"):
        loaded(folder)
    shards[1].write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is damaged or no safetensors file"):
        loaded(folder)
    path, index = index_of(folder)
    index["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names pytorch_model.bin, which is not safetensors \(pickled"):
        loaded(folder)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tuned")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tuned: an adapter.*merge it"):
        loaded(folder)


# --- what is not missing -----------------------------------------------------------------------------------------


def test_a_tied_head_is_not_missing_whichever_of_the_two_is_stored(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tied", "gemma2")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    sound = loaded(folder).fingerprint
    rewritten(folder, lambda w: {k.replace("model.embed_tokens", "lm_head"): t for k, t in w.items()})
    assert loaded(folder).fingerprint == sound
    rewritten(folder, lambda _: unheaded(weights))  # saved from the base model: nothing is lost
    assert loaded(folder).fingerprint == sound
    rewritten(folder, lambda _: {k: t for k, t in weights.items() if "embed_tokens" not in k})
    with pytest.raises(CheckpointError, match=r"missing from the files \(.*embed_tokens.weight"):
        loaded(folder)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_kept_and_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "both")
    configured(folder, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="both: transformers says: The tied weights"):
        found = loaded(folder)
    assert torch.equal(found.model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_buffers_that_a_model_computes_may_be_in_its_files(tmp_path: Path) -> None:
    old_llama = saved(tmp_path / "llama")
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(N_LAYERS)}
    rewritten(old_llama, lambda weights: weights | rotary)
    old_gpt2 = saved(tmp_path / "gpt2", "gpt2")
    masks: Weights = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(N_LAYERS)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(N_LAYERS)}
    rewritten(old_gpt2, lambda weights: {k.removeprefix("transformer."): t for k, t in weights.items()} | masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(old_llama).fingerprint == fingerprint(tiny_model("llama"))
        assert loaded(old_gpt2).fingerprint == fingerprint(tiny_model("gpt2"))


# --- what a user must see ----------------------------------------------------------------------------------------


def test_what_transformers_warns_of_reaches_the_user_and_its_logger_is_as_before(tmp_path: Path) -> None:
    from transformers.utils import logging

    logger = logging.get_logger("transformers")
    before = logger.level, list(logger.handlers), logger.propagate
    folder = saved(tmp_path / "odd")
    configured(folder, bos_token_id=50256)
    with pytest.warns(UserWarning, match="odd: transformers says: .*bos_token_id"):
        loaded(folder)
    assert (logger.level, list(logger.handlers), logger.propagate) == before
