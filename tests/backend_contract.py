"""What every backend owes on every model, as functions that take a fresh backend and assert.

`test_backend_contract` runs them over families and backends, `test_backend_faults` over backends with a seeded fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.each import Each, repeated, stacked
from rsteer_interp.backends.edits import At, Edit, Site, compose
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.batch import Tokens
from rsteer_interp.conditions import Not
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate, Gated
from rsteer_interp.interventions import AtPositions, ablate, add
from tests.tiny_models import tiny_rows

TOLERANCE = 1e-5  # relative, float32
ROUNDS_MORE = {"qwen3_next": 5.0}  # linear attention normalises head outputs that can be tiny, and rounding with them
Check = Callable[[Backend], None]


# -- edits for tests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """Keeps a copy of every state by site, row and position id, and counts how often each was passed."""

    sites: frozenset[Site]
    pointwise: bool = True
    states: dict[tuple[Site, int, int], Tensor] = field(default_factory=dict)
    times: Counter[tuple[Site, int, int]] = field(default_factory=Counter)
    steps: dict[tuple[Site, int, int], tuple[str, int]] = field(default_factory=dict)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        # A prefix that all rows share is run once, on one row, which stands for all of them.
        rows = range(len(at.batch)) if at.phase == "prefix" else at.rows.tolist()
        for i, row in enumerate(rows):
            own = 0 if at.phase == "prefix" else i
            for column in at.mask[own].nonzero()[:, 0].tolist():
                key = (at.site, row, int(at.positions[own, column]))
                self.states[key] = x[own, column].clone()
                self.times[key] += 1
                self.steps[key] = (at.phase, at.step)
        return x


@dataclass(frozen=True)
class Call:
    """A function of x as an edit at one site."""

    site: Site
    function: Callable[[Tensor], Tensor]
    pointwise: bool = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return self.function(x)


def vector(seed: int, d: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed))


def strong_edit(backend: Backend) -> Edit:
    """An addition, an ablation on two layers and an addition to the suffix and the reply: it changes the reply."""
    d, last = backend.d_model, backend.n_layers - 1
    parts = (
        add({Site(1): vector(1, d)}, {Site(1): 4.0}),
        ablate({Site(2): vector(2, d), Site(last): vector(2, d)}),
        AtPositions(add({Site(0, "resid_post"): vector(3, d)}, {Site(0, "resid_post"): 3.0})),
    )
    edit = compose(*parts)
    assert edit is not None
    return edit


def far(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| / |a| over vectors; infinite where either is not finite."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    off = ((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-12)).max()
    return float(off) if bool(torch.isfinite(a).all() and torch.isfinite(b).all()) else float("inf")


def equal(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    assert far(a, b) <= tolerance, f"relative difference {far(a, b):.1e}"


def hook_count(backend: Backend) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backend.model.modules())


@contextmanager
def unshared(backend: Any) -> Iterator[None]:
    """The backend without prefix sharing."""
    before = backend.can_share_prefix
    backend._full_attention = False
    try:
        yield
    finally:
        backend._full_attention = before


def extended(row: Tokens, ids: Sequence[int]) -> Tokens:
    return Tokens(row.ids + tuple(ids), row.prefix, row.instruction, row.prompt)


# -- the contract -----------------------------------------------------------------------------------------------------


def check_states_are_those_of_transformers(backend: Backend, reference: Any) -> None:
    """The stream is the bare model's hidden states and the logits are its logits, prompt by prompt."""
    rows = tiny_rows(backend)
    tolerance = TOLERANCE * ROUNDS_MORE.get(backend.model.config.model_type, 1.0)
    record = Record(frozenset(Site(layer) for layer in range(backend.n_layers + 1)))
    logits = backend.logits(backend.batch(rows), record)[:, -1]
    for i, row in enumerate(rows):
        with torch.no_grad():
            out = reference(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)
        equal(out.logits[0, -1:], logits[i : i + 1], tolerance)
        for layer in range(backend.n_layers):  # the last hidden state of transformers is behind the final norm
            ours = torch.stack([record.states[Site(layer), i, position] for position in range(len(row.ids))])
            equal(out.hidden_states[layer][0], ours, tolerance)


def check_padding_does_not_matter(backend: Backend) -> None:
    """Stream and logits of a prompt are the same alone and beside longer ones, with a shared prefix and without."""
    rows = tiny_rows(backend)
    tolerance = TOLERANCE * ROUNDS_MORE.get(backend.model.config.model_type, 1.0)
    together = Record(backend.sites)
    logits = backend.logits(backend.batch(rows), together)
    for i, row in enumerate(rows):
        alone = Record(backend.sites)
        equal(backend.logits(backend.batch([row]), alone)[0], logits[i], tolerance)
        for site in backend.sites:
            stream = [Site(site.layer)] if site.point in ("attn_out", "mlp_out") else [site]
            for position in range(len(row.ids)):
                a, b = alone.states[site, 0, position], together.states[site, i, position]
                size = max(float(a.norm()), float(alone.states[stream[0], 0, position].norm()))
                assert float((a - b).norm()) <= tolerance * size, f"{site}, row {i}, position {position}"


def check_shared_prefix_is_exact(backend: Backend) -> None:
    """Logits, states and replies with a shared prefix are those without; or the notes say why it is not shared."""
    rows, edit = tiny_rows(backend), None
    batch = backend.batch(rows)
    assert batch.shared_prefix >= 4
    record = Record(backend.sites)
    backend.logits(batch, record)
    shares = "prefix" in {phase for phase, _ in record.steps.values()}
    assert shares == backend.can_share_prefix
    if not shares:
        assert any("template prefix not shared" in note for note in backend.notes)
        return
    d = backend.d_model
    for edit in (None, compose(add({Site(1): vector(1, d)}, {Site(1): 4.0}), ablate({Site(2): vector(2, d)}))):
        logits, replies = backend.logits(batch, edit), backend.generate(batch, 6, edit)
        with unshared(backend):
            equal(backend.logits(batch, edit), logits)
            assert torch.equal(backend.generate(batch, 6, edit).ids, replies.ids)


def check_an_edit_acts_at_its_site_and_after_it(backend: Backend) -> None:
    """At every site: earlier sites are untouched, the stream after it changes, and so do the logits."""
    batch = backend.batch(tiny_rows(backend)[:2])
    before = Record(backend.sites, pointwise=False)
    plain = backend.logits(batch, before)
    for site in sorted(backend.sites):
        after = Record(backend.sites, pointwise=False)
        push = Call(site, lambda x: x + 3 * vector(7, x.shape[-1]), pointwise=False)
        logits = backend.logits(batch, compose(push, after))
        assert far(plain[:, -1], logits[:, -1]) > 1e-3, f"{site} has no effect"
        for (other, row, position), state in before.states.items():
            change = far(state[None], after.states[other, row, position][None])
            if other.order < site.order:
                assert change <= 1e-6, f"an edit at {site} changes {other} by {change:.1e}"
            elif other.point in ("resid_pre", "resid_post") and other >= site:
                assert change > 1e-4, f"an edit at {site} leaves {other} as it was"


def check_reading_is_a_no_op(backend: Backend) -> None:
    batch = backend.batch(tiny_rows(backend))
    plain, replies = backend.logits(batch), backend.generate(batch, 4)
    for pointwise in (True, False):
        record = Record(backend.sites, pointwise)
        equal(backend.logits(batch, record), plain)
        assert torch.equal(backend.generate(batch, 4, Record(backend.sites, pointwise)).ids, replies.ids)


def check_the_writers_add_up(backend: Backend) -> None:
    """resid_pre + attn_out + mlp_out = resid_post, and resid_post of a block = resid_pre of the next."""
    record = Record(backend.sites, pointwise=False)
    backend.logits(backend.batch(tiny_rows(backend)[:3]), record)
    keys = {(row, position) for _, row, position in record.states}
    for layer in range(backend.n_layers):
        for key in keys:
            parts = [record.states[(Site(layer, p), *key)] for p in ("resid_pre", "attn_out", "mlp_out")]
            post = record.states[(Site(layer, "resid_post"), *key)]
            equal(post[None], sum(parts)[None])  # type: ignore[index]
            assert torch.equal(post, record.states[(Site(layer + 1), *key)])


def check_hooks_are_gone_afterwards(backend: Backend) -> None:
    """After a run, after an edit that raises, and after one that is refused, nothing of it is left."""
    batch = backend.batch(tiny_rows(backend))
    plain, hooks = backend.logits(batch), hook_count(backend)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    pushes = compose(Call(Site(0), lambda x: x + 1), Call(Site(2), fail))
    assert pushes is not None
    for run in (
        lambda: backend.logits(batch, pushes),
        lambda: backend.generate(batch, 2, pushes),
        lambda: backend.run(batch, pushes),
    ):
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
    with pytest.raises(UserError, match=r"hook_resid_pre returned shape"):
        backend.logits(batch, Call(Site(1), lambda x: x[:, :1]))
    with pytest.raises(UserError, match="has no site"):
        backend.logits(batch, Call(Site(backend.n_layers + 1), lambda x: x))
    backend.run(batch, Record(frozenset({Site(2)})))
    backend.logits(batch, strong_edit(backend))
    assert hook_count(backend) == hooks
    assert torch.equal(backend.logits(batch), plain)


def check_a_run_stops_after_the_last_site(backend: Backend) -> None:
    blocks = backend.bridge.blocks if backend.name == "transformerlens" else backend.blocks  # type: ignore[attr-defined]
    batch = backend.batch(tiny_rows(backend))
    for site in sorted(site for site in backend.sites if site.order < (backend.n_layers - 1, 0)):
        ran: list[int] = []
        handles = [b.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i)) for i, b in enumerate(blocks)]
        record = Record(frozenset({site}), pointwise=False)
        backend.run(batch, record)
        for handle in handles:
            handle.remove()
        assert record.states, f"{site} was not reached"
        assert max(ran, default=0) <= site.layer, f"block {max(ran)} ran for {site}"


def check_each_token_is_edited_once(backend: Backend) -> None:
    """Over prompt and decoding every token of every row passes every site once, at its position and step."""
    rows = tiny_rows(backend)
    backend.stop_ids = frozenset(range(0, 200, 9))  # so that rows end at different steps
    for pointwise in (True, False):
        record = Record(backend.sites, pointwise)
        replies = backend.generate(backend.batch(rows), 6, record)
        assert set(record.times.values()) == {1}
        expected = {
            (site, i, position)
            for site in backend.sites
            for i, row in enumerate(rows)
            for position in range(len(row.ids) + int(replies.lengths[i]) - 1)  # the last token is not run
        }
        assert set(record.times) == expected
        for (_, i, position), (phase, step) in record.steps.items():
            n = len(rows[i].ids)
            assert (phase, step) == (("decode", position - n + 1) if position >= n else (phase, 0))
            assert phase != "decode" or position >= n


def check_generation_is_that_of_transformers(backend: Backend, reference: Any) -> None:
    batch = backend.batch(tiny_rows(backend))
    replies = backend.generate(batch, 8)
    with torch.no_grad():
        full = reference.generate(batch.ids, attention_mask=batch.mask.long(), max_new_tokens=8, do_sample=False)
    for i, length in enumerate(replies.lengths.tolist()):
        assert full[i, batch.ids.shape[1] :][:length].tolist() == replies.ids[i, :length].tolist()


def check_generation_is_one_pass_per_token(backend: Backend) -> None:
    """Under an edit, the reply and its log-probs are those of running everything again for every token."""
    rows = tiny_rows(backend)[:4]
    edit = strong_edit(backend)
    for some_edit in (edit, ablate({Site(layer): vector(layer, backend.d_model) for layer in range(backend.n_layers)})):
        replies = backend.generate(backend.batch(rows), 5, some_edit)
        for i, row in enumerate(rows):
            ids: list[int] = []
            for step in range(int(replies.lengths[i])):
                logits = backend.logits(backend.batch([extended(row, ids)]), some_edit)[0, -1]
                ids.append(int(logits.argmax()))
                log_prob = float(logits.log_softmax(-1)[ids[-1]])
                assert log_prob == pytest.approx(float(replies.log_probs[i, step]), abs=1e-4)
            assert ids == replies.ids[i, : len(ids)].tolist()
    plain = backend.generate(backend.batch(rows), 5)
    assert not torch.equal(plain.ids, backend.generate(backend.batch(rows), 5, edit).ids), "the edit does nothing"


def check_sampling_depends_on_the_prompt_alone(backend: Backend) -> None:
    """Replies are the same whatever the batch and the order, differ among themselves, and repeat with the seed."""
    rows = tiny_rows(backend)
    backend.stop_ids = frozenset(range(0, 200, 15))
    sampling = Sampling(n=3, temperature=1.5, seed=5)

    def replies(order: list[int], batch_size: int, sampling: Sampling = sampling) -> list[list[int]]:
        found: dict[int, list[list[int]]] = {}
        chosen = [rows[i] for i in order]
        for group, out in backend.batches(chosen, lambda b: backend.generate(b, 6, sampling=sampling), batch_size):
            for place, i in enumerate(group):
                block = slice(place * sampling.n, (place + 1) * sampling.n)
                found[order[i]] = [ids[:n].tolist() for ids, n in zip(out.ids[block], out.lengths[block], strict=True)]
        return [reply for i in sorted(found) for reply in found[i]]

    everything = replies([0, 1, 2, 3, 4, 5], 64)
    assert replies([0, 1, 2, 3, 4, 5], 1) == everything
    assert replies([5, 2, 0, 1, 4, 3], 4) == everything
    assert replies([0, 1, 2, 3, 4, 5], 64, Sampling(n=3, temperature=1.5, seed=6)) != everything
    assert len({tuple(reply) for reply in everything}) > len(rows)


def check_edits_compose_in_order(backend: Backend) -> None:
    """The later edit sees the earlier one's result, also where two names mean one place."""
    batch = backend.batch(tiny_rows(backend))
    d, here, same = backend.d_model, Site(2), Site(1, "resid_post")
    v = vector(4, d)
    unit = v / v.norm()
    push, remove = add({here: v}, {here: 5.0}), ablate({here: v})
    for first, second, left in ((push, remove, 0.0), (remove, push, 5.0)):
        record = Record(frozenset({here}))
        backend.run(batch, compose(first, second, record))  # type: ignore[arg-type]
        for state in record.states.values():
            assert float(state @ unit) == pytest.approx(left, abs=1e-4)
    early = add({same: v}, {same: 5.0})  # resid_post of block 1 comes before resid_pre of block 2
    for order in ((early, remove), (remove, early)):
        equal(backend.logits(batch, remove), backend.logits(batch, compose(*order)))


def check_resid_post_is_the_next_resid_pre(backend: Backend) -> None:
    batch = backend.batch(tiny_rows(backend))
    for layer in range(backend.n_layers):
        post, pre = Site(layer, "resid_post"), Site(layer + 1)
        a, b = (add({site: vector(9, backend.d_model)}, {site: 3.0}) for site in (post, pre))
        assert torch.equal(backend.logits(batch, a), backend.logits(batch, b))
        assert torch.equal(backend.generate(batch, 3, a).ids, backend.generate(batch, 3, b).ids)


def settings_for(backend: Backend) -> list[Edit | None]:
    """No edit, one that shares a prefix, one of suffix and reply, and gates that hold for some prompts, the same edit twice."""
    d, early = backend.d_model, Site(1)
    record = Record(frozenset({early}), pointwise=False)
    rows = tiny_rows(backend)
    backend.run(backend.batch(rows), record)
    read = (
        torch.stack([record.states[early, i, len(row.ids) - 1] for i, row in enumerate(rows)]).double()
        @ vector(5, d).double()
    )
    condition = Gate(early, vector(5, d), float(read.quantile(0.5)))
    push = add({Site(2): vector(6, d)}, {Site(2): 6.0})
    gated = Gated(push, condition)
    return [
        None,
        strong_edit(backend),
        add({early: vector(1, d)}, {early: 4.0}),
        gated,
        Gated(push, Not(condition)),
        gated,
        Gated(push, condition, first_pass=False),
    ]


def check_settings_share_a_batch(backend: Backend) -> None:
    """Many settings as rows of one batch give what each gives alone: logits, replies of different lengths, sampled ones."""
    rows, edits = tiny_rows(backend), settings_for(backend)
    tolerance = TOLERANCE * ROUNDS_MORE.get(backend.model.config.model_type, 1.0)
    backend.stop_ids = frozenset(range(0, 200, 9))  # so that rows end at different steps
    shuffled = torch.randperm(len(edits) * len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for chosen in (edits[:3], edits):  # those that share more than the template's prefix, and all
        every, edit = repeated(rows, len(chosen)), Each(tuple(chosen))
        order = [i for i in shuffled if i < len(every)]
        mixed = backend.batch([every[i] for i in order])
        made = stacked(backend.batch(rows), len(chosen))
        alone = [backend.logits(backend.batch(rows), each) for each in chosen]
        for each, logits in zip(chosen[1:], alone[1:], strict=True):
            acts = not isinstance(each, Gated) or each.first_pass
            assert (far(alone[0], logits) > 1e-3) == acts, f"{each} on the prompt"
        equal(torch.stack(alone).flatten(0, 1), backend.logits(made, edit), tolerance)
        equal(torch.stack(alone).flatten(0, 1)[order], backend.logits(mixed, edit), tolerance)
        for sampling in (None, Sampling(n=2, temperature=1.5, seed=3)):
            n = sampling.n if sampling else 1
            apart = [backend.generate(backend.batch(rows), 6, each, sampling) for each in chosen]
            lengths = torch.cat([replies.lengths for replies in apart]).view(-1, n)
            assert len(set(lengths.flatten().tolist())) > 1
            ids = torch.cat([replies.ids for replies in apart]).view(-1, n, 6)
            for batch, places in ((made, list(range(len(every)))), (mixed, order)):
                found = backend.generate(batch, 6, edit, sampling)
                assert torch.equal(found.lengths, lengths[places].flatten())
                assert torch.equal(found.ids, ids[places].flatten(0, 1))


CHECKS: tuple[Check, ...] = (
    check_settings_share_a_batch,
    check_padding_does_not_matter,
    check_shared_prefix_is_exact,
    check_an_edit_acts_at_its_site_and_after_it,
    check_reading_is_a_no_op,
    check_the_writers_add_up,
    check_hooks_are_gone_afterwards,
    check_a_run_stops_after_the_last_site,
    check_each_token_is_edited_once,
    check_generation_is_one_pass_per_token,
    check_sampling_depends_on_the_prompt_alone,
    check_edits_compose_in_order,
    check_resid_post_is_the_next_resid_pre,
)
REFERENCE_CHECKS: tuple[Callable[[Backend, Any], None], ...] = (
    check_states_are_those_of_transformers,
    check_generation_is_that_of_transformers,
)
