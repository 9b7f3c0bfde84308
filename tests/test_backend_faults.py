"""Faults seeded on purpose: the contract, or the self-check at load, must fail under each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rsteer_interp.backends import base
from rsteer_interp.backends import each as each_module
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.each import Each
from rsteer_interp.backends.edits import At, Compose, Site
from rsteer_interp.backends.self_check import self_check
from rsteer_interp.errors import UserError
from tests import backend_contract as contract
from tests.tiny_models import KINDS, Kind, tiny_backend, tiny_model

Patch = pytest.MonkeyPatch
Fault = Callable[[Any, Patch], None]


def _change_forward(backend: Any, patch: Patch, **changes: Callable[..., Any]) -> None:
    """Call the backend's primitive with some arguments replaced."""
    forward = backend._forward

    def changed(ids: Any, mask: Any, positions: Any, **options: Any) -> Any:
        given = {"ids": ids, "mask": mask, "positions": positions, **options}
        given |= {name: change(given[name]) for name, change in changes.items()}
        return forward(given.pop("ids"), given.pop("mask"), given.pop("positions"), **given)

    patch.setattr(backend, "_forward", changed)


def positions_start_at_zero(backend: Any, patch: Patch) -> None:
    """Positions count columns, padding too, as transformers does without position ids."""
    _change_forward(backend, patch, positions=lambda p: torch.arange(p.shape[1]).expand_as(p))


def mask_is_all_ones(backend: Any, patch: Patch) -> None:
    _change_forward(backend, patch, mask=torch.ones_like)


def off_by_one_layer(backend: Any, patch: Patch) -> None:
    def later(site: Site) -> Site:
        return replace(site, layer=min(site.layer + 1, backend.n_layers - (site.point != "resid_pre")))

    _change_forward(backend, patch, hooks=lambda hooks: {later(site): function for site, function in hooks.items()})


def hook_is_left_behind(backend: Any, patch: Patch) -> None:
    if backend.name == "hooks":
        install = backend._install
        patch.setattr(backend, "_install", lambda *args: install(*args) and SimpleNamespace(remove=lambda: None))
    else:
        run = backend.bridge.run_with_hooks
        patch.setattr(
            backend.bridge, "run_with_hooks", lambda *args, **options: run(*args, **options, reset_hooks_end=False)
        )


def right_padding(backend: Any, patch: Patch) -> None:
    batch_of = backend.batch

    def flipped(rows: Any) -> Any:
        batch = batch_of(rows)
        order = (~batch.mask).long().argsort(dim=-1, stable=True)  # real tokens first
        moved = {name: getattr(batch, name).gather(-1, order) for name in ("ids", "mask", "positions")}
        return replace(batch, **moved, shared_prefix=0)

    patch.setattr(backend, "batch", flipped)


def _drop_hooks(phase: str) -> Fault:
    def fault(backend: Any, patch: Patch) -> None:
        hooks = base._Run.hooks
        patch.setattr(base._Run, "hooks", lambda run, now, *args: {} if now == phase else hooks(run, now, *args))

    fault.__name__ = f"no_edit_in_the_{phase}_phase"
    return fault


def position_stands_still_while_decoding(backend: Any, patch: Patch) -> None:
    start: list[torch.Tensor] = []

    def still(positions: torch.Tensor) -> torch.Tensor:
        if positions.shape[1] > 1:
            start[:] = []
            return positions
        start.append(positions)
        return start[0][:1].expand_as(positions) if len(start) > 1 else positions

    _change_forward(backend, patch, positions=still)


def composition_is_reversed(backend: Any, patch: Patch) -> None:
    call = Compose.__call__
    patch.setattr(Compose, "__call__", lambda self, x, at: call(Compose(self.edits[::-1]), x, at))


def random_numbers_go_by_place(backend: Any, patch: Patch) -> None:
    def by_place(batch: Any, sampling: Any, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sampling.seed)
        return torch.rand(len(batch) * sampling.n, steps, generator=generator)

    patch.setattr(base, "uniform_numbers", by_place)


def prefix_is_shared_where_it_must_not_be(backend: Any, patch: Patch) -> None:
    patch.setattr(type(backend), "can_share_prefix", True)


def prefix_is_that_of_the_first_setting(backend: Any, patch: Patch) -> None:
    """A prefix is run once for all settings, with the first one's edit."""
    call = Each.__call__

    def first(each: Each, x: torch.Tensor, at: At) -> torch.Tensor:
        out = call(each, x, at)
        return out[:1].expand_as(out) if at.phase == "prefix" else out

    patch.setattr(Each, "__call__", first)


def gates_of_all_settings_share_what_they_know(backend: Any, patch: Patch) -> None:
    keep = each_module._keep
    patch.setattr(each_module, "_keep", lambda memory, setting, *args: [keep(memory, s, *args) for s in range(6)])


def rows_that_have_ended_are_not_told_to_the_edit(backend: Any, patch: Patch) -> None:
    """While decoding, current row i is taken for row i of the batch."""
    call = Each.__call__
    patch.setattr(Each, "__call__", lambda each, x, at: call(each, x, replace(at, rows=torch.arange(len(at.rows)))))


FAULTS: dict[Fault, tuple[str, set[str]]] = {
    # fault: family to show it on, and contract checks that must each fail
    positions_start_at_zero: ("gpt2", {"padding_does_not_matter", "generation_is_one_pass_per_token"}),
    mask_is_all_ones: ("llama", {"padding_does_not_matter"}),
    off_by_one_layer: ("llama", {"an_edit_acts_at_its_site_and_after_it", "states_are_those_of_transformers"}),
    hook_is_left_behind: ("llama", {"hooks_are_gone_afterwards"}),
    right_padding: ("llama", {"padding_does_not_matter", "generation_is_that_of_transformers"}),
    _drop_hooks("decode"): ("llama", {"generation_is_one_pass_per_token", "each_token_is_edited_once"}),
    _drop_hooks("prefix"): ("llama", {"shared_prefix_is_exact", "each_token_is_edited_once"}),
    position_stands_still_while_decoding: ("gpt2", {"generation_is_one_pass_per_token"}),
    composition_is_reversed: ("llama", {"edits_compose_in_order"}),
    random_numbers_go_by_place: ("llama", {"sampling_depends_on_the_prompt_alone"}),
    prefix_is_that_of_the_first_setting: ("llama", {"settings_share_a_batch"}),
    gates_of_all_settings_share_what_they_know: ("llama", {"settings_share_a_batch"}),
    rows_that_have_ended_are_not_told_to_the_edit: ("llama", {"settings_share_a_batch"}),
    prefix_is_shared_where_it_must_not_be: ("mistral_window", {"padding_does_not_matter"}),
}
SELF_CHECK_SEES = {
    off_by_one_layer: "out of place|is not|is never passed|fires twice",
    hook_is_left_behind: "leaves hooks behind|fires twice|reading changes",
}


def _failing(backend: Backend, family: str, names: set[str]) -> set[str]:
    failed = set()
    for name in names:
        check: Any = getattr(contract, f"check_{name}")
        try:
            check(backend, tiny_model(family)) if check in contract.REFERENCE_CHECKS else check(backend)
        except (AssertionError, UserError, KeyError):
            failed.add(name)
    return failed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_contract_sees_the_fault(fault: Fault, kind: Kind, monkeypatch: Patch) -> None:
    family, names = FAULTS[fault]
    backend = tiny_backend(family, kind)
    fault(backend, monkeypatch)
    assert _failing(backend, family, names) == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", SELF_CHECK_SEES, ids=lambda fault: fault.__name__)
def test_the_self_check_sees_the_fault(fault: Fault, kind: Kind, monkeypatch: Patch) -> None:
    backend = tiny_backend("llama", kind)
    fault(backend, monkeypatch)
    with pytest.raises(UserError, match=SELF_CHECK_SEES[fault]) as caught:
        self_check(backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_ignores_its_mask_is_run_one_prompt_at_a_time(kind: Kind, monkeypatch: Patch) -> None:
    backend = tiny_backend("llama", kind)
    mask_is_all_ones(backend, monkeypatch)
    self_check(backend)
    assert backend.batch_size == 1
    assert any("padding changes" in note for note in backend.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_are_refused(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    next(backend.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        self_check(backend)


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_that_is_not_added_to_the_stream_is_withdrawn(kind: Kind, monkeypatch: Patch) -> None:
    """The layer norm's output instead of the attention's, as on a family where a name means another tensor."""
    backend: Any = tiny_backend("llama", kind)
    site = Site(1, "attn_out")
    if kind == "hooks":
        pair = backend._writers[1]
        backend._writers[1] = (backend.blocks[1].input_layernorm, pair[1])
    else:
        backend._hooks[site] = "blocks.1.ln1.hook_out"
    self_check(backend)
    assert backend.sites & {site, Site(1, "mlp_out")} == set()
    assert Site(2, "attn_out") in backend.sites
    assert any(str(site) in note and "not offered" in note for note in backend.notes)
