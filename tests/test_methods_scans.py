"""SCANS: the transition in a pass of its own, a sign for each prompt, suffix positions, and layers by the logit lens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cosine_similarity

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, log_odds
from rsteer_interp.gates import roc
from rsteer_interp.interventions import AtPositions, OnPrompt, add
from rsteer_interp.lens import anchors, lens_logits
from rsteer_interp.methods import Method
from rsteer_interp.methods.scans import Scans, scans_directions
from rsteer_interp.transition import (
    Marker,
    SteerBySign,
    TransitionGate,
    similarity,
    transition,
    without_own,
)
from tests.conditional_material import REFUSAL_TOKENS as TOKENS
from tests.conditional_material import material
from tests.tiny_models import FAMILIES, KINDS, Kind, tiny_backend

TEXTS = ["tell me about the city", "why is the river in the city ?", "write", "what can you tell me ?"]
SITES = [Site(2), Site(3), Site(4)]
OPENING = "yes of"  # two tokens of the tiny vocabulary: the last one counts


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(eq=False)
class Watch:
    """Keeps whole streams, by site and step."""

    sites: frozenset[Site]
    seen: dict[tuple[Site, int], torch.Tensor] = field(default_factory=dict)
    pointwise = False

    def __call__(self, x: torch.Tensor, at: At) -> torch.Tensor:
        self.seen[at.site, at.step] = x.clone()
        return x


def stream(backend: Backend, ids: tuple[int, ...], site: Site) -> torch.Tensor:
    watch = Watch(frozenset({site}))
    backend.run(backend.batch([Tokens(ids, 0, 0, len(ids))]), watch)
    return watch.seen[site, 0][0]


# -- the transition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["prompt_end", "instruction_end"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_the_transition_is_that_of_each_prompt_alone(family: str, kind: Kind, marker: Marker) -> None:
    """State at the marker minus state at the opening's last token, whatever the neighbours, padding and given answers."""
    backend = tiny_backend(family, kind)
    opening = tuple(backend.tokenizer(OPENING, add_special_tokens=False)["input_ids"])
    assert len(opening) == 2
    rows = backend.template().encode_all(TEXTS, ["river ."] * len(TEXTS))
    got = transition(backend, rows, SITES, opening=OPENING, marker=marker)
    for i, row in enumerate(rows):
        for site in SITES:
            alone = stream(backend, row.ids[: row.prompt] + opening, site)
            place = row.prompt - 1 if marker == "prompt_end" else row.instruction
            torch.testing.assert_close(got[site][i], alone[place] - alone[-1], atol=2e-4, rtol=0)


def test_states_that_are_not_finite_give_no_sign() -> None:
    backend = tiny_backend("llama")
    with torch.no_grad():
        backend.model.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"blocks\.3.*not finite"):
        transition(backend, backend.template().encode_all(TEXTS), SITES, opening=OPENING)


def test_sigma_is_the_mean_cosine_and_an_anchor_has_no_part_in_its_own_reference() -> None:
    t = {site: normal(7, 5, seed=site.layer) for site in SITES}
    reference = {site: rows.mean(0) for site, rows in t.items()}
    sigma = similarity(t, reference)
    for i in range(7):
        cosines = [cosine_similarity(t[site][i], reference[site], dim=0) for site in SITES]
        torch.testing.assert_close(sigma[i], torch.stack(cosines).mean(), rtol=1e-10, atol=0)
    others = without_own(t)
    for i in range(7):
        keep = [j for j in range(7) if j != i]
        torch.testing.assert_close(others[SITES[0]][i], t[SITES[0]][keep].mean(0), rtol=1e-10, atol=1e-12)
    assert float(similarity(t, others).mean()) < float(sigma.mean())  # pure noise looks similar to itself
    with pytest.raises(UserError, match="two anchors"):
        without_own({SITES[0]: normal(1, 5)})


def test_the_gate_tells_a_planted_difference_and_permuted_labels_nothing() -> None:
    """t = the sets' own direction + noise: area near 1, and 0.5 where the labels are drawn anew."""
    axes = torch.eye(12, dtype=torch.float64)
    unsafe, safe = ({site: 3 * axes[i] + normal(80, 12, seed=site.layer + 10 * i) for site in SITES} for i in (0, 1))
    reference = {site: rows[:40].mean(0) for site, rows in unsafe.items()}
    sigma = [similarity({site: rows[40:] for site, rows in t.items()}, reference) for t in (unsafe, safe)]
    curve = roc(*sigma)
    assert curve.area.low > 0.95 and curve.null[0] < 0.5 < curve.null[1] < 0.65
    labels, scores = torch.tensor([1] * 40 + [0] * 40), torch.cat(sigma)
    areas = [
        roc_auc_score(labels[torch.randperm(80, generator=torch.Generator().manual_seed(seed))], scores)
        for seed in range(50)
    ]
    assert sum(areas) / 50 == pytest.approx(0.5, abs=0.03)


# -- the sign of each prompt -------------------------------------------------------------------------------------------


def _steering(backend: Backend, threshold: float | None = None, dead_band: float = 0.0) -> SteerBySign:
    """Three of TEXTS on one side of the threshold and one on the other, unless it is given."""
    rows = backend.template().encode_all(TEXTS)
    t = transition(backend, rows, SITES, opening=OPENING)
    gate = TransitionGate(backend, {site: x[0] for site, x in t.items()}, 0.0, dead_band, OPENING)
    if threshold is None:
        threshold = float(gate.similarity(rows).sort().values[:2].mean())
    gate = TransitionGate(backend, gate.reference, threshold, dead_band, OPENING)
    vectors = {site: normal(backend.d_model, seed=site.layer) for site in SITES[:2]}
    toward, away = (AtPositions(add(vectors, dict.fromkeys(vectors, 3.0 * sign))) for sign in (1, -1))
    return SteerBySign(toward, away, gate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_rows_never_seen_before_get_their_own_sign(family: str, kind: Kind) -> None:
    """Prompts that the caller encodes: no table is filled first. In the prompt pass, while decoding, and for answers."""
    backend = tiny_backend(family, kind)
    steering = _steering(backend)
    rows = backend.template().encode_all(TEXTS)
    assert not steering.gate._seen
    base, toward, away, got = (
        log_odds(backend, rows, TOKENS, e) for e in (None, steering.toward, steering.away, steering)
    )
    signs = steering.gate.signs(rows)
    assert sorted(signs.tolist()) == [-1, 1, 1, 1]
    assert float((toward - base).abs().min()) > 1e-3 and float((away - toward).abs().min()) > 1e-3
    torch.testing.assert_close(got, torch.where(signs > 0, toward, away), atol=1e-4, rtol=0)
    batch = backend.batch(rows)
    replies = [backend.generate(batch, 4, e).ids for e in (steering.toward, steering.away, steering)]
    assert torch.equal(replies[2], torch.where((signs > 0)[:, None], replies[0], replies[1]))
    answered = backend.template().encode_all(TEXTS, ["the river ."] * len(TEXTS))
    kls = [answer_effects(backend, answered, e).kl for e in (steering.toward, steering.away, steering)]
    torch.testing.assert_close(kls[2], torch.where(signs > 0, kls[0], kls[1]), atol=1e-4, rtol=1e-3)


def test_each_prompt_is_measured_once_and_neighbours_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_backend("llama")
    steering = _steering(backend)
    rows = backend.template().encode_all(TEXTS)
    passes = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda batch, edit, **kw: passes.append(len(batch)) or run(batch, edit, **kw))
    alone = torch.cat([log_odds(backend, [row], TOKENS, steering) for row in rows])
    assert passes == [1, 1, 1, 1]
    together = log_odds(backend, rows, TOKENS, steering)
    assert passes == [1, 1, 1, 1]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    fresh = TransitionGate(backend, steering.gate.reference, steering.gate.threshold, 0.0, OPENING)
    torch.testing.assert_close(fresh.similarity(rows), steering.gate.similarity(rows), atol=1e-5, rtol=0)
    assert passes == [1, 1, 1, 1, 4]


def test_signs_at_the_threshold_and_in_the_dead_band() -> None:
    """No branch does nothing, unless one is asked for; the threshold itself is unsafe."""
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    gate = _steering(backend).gate
    sigma = gate.similarity(rows)
    order = sigma.argsort()
    for dead_band, expected in (
        (0.0, [-1, -1, 1, 1]),
        (float(sigma[order[2]] - sigma[order[1]]) + 1e-9, [-1, 0, 1, 1]),
    ):
        own = TransitionGate(backend, gate.reference, float(sigma[order[2]]), dead_band, OPENING, _seen=gate._seen)
        assert own.signs(rows)[order].tolist() == expected
    with pytest.raises(UserError, match="dead_band"):
        TransitionGate(backend, gate.reference, dead_band=-0.1)


def test_a_row_in_the_dead_band_is_left_alone() -> None:
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    steering = _steering(backend, threshold=2.0, dead_band=5.0)
    assert steering.gate.signs(rows).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(
        log_odds(backend, rows, TOKENS, steering), log_odds(backend, rows, TOKENS), rtol=0, atol=1e-5
    )


def _changes(backend: Backend, edit: Edit, rows: list[Tokens], site: Site) -> torch.Tensor:
    """What an edit adds at its first site, on unpadded columns."""
    before, after = Watch(frozenset({site})), Watch(frozenset({site}))
    both = compose(before, edit, after)
    assert both is not None
    backend.run(backend.batch(rows), both)
    return after.seen[site, 0] - before.seen[site, 0]


def test_the_signs_are_mirror_images_and_positions_before_the_marker_are_unchanged() -> None:
    """At the edited layer: nothing on prefix and instruction, +a v or -a v from the suffix on, on all rows."""
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    site = SITES[0]
    plus, minus = (_changes(backend, _steering(backend, threshold=t), rows, site) for t in (-2.0, 2.0))
    torch.testing.assert_close(plus, -minus, atol=1e-5, rtol=0)
    batch = backend.batch(rows)
    suffix = batch.mask & (batch.positions >= batch.span_end("instruction")[:, None])
    assert float(plus[~suffix].abs().max()) == 0.0 and int((~suffix & batch.mask).sum()) > 10
    unit = normal(backend.d_model, seed=site.layer)
    expected = (3.0 * unit / unit.norm()).float().expand_as(plus[suffix])
    torch.testing.assert_close(plus[suffix], expected, atol=1e-5, rtol=0)


def test_generated_tokens_are_steered_too() -> None:
    backend = tiny_backend("llama")
    steering = _steering(backend, threshold=-2.0)
    row = backend.template().encode_all(TEXTS[:1])
    before, after = Watch(frozenset({SITES[0]})), Watch(frozenset({SITES[0]}))
    backend.generate(backend.batch(row), 3, compose(before, steering, after))
    for step in (1, 2):
        moved = after.seen[SITES[0], step] - before.seen[SITES[0], step]
        assert float(moved.norm()) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_prepared_starts_pass_through(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    steering = _steering(backend)
    rows = backend.template().encode_all(TEXTS)
    plain = log_odds(backend, rows, TOKENS, steering)
    torch.testing.assert_close(
        log_odds(backend, backend.prepare(rows, 2), TOKENS, _steering(backend)), plain, atol=1e-4, rtol=0
    )
    shift = torch.zeros(backend.d_model, requires_grad=True)

    class Shift:
        sites, pointwise = frozenset({Site(1)}), True

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            return x + shift

    backend.logits(backend.batch(rows), compose(Shift(), _steering(backend)), grad=True).sum().backward()
    assert shift.grad is not None and float(shift.grad.norm()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_decides_ahead_sees_the_unedited_model(kind: Kind) -> None:
    """Called once per run, before any hook is set, also inside a composition: a pass in it is a bare one."""
    backend = tiny_backend("llama", kind)
    rows = backend.template().encode_all(TEXTS)
    bare = last_states(backend, rows, SITES)
    seen = []

    class Ahead:
        sites, pointwise = frozenset({Site(1)}), True

        def decide_ahead(self, batch: Batch, memory: dict) -> None:  # type: ignore[type-arg]
            seen.append(last_states(backend, batch.rows, SITES))

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            return x + 3

    with_edit = compose(Ahead(), add({Site(2): torch.ones(backend.d_model)}, {Site(2): 5.0}))
    backend.generate(backend.batch(rows), 3, with_edit)
    backend.run(backend.batch(rows), with_edit)
    assert len(seen) == 2
    for states in seen:
        for site in SITES:
            torch.testing.assert_close(states[site], bare[site], atol=1e-5, rtol=0)


def test_edits_around_it_pass_the_question_on_and_one_that_does_not_is_told() -> None:
    """In the prompt pass, an edit of the prompt alone is the edit."""
    backend = tiny_backend("llama")
    rows, steering = backend.template().encode_all(TEXTS), _steering(backend)
    odds = [log_odds(backend, rows, TOKENS, edit) for edit in (steering, OnPrompt(steering))]
    torch.testing.assert_close(odds[0], odds[1], atol=1e-5, rtol=0)

    class Silent:
        sites, pointwise = steering.sites, False

        def __call__(self, x: torch.Tensor, at: At) -> torch.Tensor:
            return steering(x, at)

    with pytest.raises(UserError, match="not decided; give SteerBySign to a backend itself"):
        log_odds(backend, rows, TOKENS, Silent())


# -- the logit lens ----------------------------------------------------------------------------------------------------


def test_the_lens_is_the_models_own_norm_and_unembedding() -> None:
    backend = tiny_backend("llama")
    vectors = normal(70, backend.d_model)  # more than one batch
    model = backend.model
    with torch.inference_mode():
        states = (vectors / vectors.norm(dim=1, keepdim=True) * backend.d_model**0.5).float()
        expected = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(lens_logits(backend, vectors), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_works_on_every_family_and_length_does_not_matter(family: str) -> None:
    backend = tiny_backend(family)
    vectors = normal(3, backend.d_model)
    logits = lens_logits(backend, vectors)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-2
    torch.testing.assert_close(lens_logits(backend, 1e-4 * vectors), logits, atol=1e-4, rtol=1e-4)
    if family in ("llama", "gpt2", "gemma3"):
        torch.testing.assert_close(
            lens_logits(tiny_backend(family, "transformerlens"), vectors), logits, atol=1e-3, rtol=1e-3
        )


def test_a_planted_refusal_direction_is_anchored_and_random_ones_are_not() -> None:
    backend = tiny_backend("llama")
    w, gain = backend.model.lm_head.weight.detach().double(), backend.model.model.norm.weight.detach().double()
    planted = (w[list(TOKENS)].mean(0) - w.mean(0)) * gain
    directions = {Site(1): planted, Site(2): -planted} | {Site(10 + i): normal(32, seed=i) for i in range(40)}
    found = anchors(backend, directions, TOKENS, k=5)
    assert found[Site(1)].anchored and found[Site(1)].p <= 0.01
    assert set(found[Site(1)].openers) <= {backend.tokenizer.decode([i]) for i in TOKENS}
    assert not found[Site(2)].anchored and found[Site(2)].p > 0.5
    assert sum(found[Site(10 + i)].anchored for i in range(40)) <= 6
    with pytest.raises(UserError, match="nonzero length"):
        lens_logits(backend, torch.zeros(1, backend.d_model))


# -- the method --------------------------------------------------------------------------------------------------------


def test_directions_point_to_the_harmful_and_every_benign_set_counts_the_same() -> None:
    harmful, few, many = ({SITES[0]: normal(n, 6, seed=n) + shift} for n, shift in ((30, 2.0), (5, 0.0), (50, -1.0)))
    v = scans_directions(harmful, [few, many], SITES[:1])[SITES[0]]
    expected = harmful[SITES[0]].mean(0) - (few[SITES[0]].mean(0) + many[SITES[0]].mean(0)) / 2
    torch.testing.assert_close(v, expected / expected.norm(), rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="same mean"):
        scans_directions(harmful, [harmful], SITES[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_method_steers_block_outputs_at_its_depth_by_a_relative_dose(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    assert isinstance(Scans(), Method)
    data = material(backend)
    fitted = Scans(opening=OPENING).fit(data)
    assert sorted(fitted.directions) == [Site(2), Site(3)]  # outputs of blocks 1 and 2 of 4
    assert sorted(fitted.gate.reference) == [Site(2), Site(3), Site(4)]  # to the last block
    rows = data.template.encode_all(data.select["harmful"].texts + data.select["political"].texts)
    nothing = fitted(0.0).edit
    base = log_odds(backend, rows, TOKENS)
    torch.testing.assert_close(log_odds(backend, rows, TOKENS, nothing), base, rtol=0, atol=1e-5)
    treated = fitted(0.1)
    assert treated.edit is not None and treated.system is None
    moved = _changes(backend, treated.edit, rows, Site(2))
    batch = backend.batch(rows)
    suffix = batch.mask & (batch.positions >= batch.span_end("instruction")[:, None])
    lengths = moved[suffix].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1 * fitted.norms[Site(2)]), rtol=1e-3, atol=0)
    along = (moved[:, -1].double() @ fitted.directions[Site(2)]).sign().long()
    assert torch.equal(along, fitted.gate.signs(rows))


def test_a_threshold_from_the_fit_split_parts_the_sets_of_select() -> None:
    backend = tiny_backend("llama")
    data = material(backend)
    fitted = Scans(opening=OPENING).fit(data)
    rows = [data.template.encode_all(data.select[name].texts) for name in ("harmful", "general")]
    curve = roc(*(fitted.gate.similarity(r) for r in rows))
    assert curve.area.value > 0.9 > curve.null[1]
    shares = [(fitted.gate.signs(r) > 0).double().mean() for r in rows]
    assert float(shares[0] - shares[1]) > 0.5
    assert Scans(opening=OPENING, threshold=0.75).fit(data).gate.threshold == 0.75


def test_layers_by_the_lens() -> None:
    """The tiny model's directions say nothing about refusal unless the tokens are those that they do write."""
    backend = tiny_backend("llama")
    data = material(backend)
    benign = [data.fit[name].states for name in data.ordinary]
    v = scans_directions(data.fit["harmful"].states, benign, [Site(3)])[Site(3)]
    order = lens_logits(backend, v[None])[0].argsort()
    says = replace(data, refusal_tokens=tuple(order[-3:].tolist()))
    assert Site(3) in Scans(opening=OPENING, layers="lens").fit(says).directions
    everything = {
        site: scans_directions(data.fit["harmful"].states, benign, [site])[site] for site in map(Site, range(1, 5))
    }
    bottom = lens_logits(backend, torch.stack(list(everything.values()))).amax(0).argsort()[:1]
    with pytest.raises(UserError, match="layers='depth'"):
        Scans(opening=OPENING, layers="lens").fit(replace(data, refusal_tokens=tuple(bottom.tolist())))
