"""Directions: the theorems every estimator obeys, recovery of planted directions, and faults that the checks must catch."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import (
    ESTIMATORS,
    DirectionEstimator,
    Evidence,
    MeanDifference,
    RidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_directions,
)
from rsteer_interp.directions.evidence import MIN_NEUTRAL
from rsteer_interp.directions.ridge import ridge_solve
from rsteer_interp.errors import UserError
from rsteer_interp.moments import Moments
from rsteer_interp.nulls import cosine
from tests.planted import (
    changed,
    check_blind_to_a_common_weight,
    check_blind_to_a_shift,
    check_points_to_refusal,
    check_rotates_with_the_states,
    check_weight_two_is_a_copy,
    planted,
)

SITE = Site(3)
FITTED: list[DirectionEstimator] = [
    *(kind() for name, kind in ESTIMATORS.items() if name != "wrmd_literal"),
    WeightedRidgeMeanDifference(covariance="pooled", penalty=0.1),
]
LITERAL = WeightedRidgeMeanDifference(covariance="literal")
WEIGHTED = [e for e in [*FITTED, LITERAL] if isinstance(e, WeightedMeanDifference | WeightedRidgeMeanDifference)]
ROWS_NEEDED = [e for e in FITTED if getattr(e, "shrinkage", "none") != "none" or getattr(e, "penalty", 0) == "left_out"]
MOMENTS_ENOUGH = [e for e in [*FITTED, LITERAL] if e not in ROWS_NEEDED]
PLAIN_RIDGE = (RidgeMeanDifference, WeightedRidgeMeanDifference)


@pytest.mark.parametrize("estimator", [*FITTED, LITERAL], ids=repr)
def test_every_estimator_keeps_the_contract(estimator: DirectionEstimator) -> None:
    assert isinstance(estimator, DirectionEstimator)
    evidence = planted(80, 12, 0)[0]
    direction = fit_directions(estimator, {SITE: evidence}, sets=["a", "b"], fingerprint="f")[SITE]
    assert direction.vector.dtype == torch.float32
    torch.testing.assert_close(direction.vector, estimator.fit(evidence).float())
    assert direction.unit.norm() == pytest.approx(1, abs=1e-6)
    assert cosine(direction.unit, direction.vector) == pytest.approx(1, abs=1e-6)
    record = direction.record()
    assert (record["estimator"], record["sets"], record["fingerprint"]) == (estimator.name, ["a", "b"], "f")
    assert sum(record["counts"].values()) == 80
    assert all(math.isfinite(value) for value in record["diagnostics"].values())
    with pytest.raises(FrozenInstanceError):
        direction.vector = torch.zeros(12)  # type: ignore[misc]
    for name in record["hyperparameters"]:
        with pytest.raises(FrozenInstanceError):
            setattr(estimator, name, 1)


@pytest.mark.parametrize("estimator", MOMENTS_ENOUGH, ids=repr)
def test_moments_alone_and_streamed_give_the_same_direction(estimator: DirectionEstimator) -> None:
    evidence = planted(60, 40, 1)[0]
    streamed = Evidence.streamed(zip(evidence.states.split(13), evidence.scores.split(13), strict=True))
    for other in (evidence.summary(), streamed):
        torch.testing.assert_close(estimator.fit(other), estimator.fit(evidence), rtol=1e-8, atol=1e-9)
    assert streamed.counts == evidence.counts


@pytest.mark.parametrize("estimator", FITTED, ids=repr)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sign_rotation_and_shift(estimator: DirectionEstimator, seed: int) -> None:
    check_points_to_refusal(estimator, seed)
    check_rotates_with_the_states(estimator, seed)
    check_blind_to_a_shift(estimator, seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_literal_covariance_turns_with_the_states_but_sees_a_shift(seed: int) -> None:
    check_points_to_refusal(LITERAL, seed)
    check_rotates_with_the_states(LITERAL, seed)
    with pytest.raises(AssertionError):
        check_blind_to_a_shift(LITERAL, seed)


@pytest.mark.parametrize("estimator", [e for e in WEIGHTED if e not in ROWS_NEEDED], ids=repr)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights(estimator: DirectionEstimator, seed: int) -> None:
    check_blind_to_a_common_weight(estimator, seed)
    if not (isinstance(estimator, WeightedMeanDifference) and estimator.form == "units") and estimator is not LITERAL:
        check_weight_two_is_a_copy(estimator, seed)  # the others use the midpoint here, which is not weighted


@pytest.mark.parametrize("estimator", [*FITTED, LITERAL], ids=repr)
def test_swapping_the_classes_flips_all_but_the_one_class_ridges(estimator: DirectionEstimator) -> None:
    evidence = planted(200, 12, 3)[0]
    forward, back = estimator.fit(evidence), estimator.fit(changed(evidence, scores=-evidence.scores))
    if isinstance(estimator, PLAIN_RIDGE) and estimator.covariance != "pooled":
        assert cosine(forward, back) > -0.999
    else:
        torch.testing.assert_close(back, -forward, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("estimator", "sees_offset"),
    [
        (MeanDifference(), False),
        (WeightedMeanDifference(form="plain"), False),
        (WeightedMeanDifference(form="units"), True),
        (WeightedRidgeMeanDifference(), False),
        (WeightedRidgeMeanDifference(covariance="literal"), True),
    ],
    ids=repr,
)
def test_the_neutral_offset_cancels_unless_means_are_normalised_or_the_covariance_is_literal(
    estimator: DirectionEstimator, sees_offset: bool
) -> None:
    evidence = planted(60, 12, 0)[0]
    other = Moments.of(evidence.neutral.mean + torch.randn(MIN_NEUTRAL, 12, generator=torch.Generator().manual_seed(1)))
    moved = Evidence(evidence.states, evidence.scores, moments={"neutral": other})
    same = torch.allclose(estimator.fit(evidence), estimator.fit(moved), rtol=1e-6)
    assert same is not sees_offset


def test_mean_differences_equal_their_formulas() -> None:
    evidence = planted(90, 12, 0)[0]
    h, c = evidence.states, evidence.scores
    refusing, complying, offset = h[c > 0.15], h[c < -0.15], h[c.abs() <= 0.15].mean(0)
    assert len(refusing) + len(complying) < 90 - MIN_NEUTRAL
    torch.testing.assert_close(MeanDifference().fit(evidence), refusing.mean(0) - complying.mean(0))
    p = (c[c > 0.15, None] * (refusing - offset)).sum(0) / c[c > 0.15].sum()
    n = (c[c < -0.15, None] * (complying - offset)).sum(0) / c[c < -0.15].sum()
    torch.testing.assert_close(WeightedMeanDifference("plain").fit(evidence), p - n)
    torch.testing.assert_close(WeightedMeanDifference().fit(evidence), p / p.norm() - n / n.norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_direction_is_recovered_and_the_error_shrinks(seed: int) -> None:
    for estimator in (
        MeanDifference(),
        WeightedMeanDifference("plain"),
        RidgeMeanDifference(),
        WeightedRidgeMeanDifference(),
    ):
        errors = []
        for n in (200, 20_000):
            evidence, u, sigma = planted(n, 12, seed)
            truth = torch.linalg.solve(sigma, u) if isinstance(estimator, PLAIN_RIDGE) else u
            errors.append(1 - cosine(estimator.fit(evidence), truth))
        assert errors[1] < 0.01
        assert errors[1] < errors[0] / 5


def test_a_score_weighted_fit_trusts_sure_prompts_more() -> None:
    """With labels wrong more often where |c| is small, WMD is nearer to the truth than MD."""
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(4000, generator=generator, dtype=torch.float64) * 2 - 1
    truly = torch.where(torch.rand(4000, generator=generator) < c.abs() ** 2, c.sign(), -c.sign())
    u = torch.zeros(12, dtype=torch.float64)
    u[0] = 1
    evidence = Evidence(truly[:, None] * u + torch.randn(4000, 12, generator=generator, dtype=torch.float64), c)
    assert cosine(WeightedMeanDifference("plain").fit(evidence), u) > cosine(MeanDifference().fit(evidence), u)


# -- faults that the checks above must catch -----------------------------------------------------------------------


@dataclass(frozen=True)
class FlippedSign:
    name: ClassVar[str] = "fault"

    def fit(self, evidence: Evidence) -> Tensor:
        return evidence.complying.mean - evidence.refusing.mean


def _about(moments: Moments, point: Tensor | float = 0.0) -> Tensor:
    """The second moment about a point."""
    shift = moments.mean - point
    return moments.covariance + torch.outer(shift, shift)


@dataclass(frozen=True)
class UnweightedCentring:
    name: ClassVar[str] = "fault"

    def fit(self, evidence: Evidence) -> Tensor:
        weighted, centre = evidence.complying_weighted, evidence.complying.mean
        delta = evidence.refusing_weighted.mean - weighted.mean
        return torch.linalg.solve(_about(weighted, centre) + 0.01 * torch.eye(len(delta), dtype=torch.float64), delta)


@dataclass(frozen=True)
class UnnormalisedWeights:
    name: ClassVar[str] = "fault"

    def fit(self, evidence: Evidence) -> Tensor:
        refusing, complying = evidence.refusing_weighted, evidence.complying_weighted
        return ridge_solve(complying.scatter, refusing.mean - complying.mean, 0.01)


@dataclass(frozen=True)
class Uncentred:
    name: ClassVar[str] = "fault"

    def fit(self, evidence: Evidence) -> Tensor:
        delta = evidence.refusing.mean - evidence.complying.mean
        return torch.linalg.solve(_about(evidence.complying) + 0.01 * torch.eye(len(delta), dtype=torch.float64), delta)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (FlippedSign(), check_points_to_refusal),
        (UnweightedCentring(), check_weight_two_is_a_copy),
        (UnnormalisedWeights(), check_blind_to_a_common_weight),
        (Uncentred(), check_blind_to_a_shift),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_the_checks_catch_seeded_faults(fault: DirectionEstimator, check: object) -> None:
    with pytest.raises(AssertionError):
        check(fault)  # type: ignore[operator]


# -- evidence and errors -----------------------------------------------------------------------


@pytest.mark.parametrize("neutral", [0, MIN_NEUTRAL - 1, MIN_NEUTRAL])
def test_a_tiny_neutral_set_falls_back_to_the_midpoint_and_says_so(neutral: int) -> None:
    h = torch.randn(20 + neutral, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = torch.tensor([0.9] * 8 + [-0.7] * 12 + [0.0] * neutral)
    direction = fit_directions(MeanDifference(), {SITE: Evidence(h, c)})[SITE]
    enough = neutral >= MIN_NEUTRAL
    expected = h[20:].mean(0) if enough else (h[:8].mean(0) + h[8:20].mean(0)) / 2
    torch.testing.assert_close(direction.offset, expected.float())
    assert direction.offset_source == ("neutral" if enough else "midpoint")
    assert direction.counts == {"refusing": 8, "complying": 12, "neutral": neutral}


def test_subset_is_the_evidence_of_those_prompts() -> None:
    evidence = planted(60, 12, 0)[0]
    index = torch.arange(0, 60, 2)
    part = evidence.subset(index)
    assert torch.equal(part.states, evidence.states[index])
    assert part.labels.tolist() == evidence.labels[index].tolist()
    assert part.counts == Evidence(evidence.states[::2], evidence.scores[::2]).counts


def test_errors_name_the_class_the_number_and_the_remedy() -> None:
    h, c = torch.randn(6, 4), torch.tensor([0.9, 0.8, 0.0, 0.1, -0.1, 0.7])
    with pytest.raises(
        UserError,
        match=r"no complying prompts \(n = 0 with score < -0\.15\) at blocks\.3\.hook_resid_pre; add prompts that",
    ):
        fit_directions(MeanDifference(), {SITE: Evidence(h, c)})
    broken = h.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"refusing prompts \(n = 3\) .* not finite"):
        fit_directions(MeanDifference(), {SITE: Evidence(broken, torch.tensor([0.9, 0.8, 0.7, -1, -1, -1]))})
    with pytest.raises((UserError, TypeCheckError), match=r"6 states but 5 scores|confidence"):
        Evidence(h, c[:5])
    with pytest.raises(UserError, match="not in"):
        Evidence(h, 3 * c)
    with pytest.raises(UserError, match="length 0"):
        fit_directions(MeanDifference(), {SITE: Evidence(torch.ones(4, 3), torch.tensor([1.0, 1, -1, -1]))})
    with pytest.raises(UserError, match="only moments were kept"):
        _ = planted(40, 4, 0)[0].summary().states
    with pytest.raises(UserError, match="'refusing' are missing"):
        Evidence()
    with pytest.raises(UserError, match="no batches"):
        Evidence.streamed([])
    with pytest.raises(UserError, match="neutral_band"):
        Evidence(h, c, neutral_band=1.0)


def test_a_probe_is_a_few_lines() -> None:
    @dataclass(frozen=True)
    class MedianDifference:
        name: ClassVar[str] = "median"
        scale: float = 1.0

        def fit(self, evidence: Evidence) -> Tensor:
            refusing, complying = (evidence.states[evidence.labels == label].double() for label in (1, -1))
            return self.scale * (refusing.median(0).values - complying.median(0).values)

    evidence, u, _ = planted(2000, 12, 0, strength=3.0)
    direction = fit_directions(MedianDifference(scale=2.0), {SITE: evidence})[SITE]
    assert direction.hyperparameters == {"scale": 2.0}
    assert cosine(direction.vector, u) > 0.95

    @dataclass(frozen=True)
    class WrongShape:
        name: ClassVar[str] = "wrong"

        def fit(self, evidence: Evidence) -> Tensor:
            return evidence.states

    with pytest.raises(UserError, match="'wrong' gave shape"):
        fit_directions(WrongShape(), {SITE: evidence})
