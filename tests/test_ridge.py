"""Ridge: primal = dual, limits, scikit-learn's weighted Ridge and Ledoit-Wolf as oracles, the null space."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import Ridge
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import (
    Evidence,
    MeanDifference,
    RidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_directions,
)
from rsteer_interp.directions.ridge import (
    effective_rank,
    ledoit_wolf_intensity,
    null_space_share,
    ridge_path,
    ridge_solve,
)
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments, Scatter
from rsteer_interp.nulls import cosine
from rsteer_interp.spectrum import participation_ratio
from rsteer_interp.symmetric import packed_gram
from tests.planted import changed, planted

SIZES = [(400, 20), (30, 60), (61, 60)]


def complying_part(n: int, d: int, seed: int = 0) -> tuple[Scatter, Tensor]:
    evidence = planted(n, d, seed)[0]
    moments = evidence.complying_weighted
    return moments.scatter / moments.weight, MeanDifference().fit(evidence)


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 10.0])
def test_primal_equals_dual_equals_the_definition(n: int, d: int, penalty: float) -> None:
    states = planted(n, d, 0)[0].states
    z = (states - states.mean(0)) / n**0.5
    delta = complying_part(n, d)[1]
    dual, primal = (
        ridge_solve(Scatter(rows=z), delta, penalty),
        ridge_solve(Scatter(packed=packed_gram(z)), delta, penalty),
    )
    direct = torch.linalg.solve(z.T @ z + penalty * torch.eye(d, dtype=torch.float64), delta)
    assert (dual - primal).norm() / primal.norm() < 1e-8
    assert (dual - direct).norm() / direct.norm() < 1e-8


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_the_path_equals_solving_each(n: int, d: int) -> None:
    sigma, delta = complying_part(n, d)
    penalties = [1e-3, 1e-2, 1.0, 100.0]
    path = ridge_path(delta, sigma, penalties)
    for vector, penalty in zip(path, penalties, strict=True):
        expected = ridge_solve(sigma, delta, penalty)
        assert (vector - expected).norm() / expected.norm() < 1e-8


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_a_large_penalty_gives_the_mean_difference(n: int, d: int) -> None:
    evidence = planted(n, d, 1)[0]
    for covariance in ("centred", "literal", "pooled"):
        ridge = RidgeMeanDifference(penalty=1e9, covariance=covariance).fit(evidence)
        weighted = WeightedRidgeMeanDifference(penalty=1e9, covariance=covariance).fit(evidence)
        assert cosine(ridge, MeanDifference().fit(evidence)) > 1 - 1e-10
        assert cosine(weighted, WeightedMeanDifference("plain").fit(evidence)) > 1 - 1e-10


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("covariance", ["centred", "literal", "pooled"])
@pytest.mark.parametrize("shrinkage", ["none", "ledoit_wolf"])
def test_equal_weights_turn_wrmd_into_rmd(n: int, d: int, covariance: str, shrinkage: str) -> None:
    evidence = planted(n, d, 2)[0]
    binary = changed(evidence, scores=0.7 * evidence.labels.double())
    options = {"covariance": covariance, "shrinkage": shrinkage}
    weighted = WeightedRidgeMeanDifference(**options).fit(binary)  # type: ignore[arg-type]
    torch.testing.assert_close(weighted, RidgeMeanDifference(**options).fit(binary), rtol=1e-8, atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_the_pooled_form_is_parallel_to_sklearn_ridge_and_the_one_class_form_is_not(
    n: int, d: int, weighted: bool, penalty: float
) -> None:
    evidence = planted(n, d, 4)[0]
    keep = evidence.labels != 0
    x, y = evidence.states[keep].numpy(), evidence.labels[keep].double().numpy()
    w = evidence.scores[keep].abs().numpy() if weighted else y**2
    oracle = torch.from_numpy(Ridge(alpha=penalty * w.sum(), solver="cholesky").fit(x, y, sample_weight=w).coef_)
    kind = WeightedRidgeMeanDifference if weighted else RidgeMeanDifference
    assert 1 - cosine(kind(penalty=penalty, covariance="pooled").fit(evidence), oracle) < 1e-9
    assert 1 - cosine(kind(penalty=penalty).fit(evidence), oracle) > 1e-4


@pytest.mark.parametrize("n", [30, 200])
def test_literal_minus_centred_is_the_outer_product_of_the_offset(n: int) -> None:
    """Eq. 4 as printed: uncentred h minus the offset-centred weighted mean, against the weighted covariance."""
    evidence = planted(n, 20, 5)[0]
    o = evidence.offset
    h, w = (v[evidence.labels == -1] for v in (evidence.states, evidence.scores.abs()))
    mean = (w[:, None] * (h - o)).sum(0) / w.sum()
    printed = ((h - mean) * w[:, None]).T @ (h - mean) / w.sum()
    torch.testing.assert_close(
        printed - evidence.complying_weighted.covariance, torch.outer(o, o), rtol=1e-9, atol=1e-9
    )
    wrong = printed - evidence.complying.covariance  # fault: unweighted centring
    assert not torch.allclose(wrong, torch.outer(o, o), atol=1e-3)
    delta = evidence.refusing_weighted.mean - evidence.complying_weighted.mean
    expected = torch.linalg.solve(printed + 0.01 * torch.eye(20, dtype=torch.float64), delta)
    fitted = WeightedRidgeMeanDifference(covariance="literal").fit(evidence)
    torch.testing.assert_close(fitted, expected, rtol=1e-7, atol=1e-9)
    assert abs(cosine(fitted, o)) < abs(cosine(WeightedRidgeMeanDifference().fit(evidence), o))


def test_few_states_put_the_vector_in_the_null_space_and_shrinkage_takes_it_out() -> None:
    """The simulation of methods 1.5: 140 complying prompts in 512 dimensions."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(280, 512, generator=generator, dtype=torch.float64)
    h[:140, 0] += 2
    evidence = Evidence(h, torch.tensor([1.0] * 140 + [-1.0] * 140))

    def share(estimator: RidgeMeanDifference) -> float:
        return fit_directions(estimator, {Site(0): evidence})[Site(0)].diagnostics["null_space_share"]

    assert share(RidgeMeanDifference()) > 0.9999
    assert cosine(RidgeMeanDifference(penalty=1e-4).fit(evidence), RidgeMeanDifference().fit(evidence)) > 0.99999
    assert share(RidgeMeanDifference(shrinkage="ledoit_wolf")) < 0.9
    assert share(RidgeMeanDifference(penalty=1.0)) < share(RidgeMeanDifference())


@pytest.mark.parametrize(("n", "d"), [(10, 30), (100, 30)])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_effective_rank_equals_that_of_the_eigenvalues(n: int, d: int, ridge: float) -> None:
    x = planted(n, d, 0)[0].states
    sigma = Moments.of(x).scatter / float(n)
    values = torch.linalg.eigvalsh(sigma.dense) + ridge
    assert effective_rank(sigma, ridge) == pytest.approx(participation_ratio(values.clamp(min=0)), rel=1e-9)
    isotropic = Scatter(rows=torch.zeros(0, d, dtype=torch.float64))
    assert effective_rank(isotropic, 1.0) == pytest.approx(d)
    assert effective_rank(Moments.of(x[:2]).scatter, 0.0) == pytest.approx(1)


@pytest.mark.parametrize(("n", "d"), [(10, 30), (100, 30)])
def test_null_space_share_equals_the_projection(n: int, d: int) -> None:
    x = planted(n, d, 0)[0].states
    sigma = Moments.of(x).scatter / float(n)
    v = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, values, basis = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    inside = basis[values > 1e-9 * values[0]]
    expected = float(1 - (inside @ v).square().sum() / v.square().sum())
    assert null_space_share(v, sigma) == pytest.approx(expected, abs=1e-8)
    assert null_space_share(v, Moments.of(x[:1]).scatter) == 1


@pytest.mark.parametrize(("n", "d"), [(15, 40), (200, 40)])
def test_ledoit_wolf_equals_sklearn(n: int, d: int) -> None:
    x = planted(n, d, 6)[0].states
    x = x - x.mean(0)
    ours = ledoit_wolf_intensity(x, torch.full((n,), 0.3, dtype=torch.float64))
    assert ours == pytest.approx(ledoit_wolf_shrinkage(x.numpy(), assume_centered=True), rel=1e-9)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    share = weights / weights.sum()
    s = (x * share[:, None]).T @ x
    noise = sum(float(p) ** 2 * float((torch.outer(r, r) - s).square().sum()) for p, r in zip(share, x, strict=True))
    spread = float((s - s.trace() / d * torch.eye(d, dtype=torch.float64)).square().sum())
    assert ledoit_wolf_intensity(x, weights) == pytest.approx(min(1.0, noise / spread), rel=1e-9)


def test_the_penalty_is_reported_in_mean_eigenvalues() -> None:
    evidence = planted(300, 20, 0)[0]
    mean_eigenvalue = float(evidence.complying.covariance.trace()) / 20
    found = RidgeMeanDifference(penalty=0.5).diagnose(evidence, MeanDifference().fit(evidence))
    assert found["relative_penalty"] == pytest.approx(0.5 / mean_eigenvalue)
    shrunk = RidgeMeanDifference(penalty=0.5, shrinkage="ledoit_wolf").diagnose(evidence, torch.ones(20))
    assert shrunk["relative_penalty"] == pytest.approx(0.5 / mean_eigenvalue + shrunk["shrinkage"])


def test_a_low_precision_gram_matrix_would_lose_the_direction() -> None:
    evidence, _, _ = planted(600, 64, 0)
    evidence = changed(evidence, states=evidence.states + 100 * (torch.arange(64) == 5))
    ours = RidgeMeanDifference().fit(changed(evidence, states=evidence.states.to(torch.bfloat16)))
    low = evidence.states[evidence.labels == -1].to(torch.bfloat16)
    gram = (low.T @ low / len(low) - torch.outer(low.mean(0), low.mean(0))).double()
    fault = torch.linalg.solve(gram + 0.01 * torch.eye(64, dtype=torch.float64), MeanDifference().fit(evidence))
    assert cosine(ours, RidgeMeanDifference().fit(evidence)) > 0.9
    assert cosine(fault, RidgeMeanDifference().fit(evidence)) < 0.8


def test_errors_name_the_remedy() -> None:
    evidence = planted(30, 60, 0)[0]
    with pytest.raises(UserError, match=r"penalty 0 with .* positive penalty"):
        RidgeMeanDifference(penalty=0.0).fit(evidence)
    with pytest.raises(UserError, match="raise the penalty"):
        ridge_solve(Scatter(packed=torch.zeros(6, dtype=torch.float64)), torch.ones(3), 0.0)
    with pytest.raises(UserError, match="at least 0"):
        RidgeMeanDifference(penalty=-1.0)
    with pytest.raises(UserError, match="positive"):
        ridge_path(torch.ones(60), evidence.complying.scatter, [0.0, 1.0])
    with pytest.raises(UserError, match="only moments were kept"):
        RidgeMeanDifference(shrinkage="ledoit_wolf").fit(evidence.summary())
