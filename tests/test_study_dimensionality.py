"""Study of dimensions: planted ranks, nulls that stay null, edits against the plain way. The whole study: test_studies.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import Evidence, RidgeMeanDifference
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import AblateSubspace, Displace, ablate, add
from rsteer_interp.moments import Moments
from rsteer_interp.statistics.rotation import random_frame
from rsteer_interp.studies.dimension_results import Curve, Enough
from rsteer_interp.studies.dimension_runs import Bench, ablation_sweep, control_sweep, push_sweep
from rsteer_interp.studies.dimension_sweep import Base, Swept, smallest_enough, sweep_curves, to_match
from rsteer_interp.studies.dimension_variance import variance
from rsteer_interp.studies.doses import Dosed, RecordShares, mean_doses
from rsteer_interp.studies.log_odds_gradient import log_odds_gradients
from rsteer_interp.studies.subspaces import (
    PENALTIES,
    Groups,
    contrasts,
    families,
    half_overlaps,
    like_states,
    mean_first,
    overlap,
    principal,
    ridge_fits,
    shuffled,
    topics,
)
from rsteer_interp.studies.variance_spectrum import (
    class_spectrum,
    marchenko_pastur_edge,
    noise_level,
    parallel_analysis,
)
from tests.tiny_models import tiny_backend, tiny_rows

TOKENS = (5, 9, 30)
S = Site(2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the edit ----------------------------------------------------------------------------------------------------


def test_ablating_a_subspace_is_an_exact_projection_that_knows_the_span_alone() -> None:
    h, basis = draw(4, 5, 16, seed=1), random_frame(3, 16, 0)
    once = AblateSubspace(S, basis)(h, None)  # type: ignore[arg-type]
    torch.testing.assert_close(once @ basis.T, torch.zeros(4, 5, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(AblateSubspace(S, basis)(once, None), once, atol=1e-12, rtol=0)  # type: ignore[arg-type]
    turned = torch.linalg.qr(draw(3, 3, seed=2)).Q @ basis.flip(0)
    torch.testing.assert_close(AblateSubspace(S, turned)(h, None), once, atol=1e-12, rtol=0)  # type: ignore[arg-type]


def test_one_row_is_directional_ablation_and_another_target_is_its_null_of_equal_norm() -> None:
    h, (v, u) = draw(4, 5, 16, seed=1), random_frame(2, 16, 0)
    one = AblateSubspace(S, v[None])(h, None)  # type: ignore[arg-type]
    torch.testing.assert_close(one, ablate({S: v}).edits[S](h, None), atol=1e-12, rtol=0)  # type: ignore[attr-defined]
    moved = AblateSubspace(S, v[None], u[None])(h.float(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(moved, Displace(S, v, u)(h.float(), None))  # type: ignore[arg-type]
    basis, into = random_frame(6, 16, 3).split(3)
    sizes = [(AblateSubspace(S, basis, t, 0.5)(h, None) - h).norm(dim=-1) for t in (basis, into)]  # type: ignore[arg-type]
    torch.testing.assert_close(sizes[0], sizes[1])
    torch.testing.assert_close(sizes[0], 0.5 * (h @ basis.T).norm(dim=-1))


def test_rows_that_are_not_orthonormal_are_refused() -> None:
    with pytest.raises(UserError, match="not orthonormal"):
        AblateSubspace(S, draw(3, 16))
    with pytest.raises(UserError, match="give equal"):
        AblateSubspace(S, random_frame(3, 16, 0), random_frame(2, 16, 0))


# -- subspaces ---------------------------------------------------------------------------------------------------


def planted(rank: int, noise: float = 0.3, n_subjects: int = 24, d: int = 48, seed: int = 0) -> tuple[Tensor, Groups]:
    """Twelve prompts per subject, half of them refused; refusal moves each subject along its own mixture of `rank` directions
    (the first always), and every subject has a large topic of its own."""
    each = 12
    axes = random_frame(rank, d, seed)
    mix = 6 * draw(n_subjects, rank, seed=seed + 1)
    mix[:, 0] = 12.0
    subject = torch.arange(n_subjects).repeat_interleave(each)
    role = torch.tensor([1, -1] * (n_subjects * each // 2))
    topic = 5 * draw(n_subjects, d, seed=seed + 2)
    states = topic[subject] + noise * draw(len(subject), d, seed=seed + 3)
    states += (role > 0)[:, None] * (mix @ axes)[subject] * 0.5
    return states, Groups(role, subject % 2 == 0, subject, subject // 2)


@pytest.mark.parametrize("rank", [1, 3])
def test_subjects_find_a_planted_rank_and_ignore_topic(rank: int) -> None:
    states, groups = planted(rank)
    found = families(states, groups, 8)["subjects"]
    assert overlap(found[:rank], random_frame(rank, states.shape[1], 0)) > 0.98
    contrast = parallel_analysis(
        lambda role: contrasts(states, role, groups.subject, each=False), groups.role, groups.subject, 200, 0, 8
    )
    assert contrast["beyond"] == rank and contrast["p_first"] < 0.01


def test_shuffled_labels_have_no_dimension_beyond_shuffled_labels() -> None:
    states, groups = planted(2)
    firsts = []
    for seed in range(20):
        role = shuffled(groups.role, groups.subject, 100 + seed)
        found = parallel_analysis(
            lambda r: contrasts(states, r, groups.subject, each=False), role, groups.subject, 60, seed, 4
        )
        firsts.append(found["p_first"])
    assert sum(p <= 0.05 for p in firsts) <= 4


def pure_topic(seed: int) -> tuple[Tensor, Groups]:
    """Sensitive subjects are mostly refused, matched ones mostly answered, and states know the subject alone."""
    g, subject = torch.Generator().manual_seed(seed), torch.arange(26).repeat_interleave(8)
    sensitive = subject % 2 == 0
    rate = (torch.randn(26, generator=g) + torch.where(torch.arange(26) % 2 == 0, 1.0, -1.5)).sigmoid()
    role = (torch.rand(len(subject), generator=g) < rate[subject]).long() * 2 - 1
    states = 3 * torch.randn(26, 24, generator=g)[subject] + torch.randn(len(subject), 24, generator=g)
    states[:, 0] += 20.0 * sensitive
    return states.double(), Groups(role, sensitive, subject, subject // 2)


def test_pure_topic_has_no_dimension_of_refusal() -> None:
    """What is said of differences fires in one of twenty simulations, where shuffles inside pairs of subjects nearly always did."""
    firsts, inside_pairs = [], 0
    for seed in range(40):
        x, groups = pure_topic(seed)

        def subjects(role: Tensor, x: Tensor = x, groups: Groups = groups) -> Tensor:
            return contrasts(x, role, groups.subject, each=False)

        def pairs(role: Tensor, x: Tensor = x, groups: Groups = groups) -> Tensor:
            return contrasts(x, role, groups.pair, each=True)

        firsts.append(parallel_analysis(subjects, groups.role, groups.subject, 99, seed, 2)["p_first"])
        inside_pairs += parallel_analysis(pairs, groups.paired_role, groups.pair, 39, seed, 2)["p_first"] <= 0.05
    assert sum(p <= 0.05 for p in firsts) <= 6 and stats.kstest(firsts, "uniform").pvalue > 0.01
    assert inside_pairs >= 35


def test_the_variance_side_shuffles_inside_subjects_alone() -> None:
    """Of pure topic two halves agree, and with shuffled labels they agree as much; differences of pairs have no spectrum."""
    beyond = 0
    for seed in range(4):
        x, groups = pure_topic(100 + seed)
        found = variance(x, groups, x, groups, (1,), 19, 4, seed)
        assert set(found["contrasts"]) == {"subjects"}
        (row,) = found["halves"]["pairs"]
        assert row["overlap"] > 0.5  # topic is what pairs agree on
        beyond += row["overlap"] > row["null_high"]
    assert beyond <= 1


def test_contrasts_are_the_plain_differences() -> None:
    states, role = draw(6, 4), torch.tensor([1, -1, -1, 1, 1, 0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])  # group 1 has nobody who answered
    middle = states[[1, 2]].mean(0)
    torch.testing.assert_close(contrasts(states, role, group, True), states[[0, 3]] - middle)
    torch.testing.assert_close(contrasts(states, role, group, False), (states[[0, 3]].mean(0) - middle)[None])


def test_paired_roles_are_refused_sensitive_and_answered_matched() -> None:
    zero = torch.zeros(5, dtype=torch.long)
    groups = Groups(torch.tensor([1, -1, 1, -1, 0]), torch.tensor([True, True, False, False, True]), zero, zero)
    assert groups.paired_role.tolist() == [1, 0, 0, -1, 0]


def test_ridge_fits_are_the_estimators_own() -> None:
    states, groups = planted(1, n_subjects=6)
    evidence = Evidence(states, groups.role.double())
    rows = ridge_fits(evidence, groups.pair)
    assert rows.shape == (3 * len(PENALTIES), 48)
    left = evidence.subset(groups.pair != 1)
    for row, penalty in zip(rows[len(PENALTIES) : 2 * len(PENALTIES)], PENALTIES, strict=True):
        sigma = left.complying.scatter / left.complying.weight
        wanted = RidgeMeanDifference(penalty=penalty * sigma.trace / sigma.d).fit(left)
        torch.testing.assert_close(row, wanted / wanted.norm(), atol=1e-9, rtol=0)


def test_bases_are_orthonormal_nested_and_start_with_the_mean() -> None:
    rows = draw(10, 30) + 2
    basis = mean_first(rows, 6)
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(basis[0], rows.mean(0) / rows.mean(0).norm())
    torch.testing.assert_close(mean_first(rows, 3), basis[:3])
    assert len(mean_first(rows[:1].expand(4, -1), 6)) == 1  # vectors that agree span one dimension
    assert len(mean_first(rows, 1)) == 1 and len(principal(rows[:0], 4)) == 0


def test_random_subspaces_overlap_by_chance_and_covariance_draws_stay_in_the_span() -> None:
    values = [overlap(random_frame(4, 60, 2 * i), random_frame(4, 60, 2 * i + 1)) for i in range(60)]
    assert sum(values) / 60 == pytest.approx(4 / 60, rel=0.1)
    states = draw(9, 60)
    like = like_states(20, 0, Moments.of(states))
    assert len(like) == 8
    centred = principal(states - states.mean(0), 8)
    torch.testing.assert_close(like @ centred.T @ centred, like, atol=1e-8, rtol=0)


def test_topics_hold_what_differs_between_subjects_and_no_refusal() -> None:
    states, groups = planted(1, n_subjects=8)
    basis = topics(states, groups, 6)
    refusal = random_frame(1, 48, 0)[0]
    assert float((basis @ refusal).norm()) < 0.6  # as a random direction in 6 of 48 dimensions may
    answered = groups.role < 0
    means = torch.stack([states[answered & (groups.subject == s)].mean(0) for s in range(0, 8, 2)])
    span = topics(states, groups, 99)
    torch.testing.assert_close((means - means.mean(0)) @ span.T @ span, means - means.mean(0), atol=1e-8, rtol=0)


def test_halves_agree_on_planted_dimensions_only() -> None:
    states, groups = planted(2)

    def fit(index: Tensor, seed: int | None) -> Tensor:
        part = groups.subset(index)
        role = part.role if seed is None else shuffled(part.role, part.subject, seed)
        return families(states[index], replace(part, role=role), 8)["subjects"]

    rows = half_overlaps(fit, groups.pair, [1, 2, 8, 64], 8, 0)
    assert [row["k"] for row in rows] == [1, 2, 8]
    assert rows[1]["overlap"] > 0.9 and rows[2]["overlap"] < 0.6
    assert rows[0]["null_high"] < rows[0]["low"] and rows[1]["chance"] == pytest.approx(2 / 48)


# -- variance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(60, 240), (240, 60)])
def test_the_noise_level_and_edge_of_white_noise(n: int, d: int) -> None:
    states = 3 * draw(n + 1, d)
    values = torch.linalg.eigvalsh(Moments.of(states).covariance).flip(0)[: min(n, d)]
    noise = noise_level(values, n, d)
    assert noise == pytest.approx(9, rel=0.1)
    assert float(values[0]) < 1.1 * marchenko_pastur_edge(noise, n, d)


def test_a_class_of_planted_rank_has_that_many_eigenvalues_over_the_edge() -> None:
    axes, n = random_frame(3, 200, 0), 80
    states = 20 * draw(n, 3, seed=1) @ axes + draw(n, 200, seed=2)
    found = class_spectrum(states, torch.arange(n) // 4, 10)
    assert found["over_edge"] == 3
    ratio = found["participation"]
    assert 2 < ratio["value"] < 4 and ratio["low"] < ratio["value"] < ratio["high"]
    assert found["shares"] == sorted(found["shares"], reverse=True)


def test_massive_coordinates_are_found_and_left_out() -> None:
    states, groups = planted(1)
    states[:, 7] += 5000
    states[:, 7] *= 1 + 0.1 * draw(len(states), seed=9)
    found = variance(states, groups, states, groups, (1, 2), 20, 2, 0)
    assert found["massive"]["coordinates"][0] == 7 and found["massive"]["share"] > 0.9
    classes = found["classes"]
    with_it, without_it = (classes[f"refused{more}"] for more in ("", ", without massive coordinates"))
    assert with_it["participation"]["value"] < 1.1 < without_it["participation"]["value"]


# -- the answer --------------------------------------------------------------------------------------------------

KS = (1, 2, 4, 8)
N = 20


def base(refused: Tensor, answered: Tensor, each: int = 1) -> Base:
    """Prompts of which `each` are of one subject."""
    return Base(refused, answered, [i // each for i in range(len(refused))], [i // each for i in range(len(answered))])


FAR = base(torch.full((N,), 50.0).double(), torch.zeros(6).double())  # so far apart that the gap bounds nothing


def sweep(levels: list[float], seed: int = 0) -> Swept:
    removed = torch.tensor(levels, dtype=torch.float64)[:, None] + 0.1 * draw(4, N, seed=seed)
    return Swept(KS, removed, 0.1 * draw(4, 4, N, seed=seed + 1))


def answer(swept: Swept, of: Base = FAR, n_draws: int = 2000) -> tuple[Curve, Enough]:
    curves, _ = sweep_curves({"x": swept}, of, n_draws=n_draws)
    enough = curves["x"].enough
    assert enough is not None
    return curves["x"], enough


def test_the_planted_k_is_the_answer_and_its_band_holds_it() -> None:
    found, enough = answer(sweep([1.0, 2.0, 5.0, 5.2]))
    assert (enough.k, enough.low, enough.high) == (4, 4, 4)
    assert enough.frequency[2] == 1.0 and enough.never == 0
    assert max(found.q) < 0.05 and found.beyond
    _, close = answer(sweep([1.0, 4.65, 5.0, 5.2]))
    assert close.low == 2 and close.high == 4


def test_what_random_subspaces_remove_too_does_not_count() -> None:
    swept = sweep([3.0, 3.1, 5.0, 9.0])
    more = torch.tensor([0.0, 0.0, 2.0, 6.5])[:, None, None]
    found, enough = answer(Swept(KS, swept.removed, swept.null + more))
    assert enough.k == 1 and found.enough_without_null is not None and found.enough_without_null.k == 8


def test_what_is_removed_below_the_level_of_answered_prompts_is_not_refusal() -> None:
    swept = sweep([1.0, 3.1, 5.0, 14.0])
    refused, answered = 0.5 + 0.1 * draw(N, seed=8), -2.5 + 0.1 * draw(6, seed=9)
    curves, removable = sweep_curves({"x": swept}, base(refused, answered))
    assert curves["x"].enough is not None and curves["x"].enough.k == 2 and removable.bounded_by_gap
    assert removable.size.value == pytest.approx(3.0, abs=0.1)
    curves, removable = sweep_curves({"x": swept}, base(answered[:1].expand(N), refused[:6]))
    assert curves["x"].enough is not None and curves["x"].enough.k == 8 and not removable.bounded_by_gap


def test_all_curves_of_a_sweep_are_measured_by_one_removable() -> None:
    """A subspace that removes a fifth at every K has no K90: its own best is no measure of what there is to remove."""
    curves, removable = sweep_curves({"all": sweep([4.8, 4.9, 5.0, 5.0]), "little": sweep([1.0, 1.0, 1.0, 1.0])}, FAR)
    assert removable.size.value == pytest.approx(5, abs=0.1)
    for name, k in (("all", 1), ("little", None)):
        enough = curves[name].enough
        assert enough is not None and enough.k == k and enough.never == (0 if k else 1)


def test_bands_are_over_subjects() -> None:
    """Ten prompts of one subject are one draw: bands are as wide as if each subject had been asked once."""
    each, n_subjects = 10, 12
    level = torch.tensor([0.0, 4.5, 5.0, 5.0])[:, None] + torch.zeros(4, n_subjects)
    level[1] += 1.5 * draw(n_subjects, seed=3)
    refused, answered = torch.full((n_subjects,), 50.0).double(), torch.zeros(6).double()
    once = Swept(KS, level, 0.1 * draw(4, 4, n_subjects, seed=4))
    often = Swept(KS, level.repeat_interleave(each, 1), once.null.repeat_interleave(each, 2))
    clustered = base(refused.repeat_interleave(each), answered, each)
    a, b, c = (
        answer(*pair)[0]
        for pair in (
            (once, base(refused, answered)),
            (often, clustered),
            (often, replace(clustered, refused_subjects=range(120))),
        )
    )
    assert a.enough and b.enough and c.enough
    assert a.enough.frequency == pytest.approx(b.enough.frequency, abs=0.05)
    assert abs(c.enough.frequency[1] - b.enough.frequency[1]) > 0.1
    assert b.removed[1].high - b.removed[1].low > 2 * (c.removed[1].high - c.removed[1].low)


def test_a_family_that_is_random_is_rarely_beyond_random() -> None:
    hits = 0
    for seed in range(100):
        means = draw(5, 4, 1, seed=seed)
        nulls = means[1:].permute(1, 0, 2).expand(-1, -1, 10)
        swept = Swept(KS, means[0] + 0.05 * draw(4, 10, seed=500 + seed), nulls)
        curves, _ = sweep_curves({"x": swept}, base(FAR.refused[:10], FAR.answered), n_draws=10)
        hits += any(q <= 0.05 for q in curves["x"].q)
    assert hits <= 12


def test_no_positive_effect_has_no_answer() -> None:
    curves, removable = sweep_curves({"x": sweep([-1.0, -1.0, -2.0, -1.0])}, FAR)
    assert curves["x"].enough is None and removable.size.value < 0
    means = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [2.0, 1.0]])
    assert smallest_enough(means, torch.tensor([2.0, -1.0, 2.0]), 0.9).tolist() == [1, 2, 0]
    assert to_match(2.0, [1.0, 2.5, 3.0], [1, 2, 4]) == 2 and to_match(9.0, [1.0], [1]) is None


# -- the model runs ----------------------------------------------------------------------------------------------


def test_sweeps_equal_the_plain_way_and_the_null_has_the_ablations_dose() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    sites = [Site(1), Site(2), Site(3)]
    basis = {s: random_frame(4, backend.d_model, s.layer) for s in sites}
    bench = Bench.of(backend, rows, TOKENS, 1)
    turn = random_frame(backend.d_model, backend.d_model, 50).float()
    found = ablation_sweep(bench, basis, [1, 4], [turn])
    assert found["outcome"].shape == (2, 2, 2, len(rows)) and found["dose"].shape == (2, 2)
    plain = log_odds(backend, rows, TOKENS, ablate({s: b[0] for s, b in basis.items()}))
    torch.testing.assert_close(found["outcome"][0, 0, 0], plain, atol=1e-4, rtol=0)
    ratio = found["dose"][:, 1] / found["dose"][:, 0]  # of |edit| / |resid|: the edit is as long, the state is another
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all())
    assert bool((found["outcome"][:, :, 1] > -1e-6).all())
    control = control_sweep(bench, [basis], [1, 4])
    torch.testing.assert_close(control["outcome"][:, 0], found["outcome"][:, 0])


def record_shares(backend: Any, rows: Any, basis: Any) -> Any:
    shares = RecordShares(basis)
    for _ in backend.batches(rows, lambda batch: backend.run(batch, shares)):
        pass
    return shares.totals


def test_doses_are_shares_of_the_residual_norm() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    basis = random_frame(3, backend.d_model, 0)
    edit = Dosed(AblateSubspace(S, basis))
    for _ in backend.batches(rows, lambda batch: backend.run(batch, edit)):
        pass
    applied, wanted = mean_doses(edit.totals)[S], mean_doses(record_shares(backend, rows, {S: basis}))[S]
    assert float(applied) == pytest.approx(float(wanted[2]), rel=1e-5)
    assert wanted.tolist() == sorted(wanted.tolist()) and 0 < float(wanted[2]) < 1


def test_gradients_are_finite_differences_and_the_push_is_the_best_in_its_span() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    slopes = log_odds_gradients(backend, rows, TOKENS, [Site(1), S])
    v, step = random_frame(1, backend.d_model, 3)[0], 1e-2
    up, down = (log_odds(backend, rows, TOKENS, add({S: v.float()}, {S: sign * step})) for sign in (1, -1))
    torch.testing.assert_close(slopes[S] @ v, (up - down) / (2 * step), atol=2e-3, rtol=0.02)
    gradient = slopes[S].mean(0)
    bench, basis = Bench.of(backend, rows, TOKENS, 2), random_frame(6, backend.d_model, 4)
    found = push_sweep(bench, S, gradient, [basis, basis.flip(0)], [1, 6], 0.05)["outcome"][:, :, 0].mean(2)
    base = bench.measure(None)[0].mean()
    assert float(found[1, 0]) < float(found[0].min()) < float(base)
    torch.testing.assert_close(found[1, 0], found[1, 1], atol=1e-5, rtol=0)  # the span alone


def test_labels_shuffled_over_subjects_are_caught() -> None:
    """Not inside them: topic would look like refusal."""
    states, groups = planted(1)
    role = torch.where(groups.subject < 12, 1, -1)  # "refused" is a matter of subject alone
    everybody = torch.zeros_like(groups.subject)
    wrong_null = parallel_analysis(lambda r: contrasts(states, r, everybody, True), role, everybody, 60, 0, 4)
    assert wrong_null["p_first"] < 0.05
    assert len(contrasts(states, role, groups.subject, True)) == 0
    assert replace(groups, role=role).paired_role.shape == role.shape
