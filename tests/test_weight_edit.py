"""Weight orthogonalisation: writers found in every family, weight edit = activation edit, saved checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import ablate
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.weight_edit import (
    chosen,
    orthogonalise,
    save_checkpoint,
    stream_component,
    writer_ablation,
    writer_sites,
)
from rsteer_interp.weight_writers import Writer, find_writers
from tests.tiny_models import D_MODEL, FAMILIES, N_LAYERS, tiny_model, tiny_rows, tiny_tokenizer

POST_NORM = ("gemma2", "gemma3")
FAMILIES_HELD = [family for family in FAMILIES if family not in POST_NORM]
R = random_unit_vectors(1, D_MODEL, 5)[0] * 3.0  # its length must not matter


def backend_of(model: Any) -> Backend:
    return load_backend(model, "hooks", tokenizer=tiny_tokenizer())


def exact(family: str) -> Any:
    """In float64, experts by a plain loop (their grouped matrix product has no float64); a linear attention, which computes
    in float32 whatever it is given, in float32."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    return model if family == "qwen3_next" else model.double()


def logits(backend: Backend, edit: Any = None) -> Tensor:
    return backend.logits(backend.batch(tiny_rows(backend)), edit, keep=2)


def all_sites() -> list[Site]:
    return [Site(layer) for layer in range(N_LAYERS + 1)]


@pytest.mark.parametrize("family", FAMILIES_HELD)
def test_a_weight_edit_is_an_activation_edit(family: str) -> None:
    """Equal logits, r^T W' = 0 for every writer, and no r component anywhere in the stream."""
    plain, model = exact(family), exact(family)
    tolerance = 1e-8 if model.dtype == torch.float64 else 1e-4
    writers = orthogonalise(model, R)
    unedited, edited = backend_of(plain), backend_of(model)
    everywhere = ablate(dict.fromkeys([*all_sites(), *writer_sites(N_LAYERS)], R))
    got = logits(edited)
    for edit in (everywhere, writer_ablation(R, writer_sites(N_LAYERS))):
        torch.testing.assert_close(got, logits(unedited, edit), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(got, logits(unedited), atol=1e-2)
    parameters = dict(model.named_parameters())
    for writer in writers:
        rows = parameters[writer.name].double().movedim(writer.axis, -1)
        assert float((rows @ (R / R.norm())).abs().max()) < 10 * torch.finfo(model.dtype).eps
    assert max(stream_component(edited, tiny_rows(edited), R).values()) < 1e-6
    assert {writer.site for writer in writers} == set(writer_sites(N_LAYERS))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_other_scales_are_the_same_affine_edit(family: str, scale: float) -> None:
    model = exact(family)
    orthogonalise(model, R, scale)
    wanted = logits(backend_of(exact(family)), writer_ablation(R, writer_sites(N_LAYERS), scale))
    torch.testing.assert_close(logits(backend_of(model)), wanted, atol=1e-8, rtol=1e-8)


def test_which_parameters_are_writers() -> None:
    def names(family: str) -> set[tuple[str, int]]:
        return {(w.name.replace(".0.", ".L."), w.axis) for w in find_writers(tiny_model(family)) if w.site.layer == 0}

    assert names("qwen2") == {
        ("model.embed_tokens.weight", 1),
        ("model.layers.L.self_attn.o_proj.weight", 0),
        ("model.layers.L.mlp.down_proj.weight", 0),
    }
    assert names("gpt2") == {
        ("transformer.wte.weight", 1),
        ("transformer.wpe.weight", 1),
        *((f"transformer.h.L.{part}.c_proj.weight", 1) for part in ("attn", "mlp")),
        *((f"transformer.h.L.{part}.c_proj.bias", 0) for part in ("attn", "mlp")),
    }
    assert names("mixtral") >= {("model.layers.L.mlp.experts.down_proj", 1)}
    assert names("qwen3_next") >= {
        ("model.layers.L.mlp.experts.down_proj", 1),
        ("model.layers.L.mlp.shared_expert.down_proj.weight", 0),
        ("model.layers.L.linear_attn.out_proj.weight", 0),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_writers_are_the_same_in_half_precision(family: str, dtype: torch.dtype) -> None:
    assert find_writers(tiny_model(family).to(dtype)) == find_writers(tiny_model(family))


@pytest.mark.parametrize("family", POST_NORM)
def test_post_norm_families_are_refused_and_why(family: str) -> None:
    """A norm with a gain after the writer brings the component back: editing the maps before it is no ablation."""
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"blocks\.0\.hook_attn_out is not written by weights alone") as error:
        orthogonalise(model, R)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    maps = [
        Writer(f"model.layers.{layer}.{name}.weight", 0, Site(layer))
        for layer in range(N_LAYERS)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    orthogonalise(model, R, writers=[Writer("model.embed_tokens.weight", 1, Site(0)), *maps])
    backend = backend_of(model)
    assert max(stream_component(backend, tiny_rows(backend), R).values()) > 0.01


def test_a_tied_unembedding_keeps_what_it_had() -> None:
    model, plain = exact("gpt2"), exact("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    orthogonalise(model, R)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(model.transformer.wte.weight, plain.transformer.wte.weight)
    assert model.config.tie_word_embeddings is False
    untouched = exact("gpt2")
    orthogonalise(untouched, R, writers="granular")
    assert untouched.lm_head.weight is untouched.transformer.wte.weight
    assert untouched.config.tie_word_embeddings is True


@pytest.mark.parametrize("forgotten", ["transformer.wte.weight", "transformer.wpe.weight", "h.1.mlp.c_proj.bias"])
def test_a_forgotten_writer_leaves_a_component(forgotten: str) -> None:
    model = exact("gpt2")
    orthogonalise(model, R, writers=[w for w in find_writers(model) if not w.name.endswith(forgotten)])
    backend, plain = backend_of(model), backend_of(exact("gpt2"))
    assert max(stream_component(backend, tiny_rows(backend), R).values()) > 1e-3
    wanted = logits(plain, writer_ablation(R, writer_sites(N_LAYERS)))
    assert not torch.allclose(logits(backend), wanted, atol=1e-3)


def test_granular_leaves_what_the_first_block_and_the_embedding_write() -> None:
    model = exact("llama")
    writers = orthogonalise(model, R, writers="granular")
    assert {w.site for w in writers} == set(writer_sites(N_LAYERS, "granular"))
    assert min(w.site.layer for w in writers) == 1
    backend, plain = backend_of(model), backend_of(exact("llama"))
    rows = tiny_rows(backend)
    left = stream_component(backend, rows, R)
    assert all(left[site] > 0.01 for site in all_sites())
    # What is left is exactly what embedding and first block wrote, carried along.
    edit = writer_ablation(R, writer_sites(N_LAYERS, "granular"))
    assert left == pytest.approx(stream_component(plain, rows, R, edit), rel=1e-5)
    torch.testing.assert_close(logits(backend), logits(plain, edit), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_a_saved_checkpoint_loads_everywhere(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    orthogonalise(model, R)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "edited", {"scale": 1.0})
    assert {p.name for p in tmp_path.iterdir()} == {"edited", ".edited.lock"}
    assert (tmp_path / "edited" / "model.safetensors").is_file()
    wanted = logits(backend_of(model))
    for kind in ("hooks", "transformerlens"):
        backend = load_backend(tmp_path / "edited", kind, tokenizer=tiny_tokenizer())  # type: ignore[arg-type]
        assert backend.fingerprint != backend_of(tiny_model(family)).fingerprint
        torch.testing.assert_close(logits(backend), wanted, atol=2e-4, rtol=1e-4)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match="exists already"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "edited", {})


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tiny_model("llama"), Full(), tmp_path / "edited", {})
    assert [p.name for p in tmp_path.iterdir()] == [".edited.lock"]


def test_rounding_to_bfloat16_stays_within_its_own_precision() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    writers = orthogonalise(model, R)
    parameters = dict(model.named_parameters())
    for writer in writers:
        rows = parameters[writer.name].double().movedim(writer.axis, -1)
        assert float((rows @ (R / R.norm())).abs().max()) < 2**-8 * float(rows.norm(dim=-1).max())


class Scaled(nn.Module):
    """A layer whose output is scaled, coordinate by coordinate, before it reaches the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.linspace(0.5, 1.5, D_MODEL), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs) * self.gain  # type: ignore[no-any-return]


class Idle(nn.Module):
    """An MLP with a second output matrix that no token is ever sent to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.expert = inner, nn.Linear(64, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_gains_idle_experts_and_quantised_weights_are_refused() -> None:
    scaled = tiny_model("llama")
    scaled.model.layers[2].mlp = Scaled(scaled.model.layers[2].mlp)
    with pytest.raises(UserError, match=r"blocks\.2\.hook_mlp_out is not written by weights alone"):
        find_writers(scaled)
    idle = tiny_model("llama")
    idle.model.layers[1].mlp = Idle(idle.model.layers[1].mlp).requires_grad_(False)
    with pytest.raises(UserError, match=r"'expert\.weight' at blocks\.1\.hook_mlp_out is reached by none"):
        find_writers(idle)
    quantised = tiny_model("llama")
    quantised.hf_quantizer = SimpleNamespace()
    with pytest.raises(UserError, match="quantised weights"):
        find_writers(quantised)
    with pytest.raises(UserError, match="offloaded"):
        find_writers(tiny_model("llama").to("meta"))


@pytest.mark.parametrize("bad", [torch.zeros(D_MODEL), torch.full((D_MODEL,), torch.nan), torch.ones(D_MODEL + 1)])
def test_bad_directions_change_nothing(bad: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="give a finite vector"):
        orthogonalise(model, bad)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_chosen_is_all_or_granular() -> None:
    writers = find_writers(tiny_model("gpt2"))
    assert chosen(writers, "all") == writers
    assert {w.name.split(".")[2] for w in chosen(writers, "granular")} == {"1", "2", "3"}
