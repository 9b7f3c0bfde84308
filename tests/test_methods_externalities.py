"""Steering Externalities: openings and their directions, the target projection, and what no harmful prompt is given."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions.paired import paired_direction
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine
from rsteer_interp.methods.base import Method
from rsteer_interp.methods.compliance_vector import (
    COMPLYING,
    PAPER_LAYERS,
    REFUSING,
    Bind,
    Compliance,
    continuation_states,
    layers_at,
    opening_directions,
    ordinary_texts,
    with_openings,
)
from rsteer_interp.methods.format_vector import JSON_REQUEST, AnswerForm, format_vector
from tests.tiny_models import ANSWERS, KINDS, PROMPTS, Kind, answered_rows, draw, tiny_backend, tiny_rows
from tests.two_direction_material import planted_material


class Keep:
    """Records whole streams, so that a test can do its own sums."""

    pointwise = False

    def __init__(self, *sites: Site) -> None:
        self.sites, self.seen = frozenset(sites), {}

    def __call__(self, x, at):  # type: ignore[no-untyped-def]
        self.seen[at.site] = x.double()
        return x


# -- STEER-COMPLIANCE and STEER-BIND -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_a_continuation_is_read_without_prompt_or_padding(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    rows, sites = answered_rows(backend), [Site(1), Site(3)]
    mean, last = (continuation_states(backend, rows, sites, reading) for reading in ("continuation", "last"))
    for i, row in enumerate(rows):
        keep = Keep(*sites)
        backend.run(backend.batch([row]), keep)
        for site in sites:
            own = keep.seen[site][0, row.prompt :]
            assert len(own) == len(ANSWERS[i].split())
            torch.testing.assert_close(mean[site][i].double(), own.mean(0), atol=1e-4, rtol=0)
            torch.testing.assert_close(last[site][i].double(), own[-1], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no answer to read"):
        continuation_states(backend, tiny_rows(backend), sites)


def test_the_papers_layers_on_models_of_any_depth() -> None:
    assert layers_at(PAPER_LAYERS, 32) == [15, 17, 18, 19, 20, 21, 22, 23, 24]
    assert layers_at(PAPER_LAYERS, 64) == [30, 34, 36, 38, 40, 42, 44, 46, 48]
    small = layers_at(PAPER_LAYERS, 24)
    assert small == [11, 13, 14, 15, 16, 17, 18]
    assert all(1 <= layer < 4 for layer in layers_at((0.01, 0.99), 4))
    for wrong in ((), (0.5, 1.0), (0.0,)):
        with pytest.raises(UserError, match="fractions of the depth"):
            layers_at(wrong, 24)


def test_openings_are_ten_of_each_and_all_different() -> None:
    assert len(set(REFUSING)) == len(set(COMPLYING)) == 10 and not set(REFUSING) & set(COMPLYING)


def test_every_prompt_has_its_opening_in_turn() -> None:
    material = planted_material()
    rows = with_openings(material.template, ["tell me"] * 7, ("bread", "water", "law"))
    words = [material.backend.tokenizer.decode(row.ids[row.prompt :]).strip() for row in rows]
    assert words == ["bread", "water", "law", "bread", "water", "law", "bread"]
    texts = ordinary_texts(material, 7)
    harmless, general = (material.fit[name].texts for name in material.ordinary)
    assert texts == [harmless[0], general[0], harmless[1], general[1], harmless[2], general[2], harmless[3]]


def _prompts(material, rows) -> list[str]:  # type: ignore[no-untyped-def]
    return [material.backend.tokenizer.decode(row.ids[row.prefix : row.instruction]).strip() for row in rows]


def test_no_harmful_prompt_gets_a_complying_opening() -> None:
    material = planted_material()
    harmful = set(material.fit["harmful"].texts)
    ordinary = {text for name in material.ordinary for text in material.fit[name].texts} - harmful
    refusing, complying = Bind(n_pairs=30).rows(material)
    assert len(refusing) == len(complying) == 30
    assert set(_prompts(material, refusing)) <= harmful and not set(_prompts(material, complying)) & harmful
    assert len(Bind().rows(material)[0]) == 40  # as many as there are
    for rows in Compliance().rows(material):
        assert len(rows) == 64 and not set(_prompts(material, rows)) & harmful
        assert set(_prompts(material, rows)) <= ordinary


@pytest.mark.parametrize(
    "method", [Compliance(n_pairs=8), Bind(n_pairs=6, reading="last"), Compliance(centring="global")]
)
def test_the_edit_takes_the_refusing_direction_away_by_the_dose(method: Compliance) -> None:
    material = planted_material()
    backend = material.backend
    # The tiny tokenizer knows few words, so the openings are the same unknown words of different number.
    assert isinstance(method, Method)
    sites = [Site(layer) for layer in layers_at(method.depths, backend.n_layers)]
    refusing, complying = method.rows(material)
    states = continuation_states(backend, [*refusing, *complying], sites, method.reading)
    treatment = method.fit(material)(0.1)
    assert treatment.edit is not None and treatment.edit.sites == set(sites) and treatment.edit.pointwise
    n, first, rows = len(refusing), sites[0], tiny_rows(backend)
    v = paired_direction(states[first][:n], states[first][n:], method.centring)
    assert float((states[first][:n] - states[first][n:]).double().mean(0) @ v) > 0
    norm = mean_norms(backend, material.template.encode_all(material.fit["harmless"].texts[:16]), sites)[first]
    base, after = (last_states(backend, rows, [first], edit)[first].double() for edit in (None, treatment.edit))
    torch.testing.assert_close(after - base, (-0.1 * norm * v).expand_as(base), atol=1e-4, rtol=0)


def test_directions_are_those_of_the_continuations_alone() -> None:
    backend = tiny_backend("llama")
    rows = [backend.template().encode_all(PROMPTS, [answer] * len(PROMPTS)) for answer in ("i do not", "the bread is")]
    found = opening_directions(backend, *rows, [Site(2)])[Site(2)]
    states = [continuation_states(backend, side, [Site(2)])[Site(2)] for side in rows]
    torch.testing.assert_close(found, paired_direction(*states), atol=1e-5, rtol=0)


# -- STEER-JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_vector_sets_the_projection_to_its_target(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    vector = format_vector(backend, backend.template(), PROMPTS)
    assert vector.site == Site(2) and vector.n == len(PROMPTS)
    asked = backend.template().encode_all([f"{text} {JSON_REQUEST}" for text in PROMPTS])
    h_with, h_without = (
        last_states(backend, r, [vector.site])[vector.site].double() for r in (asked, tiny_rows(backend))
    )
    difference = (h_with - h_without).mean(0)
    torch.testing.assert_close(vector.direction, difference / difference.norm(), atol=1e-5, rtol=0)
    assert vector.target == pytest.approx(float((h_with @ vector.direction).mean()), abs=1e-4)
    assert vector.target - vector.plain == pytest.approx(float(difference.norm()), abs=1e-4)
    keep = Keep(vector.site)
    batch = backend.batch(tiny_rows(backend))

    class Both:
        sites, pointwise = frozenset({vector.site}), False

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            return keep(vector.edit()(x, at), at)

    backend.run(batch, Both())
    along = keep.seen[vector.site][batch.mask] @ vector.direction
    torch.testing.assert_close(along, torch.full_like(along, vector.target), atol=1e-4, rtol=0)
    x = draw(2, 3, 32)
    edited = Affine(vector.site, vector.direction, kappa=1.0, amount=vector.target)(x, None)  # type: ignore[arg-type]
    torch.testing.assert_close(
        edited @ vector.direction, torch.full((2, 3), vector.target, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_a_request_that_changes_nothing_is_named() -> None:
    backend = tiny_backend("llama")
    with pytest.raises(UserError, match="changes no state"):
        format_vector(backend, backend.template(), PROMPTS, Site(1), request="")


def test_the_form_of_an_answer_as_a_method_moves_the_component_by_its_strength() -> None:
    material = planted_material()
    fitted = AnswerForm().fit(material)
    rows = material.template.encode_all(PROMPTS)
    none, half, full = (fitted(s).edit for s in (0.0, 0.5, 1.0))
    assert isinstance(full, Affine) and isinstance(half, Affine) and isinstance(none, Affine)
    along = [
        last_states(material.backend, rows, [full.site], edit)[full.site].double() @ full.direction.double()
        for edit in (none, half, full)
    ]
    for values, amount in zip(along, (none.amount, half.amount, full.amount), strict=True):
        torch.testing.assert_close(values, torch.full_like(values, float(amount)), atol=1e-4, rtol=0)
    assert float(half.amount) == pytest.approx((float(none.amount) + float(full.amount)) / 2)
