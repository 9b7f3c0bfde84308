"""AlphaSteer: the projector, the rank-one gate, its leakage, and an edit of the prompt pass from each row's last token."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.edits import At, Compose, Edit, Site, compose, leaves_prefix
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_log_probs, log_odds
from rsteer_interp.interventions import AtPositions, add
from rsteer_interp.methods import Examples, Material, Method
from rsteer_interp.methods.alphasteer import (
    AlphaSteer,
    LastTokenShift,
    LinearGate,
    NullSpace,
    leakage,
    least_null,
    linear_gate,
    protected_moments,
    steering_matrix,
)
from rsteer_interp.methods.refusal_steering import evidence
from rsteer_interp.methods.selective import band
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import cosine
from rsteer_interp.prompts import BUILT_IN, Prompt, load_prompts
from tests.planted_material import held_out, planted_material
from tests.tiny_models import KINDS, PROMPTS, Kind, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(seed: int, n: int, d: int = 20, shift: float = 3.0) -> Tensor:
    """Correlated states about a mean that is not 0, of several sizes by direction."""
    basis = torch.linalg.qr(draw(d, d, seed=99))[0]
    return shift * draw(d, seed=98) + draw(n, d, seed=seed) * torch.logspace(1, -1, d, dtype=torch.float64) @ basis


# -- the projector -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("centred", [False, True])
def test_p_is_an_orthogonal_projector_of_the_wanted_rank(seed: int, n: int, centred: bool) -> None:
    protected = states(seed, n)
    seen = min(n - 1 if centred else n, 20)
    assert least_null(Moments.of(protected), centred) == pytest.approx(1 - seen / 20)
    for null in (0.3, 0.45, 0.6, 1.0):
        if 20 - round(20 * null) > seen:
            with pytest.raises(UserError, match=f"{n} protected prompts show {seen}"):
                NullSpace.of(Moments.of(protected), null, centred)
            continue
        space = NullSpace.of(Moments.of(protected), null, centred)
        p = space.matrix
        torch.testing.assert_close(p @ p, p, atol=1e-10, rtol=0)
        torch.testing.assert_close(p, p.T, atol=1e-12, rtol=0)
        assert space.rank == round(float(p.trace())) == round(20 * null)
        torch.testing.assert_close(space.project(protected), (protected - space.origin) @ p, atol=1e-10, rtol=0)
        assert centred or not bool(space.origin.any())


@pytest.mark.parametrize("null", [0.3, 0.5, 0.6])
def test_p_is_that_of_the_smallest_singular_directions(null: float) -> None:
    """The authors' way: singular value decomposition of H^T H, the last null * d directions, P = U U^T."""
    protected = states(4, 70)
    for centred in (False, True):
        h = (protected - protected.mean(0) if centred else protected).numpy()
        u, values, _ = np.linalg.svd(h.T @ h)
        kept = u[:, np.argsort(values)[: round(20 * null)]]
        found = NullSpace.of(Moments.of(protected), null, centred).matrix.numpy()
        np.testing.assert_allclose(found, kept @ kept.T, atol=1e-8)


def test_p_from_streamed_moments_is_the_same() -> None:
    protected = states(5, 50)
    parts = [Moments.of(protected[i : i + 9]) for i in range(0, 50, 9)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    a, b = (NullSpace.of(m, 0.5).matrix for m in (merged, Moments.of(protected)))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [8, 60])
def test_every_null_fraction_that_is_taken_makes_a_difference(n: int) -> None:
    """Fractions that the protected states do not determine are errors, never a larger P than was asked for."""
    moments = Moments.of(states(6, n))
    taken = {}
    for null in (0.1, 0.3, 0.5, 0.7, 0.9):
        try:
            taken[null] = NullSpace.of(moments, null).rank
        except UserError:
            assert null < least_null(moments)
    assert list(taken.values()) == [round(20 * null) for null in taken] and len(taken) == (2 if n == 8 else 5)


def test_with_too_few_protected_prompts_the_method_says_what_p_keeps() -> None:
    """d = 32: the material's protected prompts determine 0.6, and not a fraction below what they show; more of them do."""
    material, sites = planted_material(), [Site(2)]
    few = replace(material, ordinary=(), fit=material.fit | {"harm": _first(material.fit["harm"], 4)})
    least = least_null(protected_moments(few, sites)[sites[0]])
    assert least > 0.3
    before = len(few.backend.notes)
    AlphaSteer(null=0.3).gates(few, sites)
    assert any(f"P keeps {least:.2f} of the dimensions" in note for note in few.backend.notes[before:])
    texts = tuple(text for kind in ("kitchen", "arts") for text in few.fit[kind].texts)
    enough = replace(few, protected=texts)
    before = len(few.backend.notes)
    AlphaSteer(null=0.3).gates(enough, sites)
    assert len(few.backend.notes) == before
    for each, words in ((few, f"{least:.2f}"), (enough, "0.3")):
        rank, _ = AlphaSteer(null=0.3, depth=(0.4, 0.6)).checks(each, 0.1, held_out())
        assert rank.value.value == pytest.approx(float(words), abs=0.02) and "0.3 asked for" in rank.null
        assert rank.value.n == protected_moments(each, sites)[sites[0]].count


def _first(examples: Examples, n: int) -> Examples:
    return examples.where(torch.arange(len(examples.texts)) < n)


def test_the_uncentred_p_is_about_the_mean_and_a_massive_coordinate() -> None:
    """Both remove it, but one as the mean direction: its first direction is the mean, the other's is the largest spread."""
    d, n = 40, 200
    massive = torch.zeros(d, dtype=torch.float64)
    massive[7] = 50
    protected = massive + draw(n, d, seed=1) * torch.linspace(3, 1, d, dtype=torch.float64)
    moments = Moments.of(protected)
    uncentred, centred = (NullSpace.of(moments, 0.5, c) for c in (False, True))
    assert abs(cosine(uncentred.removed[0], moments.mean)) > 0.999
    assert abs(float(uncentred.removed[0, 7])) > 0.99
    assert abs(float(centred.removed[0, 7])) < 0.5
    torch.testing.assert_close(centred.origin, moments.mean)


# -- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [6, 50])
def test_delta_has_rank_one_and_is_the_papers(seed: int, n: int) -> None:
    """Delta = P pinv(X^T X + 10 P^T P) X^T R with equal rows r, in numpy, is w r^T."""
    protected, edited, r = states(seed, 40), states(seed + 10, n) + 2 * draw(20, seed=55), draw(20, seed=seed + 20)
    space = NullSpace.of(Moments.of(protected), 0.5)
    p, h = space.matrix.numpy(), edited.numpy()
    x = h @ p
    paper = p @ np.linalg.pinv(x.T @ x + 10 * p.T @ p) @ x.T @ np.tile(r.numpy(), (n, 1))
    gate = linear_gate(edited, space)
    np.testing.assert_allclose(np.outer(gate.weights, r), paper, atol=1e-9)
    np.testing.assert_allclose(steering_matrix(edited, space, r.expand(n, -1)), paper, atol=1e-9)
    assert np.linalg.matrix_rank(paper, tol=1e-9) == 1
    assert gate.offset == 0
    np.testing.assert_allclose(gate.scores(protected)[:, None] * r, protected.numpy() @ paper, atol=1e-9)


def test_targets_of_their_own_are_met_and_the_matrix_ends_in_the_null_space() -> None:
    protected, edited, targets = states(0, 40), states(1, 6) + draw(20, seed=55), draw(6, 20, seed=2)
    space = NullSpace.of(Moments.of(protected), 0.6)
    delta = steering_matrix(edited, space, targets, penalty=1e-9)
    torch.testing.assert_close(edited @ delta, targets, atol=1e-4, rtol=0)
    torch.testing.assert_close(space.matrix @ delta, delta, atol=1e-9, rtol=0)
    assert int(torch.linalg.matrix_rank(delta, tol=1e-8)) == 6


def test_protected_prompts_get_nothing_and_without_the_projector_they_would() -> None:
    """n < d: the edit is exactly 0 on the fitted protected states, and about 1 on those to be edited; the fault leaks."""
    for seed in range(3):
        protected, edited = states(seed, 8), states(seed + 10, 5) + 4 * draw(20, seed=55)
        moments = Moments.of(protected)
        for centred in (False, True):
            space = NullSpace.of(moments, least_null(moments, centred), centred)
            gate = linear_gate(edited, space, penalty=1e-3)
            assert float(gate.scores(protected).abs().max()) < 1e-8
            torch.testing.assert_close(gate.scores(edited), torch.ones(5, dtype=torch.float64), atol=0.05, rtol=0)
        fault = linear_gate(edited, NullSpace.of(moments, 1.0), penalty=1e-3)
        assert float(fault.scores(protected).abs().max()) > 0.1


@pytest.mark.parametrize("n", [12, 60])
def test_uncentred_is_not_blind_to_a_shift_centred_is_and_both_turn_with_the_states(n: int) -> None:
    protected, edited, probe = states(0, n), states(1, 15) + draw(20, seed=55), states(2, 9)
    shift, turn = 5 * draw(20, seed=3), torch.linalg.qr(draw(20, 20, seed=4))[0]

    def scores(centred: bool, change: Any) -> Tensor:
        gate = linear_gate(change(edited), NullSpace.of(Moments.of(change(protected)), 0.6, centred))
        return gate.scores(change(probe))

    plain = {centred: scores(centred, lambda x: x) for centred in (False, True)}
    torch.testing.assert_close(scores(True, lambda x: x + shift), plain[True], atol=1e-7, rtol=0)
    assert float((scores(False, lambda x: x + shift) - plain[False]).abs().max()) > 1e-3
    for centred in (False, True):
        torch.testing.assert_close(scores(centred, lambda x: x @ turn), plain[centred], atol=1e-7, rtol=0)


def test_what_cannot_be_fitted_is_named() -> None:
    protected = Moments.of(states(0, 40))
    for null in (0.0, 1.5):
        with pytest.raises(UserError, match="null fraction"):
            NullSpace.of(protected, null)
    with pytest.raises(UserError, match="add prompts"):
        NullSpace.of(Moments.of(states(0, 1)), 0.5)
    flat = torch.eye(20, dtype=torch.float64)[:10]
    with pytest.raises(UserError, match="raise the null fraction"):
        linear_gate(flat[:3], NullSpace.of(Moments.of(flat), 0.5))


# -- leakage -------------------------------------------------------------------------------------------------------


def _planted(d: int = 40, k: int = 10, noise: float = 0.3, n: int = 60) -> Material:
    """States in which ordinary prompts live in k directions, those to be edited also along one more, unusual ones all over."""
    site = Site(1)
    u = torch.eye(d, dtype=torch.float64)[-1]

    def examples(seed: int, c: float, along: float = 0.0) -> Examples:
        x = noise * draw(n, d, seed=seed)
        x[:, :k] += 4 * draw(n, k, seed=seed + 1)
        # What else the edited have in common is a place where protected ones are too: a gate that may use it, will.
        x[:, 0] = x[:, 0] / 16 + 6 if along else x[:, 0]
        texts = [f"tell me {i}" for i in range(n)]
        return Examples(texts, torch.full((n,), c), {site: x + along * u}, texts)

    parts = {
        split: {
            "remove": examples(seed, 1.0, 3.0),
            "contrast": examples(seed + 2, -1.0),
            "keep": examples(seed + 4, 1.0),
            "ordinary": examples(seed + 6, -1.0),
        }
        for split, seed in (("fit", 10), ("select", 20))
    }
    backend: Any = None
    return Material(backend, backend, (0,), parts["fit"], parts["select"], "remove", "contrast", "keep", ("ordinary",))


def test_leakage_is_small_while_the_protected_directions_are_removed_and_grows_without() -> None:
    """Held-out noise still leaks: to the amount that a large sample from the same population shows, inside the interval."""
    material = _planted()
    found = leakage(material, Site(1), material.select, nulls=(0.5, 0.75, 1.0), penalty=0.1)
    assert [(x.null, x.centred) for x in found] == [(n, c) for c in (False, True) for n in (0.5, 0.75, 1.0)]
    assert [x.rank for x in found[:3]] == [20, 30, 40]
    many = _planted(n=5000).select
    protected = Moments.of(torch.cat([material.fit[n].states[Site(1)] for n in ("keep", "ordinary", "contrast")]))
    for one in found:
        space = NullSpace.of(protected, one.null, one.centred)
        gate = linear_gate(material.fit["remove"].states[Site(1)], space, 0.1)
        size = {name: float(gate.scores(x.states[Site(1)]).abs().mean()) for name, x in many.items()}
        for name, ratio in one.ratios.items():
            assert ratio.low < ratio.value < ratio.high and ratio.n == 60
            assert 0.9 * ratio.low < size[name] / size["remove"] < 1.1 * ratio.high
            if one.null < 1:
                assert 0.04 < ratio.value < 0.2
            else:
                assert ratio.low > max(x.ratios[name].high for x in found if x.null < 1)
    assert 0 <= found[0].energy.mean < 0.2 and found[0].energy.top > 0.9
    assert set(found[0].energy.coordinates) == set(range(10))


def test_leakage_of_unusual_prompts_is_read_from_the_model() -> None:
    material = planted_material()
    texts = ["word7 word8 word9 word10", "why why why", "? ! ? !", "a a a a a a"]
    site = Site(1)
    prompts = [Prompt(prompt=text, subject=text) for text in texts]
    found = leakage(material, site, material.select, {"unusual": prompts}, nulls=(0.5,))
    assert set(found[0].ratios) == {"harm", "kitchen", "arts", "unusual"}
    method = AlphaSteer(null=0.5)
    gate = method.gates(material, [site])[site]
    rows = material.template.encode_all(texts)
    benign = gate.scores(last_states(material.backend, rows, [site])[site]).abs().mean()
    select = material.select["political"]
    wanted = gate.scores(select.where(select.refused).states[site]).abs().mean()
    assert found[0].ratios["unusual"].value == pytest.approx(float(benign / wanted))
    with pytest.raises(UserError, match="two prompts on each side"):
        leakage(material, site, material.select, {"one": prompts[:1]}, nulls=(0.5,))


# -- the edit ------------------------------------------------------------------------------------------------------


def _shift(backend: Any, *layers: int, prefix: bool = False) -> LastTokenShift:
    gate = LinearGate(draw(backend.d_model, seed=layers[0]) / 3, 0.2)
    shifts = {Site(layer): draw(backend.d_model, seed=layer + 50) for layer in layers}
    return LastTokenShift(Site(layers[0]), gate, shifts, prefix)


def _shifts(backend: Any, read: str, prefix: bool = False) -> list[LastTokenShift]:
    """Two gates, of which the second reads what the first edit left; or one gate for both places."""
    if read == "first":
        return [_shift(backend, 1, 3, prefix=prefix)]
    return [_shift(backend, 1, prefix=prefix), _shift(backend, 3, prefix=prefix)]


def _edit(backend: Any, read: str = "each", prefix: bool = False) -> Edit:
    edit = compose(*_shifts(backend, read, prefix))
    assert edit is not None
    return edit


def _restated(backend: Any, row: Any, shifts: list[LastTokenShift]) -> Edit:
    """The paper's algorithm for one prompt, layer by layer: read the last token, then add a constant to the positions."""
    edit: Edit | None = None
    for shift in shifts:
        h = last_states(backend, [row], [shift.site], edit)[shift.site].double()[0]
        score = float(h @ shift.gate.weights) - shift.gate.offset
        spans = {"instruction", "suffix"} | ({"prefix"} if shift.prefix else set())
        constant = add(shift.shifts, {site: score * float(v.norm()) for site, v in shift.shifts.items()})
        edit = compose(edit, AtPositions(constant, frozenset(spans)))
    assert edit is not None
    return edit


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("read", ["each", "first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_the_edit_is_the_papers_row_by_row(family: str, kind: Kind, read: str, prefix: bool) -> None:
    """Against each prompt alone; so neighbours, padding, sharing the prefix and the order of rows do not matter."""
    backend = tiny_backend(family, kind)
    rows, edit = tiny_rows(backend), _edit(backend, read, prefix)
    base, got = (log_odds(backend, rows, TOKENS, e) for e in (None, edit))
    alone = [_restated(backend, row, _shifts(backend, read, prefix)) for row in rows]
    wanted = torch.cat([log_odds(backend, [row], TOKENS, one) for row, one in zip(rows, alone, strict=True)])
    assert float((wanted - base).abs().max()) > 0.1
    torch.testing.assert_close(got, wanted, atol=3e-4, rtol=0)
    torch.testing.assert_close(log_odds(backend, rows[::-1], TOKENS, edit).flip(0), got, atol=3e-4, rtol=0)


def test_reading_once_is_not_reading_at_each_layer() -> None:
    backend = tiny_backend("llama")
    first = _shift(backend, 1, 3)
    again = replace(first, site=Site(3), shifts={Site(3): first.shifts[Site(3)]})
    each = compose(replace(first, shifts={Site(1): first.shifts[Site(1)]}), again)
    once, twice = (log_odds(backend, tiny_rows(backend), TOKENS, e) for e in (first, each))
    assert float((once - twice).abs().max()) > 1e-2
    with pytest.raises(UserError, match="read it before"):
        replace(first, site=Site(2))


def test_a_prepared_start_changes_nothing() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    for read in ("each", "first"):
        edit = _edit(backend, read)
        plain = log_odds(backend, rows, TOKENS, edit)
        torch.testing.assert_close(log_odds(backend, backend.prepare(rows, 1), TOKENS, edit), plain, atol=1e-4, rtol=0)


def test_prefix_is_shared_only_where_it_is_left_alone() -> None:
    backend = tiny_backend("llama")
    batch = backend.batch(tiny_rows(backend))
    for prefix in (False, True):
        edit = _edit(backend, prefix=prefix)
        assert not edit.pointwise and leaves_prefix(edit) != prefix
        assert backend._shared_width(batch, edit, 1) == (0 if prefix else batch.rows[0].prefix)
    with_it, without = (log_odds(backend, tiny_rows(backend), TOKENS, _edit(backend, prefix=p)) for p in (True, False))
    assert float((with_it - without).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_decoding_steps_and_answers_are_unedited(family: str, kind: Kind) -> None:
    """Every decoding step gets its own tensor back; a given answer is scored as it would be generated."""
    backend = tiny_backend(family, kind)
    edit, seen = _edit(backend), Counter[str]()

    class Watch:
        sites, pointwise, leaves_prefix = edit.sites, False, True

        def __call__(self, x: Tensor, at: Any) -> Tensor:
            out = edit(x, at)
            assert (out is x) == (at.phase != "prompt")
            seen[at.phase] += 1
            return out

    rows = tiny_rows(backend)[:3]
    batch = backend.batch(rows)
    replies = backend.generate(batch, 4, Watch())
    assert seen["decode"] == 2 * 3 and seen["prompt"] == 2
    assert not torch.equal(replies.ids, backend.generate(batch, 4).ids)
    whole = [replace(r, ids=r.ids + tuple(ids.tolist())) for r, ids in zip(rows, replies.ids, strict=True)]
    given = answer_log_probs(backend, whole, edit)
    lengths = replies.lengths.tolist()
    assert lengths == [4, 4, 4]
    torch.testing.assert_close(given, replies.log_probs.double().mean(1), atol=1e-4, rtol=0)


def test_half_precision_streams_keep_their_type() -> None:
    backend = tiny_backend("llama")
    batch = backend.batch(tiny_rows(backend))
    shift = _shift(backend, 1)
    got: list[Tensor] = []

    class Half:
        sites, pointwise, leaves_prefix = shift.sites, False, True

        def __call__(self, x: Tensor, at: Any) -> Tensor:
            if at.phase == "prompt":
                got.extend([shift(x.to(torch.bfloat16), at), shift(x, at)])
            return x

    backend.run(batch, Half())
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0].float(), got[1], atol=0.3, rtol=0.03)


# -- the method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"centred": True}, {"read": "each"}, {"depth": (0.25, 0.6)}])
def test_the_method_removes_a_planted_refusal_and_spares_the_protected(kind: Kind, options: dict[str, Any]) -> None:
    material = planted_material(kind=kind)
    method = AlphaSteer(null=0.5, **options)
    assert isinstance(method, Method)
    fitted = method.fit(material)

    def odds(name: str, edit: Edit | None) -> Tensor:
        rows = material.template.encode_all(material.select[name].texts)
        return log_odds(material.backend, rows, material.refusal_tokens, edit)

    base = {name: odds(name, None) for name in material.select}
    edits = [fitted(s).edit for s in AlphaSteer.strengths]
    curve = torch.stack([base["political"].mean(), *(odds("political", e).mean() for e in edits)])
    assert bool((curve.diff() < 0).all()), curve

    def removed(edit: Edit | None) -> dict[str, float]:
        """Of each protected set, as a share of what is removed of the other."""
        fall = {name: float((base[name] - odds(name, edit)).mean()) for name in base}
        return {name: fall[name] / fall["political"] for name in ("harm", "kitchen", "arts")}

    assert max(removed(edits[-1]).values()) < 0.2
    if (
        not method.centred
    ):  # the fault: without the null space the gate is about the common mean, and everybody is edited
        assert min(removed(replace(method, null=1.0).fit(material)(AlphaSteer.strengths[-1]).edit).values()) > 0.9


@pytest.mark.parametrize("read", ["each", "first"])
def test_strength_is_the_relative_dose_on_the_fitted_prompts_and_points_away_from_refusal(read: Any) -> None:
    material = planted_material()
    method = AlphaSteer(depth=(0.25, 0.6), read=read)
    sites = band(material.n_layers, method.depth)
    assert len(sites) == 2
    edit = method.fit(material)(0.1).edit
    assert edit is not None and edit.sites == frozenset(sites)
    parts = edit.edits if isinstance(edit, Compose) else (edit,)
    assert len(parts) == (2 if read == "each" else 1)
    fit = material.fit["political"]
    fitted = fit.where(fit.refused)
    sizes = mean_norms(material.backend, material.template.encode_all(fitted.texts), sites)
    for part in parts:
        assert isinstance(part, LastTokenShift)
        scores = part.gate.scores(fitted.states[part.site])
        for site, shift in part.shifts.items():
            assert float((scores[:, None] * shift).mean(0).norm()) == pytest.approx(0.1 * sizes[site], rel=1e-5)
            seen = evidence(material, [site])[site]
            assert cosine(shift, seen.complying.mean - seen.refusing.mean) > 1 - 1e-6
    for prefix in (False, True):
        edit = AlphaSteer(prefix=prefix).fit(material)(0.1).edit
        assert edit is not None and leaves_prefix(edit) != prefix


def test_gates_of_their_own_starve_where_one_reading_does_not() -> None:
    """States h = y r: the second gate reads what the first edit left of r, so two edits of size a move (1 - (1 - a)^2) |r|."""
    d = 8
    r = torch.zeros(d, dtype=torch.float64)
    r[0] = 2.0
    gate = LinearGate(r / float(r @ r), 0.0)
    rows = tiny_rows(tiny_backend("llama"))
    batch = tiny_backend("llama").batch(rows)
    h = r.expand(len(rows), batch.ids.shape[1], d)

    def moved(edits: list[LastTokenShift], sites: list[Site]) -> float:
        x, memory = h, {}  # type: ignore[var-annotated]
        for site in sites:
            for edit in edits:
                if site in edit.sites:
                    at = At(site, "prompt", 0, batch.positions, batch.mask, torch.arange(len(rows)), batch, memory)
                    x = edit(x, at)
        return float((h - x)[0, -1, 0]) / 2

    sites = [Site(1), Site(2)]
    for a in (0.1, 0.5, 1.0):
        each = [LastTokenShift(s, gate, {s: -a * r}) for s in sites]
        assert moved(each, sites) == pytest.approx(1 - (1 - a) ** 2)
        assert moved([LastTokenShift(sites[0], gate, dict.fromkeys(sites, -a * r))], sites) == pytest.approx(2 * a)


def test_rows_of_the_tiny_prompts_differ_in_length() -> None:
    """Else the tests above would see no padding."""
    assert len({len(text.split()) for text in PROMPTS}) > 2


# -- unusual prompts -----------------------------------------------------------------------------------------------


def unusual() -> tuple[Prompt, ...]:
    return load_prompts("unusual").prompts


def test_unusual_prompts_are_split_by_subject_with_every_category_in_each() -> None:
    prompts = unusual()
    header = json.loads((resources.files("rsteer_interp") / "data" / "unusual.jsonl").read_text("utf-8").split("\n")[0])
    assert len(prompts) == 60 == len({p.prompt for p in prompts}) == header["n"] and header["set"] == "unusual"
    categories = {p.category for p in prompts}
    assert {"maths", "code", "other_languages", "tables", "copy_editing"} <= categories
    subjects: Counter[str] = Counter()
    for split, n in (("fit", 24), ("select", 12), ("report", 24)):
        part = [p for p in prompts if p.split == split]
        assert len(part) == n and {p.category for p in part} == categories
        subjects.update({p.subject for p in part})
    assert set(subjects.values()) == {1}


def test_unusual_prompts_are_new_and_unlike_the_general_ones() -> None:
    known = {text.lower() for name in BUILT_IN if name != "unusual" for text in load_prompts(name).texts}
    prompts = unusual()
    assert not known & {p.prompt.lower() for p in prompts}
    longest = max(map(len, known))
    edited = [p for p in prompts if p.category == "copy_editing"]
    assert min(len(p.prompt) for p in edited) > 1.5 * longest
    foreign = [p for p in prompts if p.category == "other_languages"]
    assert len(foreign) == 10
