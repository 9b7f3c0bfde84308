"""Candidates are the mean differences that their papers name, and taking one out leaves nothing of it in the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states, suffix_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.interventions import Everywhere
from rsteer_interp.methods.candidates import Search, ablate_everywhere, addition, mean_differences, removal
from rsteer_interp.methods.trials import trials
from tests.planted_refusal import N_LAYERS, planted_material, planted_refusal
from tests.tiny_models import KINDS, PROMPTS, Kind, tiny_backend, tiny_rows


def plain_states(backend: Backend, site: Site) -> list[Tensor]:
    """Every prompt run alone, without a recorder of ours."""
    seen: list[Tensor] = []

    class Keep:
        sites, pointwise = frozenset({site}), False

        def __call__(self, x: Tensor, at: Any) -> Tensor:
            seen.append(x[0].clone())
            return x

    for row in tiny_rows(backend):
        backend.run(backend.batch([row]), Keep())
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_suffix_states_are_those_of_the_template_after_the_instruction(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    rows, sites = tiny_rows(backend), [Site(1), Site(4)]
    got = suffix_states(backend, rows, sites)
    for site in sites:
        assert got[site].shape == (len(rows), 3, backend.d_model)
        torch.testing.assert_close(
            got[site], torch.stack([x[-3:] for x in plain_states(backend, site)]), atol=1e-4, rtol=0
        )
    torch.testing.assert_close(got[Site(1)][:, -1], last_states(backend, rows, [Site(1)])[Site(1)], atol=1e-4, rtol=0)
    answered = backend.template().encode_all(PROMPTS, ["i can tell you"] * len(PROMPTS))
    torch.testing.assert_close(suffix_states(backend, answered, sites)[Site(1)], got[Site(1)], atol=1e-4, rtol=0)
    twins = suffix_states(backend, [rows[1]] * 3, sites)[Site(4)]  # all but the last token is a shared prefix
    torch.testing.assert_close(twins, got[Site(4)][1].expand(3, -1, -1), atol=1e-4, rtol=0)


def test_candidates_are_mean_differences_with_their_length_and_none_is_too_deep() -> None:
    model = planted_refusal()
    material = planted_material(model.backend)
    found = trials(material, Search(stride=1)).candidates
    assert sorted(found) == [(position, layer) for position in (-3, -2, -1) for layer in range(1, int(0.8 * N_LAYERS))]
    encode = material.template.encode_all
    means = [
        suffix_states(model.backend, encode(material.fit[name].texts), [Site(2)])[Site(2)].double().mean(0)
        for name in ("remove", "contrast")
    ]
    r = found[-2, 2]
    torch.testing.assert_close(r.vector.double(), (means[0] - means[1])[-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(r.reference.double(), means[1][-2], atol=1e-5, rtol=0)
    assert r.length == pytest.approx(float((means[0] - means[1])[-2].norm()), rel=1e-4)


def test_a_place_without_difference_has_no_candidate() -> None:
    """At block 0 a template token is the same embedding in every prompt; a direction of rounding errors must not be scored."""
    material = planted_material(planted_refusal().backend)
    backend, encode = material.backend, material.template.encode_all
    states = [suffix_states(backend, encode(material.fit[n].texts), [Site(0), Site(2)]) for n in ("remove", "contrast")]
    assert {layer for _, layer in mean_differences(*states)} == {2}


class Components:
    """The largest share |<h, v>| / |h| that passes at each site, after an edit."""

    pointwise = False

    def __init__(self, edit: Edit, v: Tensor, sites: frozenset[Site]) -> None:
        self.edit, self.v, self.sites = edit, v / v.norm(), edit.sites | sites
        self.seen: dict[Site, float] = {}

    def __call__(self, x: Tensor, at: Any) -> Tensor:
        out = self.edit(x, at) if at.site in self.edit.sites else x
        share = ((out @ self.v).abs() / out.norm(dim=-1))[at.mask]
        self.seen[at.site] = max(float(share.max()), self.seen.get(at.site, 0.0))
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "qwen3_next"])
def test_nothing_along_the_direction_is_left_at_any_hooked_point_nor_before_the_final_norm(
    family: str, kind: Kind
) -> None:
    backend = tiny_backend(family, kind)
    v = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(1))
    edit, end = ablate_everywhere(backend, v), Site(backend.n_layers)
    assert {Site(layer) for layer in range(backend.n_layers)} <= edit.sites and end not in edit.sites
    seen = Components(edit, v, frozenset({end}))
    backend.logits(backend.batch(tiny_rows(backend)), seen)
    assert max(seen.seen.values()) < 1e-5
    only_inputs = Components(
        Everywhere({s: e for s, e in edit.edits.items() if s.point == "resid_pre"}), v, frozenset({end})
    )
    backend.logits(backend.batch(tiny_rows(backend)), only_inputs)
    assert only_inputs.seen[end] > 1e-2


def test_a_block_without_known_outputs_is_edited_at_its_input_and_the_stream_at_its_end() -> None:
    backend = tiny_backend("llama")
    v = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(1))
    backend.withdraw(Site(3))
    seen = Components(ablate_everywhere(backend, v), v, frozenset())
    backend.logits(backend.batch(tiny_rows(backend)), seen)
    assert Site(3, "mlp_out") not in seen.seen and max(seen.seen.values()) < 1e-5
    assert seen.seen.keys() >= {Site(layer) for layer in range(backend.n_layers + 1)}


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.5])
def test_strength_is_the_share_that_a_weight_edit_would_take(kappa: float) -> None:
    """W <- W - kappa v v^T W of everything that writes to the stream."""
    backend = tiny_backend("llama")
    rows = backend.batch(tiny_rows(backend))
    v = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(2))
    got = backend.logits(rows, ablate_everywhere(backend, v, kappa))
    unit = v / v.norm()
    inner = backend.model.model
    for weight in [w for b in inner.layers for w in (b.self_attn.o_proj.weight, b.mlp.down_proj.weight)]:
        weight -= kappa * torch.outer(unit, unit @ weight)
    if inner.embed_tokens.weight is backend.model.lm_head.weight:
        backend.model.lm_head.weight = torch.nn.Parameter(inner.embed_tokens.weight.clone(), requires_grad=False)
    inner.embed_tokens.weight -= kappa * torch.outer(inner.embed_tokens.weight @ unit, unit)
    torch.testing.assert_close(got, backend.logits(rows), atol=2e-3, rtol=1e-3)


def test_affine_removal_sets_one_projection_for_all_prompts() -> None:
    """The complying mean at strength 1, as far beyond it as refusing prompts lie before it at 2, halfway there at 1/2."""
    material = planted_material(planted_refusal().backend)
    candidate = trials(material, Search()).candidates[-2, 3]
    unit = candidate.vector.double() / candidate.length
    low, h = float(candidate.reference.double() @ unit), 4 * torch.randn(5, 7, len(unit)).double()
    own = h @ unit
    wanted = {0.5: (own + low) / 2, 1.0: own * 0 + low, 2.0: own * 0 + low - candidate.length}
    for strength, projection in wanted.items():
        edit = removal(material.backend, candidate, "affine", strength)
        assert edit.sites == {Site(3)} and edit.pointwise
        out = edit(h, None)  # type: ignore[arg-type]
        torch.testing.assert_close(out @ unit, projection, atol=1e-6, rtol=0)
        rest = h - own[..., None] * unit
        torch.testing.assert_close(out - (out @ unit)[..., None] * unit, rest, atol=1e-6, rtol=0)
        if strength >= 1:
            torch.testing.assert_close(edit(out, None), out, atol=1e-6, rtol=0)  # type: ignore[arg-type]
    refusing = addition(candidate, "affine")(h, None)  # type: ignore[arg-type]
    torch.testing.assert_close(refusing @ unit, own * 0 + low + candidate.length, atol=1e-6, rtol=0)
