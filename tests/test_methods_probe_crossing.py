"""What a vector does to harm: per-token KL of given answers, and crossings of a held-out probe beside their prediction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import add
from rsteer_interp.methods import probe_crossing
from rsteer_interp.methods.probe_crossing import crossings, first_token_kl, harm_probe, token_kl
from rsteer_interp.statistics.rotation import rotations
from tests.pushes import equal_dose, pushes
from tests.tiny_models import KINDS, Kind, answered_rows, draw, tiny_backend, tiny_rows

# -- KL of the first tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_zero_without_a_dose_and_grows_as_its_square(kind: Kind) -> None:
    backend = tiny_backend("llama", kind)
    rows, v = answered_rows(backend), draw(32, seed=1)
    doses = torch.tensor([0.0, 0.02, 0.04, 0.08])
    kl = token_kl(backend, rows, [add({Site(2): v}, {Site(2): float(dose)}) for dose in doses], 4)
    # Zero but for the rounding of float32 log-probabilities: no norm is taken of the amount.
    assert float(kl[0].nan_to_num().abs().max()) == 0
    means = kl[1:].flatten(1).nanmean(1)
    slopes = (means[1:] / means[:-1]).log() / math.log(2)
    assert slopes.tolist() == pytest.approx([2, 2], abs=0.1)
    assert float(means[0]) > 1e-7


def test_the_profile_follows_each_answer_to_its_end() -> None:
    """Token by token against runs of one row each, and its mean against the whole answer's."""
    backend = tiny_backend("gemma3")
    rows, v = answered_rows(backend), draw(32, seed=2)
    edit: Edit = add({Site(1): v, Site(2): v}, {Site(1): 2.0, Site(2): -1.0})
    kl = token_kl(backend, rows, [edit], 5)[0]
    lengths = [min(5, row.answer_length) for row in rows]
    assert (~kl.isnan()).sum(1).tolist() == lengths
    for i, row in enumerate(rows):
        alone = token_kl(backend, [row], [edit], 5)[0, 0]
        torch.testing.assert_close(kl[i], alone, atol=1e-4, rtol=1e-3, equal_nan=True)
        base, after = (
            backend.logits(backend.batch([row]), e, keep=row.answer_length + 1)[0].double().log_softmax(-1)
            for e in (None, edit)
        )
        by_hand = (base.exp() * (base - after)).sum(-1)[: lengths[i]]
        torch.testing.assert_close(kl[i, : lengths[i]], by_hand, atol=1e-4, rtol=1e-3)
    whole = token_kl(backend, rows, [edit], 20)[0].nanmean(1)
    torch.testing.assert_close(whole, answer_effects(backend, rows, edit).kl, atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="no answer to follow"):
        token_kl(backend, tiny_rows(backend), [edit])


def test_the_profile_has_intervals_its_n_and_a_null() -> None:
    backend = tiny_backend("llama")
    rows, v = answered_rows(backend), draw(32, seed=3)
    found = first_token_kl(backend, rows, {Site(2): v}, {Site(2): 1.5}, 6, n_null=3, seed=4)
    longest = sorted((row.answer_length for row in rows), reverse=True)
    assert [x.n for x in found.steered] == [sum(n > t for n in longest) for t in range(len(found.steered))]
    assert found.steered[-1].n >= 2 and len(found.null) == len(found.steered)
    assert all(x.low <= x.value <= x.high for x in found.steered)
    nulls = [add(turned, {Site(2): 1.5}) for turned in rotations({Site(2): v}, 3, 4)]
    assert found.null[0] == pytest.approx(float(token_kl(backend, rows, nulls, 6)[:, :, 0].mean()), rel=1e-4)
    assert first_token_kl(backend, rows, {Site(2): v}, {Site(2): 1.5}, 2, n_null=0).null == ()


# -- crossings of the probe ----------------------------------------------------------------------------------------


def _probes(backend: Backend, *layers: int) -> list[Gate]:
    """Probes for which every prompt but one starts on the harmful side."""
    probes = []
    for layer in layers:
        w = draw(32, seed=layer)
        scores = Gate(Site(layer), w, 0.0).scores(last_states(backend, tiny_rows(backend), [Site(layer)])[Site(layer)])
        probes.append(Gate(Site(layer), w, float(scores.sort().values[:2].mean())))
    return probes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_margin_shifts_as_predicted_at_the_edited_site(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind)
    rows, v = tiny_rows(backend), 3 * draw(32, seed=9)
    here, behind = crossings(backend, rows, _probes(backend, 2, 4), {Site(2): v}, {Site(2): -4.0}, n_null=3)
    w = draw(32, seed=2)
    assert here.exact and here.predicted_shift == pytest.approx(-4.0 * float(w @ v / v.norm()), abs=1e-9)
    scale = float(last_states(backend, rows, [Site(2)])[Site(2)].abs().max() * w.norm())
    assert here.largest_error < 1e-5 * scale
    assert here.observed == here.predicted and here.observed.n == len(rows) - 1
    assert not behind.exact and behind.largest_error > 0.05  # later blocks do not pass the change on unaltered
    assert behind.predicted_shift == pytest.approx(-4.0 * float(draw(32, seed=4) @ v / v.norm()), abs=1e-9)


def test_a_probe_at_the_wrong_site_is_refused_or_does_not_fit() -> None:
    backend = tiny_backend("llama")
    rows, v = tiny_rows(backend), draw(32, seed=9)
    early, _, late = _probes(backend, 1, 2, 3)
    with pytest.raises(UserError, match=r"reads blocks\.1.*before the first edit"):
        crossings(backend, rows, [early], {Site(2): v}, {Site(2): 4.0})
    wrong = replace(late, direction=draw(32, seed=2), threshold=-1e9)
    assert crossings(backend, rows, [wrong], {Site(2): v}, {Site(2): 4.0}, n_null=0)[0].largest_error > 0.05
    with pytest.raises(UserError, match="none of 6 prompts is on the harmful side"):
        crossings(backend, rows, [replace(late, threshold=1e9)], {Site(2): v}, {Site(2): 4.0}, n_null=0)


def test_the_shares_are_counted_among_the_harmful_side_beside_their_null() -> None:
    """An edit against the probe's own direction takes all prompts across, most random ones of its size do not."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    (probe,) = _probes(backend, 2)
    before = probe.scores(last_states(backend, rows, [Site(2)])[Site(2)]) - probe.threshold
    amount = -1.05 * float(before.max() / probe.direction.norm())
    found = crossings(backend, rows, [probe], {Site(2): probe.direction}, {Site(2): amount}, n_null=30)[0]
    assert found.observed.rate == found.predicted.rate == 1 and found.observed.n == 5
    assert sum(found.null) / 30 < 0.9 and len(found.null) == 30 and found.p < 0.5
    half = 0.5 * float(before.sort().values[2:4].sum() / probe.direction.norm())
    part = crossings(backend, rows, [probe], {Site(2): probe.direction}, {Site(2): -half}, n_null=0)[0]
    assert part.observed.count == part.predicted.count == 2
    towards = crossings(backend, rows, [probe], {Site(2): probe.direction}, {Site(2): half}, n_null=0)[0]
    assert towards.observed.count == 0


def test_a_band_is_predicted_from_the_sites_up_to_the_probe() -> None:
    backend = tiny_backend("llama")
    rows, u, v = tiny_rows(backend), draw(32, seed=1), draw(32, seed=2)
    directions, amounts = {Site(1): u, Site(3): v}, {Site(1): 1.0, Site(3): -2.0}
    first, middle, last = crossings(backend, rows, _probes(backend, 1, 2, 4), directions, amounts, n_null=0)
    unit_u, unit_v = u / u.norm(), v / v.norm()
    assert [first.exact, middle.exact, last.exact] == [True, False, False]
    assert first.predicted_shift == pytest.approx(float(draw(32, seed=1) @ unit_u))
    assert middle.predicted_shift == pytest.approx(float(draw(32, seed=2) @ unit_u))
    assert last.predicted_shift == pytest.approx(float(draw(32, seed=4) @ (unit_u - 2 * unit_v)))


def test_the_probe_knows_prompts_it_was_not_fitted_on() -> None:
    """With fewer prompts than dimensions the fitted ones are all on their side; held-out ones set an honest threshold."""
    g = draw(100, seed=1)
    g = 6 * g / g.norm()

    def states(n: int, seed: int, harmful: bool) -> Tensor:
        return draw(n, 100, seed=seed) + harmful * g + 5

    probe = harm_probe(Site(2), states(30, 1, True), states(30, 2, False), states(30, 3, True), states(30, 4, False))
    hits = torch.cat([probe.holds(states(200, 5, True)), ~probe.holds(states(200, 6, False))])
    assert float(hits.double().mean()) > 0.9
    assert float(probe.direction @ g) > 0
    swapped = harm_probe(Site(2), states(30, 2, False), states(30, 1, True), states(30, 4, False), states(30, 3, True))
    torch.testing.assert_close(swapped.direction, -probe.direction)


def test_the_null_of_a_band_pushes_as_far_in_the_sum_as_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that half agree: neither as one direction for all sites would, nor as one for each by itself."""
    backend, asked = tiny_backend("llama"), list[Edit]()
    monkeypatch.setattr(probe_crossing, "last_states", lambda *a: asked.append(a[3]) or last_states(*a))
    rows, v = tiny_rows(backend), draw(4, 32, seed=3)
    directions = {Site(1): v[0], Site(2): v[0] + v[1], Site(3): v[1] + v[2]}
    amounts = {Site(1): 1.0, Site(2): -2.0, Site(3): 3.0}
    crossings(backend, rows, _probes(backend, 4), directions, amounts, n_null=4)
    own, *nulls = pushes(backend, rows, *asked[1:])
    assert len(nulls) == 4 and all(equal_dose(own, null) for null in nulls)
