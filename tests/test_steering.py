"""Saved steering configurations: the edit they make, the dose they state, and what they refuse to be applied to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.results import Provenance
from rsteer_interp.steering import load_steering, make_steering
from tests.tiny_models import tiny_backend, tiny_rows

SITES = [Site(1), Site(2)]


def _steering(alpha: float, reposition: bool, fingerprint: str = ""):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    directions = {s: 5 * torch.randn(32, generator=g) for s in SITES}
    references = {s: torch.randn(32, generator=g) for s in SITES}
    scales = {Site(1): (2.0, 3.0), Site(2): (0.5, 0.25)}
    return make_steering(
        "md",
        directions,
        references,
        scales,
        SITES,
        alpha=alpha,
        reposition=reposition,
        refusal_tokens=[3],
        fingerprint=fingerprint,
    )


def test_scale_follows_the_sign_of_alpha() -> None:
    assert _steering(-0.5, False).amounts == {Site(1): -1.5, Site(2): -0.125}
    assert _steering(0.5, False).amounts == {Site(1): 1.0, Site(2): 0.25}


def test_no_dose_is_no_edit_but_repositioning_to_the_mean_is_one() -> None:
    assert _steering(0.0, False).edit() is None
    assert _steering(0.0, True).edit() is not None


@pytest.mark.parametrize("reposition", [False, True])
def test_stated_dose_is_what_the_first_site_really_moves(reposition: bool) -> None:
    """At the first edited site nothing upstream has changed, so |edit| / |resid| can be measured from outside."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    full = _steering(-0.5, reposition)
    states = last_states(backend, rows, SITES)
    edited = last_states(backend, rows, SITES, full.edit())
    measured = (edited[Site(1)] - states[Site(1)]).norm(dim=-1) / states[Site(1)].norm(dim=-1)
    only_first = make_steering(
        "md",
        {Site(1): full.directions[0]},
        {Site(1): full.references[0]},
        {Site(1): (2.0, 3.0)},
        [Site(1)],
        alpha=-0.5,
        reposition=reposition,
    )
    assert only_first.dose(states) == pytest.approx(float(measured.mean()), rel=1e-5)


def test_round_trip_and_wrong_models(tmp_path: Path) -> None:
    backend = tiny_backend("llama")
    backend.fingerprint = "ours"
    steering = _steering(-0.25, True, "ours")
    steering.save(tmp_path / "s", Provenance.collect(backend))
    read = load_steering(tmp_path / "s", backend)
    assert read.sites == steering.sites
    assert read.amounts == steering.amounts
    assert torch.equal(read.directions, steering.directions)
    assert torch.equal(read.references, steering.references)
    rows = tiny_rows(backend)
    a = last_states(backend, rows, [Site(4)], steering.edit())[Site(4)]
    torch.testing.assert_close(a, last_states(backend, rows, [Site(4)], read.edit())[Site(4)])
    backend.fingerprint = "another"
    with pytest.raises(UserError, match="another model"):
        load_steering(tmp_path / "s", backend)
    assert load_steering(tmp_path / "s", backend, other_model=True).k == 2
    backend.d_model = 64
    with pytest.raises(UserError, match="width"):
        load_steering(tmp_path / "s", backend, other_model=True)


def test_states_that_are_not_finite_are_refused() -> None:
    backend = tiny_backend("llama")
    with torch.no_grad():
        backend.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        last_states(backend, tiny_rows(backend), SITES)


def test_mean_norms_do_not_depend_on_how_prompts_are_batched() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    together = mean_norms(backend, rows, SITES)
    backend.batch_size = 1
    alone = mean_norms(backend, rows, SITES)
    for site in SITES:
        assert together[site] == pytest.approx(alone[site], rel=1e-5)
