"""Gates: each prompt decides for itself, once, on its own tokens; what holds for nobody changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import norm

from rsteer_interp.activations import instruction_means, last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site, compose, rowwise
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, log_odds
from rsteer_interp.gates import Gate, Gated, balanced_threshold, discriminant, roc
from rsteer_interp.interventions import AtPositions, OnPrompt, add
from rsteer_interp.methods.alphasteer import LastTokenShift, LinearGate
from rsteer_interp.moments import Moments
from rsteer_interp.pooling import POOLINGS, Pooling
from rsteer_interp.results import Provenance
from rsteer_interp.steering import load_steering, make_steering
from tests.tiny_models import FAMILIES, KINDS, Kind, tiny_backend

TEXTS = ["tell me about the city", "why is the river in the city ?", "write", "what can you tell me ?"]
TOKENS = (5, 9, 30)
SITE = Site(1)


def _edit(backend: Backend) -> AtPositions:
    """What a gated edit does where its gate holds: everything but the template prefix."""
    generator = torch.Generator().manual_seed(0)
    vectors = {Site(x): torch.randn(backend.d_model, generator=generator) for x in (1, 2)}
    return AtPositions(add(vectors, dict.fromkeys(vectors, 3.0)), frozenset({"instruction", "suffix", "generated"}))


def _halving(backend: Backend, pooling: Pooling) -> tuple[Gate, torch.Tensor]:
    """A gate that holds for some of TEXTS, and for which."""
    rows = backend.template().encode_all(TEXTS)
    read = last_states if pooling == "last" else instruction_means
    states = read(backend, rows, [SITE])[SITE]
    w = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(3))
    middle = (states.double() @ w.double()).sort().values[1:3].mean()
    gate = Gate(SITE, w, float(middle), "projection", pooling)
    held = gate.holds(states)
    assert int(held.sum()) == 2
    return gate, held


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_rows_decide_for_themselves(family: str, kind: Kind, pooling: Pooling) -> None:
    """Where the gate holds, the edit; elsewhere the base, in the prompt pass and while decoding."""
    backend = tiny_backend(family, kind)
    rows, edit = backend.template().encode_all(TEXTS), _edit(backend)
    gate, held = _halving(backend, pooling)
    gated = Gated(edit.edit, gate)
    base, edited, got = (log_odds(backend, rows, TOKENS, e) for e in (None, edit, gated))
    assert float((edited - base).abs().min()) > 1e-3
    torch.testing.assert_close(got, torch.where(held, edited, base), atol=1e-4, rtol=0)
    batch = backend.batch(rows)
    replies = [backend.generate(batch, 5, e).ids for e in (None, edit, gated)]
    assert not torch.equal(replies[0][held], replies[1][held])
    assert torch.equal(replies[2], torch.where(held[:, None], replies[1], replies[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_and_earlier_runs_do_not_matter(family: str) -> None:
    backend = tiny_backend(family)
    rows = backend.template().encode_all(TEXTS)
    gate, _ = _halving(backend, "instruction")
    gated = Gated(_edit(backend).edit, gate)
    together = log_odds(backend, rows, TOKENS, gated)
    alone = torch.cat([log_odds(backend, [row], TOKENS, gated) for row in rows])
    backwards = log_odds(backend, rows[::-1], TOKENS, gated).flip(0)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(backwards, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_given_answer_has_no_say(pooling: Pooling) -> None:
    """The last token of prompt and answer is not the last of the prompt: a gate that read it would decide otherwise."""
    backend = tiny_backend("llama")
    gate, held = _halving(backend, pooling)
    gated = Gated(_edit(backend).edit, gate)
    for answer in ("yes", "i can tell you about the river ."):
        rows = backend.template().encode_all(TEXTS, [answer] * len(TEXTS))
        moved = answer_effects(backend, rows, gated).kl > 1e-9
        assert torch.equal(moved, held)


def test_a_prepared_start_changes_nothing() -> None:
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    for pooling in POOLINGS:
        gated = Gated(_edit(backend).edit, _halving(backend, pooling)[0])
        plain = log_odds(backend, rows, TOKENS, gated)
        torch.testing.assert_close(log_odds(backend, backend.prepare(rows, 1), TOKENS, gated), plain, atol=1e-4, rtol=0)


def test_sharing_the_prefix_is_exact_and_stops_where_the_template_does() -> None:
    """All prompts begin alike: the words that they share are edited, so they may not be shared in a prefix's cache."""
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(["tell me about the city", "tell me about the river", "tell me about you"])
    always = Gate(SITE, torch.ones(backend.d_model), -1e9)
    gated, edit = Gated(_edit(backend).edit, always), _edit(backend)
    apart = torch.cat([log_odds(backend, [row], TOKENS, edit) for row in rows])
    for one in (gated, edit, compose(edit, None)):
        torch.testing.assert_close(log_odds(backend, rows, TOKENS, one), apart, atol=1e-4, rtol=0)
    batch = backend.batch(rows)
    assert batch.shared_prefix > rows[0].prefix
    assert backend._shared_width(batch, gated, 1) == rows[0].prefix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["gated", "positions", "shift", "each"])
def test_rows_of_other_lengths_run_their_prompt_apart_and_decode_together(what: str, kind: Kind) -> None:
    """Replies are those of every row alone; what a gate decided in the parts is found again by the rows of the whole."""
    backend = tiny_backend("llama", kind)
    texts = [text + " and the river" * n for n in (30, 0, 12) for text in TEXTS]
    rows = backend.template().encode_all(texts)
    edit = _edit(backend)
    states = last_states(backend, rows, [SITE])[SITE]
    w = torch.randn(backend.d_model, generator=torch.Generator().manual_seed(3))
    gate = Gate(SITE, w, float((states @ w).double().sort().values[5:7].mean()))
    gated = Gated(edit.edit, gate)
    shift = LastTokenShift(SITE, LinearGate(w.double() / 10, 0.0), dict.fromkeys((Site(1), Site(2)), 3 * w))
    one: Edit | None = {"gated": gated, "positions": edit, "shift": shift, "each": compose(gated, shift)}[what]
    assert one is not None and not one.pointwise and rowwise(one)
    assert len(backend.groups(rows, len(rows))) > 1
    together = backend.generate(backend.batch(rows), 5, one).ids
    alone = torch.cat([backend.generate(backend.batch([row]), 5, one).ids for row in rows])
    assert torch.equal(together, alone)
    assert not torch.equal(together, backend.generate(backend.batch(rows), 5).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_prompt_alone(kind: Kind) -> None:
    """The first token is that of the edit; decoding steps run without it."""
    backend = tiny_backend("llama", kind)
    rows = backend.template().encode_all(TEXTS)
    edit = _edit(backend).edit
    batch = backend.batch(rows)
    torch.testing.assert_close(
        log_odds(backend, rows, TOKENS, OnPrompt(edit)), log_odds(backend, rows, TOKENS, edit), atol=1e-4, rtol=0
    )
    seen = []

    class Watch:
        sites, pointwise = frozenset({Site(1), Site(2)}), True

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            out = edit(x, at)
            seen.append(at.phase)
            return out

    backend.generate(batch, 4, OnPrompt(Watch()))
    assert set(seen) == {"prefix", "prompt"}
    full, prompt = (backend.generate(batch, 6, e).ids for e in (edit, OnPrompt(edit)))
    assert torch.equal(full[:, 0], prompt[:, 0]) and not torch.equal(full, prompt)


def test_a_gate_after_its_edit_is_refused() -> None:
    backend = tiny_backend("llama")
    with pytest.raises(UserError, match=r"reads blocks\.3.*after the first edit"):
        Gated(_edit(backend).edit, Gate(Site(3), torch.ones(backend.d_model), 0.0))


def test_cosine_is_blind_to_sign_and_length_and_flipping_a_projection_gives_the_complement() -> None:
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 8), (8,)))
    cosine = Gate(SITE, w, 0.3, "cosine")
    assert torch.equal(cosine.holds(h), Gate(SITE, -5 * w, 0.3, "cosine").holds(h))
    torch.testing.assert_close(cosine.scores(h), torch.nn.functional.cosine_similarity(h, w[None]).abs().double())
    assert torch.equal(Gate(SITE, w, 0.2).holds(h), ~Gate(SITE, -w, -0.2).holds(h))


def test_the_instruction_mean_leaves_out_template_and_padding() -> None:
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(TEXTS)
    got = instruction_means(backend, rows, [SITE])[SITE]
    for row, mean in zip(rows, got, strict=True):
        seen = []

        class Record:
            sites, pointwise = frozenset({SITE}), False

            def __call__(self, x, at):  # type: ignore[no-untyped-def]
                seen.append(x[0])  # noqa: B023
                return x

        backend.run(backend.batch([row]), Record())
        torch.testing.assert_close(seen[0][row.prefix : row.instruction].mean(0), mean, atol=1e-4, rtol=0)


def test_the_discriminant_recovers_a_planted_one_and_not_what_tells_one_side_apart() -> None:
    """h = +-2 u + noise; the two outside sets differ along z by far more. n > d and n < d."""
    generator = torch.Generator().manual_seed(0)
    d = 40
    u, z = torch.eye(d, dtype=torch.float64)[:2]

    def draw(n: int, mean: torch.Tensor) -> Moments:
        return Moments.of(mean + torch.randn(n, d, generator=generator, dtype=torch.float64))

    for n in (15, 2000):
        inside, *outside = draw(n, 2 * u), draw(n, -2 * u + 9 * z), draw(n, -2 * u - 9 * z)
        w = discriminant([inside], outside)
        assert float(w @ u / w.norm()) > (0.6 if n < d else 0.99)
        assert abs(float(w @ z)) < 0.1 * float(w @ u)
        spread = sum((m.scatter for m in outside), inside.scatter).dense / (3 * n)
        assert float(w @ spread @ w) == pytest.approx(1.0)


def test_the_threshold_has_the_smallest_worst_expected_error() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        inside = 2 * torch.randn(30, generator=generator).double() + 3
        outside = {
            "a": torch.randn(20, generator=generator).double(),
            "b": 3 * torch.randn(50, generator=generator).double() - 2,
        }

        def worst(t: float, inside: torch.Tensor = inside, outside: dict[str, torch.Tensor] = outside) -> float:
            misses = norm.cdf(t, inside.mean(), inside.std())
            return max(misses, *(norm.sf(t, s.mean(), s.std()) for s in outside.values()))

        found = worst(balanced_threshold(inside, outside))
        assert found <= min(map(worst, torch.linspace(-6, 8, 3000).tolist())) + 1e-9
    constant = balanced_threshold(torch.tensor([2.0, 2.0]), {"a": torch.tensor([0.0, 0.0])})
    assert constant == 1.0
    with pytest.raises(UserError, match="two scores or more of 'a', there are 1"):
        balanced_threshold(torch.randn(3), {"a": torch.zeros(1)})


def test_one_odd_prompt_hardly_moves_the_threshold() -> None:
    """Between sets far apart, the most extreme prompt would decide alone if errors were counted."""
    generator = torch.Generator().manual_seed(4)
    inside, outside = torch.randn(25, generator=generator) + 10, torch.randn(200, generator=generator)
    odd = torch.cat([outside, torch.tensor([6.0])])
    assert abs(balanced_threshold(inside, {"a": odd}) - balanced_threshold(inside, {"a": outside})) < 0.5


def test_roc_and_its_null() -> None:
    generator = torch.Generator().manual_seed(2)
    far = roc(torch.randn(60, generator=generator) + 4, torch.randn(80, generator=generator), n_draws=200)
    near = roc(torch.randn(60, generator=generator), torch.randn(80, generator=generator), n_draws=200)
    assert far.area.low > 0.95 > far.null[1] and far.null[0] < 0.5 < far.null[1]
    assert near.null[0] < near.area.value < near.null[1]
    assert far.false_rate[0] == far.true_rate[0] == 0 and far.false_rate[-1] == far.true_rate[-1] == 1
    assert list(far.thresholds) == sorted(far.thresholds, reverse=True)


def test_a_gated_configuration_comes_back_from_disk(tmp_path: Path) -> None:
    backend = tiny_backend("llama")
    gate, _ = _halving(backend, "instruction")
    g = torch.Generator().manual_seed(0)
    vectors = {Site(x): torch.randn(backend.d_model, generator=g) for x in (1, 2)}
    zero = dict.fromkeys(vectors, torch.zeros(backend.d_model))
    steering = make_steering(
        "md", vectors, zero, dict.fromkeys(vectors, (2.0, 2.0)), list(vectors), alpha=-1.0, reposition=False, gate=gate,
        while_decoding=False,
    )  # fmt: skip
    steering.save(tmp_path / "one", Provenance.collect(backend))
    back = load_steering(tmp_path / "one", backend, other_model=True)
    assert back.gate is not None and not back.while_decoding
    fields = ("site", "threshold", "score", "pooling")
    assert [getattr(back.gate, f) for f in fields] == [getattr(gate, f) for f in fields]
    batch = backend.batch(backend.template().encode_all(TEXTS))
    assert torch.equal(backend.generate(batch, 5, steering.edit()).ids, backend.generate(batch, 5, back.edit()).ids)
