"""Embedding noise: as long as it says, on the instruction alone, and seen by the checks that claim to see it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rsteer_interp.backends.edits import Site
from rsteer_interp.embedding_integrity import (
    DOSES,
    Response,
    against_random,
    blind_radius,
    changed_tokens,
    embedding_digest,
    embedding_matrix,
    embedding_response,
    embedding_scale,
    integrity,
    weights_digest,
)
from rsteer_interp.embedding_noise import EmbeddingNoise, instruction_embeddings, noise_directions
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.measures import kl_divergence
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.studies.embedding_noise import finding
from tests.tiny_models import KINDS, PROMPTS, Kind, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_noise_is_as_long_as_it_says_and_on_the_instruction_alone(family: str, kind: Kind) -> None:
    """Row k of the directions moves the k-th instruction token, in every batch composition."""
    backend = tiny_backend(family, kind)
    rows = tiny_rows(backend)
    directions = noise_directions(3, backend.d_model, 0).float()
    noise = EmbeddingNoise(directions, 0.5)
    ids, clean = instruction_embeddings(backend, rows)
    assert ids.tolist() == [t for row in rows for t in row.ids[row.prefix : row.instruction]]
    _, noisy = instruction_embeddings(backend, rows, noise)
    moved = noisy - clean
    torch.testing.assert_close(moved.norm(dim=1) / clean.norm(dim=1), torch.full((len(ids),), 0.5), atol=1e-4, rtol=0)
    which = torch.cat([torch.arange(row.instruction - row.prefix) for row in rows]) % 3
    torch.testing.assert_close(moved / moved.norm(dim=1, keepdim=True), directions[which], atol=1e-4, rtol=0)
    together = log_odds(backend, rows, TOKENS, noise)
    alone = torch.cat([log_odds(backend, [row], TOKENS, noise) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert float((together - log_odds(backend, rows, TOKENS)).abs().max()) > 1e-3


def test_the_template_and_generated_tokens_are_left_alone() -> None:
    backend = tiny_backend("llama")
    batch = backend.batch(tiny_rows(backend))
    noise = EmbeddingNoise(noise_directions(1, backend.d_model, 0), 0.5)
    seen = []

    class Look:
        sites, pointwise, leaves_prefix = frozenset({Site(0)}), False, True

        def __call__(self, x, at):  # type: ignore[no-untyped-def]
            y = noise(x, at)
            own = [
                [row.prefix <= p < row.instruction for p in at.positions[i].tolist()]
                for i, row in enumerate(batch.rows[j] for j in at.rows.tolist())
            ]
            changed = (y != x).any(-1)
            assert torch.equal(changed & at.mask, torch.tensor(own) & at.mask & (at.phase == "prompt"))
            seen.append((at.phase, bool(changed.any())))
            return y

    backend.generate(batch, 3, Look())
    assert ("prompt", True) in seen and ("decode", False) in seen and ("decode", True) not in seen


def test_norm_zero_is_the_identity() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    found = embedding_response(backend, rows, TOKENS, noise_directions(8, backend.d_model, 0), (0.0, 0.5))
    assert float(found.log_odds[0].abs().max()) == 0
    assert float(found.kl[0].abs().max()) < 1e-7
    assert found.distance[0] == 0 and found.own_token[0].rate == 1
    assert found.distance[1] == pytest.approx(0.5, abs=1e-4)
    assert integrity(backend, rows).own_row.rate == 1


def test_the_response_is_measured_plainly() -> None:
    """Against one prompt at a time, with the two measures written out."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    directions = noise_directions(8, backend.d_model, 1)
    found = embedding_response(backend, rows, TOKENS, directions, (1.0, 0.25))
    assert found.doses == (0.25, 1.0)
    for d, dose in enumerate(found.doses):
        for i, row in enumerate(rows):
            batch, edit = backend.batch([row]), EmbeddingNoise(directions, dose)
            clean, noisy = backend.logits(batch), backend.logits(batch, edit)
            assert float(kl_divergence(clean, noisy)) == pytest.approx(float(found.kl[d, i]), abs=1e-4)
            moved = log_odds(backend, [row], TOKENS, edit) - log_odds(backend, [row], TOKENS)
            assert float(moved) == pytest.approx(float(found.log_odds[d, i]), abs=1e-4)
    assert float(found.kl[1].median()) > float(found.kl[0].median())


def test_regimes_begin_at_the_first_dose_above_their_bound() -> None:
    kl = torch.tensor([[0.0, 0.0, 9.0], [0.2, 0.3, 0.0], [2.0, 2.0, 2.0]]).double()
    found = Response((0.0, 0.1, 0.5), kl, kl, (0.0, 0.1, 0.5), (Rate.from_count(1, 1),) * 3)
    assert found.regimes() == {"noticeable": 0.1, "different": 0.5, "broken": None}
    assert found.regimes({"any": -1.0}) == {"any": 0.0}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_detection_rises_with_the_norm_of_a_planted_perturbation(family: str, seed: int) -> None:
    backend = tiny_backend(family)
    rows = tiny_rows(backend)
    directions = noise_directions(16, backend.d_model, seed)
    found = [integrity(backend, rows, EmbeddingNoise(directions, dose)) for dose in (0.0, 0.5, 2.0, 6.0, 20.0)]
    detected = [1 - one.own_token.rate for one in found]
    assert detected == sorted(detected) and detected[0] == 0 and detected[-1] > 0.9
    # Every perturbation, however small, is off its own row.
    assert [one.own_row.rate for one in found] == [1, 0, 0, 0, 0]


def test_no_direction_is_seen_within_the_blind_radius_and_the_worst_is_seen_just_outside() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)[:1]
    ids, _ = instruction_embeddings(backend, rows)
    matrix = embedding_matrix(backend)
    radius = blind_radius(backend, ids)
    distances = torch.cdist(matrix[ids].double(), matrix.double())
    distances[torch.arange(len(ids)), ids] = torch.inf
    nearest = distances.argmin(1)
    torch.testing.assert_close(
        radius.double(), distances.amin(1) / (2 * matrix[ids].double().norm(dim=1)), atol=1e-4, rtol=0
    )
    towards = torch.nn.functional.normalize(matrix[nearest] - matrix[ids], dim=1)
    inside = integrity(backend, rows, EmbeddingNoise(towards, 0.97 * float(radius.min())))
    outside = integrity(backend, rows, EmbeddingNoise(towards, 1.05 * float(radius.max())))
    assert inside.own_token.rate == 1 and outside.own_token.rate == 0


def test_equal_rows_are_no_detection() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    with torch.no_grad():
        matrix = backend.model.get_input_embeddings().weight
        matrix[150] = matrix[rows[0].ids[rows[0].prefix]]
    assert integrity(backend, rows).own_token.rate == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_familys_and_a_norm_after_the_embedding_is_refused(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedding_scale(tiny_backend("llama", kind)) == pytest.approx(1, rel=1e-5)
    assert embedding_scale(tiny_backend("gpt2", kind)) == pytest.approx(1, rel=1e-5)
    assert embedding_scale(tiny_backend("gemma3", kind)) == pytest.approx(32**0.5, rel=1e-3)
    backend = tiny_backend("llama")
    plain = type(backend.model.get_input_embeddings()).forward
    norm = nn.LayerNorm(backend.d_model)
    monkeypatch.setattr(backend.model.get_input_embeddings(), "forward",
                        lambda ids: norm(plain(backend.model.get_input_embeddings(), ids)))  # fmt: skip
    with pytest.raises(UserError, match="not a scaled row"):
        embedding_scale(backend)


def test_the_digest_notices_one_bit_and_nothing_else() -> None:
    backend, again = tiny_backend("llama"), tiny_backend("llama")
    assert embedding_digest(backend) == embedding_digest(again)
    assert changed_tokens(again, backend).tolist() == []
    with torch.no_grad():
        weight = again.model.get_input_embeddings().weight
        weight[17, 3] = torch.nextafter(weight[17, 3], torch.tensor(9.0))
    assert embedding_digest(backend) != embedding_digest(again)
    assert changed_tokens(again, backend).tolist() == [17]
    other = tiny_backend("llama")
    assert weights_digest(other) == weights_digest(backend) != weights_digest(again)
    other.model.lm_head.weight.data[5, 1] += 1e-3
    assert embedding_digest(other) == embedding_digest(backend) and weights_digest(other) != weights_digest(backend)


def test_a_direction_is_compared_with_random_ones_of_equal_norm() -> None:
    """The direction of steepest descent of the log-odds removes more refusal than 20 random ones; a random one does not."""
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    probes = noise_directions(200, backend.d_model, 5)
    falls = torch.stack(
        [
            log_odds(backend, rows, TOKENS) - log_odds(backend, rows, TOKENS, EmbeddingNoise(p[None], 0.02))
            for p in probes
        ]
    ).mean(1)
    steepest = falls @ probes  # least squares of the fall on the direction, up to its length
    found = against_random(backend, rows, TOKENS, steepest, 0.1, n_random=20, seed=1)
    assert found.fall.rank == 1 and found.fall.p == 1 / 21 and found.fall.z > 2
    plain = against_random(backend, rows, TOKENS, noise_directions(1, backend.d_model, 9)[0], 0.1, n_random=20, seed=1)
    assert plain.fall.p > 0.05
    assert found.kl.n == 20 and found.kl.value >= 0


def test_axes_are_signed_coordinates() -> None:
    axes = noise_directions(400, 16, 0, "axis")
    assert torch.equal(axes.abs().sum(1), torch.ones(400).double())
    assert torch.equal(axes.abs().amax(1), torch.ones(400).double())
    assert len(set(axes.abs().argmax(1).tolist())) == 16 and abs(float(axes.sum())) < 80
    np.testing.assert_allclose(noise_directions(5, 16, 0).norm(dim=1), 1)
    assert DOSES[0] == 0 and len(PROMPTS) > 3


def test_the_dose_that_is_spoken_of_is_the_one_found_on_select() -> None:
    """On the report prompts the KL passes the bound at a smaller dose; the sentence does not look there."""
    kl = [{"value": v, "low": v / 2, "high": 2 * v, "n": 2} for v in (0.0, 0.3, 0.8)]
    rate = [{"rate": 1.0}] * 3
    kinds = {
        kind: {
            "kl": kl,
            "kl_by_prompt": [[0.0, 0.0], [0.3, 0.3], [0.8, 0.8]],
            "own_token": rate,
            "subjects": ["a", "b"],
        }
        for kind in ("axis", "sphere")
    }
    data = {
        "doses": [0.0, 0.1, 0.5],
        "sets": {"general": kinds},
        "begins": {"general": {"regimes": {"noticeable": 0.5}, "n": 2}},
        "blind_radius": {"median": 0.3, "low": 0.2, "high": 0.4},
    }
    assert "from 0.5 of an embedding's norm on" in finding(data) and "median KL is 0.80" in finding(data)


def test_tokens_of_one_prompt_and_of_one_direction_are_not_independent() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    found = integrity(backend, rows, EmbeddingNoise(noise_directions(3, backend.d_model, 2), 3.0))
    assert found.own_token.units == 3 and integrity(backend, rows).own_token.units == len(rows)
    assert integrity(backend, rows, subjects=["a", "b"] * (len(rows) // 2)).own_token.units == 2
