"""Tiny random models of every family and a word-level chat tokenizer, built in memory, offline, in well under a second.

`tiny_backend(family, kind)` gives a fresh backend, `tiny_model(family)` the bare transformers model, `save_tiny` a folder
that `checkpoints.resolve` takes. Weights depend on the family alone. The size is asserted, because a misspelt config
field builds a full-size model without a word.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens

Kind = Literal["hooks", "transformerlens"]
KINDS: tuple[Kind, ...] = ("hooks", "transformerlens")
N_LAYERS, D_MODEL, VOCAB = 4, 32, 200
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|> system you are a helpful assistant . <|im_end|> {% endif %}"
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = [
    "system",
    "user",
    "assistant",
    "you",
    "are",
    "a",
    "helpful",
    ".",
    ",",
    "?",
    "!",
    "what",
    "is",
    "the",
    "of",
    "and",
    "how",
    "do",
    "i",
    "to",
    "in",
    "tell",
    "me",
    "about",
    "write",
    "why",
    "can",
    "explain",
    "city",
    "river",
    "history",
    "law",
    "bread",
    "bomb",
    "password",
    "poem",
    "recipe",
    "protest",
    "leader",
    "border",
    "island",
    "election",
    "price",
    "water",
]

_SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 4}  # far shorter than any prompt, so that it matters
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES | _HEADS),
    "qwen3_next": (
        "qwen3_next",
        _SIZES
        | _HEADS
        | {
            "layer_types": _HYBRID,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "mistral": ("mistral", _SIZES | _HEADS | {"sliding_window": None}),
    "mistral_window": ("mistral", _SIZES | _HEADS | _WINDOW),
    "mixtral": ("mixtral", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", _SIZES | _HEADS | _WINDOW | {"query_pre_attn_scalar": 8, "layer_types": _LOCAL}),
    "gemma3": ("gemma3_text", _SIZES | _HEADS | _WINDOW | {"query_pre_attn_scalar": 8, "layer_types": _LOCAL}),
    "gpt2": ("gpt2", {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "phi3": ("phi3", _SIZES),
}


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    names = SPECIAL + list(dict.fromkeys(WORDS))
    names += [f"word{i}" for i in range(VOCAB - len(names))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<|unk|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template and no folder behind it: one id per word, `VOCAB` of them."""
    return copy.deepcopy(_tokenizer())


@cache
def _model(family: str) -> Any:
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=0,
        **fields,
    )
    state = torch.get_rng_state()
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        # Larger than the usual start, so that layers matter and greedy choices are not ties; norms and biases not flat.
        noise = 0.2 * torch.randn_like(parameter)
        parameter.data = parameter.data + noise if parameter.ndim == 1 else noise
    torch.set_rng_state(state)
    model.config.name_or_path = f"tiny-{family}"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count < 200_000, f"tiny {family} has {count} parameters; a field of its config is misspelt"
    return model.eval().requires_grad_(False)


def tiny_model(family: str) -> Any:
    """A fresh transformers model of the family, in eval mode: 4 layers, d_model 32, seeded."""
    return copy.deepcopy(_model(family))


def tiny_backend(family: str, kind: Kind = "hooks", **options: Any) -> Backend:
    """A fresh backend over the family's tiny model, with the tiny tokenizer, through `load_backend`."""
    from rsteer_interp.backends import load_backend

    return load_backend(tiny_model(family), kind, tokenizer=tiny_tokenizer(), **options)


def save_tiny(family: str, folder: Path) -> Path:
    """The family's model and tokenizer in a folder, checked to load again with the same ids."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    text = "tell me about the river"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] != [], f"{type(again).__name__} gives other ids"
    return folder


PROMPTS = (
    "tell me about the history of the city",
    "what is the price of bread ?",
    "why",
    "write a poem about the river and the island in the water , can you ?",
    "how do i write a law",
    "explain the election to me",
)


def tiny_rows(backend: Backend, prompts: tuple[str, ...] = PROMPTS) -> list[Tokens]:
    """The prompts in the chat template: lengths differ, the template prefix is shared."""
    return backend.template().encode_all(prompts)


ANSWERS = (
    "the city is old",
    "bread",
    "i do not know why you ask me",
    "the river and the island",
    "you write it",
    "law",
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answered_rows(backend: Backend) -> list[Tokens]:
    """The prompts with ANSWERS, which are of other lengths."""
    return backend.template().encode_all(PROMPTS, ANSWERS)
