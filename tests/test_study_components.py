"""Components: sums that must hold on tiny models, planted heads and nulls, and the whole study on a tiny random model."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rsteer_interp.studies.component_attribution as study
from analyses.component_attribution import Config, run
from rsteer_interp.activations import RecordLast, last_states
from rsteer_interp.backends.edits import Site, compose
from rsteer_interp.backends.transformerlens import TransformerLensBackend
from rsteer_interp.command_line import run as run_command
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.heads import SetHeads, ablated_log_odds, last_heads
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.results import load_result
from rsteer_interp.studies import component_steps
from rsteer_interp.studies.component_shares import (
    SPANS,
    Component,
    against_random,
    differences,
    mass_by_span,
    random_heads,
    top_heads,
)
from tests.study_fixture import study_arguments
from tests.tiny_models import D_MODEL, N_LAYERS, tiny_backend, tiny_rows

TOKENS = (5, 9, 30)
FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "mixtral"]


def _backend(family: str) -> TransformerLensBackend:
    backend = tiny_backend(family, "transformerlens")
    assert isinstance(backend, TransformerLensBackend)
    return backend


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_bias_add_up_to_the_attention_output(family: str) -> None:
    backend = _backend(family)
    rows = tiny_rows(backend)
    z = last_heads(backend, rows, sorted(backend.head_sites))
    for layer in range(N_LAYERS):
        attention = backend.bridge.blocks[layer].attn
        out = torch.einsum("phe,hed->pd", z[Site(layer, "z")], attention.W_O)
        bias = getattr(attention, "b_O", None)
        whole = out if bias is None else out + bias
        site = Site(layer, "attn_out")
        torch.testing.assert_close(whole, last_states(backend, rows, [site])[site], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_components_add_up_to_the_streams_projection(family: str) -> None:
    backend = _backend(family)
    rows = tiny_rows(backend)
    v = random_unit_vectors(1, D_MODEL, 0)[0]
    for layer in (1, N_LAYERS):
        parts, names = backend.decompose(backend.batch(rows), layer, v)
        assert parts.shape == (len(rows), len(names)) and names[0] == "L0H0"
        stream = last_states(backend, rows, [Site(layer)])[Site(layer)].double() @ v
        torch.testing.assert_close(parts.sum(1), stream, atol=1e-4, rtol=0)
        mlp = last_states(backend, rows, [Site(0, "mlp_out")])[Site(0, "mlp_out")].double() @ v
        torch.testing.assert_close(parts[:, names.index("0_mlp_out")], mlp, atol=1e-5, rtol=0)
        assert Component.parse(names[1]) == Component("head", 0, 1)


@pytest.mark.parametrize(("family", "why"), [("gemma2", "do not add up"), ("qwen3_next", "2 of 4 blocks have heads")])
def test_models_whose_parts_do_not_add_up_are_refused(family: str, why: str) -> None:
    backend = _backend(family)
    with pytest.raises(UserError, match=why):
        backend.decompose(backend.batch(tiny_rows(backend)), 3, torch.ones(D_MODEL))


def test_ablating_heads_equals_the_plain_way() -> None:
    """All heads of a block at zero is its attention output without them, at the last token, for every set in one batch."""
    backend = _backend("llama")
    rows = tiny_rows(backend)
    sites = sorted(backend.head_sites)
    means = {site: z.mean(0) for site, z in last_heads(backend, rows, sites).items()}
    sets = [[], [(1, 2)], [(1, 2), (3, 0)], [(0, 0), (0, 1), (0, 2), (0, 3)]]
    got = ablated_log_odds(backend, rows[0], sets, means, TOKENS)
    torch.testing.assert_close(got[:1], log_odds(backend, rows[:1], TOKENS), atol=1e-5, rtol=0)

    class Plain:
        sites, pointwise = frozenset({Site(1, "z"), Site(3, "z")}), False

        def __call__(self, x: Tensor, at: object) -> Tensor:
            x, site = x.clone(), at.site  # type: ignore[attr-defined]
            head = {1: 2, 3: 0}[site.layer]
            x[:, -1, head] = means[site][head]
            return x

    torch.testing.assert_close(got[2:3], log_odds(backend, rows[:1], TOKENS, Plain()), atol=1e-5, rtol=0)
    assert float((got - got[0]).abs().max()) > 1e-3
    own = {site: z[0] for site, z in last_heads(backend, rows[:1], sites).items()}
    same = ablated_log_odds(backend, rows[0], sets, own, TOKENS)  # a head set to what it is
    torch.testing.assert_close(same, got[:1].expand(len(sets)), atol=1e-5, rtol=0)


def test_a_set_head_changes_only_the_last_token_of_its_row() -> None:
    backend = _backend("llama")
    rows = tiny_rows(backend)[:2]
    site = Site(1, "z")
    edit = SetHeads({site: torch.zeros(4, 8)}, {site: torch.tensor([[True, False, False, False], [False] * 4])})
    before, after = RecordLast(frozenset({Site(2)})), RecordLast(frozenset({Site(2)}))
    backend.run(backend.batch(rows), before)
    both = compose(edit, after)
    assert both is not None
    backend.run(backend.batch(rows), both)
    change = (after.states[Site(2)] - before.states[Site(2)]).abs().amax(1)
    assert float(change[0]) > 1e-3 and float(change[1]) < 1e-5
    with pytest.raises(UserError, match=r"no site blocks.1.attn.hook_z"):
        tiny_backend("llama", "hooks").logits(backend.batch(rows), edit)


def test_attention_adds_up_and_goes_to_its_spans() -> None:
    backend = _backend("qwen2")
    row = tiny_rows(backend)[0]
    attention = backend.attention(row, [(0, 1), (3, 2)])
    assert attention.shape == (2, len(row.ids))
    mass = mass_by_span(attention, (row.prefix, row.instruction))
    assert mass.shape == (2, len(SPANS))
    torch.testing.assert_close(mass.sum(1), torch.ones(2))
    torch.testing.assert_close(mass[:, 2], attention[:, row.prefix : row.instruction].sum(1))


def _planted(seed: int) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    refused = torch.rand(60, generator=generator) < 0.5
    parts = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    parts[:, 11] = 4.2  # an embedding
    return parts, refused, [f"subject {i % 12}" for i in range(60)]


def test_a_planted_component_is_found_and_topic_is_not() -> None:
    parts, refused, subjects = _planted(0)
    parts[:, 3] += 2.0 * refused
    found = differences(parts, refused, subjects, 0)
    assert [i for i, q in enumerate(found["q"]) if q <= 0.01] == [3]
    assert [i for i, q in enumerate(found["within_subject_q"]) if q <= 0.01] == [3]
    assert found["low"][3] < 2 < found["high"][3] and found["value"][3] > found["null_max"]
    assert found["value"][11] == found["low"][11] == found["high"][11] == pytest.approx(0, abs=1e-9)
    assert found["p"][11] == 1


def test_what_a_component_writes_for_a_subject_is_not_refusal() -> None:
    """Subjects differ in what is written for them and in how often they are refused; at most 5 % of such components may fire."""
    runs, plain, within, topic = 400, 0, 0, torch.arange(60) % 12
    generator = torch.Generator().manual_seed(3)
    for seed in range(runs):
        rate = torch.randn(12, generator=generator).mul(3).sigmoid()
        x = torch.randn(12, generator=generator)[topic] + 0.5 * torch.randn(60, generator=generator)
        found = differences(x[:, None], torch.rand(60, generator=generator) < rate[topic], topic.tolist(), seed, 99)
        plain += found["p"][0] <= 0.05
        within += found["within_subject_q"][0] <= 0.05
    assert within / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert plain / runs > 0.15


def test_permuted_labels_find_nothing() -> None:
    hits = sum(min(differences(*_planted(seed), 0, 400)["q"]) <= 0.05 for seed in range(40))
    assert hits <= 5


def test_top_and_random_heads() -> None:
    components = [Component("head", 0, 0), Component("mlp", 0), Component("head", 0, 1), Component("head", 1, 0)]
    assert top_heads([1.0, 9.0, 3.0, 2.0], components, 2) == [(0, 1), (1, 0)]
    draws = random_heads([(0, 1), (2, 0), (2, 3)], {0: 4, 1: 4, 2: 4}, 20, 0)
    assert len({str(d) for d in draws}) > 3
    for draw in draws:
        assert [layer for layer, _ in draw] == [0, 2, 2] and not set(draw) & {(0, 1), (2, 0), (2, 3)}
        assert len(set(draw)) == 3


def test_chosen_heads_beside_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    random = 0.3 * torch.randn(20, 40, generator=generator, dtype=torch.float64)
    found = against_random(random.mean(1) + 2, random)
    assert found["rank"] == 1 and found["p"] < 1e-3 and found["effect"]["n"] == 20
    hits = sum(
        against_random(x[:, 0], x[:, 1:])["p"] <= 0.05
        for x in (torch.randn(20, 11, generator=generator, dtype=torch.float64) for _ in range(200))
    )
    assert 1 <= hits <= 20


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [*study_arguments(tmp_path, monkeypatch), "--heads", "2", "--random", "6", "--prompts", "6"]


def test_the_whole_study_resumes_and_draws(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, arguments) == 0
    first = capsys.readouterr().out
    result = load_result(tmp_path / "out", kind=study.KIND)
    data = result.data
    assert data["applicable"], data["reason"]
    assert sum(data["report"]["value"]) == pytest.approx(data["total"]["value"], abs=1e-4)
    assert len(data["chosen"]) == 2 and float(result.tensors["direction"].norm()) == pytest.approx(1, abs=1e-5)
    assert sum(s["effect"]["value"] for s in data["attention"]["spans"].values()) == pytest.approx(1, abs=1e-4)
    steps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("*/result.json")}
    assert len(steps) == 7
    # Finished steps need no second model.
    monkeypatch.setattr(component_steps, "load_backend", lambda *_, **__: pytest.fail("loaded again"))
    assert run_command(Config, run, arguments) == 0
    assert capsys.readouterr().out == first
    assert {p: p.stat().st_mtime_ns for p in steps} == steps
    for name in ("component_attribution", "attention_patterns"):
        figure = importlib.import_module(f"figures.{name}")
        for out in ("a", "b"):
            assert figure.main(["--result", str(tmp_path / "out"), "--out", str(tmp_path / out)]) == 0
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 6
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_not_applicable_and_bad_settings(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, [*arguments, "--layer", "9"]) == 2
    assert "choose 1 to 4" in capsys.readouterr().err
    assert run_command(Config, run, [*arguments, "--layer", "1", "--heads", "3"]) == 2
    assert "take half of them" in capsys.readouterr().err
    never = study_arguments(tmp_path, monkeypatch, refuses=False)
    assert run_command(Config, run, [*never, "--scores", str(tmp_path / "never")]) == 0
    assert "not applicable: base refusal 0%" in capsys.readouterr().out
    assert not load_result(tmp_path / "out", kind=study.KIND).data["applicable"]
