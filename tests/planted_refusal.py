"""A tiny Llama in which refusal is written by hand: where, in which direction, and what reads it.

Words of `HARMFUL` carry a marker. At block `block`, the template token at `position` attends to marked tokens and writes `u` to its
own state; the last block carries u to the last position; the unembedding of `REFUSAL` reads u. One block after the writing the
same token writes a larger `z`, which nothing reads, so that u is the mean difference at one place alone: that position, entering
block `block + 1`. The rest is small random noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.evaluation import log_odds
from rsteer_interp.methods.base import Examples, Material
from tests.tiny_models import D_MODEL, SPECIAL, VOCAB, WORDS, Kind, tiny_tokenizer

HARMFUL = ("bomb", "password")
REFUSAL = 150  # the token with which this model refuses
SUFFIX = ("<|im_end|>", "<|im_start|>", "assistant")  # of the tiny template
N_LAYERS = 8
_SLOW = 3  # of a head's 8 dimensions, one that rotary position embedding hardly turns


@dataclass(frozen=True)
class Planted:
    backend: Backend
    u: Tensor
    place: tuple[int, int]  # position, layer


def planted_refusal(block: int = 1, position: int = -2, seed: int = 0, kind: Kind = "hooks") -> Planted:
    """The model with refusal planted at (position, block + 1)."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator))[0].T
    marker, kind_of_harm, asks, same, u, z = basis[:6]

    ids = tiny_tokenizer().convert_tokens_to_ids
    words = torch.randn(VOCAB, D_MODEL - 6, generator=generator) @ basis[6:] / 5
    words += same - asks
    words[list(ids(list(HARMFUL)))] += marker
    words[ids(HARMFUL[0])] += kind_of_harm
    words[ids(SUFFIX[position])] += 2 * asks
    model.model.embed_tokens.weight.copy_(words)
    model.lm_head.weight.copy_(0.05 * torch.randn(VOCAB, D_MODEL, generator=generator))
    model.lm_head.weight[REFUSAL] = 2 * u
    _attend(model.model.layers[block], queries=asks, keys=marker, values=marker, writes=u)
    _attend(model.model.layers[block + 1], queries=asks, keys=marker, values=kind_of_harm, writes=3 * z)
    _attend(model.model.layers[-1], queries=same, keys=u, values=u, writes=u)
    return Planted(load_backend(model, kind, tokenizer=tiny_tokenizer()), u, (position, block + 1))


def _attend(block: Any, queries: Tensor, keys: Tensor, values: Tensor, writes: Tensor) -> None:
    """Head 0: a token with `queries` attends to tokens with `keys`, reads their `values` and writes `writes`."""
    attention = block.self_attn
    attention.q_proj.weight[_SLOW] = 3 * queries
    attention.k_proj.weight[_SLOW] = 3 * keys
    attention.v_proj.weight[0] = values
    attention.o_proj.weight[:, 0] = writes


def texts(n: int, harmful: bool, seed: int) -> list[str]:
    """Instructions of four to nine words, with a harmful one among them or without."""
    generator = torch.Generator().manual_seed(seed)
    plain = [word for word in WORDS if word not in (*HARMFUL, "system", "user", "assistant")]

    def draw(k: int) -> int:
        return int(torch.randint(k, (1,), generator=generator))

    made = []
    for _ in range(n):
        words = [plain[draw(len(plain))] for _ in range(4 + draw(6))]
        if harmful:
            words[draw(len(words))] = HARMFUL[draw(2)]
        made.append(" ".join(words))
    return made


def planted_material(backend: Backend, n: int = 12, seed: int = 0) -> Material:
    """Sets `remove` (harmful words), `contrast` and `ordinary` (none), `keep`; refused is what has refusal log-odds above 0."""
    sets = {"remove": True, "contrast": False, "ordinary": False, "keep": True}
    template, sites = backend.template(), [Site(layer) for layer in range(1, backend.n_layers + 1)]

    def examples(harmful: bool, seed: int) -> Examples:
        made = texts(n, harmful, seed)
        rows = template.encode_all(made)
        signs = log_odds(backend, rows, [REFUSAL]).sign().float()
        return Examples(made, signs, last_states(backend, rows, sites), list(made))

    fit, select = (
        {name: examples(harmful, 100 * seed + 10 * split + i) for i, (name, harmful) in enumerate(sets.items())}
        for split in (0, 1)
    )
    return Material(
        backend, template, (REFUSAL,), fit, select, "remove", "contrast", "keep", ("ordinary",), seed
    )  # fmt: skip
