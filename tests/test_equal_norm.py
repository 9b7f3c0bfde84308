"""The null of an edit is of equal dose: at every state, between sites and in the sum, alone and beside others, while decoding too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.each import Each, repeated
from rsteer_interp.backends.edits import Around, At, Compose, Edit, Site
from rsteer_interp.equal_norm import Rotated, rotated_edits, turned_edits
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.gates import Gate, Gated
from rsteer_interp.interventions import Affine, AtPositions, Everywhere, ablate, add, set_component
from rsteer_interp.methods.alphasteer import LastTokenShift, LinearGate
from rsteer_interp.methods.cast import KeepNorm
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.reproduction.finder import NULL_DRAWS, null_edits
from rsteer_interp.soft_prompt import SoftPrompt
from tests.pushes import Spy, equal_dose, pushes
from tests.test_vector_formats import some
from tests.tiny_models import D_MODEL, KINDS, Kind, answered_rows, draw, tiny_backend, tiny_rows

SITES = (Site(1), Site(1, "attn_out"), Site(2), Site(2, "mlp_out"), Site(3))
PUSHED = dict(zip(SITES, (draw(5, D_MODEL, seed=1) + draw(1, D_MODEL, seed=2)).float(), strict=True))
AMOUNTS = {site: 1.0 + site.layer for site in SITES}
GATE = Gate(Site(1), draw(D_MODEL, seed=3), 3.0)  # open for four of the six prompts


@dataclass(frozen=True, eq=False)
class Bent:
    """An edit that keeps to no direction and no subspace."""

    sites = frozenset({Site(1), Site(3)})
    pointwise = True

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return x - torch.tanh(x @ draw(D_MODEL, D_MODEL, seed=4).to(x)) / 5


EDITS: dict[str, Callable[[], Edit]] = {
    "ablation": partial(ablate, PUSHED),
    "ablation of one direction": partial(ablate, dict.fromkeys(SITES, PUSHED[Site(1)])),
    "addition": partial(add, PUSHED, AMOUNTS),
    "reposition": partial(set_component, PUSHED, PUSHED, AMOUNTS),
    "affine": lambda: Everywhere({s: Affine(s, v, 0.5, v, 2.0) for s, v in PUSHED.items()}),
    "kept norm": lambda: KeepNorm(add(PUSHED, AMOUNTS)),
    "no subspace": Bent,
    "spans": lambda: AtPositions(ablate(PUSHED)),
    "gated": lambda: Gated(ablate(PUSHED), GATE),
    "gate behind an edit": lambda: Compose(
        (
            add({Site(0): PUSHED[Site(1)]}, {Site(0): 9.0}),
            Gated(ablate(PUSHED), replace(GATE, threshold=-0.45)),  # read of what the first edit left: three hold
        )
    ),
    "last token": lambda: LastTokenShift(Site(1), LinearGate(draw(D_MODEL, seed=5), 0.0), {Site(2): PUSHED[Site(2)]}),
    "last token, prefix too": lambda: LastTokenShift(
        Site(1), LinearGate(draw(D_MODEL, seed=5), 0.0), {s: PUSHED[s] for s in (Site(1), Site(2))}, prefix=True
    ),
    "soft prompt": lambda: SoftPrompt(torch.tensor([1, 3]), PUSHED[Site(1)][None].repeat(2, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EDITS)
def test_a_null_is_of_equal_dose_at_every_state_and_in_the_sum(name: str, kind: Kind) -> None:
    backend, edit = tiny_backend("llama", kind), EDITS[name]()
    rows = tiny_rows(backend)
    nulls = rotated_edits(edit, backend.run, D_MODEL, 2, seed=0)
    own, *found = pushes(backend, rows, edit, *nulls)
    assert all(equal_dose(own, null) for null in found)
    turned = torch.cat([torch.cat(list(x.values())) for x in found])
    assert float((turned[: len(turned) // 2] - turned[len(turned) // 2 :]).norm() / turned.norm()) > 0.5
    # One row alone, which shares no prefix, given answers, and all of it as settings of one batch.
    for part in (rows[:1], answered_rows(backend)):
        alone, null = pushes(backend, part, edit, nulls[0])
        assert equal_dose(alone, null)
    spies = [Spy(each) for each in (edit, *nulls)]
    batch = backend.batch(repeated(rows, 4))
    backend.run(batch, Each((None, *spies)))
    for spy, apart in zip(spies, (own, *found), strict=True):
        for site, delta in spy.pushes(rows).items():
            torch.testing.assert_close(delta, apart[site], atol=2e-4, rtol=2e-4)


def test_rotations_drawn_for_each_site_by_itself_are_caught() -> None:
    """The fault: as large at every state and site, and another push in the sum."""
    backend = tiny_backend("llama")
    rows, edit = tiny_rows(backend), add(PUSHED, AMOUNTS)

    @dataclass(frozen=True, eq=False)
    class PerSite(Around):
        def __call__(self, x: Tensor, at: At) -> Tensor:
            nulls = rotated_edits(edit, backend.run, D_MODEL, len(SITES), seed=0)
            q = nulls[SITES.index(at.site)].images
            return x + (self.edit(x, at) - x) @ q

    own, apart, null = pushes(backend, rows, edit, PerSite(edit), *rotated_edits(edit, backend.run, D_MODEL, 1, seed=0))
    for site in SITES:
        torch.testing.assert_close(apart[site].norm(dim=-1), own[site].norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert equal_dose(own, null) and not equal_dose(own, apart)
    summed = {name: float(sum(x.values())[0].norm()) for name, x in (("own", own), ("apart", apart))}  # type: ignore[arg-type]
    assert summed["own"] > 1.2 * summed["apart"]


def test_a_push_of_the_state_met_would_dose_more_than_an_ablation() -> None:
    """Why the edit is run by itself: what a rotated ablation leaves in the stream, the next site would take again."""
    backend = tiny_backend("llama")
    rows, edit = tiny_rows(backend), EDITS["ablation of one direction"]()
    (null,) = rotated_edits(edit, backend.run, D_MODEL, 1, seed=0)

    @dataclass(frozen=True, eq=False)
    class OfTheStateMet(Around):
        def __call__(self, x: Tensor, at: At) -> Tensor:
            return x + (self.edit(x, at) - x) @ null.images

    own, met = pushes(backend, rows, edit, OfTheStateMet(edit))
    assert not equal_dose(own, met)
    assert float(met[Site(3)].norm(dim=-1).mean()) > 1.2 * float(own[Site(3)].norm(dim=-1).mean())


def test_what_a_null_does_does_not_depend_on_what_was_run_before() -> None:
    """The fault: sizes kept by the address of a batch, which another batch may have later."""
    backend = tiny_backend("llama")
    rows, edit = tiny_rows(backend), ablate(PUSHED)
    fresh = partial(rotated_edits, edit, backend.run, D_MODEL, 2, 0)
    wanted = [log_odds_of_each(backend, part, (5, 7), fresh()) for part in (rows[:3], rows[3:])]
    nulls = fresh()
    for part, odds in [*zip((rows[:3], rows[3:]), wanted, strict=True)] * 2:
        assert torch.equal(log_odds_of_each(backend, part, (5, 7), nulls), odds)
    prepared = backend.prepare(rows[:3], 1)
    torch.testing.assert_close(log_odds_of_each(backend, prepared, (5, 7), nulls), wanted[0], atol=1e-4, rtol=1e-4)


def test_the_edit_is_run_once_for_all_its_nulls() -> None:
    backend = tiny_backend("llama")
    rows, nulls = tiny_rows(backend), rotated_edits(ablate(PUSHED), backend.run, D_MODEL, 5, 0)
    before = backend.prompts_run
    log_odds_of_each(backend, backend.prepare(rows, 0), (5,), nulls)
    assert backend.prompts_run - before == len(rows) * 6


@pytest.mark.parametrize("kind", KINDS)
def test_gates_decide_in_a_null_as_in_the_edit_and_hold_while_decoding(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    rows = tiny_rows(backend)
    edit = EDITS["gate behind an edit"]()
    closed = Gated(add(PUSHED, AMOUNTS), GATE)
    opened = pushes(backend, rows, closed)[0][Site(2)].norm(dim=-1).split([len(r.ids) for r in rows])
    held = torch.tensor([float(x.max()) > 0 for x in opened])
    assert bool(held.any()) and not bool(held.all())
    (null,) = rotated_edits(closed, backend.run, D_MODEL, 1, seed=0)
    plain, moved = (backend.generate(backend.batch(rows), 6, each).ids for each in (None, null))
    same = (plain == moved).all(1)
    assert bool(same[~held].all()) and not bool(same[held].any())
    # Beside others, and beside another gate's edit of the same prompts.
    nulls = [null, *rotated_edits(edit, backend.run, D_MODEL, 2, seed=1)]
    together = backend.generate(backend.batch(repeated(rows, 4)), 6, Each((None, *nulls))).ids.split(len(rows))
    for found, each in zip(together, (None, *nulls), strict=True):
        assert torch.equal(found, backend.generate(backend.batch(rows), 6, each).ids)


def _silent(backend: Backend) -> Backend:
    """Blocks that write nothing: the stream is the embedding and what edits add."""
    for block in backend.blocks:  # type: ignore[attr-defined]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    return backend


@pytest.mark.parametrize("name", ["ablation", "ablation of one direction", "addition", "reposition", "no subspace"])
def test_while_decoding_a_null_is_of_equal_dose_exactly_where_blocks_add_nothing_of_their_own(name: str) -> None:
    backend, edit = _silent(tiny_backend("llama")), EDITS[name]()
    rows = tiny_rows(backend)
    (null,) = rotated_edits(edit, backend.run, D_MODEL, 1, seed=0)
    spy = Spy(null)
    replies = backend.generate(backend.batch(rows), 4, spy)
    assert int(replies.lengths.min()) > 1 and spy.decoded
    # The edit itself on the same text: the null's replies as given answers.
    texts = [
        replace(r, ids=(*r.ids, *ids[:n]))
        for r, ids, n in zip(rows, replies.ids.tolist(), replies.lengths, strict=True)
    ]
    own = Spy(edit)
    log_odds(backend, texts, (5,), own)
    steps = [spy.decoded[i : i + len(edit.sites)] for i in range(0, len(spy.decoded), len(edit.sites))]
    for step, found in enumerate(steps):
        alive = [t for t, n in zip(texts, replies.lengths.tolist(), strict=True) if n > step + 1]
        wanted = {s: torch.stack([own.seen[t.ids, s, t.prompt + step] for t in alive]) for s in sorted(edit.sites)}
        assert equal_dose(wanted, dict(found))


def test_while_decoding_an_ablations_null_does_not_take_away_again_what_it_left() -> None:
    """Of blocks that do write: about the ablation's own dose on the same text, where the state met alone gives far more."""
    backend, edit = tiny_backend("llama"), EDITS["ablation of one direction"]()
    rows = tiny_rows(backend)
    ratios = []
    for null in rotated_edits(edit, backend.run, D_MODEL, 6, seed=0):
        spy, own = Spy(null), Spy(edit)
        replies = backend.generate(backend.batch(rows), 5, spy)
        texts = [replace(r, ids=(*r.ids, *ids)) for r, ids in zip(rows, replies.ids.tolist(), strict=True)]
        log_odds(backend, texts, (5,), own)
        alive = int(replies.lengths.min()) - 1
        found = sum(float(delta.norm(dim=-1).mean()) for _, delta in spy.decoded[: alive * len(SITES)])
        wanted = sum(
            float(torch.stack([own.seen[t.ids, s, t.prompt + i] for t in texts]).norm(dim=-1).mean())
            for i in range(alive)
            for s in SITES
        )
        ratios.append(found / wanted)
    assert all(0.7 < r < 1.3 for r in ratios), ratios


def test_edits_along_known_vectors_are_turned_towards_targets() -> None:
    backend = tiny_backend("llama")
    rows, edit = tiny_rows(backend), ablate(PUSHED)
    vectors = torch.stack(list(PUSHED.values()))
    targets = [random_unit_vectors(len(SITES), D_MODEL, seed) for seed in range(2)]
    nulls = turned_edits(edit, backend.run, vectors, targets)
    own, *found = pushes(backend, rows, edit, *nulls)
    for null, target in zip(found, targets, strict=True):
        assert equal_dose(own, null)
        across = torch.cat(list(null.values()))
        span = torch.linalg.qr(target.T)[0]
        assert float((across - across @ span @ span.T).norm() / across.norm()) < 1e-4
    # One vector for all sites lands on its target, and on nothing else.
    r, u = random_unit_vectors(2, D_MODEL, 7)
    (null,) = turned_edits(ablate(dict.fromkeys(SITES, r.float())), backend.run, r[None], [u[None]])
    (moved,) = pushes(backend, rows, null)
    for delta in moved.values():
        torch.testing.assert_close(delta, (delta @ u)[:, None] * u, atol=1e-5, rtol=0)


def test_what_cannot_be_turned_is_said() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)

    @dataclass(frozen=True, eq=False)
    class Heads:
        sites = frozenset({Site(1, "z")})
        pointwise = True

        def __call__(self, x: Tensor, at: Any) -> Tensor:
            return 0 * x

    with pytest.raises(UserError, match="heads' outputs"):
        rotated_edits(Heads(), backend.run, D_MODEL, 1, 0)
    (null,) = rotated_edits(ablate(PUSHED), backend.run, D_MODEL, 1, 0)
    assert isinstance(null, Rotated)
    with pytest.raises(UserError, match="to a backend itself"):
        log_odds(backend, rows, (5,), AtPositions(null))


@pytest.mark.parametrize("reposition", [False, True])
def test_the_finders_null_is_of_equal_dose_in_the_sum_for_either_update(reposition: bool) -> None:
    backend = tiny_backend("llama")
    steering = replace(some(sites=(Site(1), Site(2), Site(3))), reposition=reposition)
    agreeing = torch.nn.functional.normalize(steering.directions + 2 * steering.directions.mean(0), dim=1)
    steering = replace(steering, directions=agreeing)
    context: Any = SimpleNamespace(backend=backend, seed=0)
    edit = steering.edit()
    assert edit is not None
    nulls = null_edits(context, edit)
    assert len(nulls) == NULL_DRAWS >= 19  # a p of 0.05 can be reached
    own, *found = pushes(backend, tiny_rows(backend), edit, *nulls[:3])  # type: ignore[list-item]
    assert all(equal_dose(own, null) for null in found)
    assert null_edits(context, None) == [None] * NULL_DRAWS
