"""What stands beside a direction: repeatability, what topic alone gives of it, and a weighted fit beside its unweighted twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, CannotFit, DirectionEstimator, Evidence, fit_directions, is_weighted
from rsteer_interp.directions.diagnosis import Diagnosis, diagnose

SITE = Site(3)
WEIGHTED = [name for name, kind in ESTIMATORS.items() if is_weighted(kind)]


def subjects_of(n: int, topic: float, refusal: float, seed: int, d: int = 40) -> Evidence:
    """Even subjects are mostly refused, odd ones mostly answered; `topic` sets them apart along one direction, the verdict itself
    moves states by `refusal` along another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    subject = torch.arange(n) % 16
    refused = torch.rand(n, generator=generator) < torch.where(subject % 2 == 0, 0.75, 0.25)
    c = torch.where(refused, 1.0, -1.0).double() * (0.4 + 0.6 * torch.rand(n, generator=generator).double())
    h = normal(n, d)
    h[:, 0] += topic * (1 - 2 * (subject % 2))
    h[:, 1] += refusal * c.sign()
    return Evidence(h, c, subjects=subject.tolist())


def found(estimator: DirectionEstimator, evidence: Evidence) -> Diagnosis:
    return diagnose(estimator, evidence, fit_directions(estimator, {SITE: evidence})[SITE])


@pytest.mark.parametrize("name", ["md", "wmd_plain", "rmd", "rmd_loso"])
def test_topic_alone_is_as_repeatable_as_topic(name: str) -> None:
    """A direction that is a topic agrees between halves, and as well with verdicts permuted inside subjects; one of refusal does
    not when they are."""
    topic = found(ESTIMATORS[name](), subjects_of(320, 1.5, 0.0, 0))
    refusal = found(ESTIMATORS[name](), subjects_of(320, 0.0, 1.5, 0))
    assert topic.split_half and topic.split_half_topic and refusal.split_half and refusal.split_half_topic
    if name == "md":
        assert min(topic.split_half.value, refusal.split_half.value) > 0.6
    assert topic.split_half_topic.high > topic.split_half.value
    assert refusal.split_half_topic.high < refusal.split_half.value
    for each in (topic, refusal):
        assert each.split_half and each.split_half.low <= each.split_half.value <= each.split_half.high


def test_a_ridge_on_few_prompts_is_named_as_noise() -> None:
    """Fewer answered prompts than dimensions: the paper's penalty leaves the null space's vector, which halves do not share."""
    evidence = subjects_of(96, 0.5, 1.0, 1, d=200)
    md, ridge = found(ESTIMATORS["md"](), evidence), found(ESTIMATORS["rmd"](), evidence)
    assert ridge.null_space_share > 0.999 > md.null_space_share
    assert md.split_half and ridge.split_half
    assert md.effective_rank is None and md.relative_penalty is None
    assert ridge.effective_rank is not None and ridge.effective_rank < ridge.counts["complying"]
    assert md.cosine_md == pytest.approx(1) and 0 < ridge.cosine_md < 1
    assert md.cosine_null == pytest.approx(1.96 / 200**0.5, rel=0.02)
    loso = found(ESTIMATORS["rmd_loso"](), evidence)
    assert loso.split_half and loso.null_space_share < ridge.null_space_share
    assert loso.relative_penalty and ridge.relative_penalty and loso.relative_penalty > ridge.relative_penalty


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_estimator_is_refused_scores_that_are_not_graded(name: str) -> None:
    """With c = +1 and -1 it is its unweighted twin to the last bit, and would stand in a table under its own name."""
    graded = subjects_of(160, 0.5, 1.0, 2)
    assert fit_directions(ESTIMATORS[name](), {SITE: graded})[SITE].estimator == name
    diagnosis = found(ESTIMATORS[name](), graded)
    assert diagnosis.cosine_unweighted is not None and diagnosis.cosine_unweighted < 0.999
    for size in (1.0, 0.3):
        greedy = Evidence(graded.states, graded.labels * size, subjects=graded.subjects)
        for seen in (greedy, greedy.summary()):
            with pytest.raises(CannotFit, match=rf"'{name}' weighs prompts by \|c\|.* --samples 4 or more"):
                fit_directions(ESTIMATORS[name](), {SITE: seen})
    one_class = torch.where(graded.labels > 0, graded.scores, -1.0)  # one graded class is enough
    assert fit_directions(ESTIMATORS[name](), {SITE: Evidence(graded.states, one_class, subjects=graded.subjects)})


def test_estimators_without_weights_take_any_scores() -> None:
    graded = subjects_of(160, 0.5, 1.0, 2)
    greedy = Evidence(graded.states, graded.labels.double(), subjects=graded.subjects)
    for name in set(ESTIMATORS) - set(WEIGHTED):
        assert found(ESTIMATORS[name](), greedy).cosine_unweighted is None


def test_halves_that_cannot_be_fitted_have_no_cosine() -> None:
    evidence = subjects_of(160, 0.5, 1.0, 3)
    few = Evidence(evidence.states, evidence.scores, subjects=["a"] * 160)
    assert found(ESTIMATORS["md"](), few).split_half is None
