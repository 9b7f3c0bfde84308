"""Every backend on every family: the contract, parity of the two, and how `load_backend` chooses."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rsteer_interp.backends as backends
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.parity import ParityCertificate, parity_certificate
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.checkpoints import resolve
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import add
from tests.backend_contract import CHECKS, REFERENCE_CHECKS, ROUNDS_MORE, TOLERANCE, Check, equal, vector
from tests.tiny_models import (
    FAMILIES,
    KINDS,
    VOCAB,
    Kind,
    save_tiny,
    tiny_backend,
    tiny_model,
    tiny_rows,
    tiny_tokenizer,
)

SHARES_PREFIX = set(FAMILIES) - {"qwen3_next", "mistral_window", "gemma2", "gemma3"}  # these have other caches

# Families that a backend cannot hold, and what it says. None of FAMILIES is among them.
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4}
HEADS = SMALL | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
REFUSED: dict[tuple[str, Kind], tuple[dict[str, Any], str]] = {
    ("helium", "transformerlens"): (HEADS | {"head_dim": 8}, "TransformerLens cannot hold HeliumForCausalLM"),
    ("diffllama", "transformerlens"): (HEADS, "TransformerLens cannot hold DiffLlamaForCausalLM"),
    ("mamba", "transformerlens"): (SMALL | {"state_size": 4}, "returns no key-value cache"),
    ("mamba", "hooks"): (SMALL | {"state_size": 4}, "returns no key-value cache"),
}


made = cache(tiny_backend)


@pytest.fixture
def backend(family: str, kind: Kind) -> Iterator[Backend]:
    """One backend for all checks of a family and kind, so that what one check leaves behind fails the next."""
    backend = made(family, kind)
    stop_ids = backend.stop_ids
    yield backend
    backend.stop_ids = stop_ids


@cache
def other_model(family: str) -> Any:
    torch.manual_seed(0)
    fields = next(fields for (name, _), (fields, _) in REFUSED.items() if name == family)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, bos_token_id=None, eos_token_id=2, pad_token_id=0, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    return model


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(backend: Backend, check: Check) -> None:
    check(backend)


@pytest.mark.parametrize("check", REFERENCE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract_against_the_bare_model(backend: Backend, family: str, check: Any) -> None:
    check(backend, tiny_model(family))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_four_points_are_there_and_prefixes_are_shared_where_exact(backend: Backend, family: str) -> None:
    assert backend.sites == {
        Site(layer, p) for layer in range(4) for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    } | {Site(4)}
    assert backend.can_share_prefix == (family in SHARES_PREFIX)
    assert backend.batch_size == 64  # padding does no harm, so the self-check left it alone


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str) -> None:
    a, b = tiny_backend(family, "hooks"), tiny_backend(family, "transformerlens")
    certificate = parity_certificate(a, b, tiny_rows(a))
    assert certificate.passed, str(certificate)
    largest = max(certificate.worst.relative, certificate.logits.relative, certificate.logits_edited.relative)
    assert largest <= TOLERANCE * ROUNDS_MORE.get(family, 1.0)
    assert certificate.only_in_one == []
    assert {site.site for site in certificate.sites} == {str(site) for site in a.sites}
    assert all(site.prompt.tokens > 0 and site.decode_edited.tokens > 0 for site in certificate.sites)
    again = ParityCertificate.model_validate_json(certificate.model_dump_json())
    assert again == certificate
    assert json.loads(certificate.model_dump_json())["dtype"] == "float32"


def test_parity_fails_on_another_model() -> None:
    a, b = tiny_backend("llama", "hooks"), tiny_backend("qwen2", "transformerlens")
    certificate = parity_certificate(a, b, tiny_rows(a), new_tokens=2)
    assert not certificate.passed
    assert certificate.worst.relative > 0.1
    assert "FAILED" in str(certificate)
    with pytest.raises(UserError, match="do not both have it"):
        parity_certificate(a, b, tiny_rows(a), sites=[Site(9)])


@pytest.mark.parametrize("name", REFUSED, ids="-".join)
def test_a_family_that_cannot_be_held_is_refused_in_one_line(name: tuple[str, Kind]) -> None:
    family, kind = name
    with pytest.raises(UserError, match=REFUSED[name][1]) as caught:
        load_backend(other_model(family), kind, tokenizer=tiny_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_tokens_follow_the_distribution(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    batch = backend.batch(tiny_rows(backend)[:1])
    n, temperature = 4000, 2.0
    tokens = backend.generate(batch, 1, sampling=Sampling(n=n, temperature=temperature, seed=1)).ids[:, 0]
    expected = (backend.logits(batch)[0, -1] / temperature).softmax(-1)
    seen = torch.bincount(tokens, minlength=VOCAB) / n
    assert float((seen - expected).abs().max()) < 5 * (0.25 / n) ** 0.5
    replies = backend.generate(batch, 1, sampling=Sampling(n=5, temperature=temperature, seed=1))
    log_probs = backend.logits(batch)[0, -1].log_softmax(-1)[replies.ids[:, 0]]  # at temperature 1
    torch.testing.assert_close(replies.log_probs[:, 0], log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_gradients_flow_to_an_edit(backend: Backend) -> None:
    v = vector(1, backend.d_model).requires_grad_(True)

    class Push:
        sites = frozenset({Site(1)})
        pointwise = True

        def __call__(self, x: torch.Tensor, at: Any) -> torch.Tensor:
            return x + v

    backend.logits(backend.batch(tiny_rows(backend)), Push(), grad=True).sum().backward()
    assert v.grad is not None and bool(torch.isfinite(v.grad).all()) and float(v.grad.norm()) > 0


# -- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_batch_and_changes_nothing(error: type[Exception]) -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend) * 2
    limit = 2

    def run(batch: Any) -> torch.Tensor:
        if len(batch) > limit:
            raise error("on purpose")
        return backend.logits(batch)[:, -1]

    found: dict[int, torch.Tensor] = {}
    for group, logits in backend.batches(rows, run, wide=True):
        assert not found.keys() & set(group)
        found |= dict(zip(group, logits, strict=True))
    assert backend.batch_size <= limit
    assert any("out of memory at batch size 12" in note for note in backend.notes)
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        equal(backend.logits(backend.batch([row]))[:, -1], found[i][None])
    limit = 0
    with pytest.raises(UserError, match="out of memory with a single prompt"):
        list(backend.batches(rows, run))


# -- load_backend -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_auto_takes_transformerlens_below_300m_parameters_and_hooks_above(folder: Path, monkeypatch: Any) -> None:
    assert load_backend(folder).name == "transformerlens"
    assert load_backend(folder, "hooks").name == "hooks"
    assert load_backend(folder, device_map={"": "cpu"}).name == "hooks"
    monkeypatch.setattr(backends, "SMALL", 0)
    assert load_backend(folder).name == "hooks"
    assert load_backend(folder, "transformerlens").name == "transformerlens"
    wanted = [Site(1), "blocks.2.hook_attn_out"]
    assert load_backend(folder, sites=wanted).name == "hooks"
    assert load_backend(folder, sites=[*wanted, "blocks.0.attn.hook_pattern"]).name == "transformerlens"


def test_what_cannot_be_had_is_named(folder: Path) -> None:
    for bad, message in [
        ({"backend": "vllm"}, "choose auto, transformerlens or hooks"),
        ({"backend": "transformerlens", "device_map": "cpu"}, "device_map needs the hooks backend"),
        ({"backend": "hooks", "sites": ["blocks.0.attn.hook_pattern"]}, "has no site blocks.0.attn.hook_pattern"),
        ({"sites": ["blocks.0.hook_nonsense"]}, "has no site blocks.0.hook_nonsense"),
        ({"sites": [Site(9)]}, "has no site blocks.9.hook_resid_pre"),
    ]:
        with pytest.raises(UserError, match=message):
            load_backend(folder, **bad)


def test_auto_falls_back_to_hooks_and_says_so() -> None:
    backend = load_backend(other_model("helium"), tokenizer=tiny_tokenizer())
    assert backend.name == "hooks"
    assert any("hooks backend instead of transformerlens" in note for note in backend.notes)


def test_a_loaded_model_and_its_tokenizer_stay_as_they_are() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    modules, options = [type(module) for module in model.modules()], dict(tokenizer.init_kwargs)
    backend = load_backend(model, "transformerlens", tokenizer=tokenizer)
    assert [type(module) for module in model.modules()] == modules
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.init_kwargs == options and tokenizer.bos_token is None and tokenizer.padding_side == "right"
    assert backend.tokenizer is tokenizer
    assert backend.checkpoint.source == "in memory"


def test_both_backends_carry_checkpoint_and_fingerprint(folder: Path) -> None:
    checkpoint = resolve(folder)
    a, b = load_backend(checkpoint, "hooks"), load_backend(checkpoint, "transformerlens")
    assert a.fingerprint == b.fingerprint != ""
    assert a.checkpoint == b.checkpoint == checkpoint


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"model.embed_tokens": "cpu", "": "cpu"}], ids=str)
def test_device_maps_pass_through(folder: Path, device_map: Any) -> None:
    plain, placed = load_backend(folder, "hooks"), load_backend(folder, device_map=device_map)
    batch = plain.batch(tiny_rows(plain))
    for edit in (None, add({Site(1): vector(1, 32)}, {Site(1): 3.0})):
        equal(plain.logits(batch, edit), placed.logits(batch, edit))
        assert torch.equal(plain.generate(batch, 4, edit).ids, placed.generate(batch, 4, edit).ids)


def test_half_precision_passes_the_self_check(folder: Path) -> None:
    for kind in KINDS:
        backend = load_backend(folder, kind, dtype="bfloat16")
        assert backend.logits(backend.batch(tiny_rows(backend))).dtype == torch.bfloat16
        assert backend.batch_size == 64


def test_loading_does_not_touch_the_log_level(folder: Path) -> None:
    before = logging.getLogger().level
    load_backend(folder, "transformerlens")
    assert logging.getLogger().level == before


# -- the real models --------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_parity_on_the_small_demo_model() -> None:
    a, b = load_backend("demo-small", "hooks"), load_backend("demo-small", "transformerlens")
    prompts = [
        "Tell me about the history of Vienna.",
        "How do I bake bread?",
        "hi",
        "Explain photosynthesis to a child.",
    ]
    certificate = parity_certificate(a, b, a.template().encode_all(prompts))
    assert certificate.passed, str(certificate)
    assert certificate.worst.relative <= 1e-5
    assert certificate.logits.relative <= 1e-5


@pytest.mark.demo
def test_parity_on_the_demo_model() -> None:
    """Exact where both run eager attention; with the hooks backend's own kernel, within that kernel's rounding."""
    a, b = load_backend("demo", "hooks"), load_backend("demo", "transformerlens")
    prompts = ["Tell me about Vienna.", "What happened in 1989?", "hi", "How do I bake bread?"]
    rows = a.template().encode_all(prompts)
    sites = [
        Site(layer, point) for layer in (0, 12, 23) for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    ]  # type: ignore[arg-type]
    certificate = parity_certificate(a, b, rows, new_tokens=4, sites=sites)
    assert certificate.passed, str(certificate)
    assert certificate.logits.relative <= 1e-5
    a.model.set_attn_implementation("eager")
    certificate = parity_certificate(a, b, rows, new_tokens=4, sites=sites)
    assert certificate.passed and certificate.tolerance == 1e-5
    assert certificate.worst.relative <= 1e-6, str(certificate)
