"""Lambda chosen by leaving a subject out: the closed form equals refits, and where it and Ledoit-Wolf win."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsteer_interp.directions import (
    ESTIMATORS,
    CannotFit,
    Evidence,
    RidgeMeanDifference,
    WeightedRidgeMeanDifference,
)
from rsteer_interp.directions.left_out import PENALTIES, chosen_penalty, discrimination, left_out_scores
from rsteer_interp.directions.ridge_variants import LeftOutRidge
from rsteer_interp.errors import UserError
from rsteer_interp.nulls import cosine
from tests.planted import changed, planted


@pytest.mark.parametrize(("n", "d"), [(60, 20), (40, 60), (120, 30)])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_equals_refitting_without_each_subject(n: int, d: int, pooled: bool, weighted: bool) -> None:
    evidence, penalties = planted(n, d, 0)[0], [1e-2, 1.0, 10.0]
    scores, labels, member = left_out_scores(evidence, penalties, pooled=pooled, weighted=weighted)
    keep = evidence.labels != 0
    assert torch.equal(labels, evidence.labels[keep])
    h = evidence.states[keep] - evidence.states[keep].mean(0)
    kind = WeightedRidgeMeanDifference if weighted else RidgeMeanDifference
    assert evidence.subjects is not None
    subjects = torch.tensor(list(evidence.subjects))
    for k, penalty in enumerate(penalties):
        for subject in sorted(set(subjects.tolist())):
            without = evidence.subset(subjects != subject)
            v = kind(penalty=penalty, covariance="pooled" if pooled else "centred").fit(without)
            mine = subjects[keep] == subject
            assert len(set(member[mine].tolist())) == 1
            torch.testing.assert_close(scores[k, mine], h[mine] @ (v / v.norm()), rtol=0, atol=1e-8)


def test_a_subject_without_whom_a_class_is_empty_has_no_score() -> None:
    evidence = planted(60, 12, 1)[0]
    refusing = evidence.labels > 0
    lone = Evidence(
        evidence.states, evidence.scores, subjects=["a" if r else f"b{i % 5}" for i, r in enumerate(refusing)]
    )
    scores, labels, _ = left_out_scores(lone, [1.0])
    assert torch.equal(scores[0].isnan(), labels > 0)
    with pytest.raises(CannotFit, match="there are 0; add prompts"):
        chosen_penalty(lone, [1.0])


def test_discrimination_is_blind_to_what_subjects_share() -> None:
    labels = torch.tensor([1, -1, 1, -1, 1, 1])
    member = torch.tensor([0, 0, 1, 1, 2, 2])
    topic = torch.tensor([5.0, 5, -3, -3, 9, 9])
    scores = torch.stack([topic + labels, topic - labels, topic])[:, :].double()
    # Subject 2 has one verdict only: what it is given must tell nothing.
    found = discrimination(scores, labels, member)
    assert found[:2].tolist() == pytest.approx([1, -1])
    assert bool(found[2].isnan())


def test_the_penalty_is_that_of_the_best_left_out_direction() -> None:
    evidence = planted(120, 60, 2)[0]
    penalties = [1e-3, 0.1, 1.0, 100.0]
    found = discrimination(*left_out_scores(evidence, penalties))
    assert chosen_penalty(evidence, penalties) == penalties[int(found.argmax())]
    sigma = evidence.complying.scatter / evidence.complying.weight
    among = [p * sigma.trace / 60 for p in PENALTIES]
    v = RidgeMeanDifference(penalty=chosen_penalty(evidence, among)).fit(evidence)
    torch.testing.assert_close(LeftOutRidge().fit(evidence), v)


def spiked(n: int, d: int, seed: int) -> tuple[Evidence, Tensor]:
    """Five strong directions of nuisance over an even floor, and Sigma^-1 u: fewer complying prompts than dimensions, so that the
    sample covariance has no floor of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, variance = torch.linalg.qr(normal(d, d))[0], torch.ones(d, dtype=torch.float64)
    variance[:5] = 50
    u = 0.2 * basis[:, :5].sum(1) + basis[:, 5:] @ normal(d - 5) / (d - 5) ** 0.5
    scores = torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1
    labels = (scores > 0.15).double() - (scores < -0.15).double()
    states = labels[:, None] * u / u.norm() + normal(n, d) @ (basis * variance.sqrt()).T
    return Evidence(states, scores, subjects=[i % 12 for i in range(n)]), (basis / variance) @ (basis.T @ u)


@pytest.mark.parametrize("seed", range(6))
def test_with_few_prompts_shrinkage_is_nearer_to_the_truth_than_the_papers_penalty(seed: int) -> None:
    evidence, truth = spiked(150, 80, seed)
    assert evidence.counts["complying"] < 80
    near = {name: cosine(ESTIMATORS[name]().fit(evidence), truth) for name in ESTIMATORS}
    for w in ("", "w"):
        for shrunk in ("rmd_lw", "rmd_loso"):
            assert near[w + shrunk] > near[w + "rmd"] + 0.1
    assert min(near["rmd_lw"], near["rmd_loso"]) > near["md"]


def test_errors_name_the_remedy() -> None:
    evidence = planted(60, 12, 0)[0]
    with pytest.raises(CannotFit, match="give their subjects"):
        LeftOutRidge().fit(Evidence(evidence.states, evidence.scores))
    with pytest.raises(UserError, match="give one subject per state"):
        Evidence(evidence.states, evidence.scores, subjects=["a"])
    for wrong in ({"covariance": "literal"}, {"shrinkage": "ledoit_wolf"}):
        with pytest.raises(UserError, match="goes with the plain covariances"):
            RidgeMeanDifference(penalty="left_out", **wrong)  # type: ignore[arg-type]
    assert changed(evidence).subjects == evidence.subjects
