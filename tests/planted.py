"""Planted states h = shift + a y u + noise with known covariance, and the checks that every direction estimator must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rsteer_interp.directions import DirectionEstimator, Evidence


def planted(n: int, d: int, seed: int, strength: float = 1.0) -> tuple[Evidence, Tensor, Tensor]:
    """Evidence of n prompts (every sixth of one subject), the planted unit direction u, and the noise covariance (condition
    number about 100)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(d, d))[0]
    scales = torch.logspace(-0.5, 0.5, d, dtype=torch.float64)
    u = normal(d)
    u = u / u.norm()
    scores = torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1
    labels = (scores > 0.15).double() - (scores < -0.15).double()
    noise = normal(n, d) @ (basis * scales).T
    shift = 2 * normal(d)
    subjects = [i % 6 for i in range(n)]
    found = Evidence(shift + strength * labels[:, None] * u + noise, scores, subjects=subjects)
    return found, u, (basis * scales.square()) @ basis.T


def changed(evidence: Evidence, states: Tensor | None = None, scores: Tensor | None = None) -> Evidence:
    """The same prompts with other states or scores."""
    states, scores = evidence.states if states is None else states, evidence.scores if scores is None else scores
    return Evidence(states, scores, subjects=evidence.subjects)


def check_points_to_refusal(estimator: DirectionEstimator, seed: int = 0) -> None:
    evidence, u, _ = planted(600, 12, seed, strength=3.0)
    assert float(estimator.fit(evidence) @ u) > 0


def check_weight_two_is_a_copy(estimator: DirectionEstimator, seed: int = 0) -> None:
    """A prompt with |c| = 0.8 counts as two with |c| = 0.4, for an estimator that weighs by |c|."""
    evidence, _, _ = planted(60, 12, seed)
    keep = evidence.labels != 0
    states, scores = evidence.states[keep], evidence.labels[keep] * 0.4
    twice = scores.clone()
    twice[:7] *= 2
    weighted = estimator.fit(Evidence(states, twice))
    copied = estimator.fit(Evidence(torch.cat([states, states[:7]]), torch.cat([scores, scores[:7]])))
    torch.testing.assert_close(weighted, copied, rtol=1e-8, atol=1e-10)


def check_blind_to_a_common_weight(estimator: DirectionEstimator, seed: int = 0) -> None:
    evidence = planted(60, 12, seed)[0]
    sure = evidence.subset(evidence.scores.abs() > 0.4)
    halved = changed(sure, scores=sure.scores / 2)
    torch.testing.assert_close(estimator.fit(sure), estimator.fit(halved), rtol=1e-8, atol=1e-10)


def check_rotates_with_the_states(estimator: DirectionEstimator, seed: int = 0) -> None:
    for n in (60, 24):
        evidence, _, _ = planted(n, 16, seed)
        turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
            0
        ]
        turned = estimator.fit(changed(evidence, states=evidence.states @ turn.T))
        torch.testing.assert_close(turned, turn @ estimator.fit(evidence), rtol=1e-7, atol=1e-9)


def check_blind_to_a_shift(estimator: DirectionEstimator, seed: int = 0) -> None:
    for n in (60, 24):
        evidence, _, _ = planted(n, 16, seed)
        shifted = estimator.fit(changed(evidence, states=evidence.states + 30.0 * torch.arange(16)))
        torch.testing.assert_close(shifted, estimator.fit(evidence), rtol=1e-7, atol=1e-9)
