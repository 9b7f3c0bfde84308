"""Equal-norm nulls: a replay moves every state as far as the edit did, also where an ablation leaves nothing for later sites."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.activations import RecordLast
from rsteer_interp.backends.edits import Compose, Edit, Site
from rsteer_interp.equal_norm import Recorded, Redirected, Replayed
from rsteer_interp.evaluation import log_odds
from rsteer_interp.gates import Gate, Gated
from rsteer_interp.interventions import Affine, Everywhere
from rsteer_interp.nulls import random_unit_vectors
from tests.tiny_models import D_MODEL, tiny_backend, tiny_rows

SITES = (Site(1), Site(1, "attn_out"), Site(2))


def _sizes(backend, rows, edit: Edit) -> dict[Site, torch.Tensor]:
    own = Recorded(edit)
    log_odds(backend, rows, (5,), own)
    return {site: size for (_, site, phase), size in own.sizes.items() if phase == "prompt"}


@pytest.mark.parametrize("kind", ["ablation", "addition", "gated"])
def test_a_replay_moves_every_state_as_far_as_the_edit(kind: str) -> None:
    backend = tiny_backend("llama")
    rows = backend.prepare(tiny_rows(backend), 0)
    units = random_unit_vectors(4, D_MODEL, 0).float()
    kappa, amount = (1.0, 0.0) if kind == "ablation" else (0.0, 3.0)
    edit: Edit = Everywhere({site: Affine(site, units[0], kappa, amount=amount) for site in SITES})
    if kind == "gated":
        edit = Gated(edit, Gate(Site(1), units[3], 0.0))
    own = Recorded(edit)
    log_odds(backend, rows, (5,), own)
    towards = dict(zip(SITES, units[1:], strict=True))
    replayed = Replayed(edit, own.sizes, towards)
    wanted, found = _sizes(backend, rows, edit), _sizes(backend, rows, replayed)
    assert set(found) == set(SITES)
    for site in SITES:
        torch.testing.assert_close(found[site], wanted[site], atol=1e-5, rtol=1e-5)
    if kind == "gated":
        held = wanted[SITES[0]].amax((1, 2)) > 0
        assert bool(held.any()) and not bool(held.all())
    # The unit vectors are the random ones: the first site's state moved along its own.
    plain, moved = RecordLast(frozenset({Site(1)})), RecordLast(frozenset({Site(1)}))
    batch = rows.batches[0][1]
    backend.run(batch, plain)
    backend.run(batch, Compose((replayed, moved)))
    delta = moved.states[Site(1)] - plain.states[Site(1)]
    across = delta - (delta @ towards[Site(1)])[:, None] * towards[Site(1)]
    assert float(across.norm(dim=-1).max()) < 1e-5 and float(delta.norm(dim=-1).max()) > 1e-2


def test_redirecting_an_ablation_doses_more_than_the_ablation() -> None:
    """Why `Replayed` is there: what a push leaves in the stream is taken as the next site's size again."""
    backend = tiny_backend("llama")
    rows = backend.prepare(tiny_rows(backend), 0)
    units = random_unit_vectors(4, D_MODEL, 0).float()
    ablation = Everywhere({site: Affine(site, units[0], 1.0) for site in (Site(1), Site(2))})
    redirected = Redirected(ablation, {Site(1): units[1], Site(2): units[2]})
    own, other = _sizes(backend, rows, ablation), _sizes(backend, rows, redirected)
    assert float(other[Site(2)].mean()) > 1.2 * float(own[Site(2)].mean())
