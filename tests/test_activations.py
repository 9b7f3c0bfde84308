"""What is read of the stream does not depend on how prompts are put into batches; streamed moments are those of the states."""

from __future__ import annotations

import pytest
import torch

from rsteer_interp.activations import last_moments, last_states, mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.moments import Moments
from tests.tiny_models import tiny_backend

TEXTS = ["tell me about the city", "tell me about the history of the river", "tell me about the law", "write", "why ?"]
SITES = [Site(1), Site(3), Site(4)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_count_the_words_that_prompts_have_in_common(family: str) -> None:
    """Words with which all prompts of a batch begin are run once, and still count once for each prompt."""
    backend = tiny_backend(family)
    rows = backend.template().encode_all(TEXTS)
    for chosen in (rows[:3], rows):
        alone = [mean_norms(backend, [row], SITES) for row in chosen]
        counts = [len(row.ids) - row.prefix for row in chosen]
        for site, norm in mean_norms(backend, chosen, SITES).items():
            expected = sum(n * each[site] for n, each in zip(counts, alone, strict=True)) / sum(counts)
            assert norm == pytest.approx(expected, rel=1e-5), site


def test_streamed_moments_are_those_of_the_states() -> None:
    backend = tiny_backend("qwen2", batch_size=2)
    rows = backend.template().encode_all(TEXTS)
    states = last_states(backend, rows, SITES)
    for site, moments in last_moments(backend, rows, SITES).items():
        whole = Moments.of(states[site])
        assert moments.count == len(TEXTS)
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.covariance, whole.covariance, rtol=1e-4, atol=1e-5)
