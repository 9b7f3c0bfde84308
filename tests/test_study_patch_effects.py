"""Patching: theorems on tiny models, a seeded fault, planted maps and nulls, and the whole study on a tiny random model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rsteer_interp.studies.patch_effects as study
from analyses.patch_effects import Config, run
from figures import patch_effects as figure
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.command_line import run as run_command
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.patching import Cell, Patch, PatchLast, all_states, patched_log_odds
from rsteer_interp.refusal_scores import replies_of_each
from rsteer_interp.results import load_result
from rsteer_interp.studies.patch_map import control, hand_over, held_out_best, make_pairs, patch_map
from tests.refusing_model import OpeningJudge
from tests.study_fixture import study_arguments
from tests.tiny_models import KINDS, Kind, tiny_backend

TOKENS = (5, 9, 30)
TEXTS = ("tell me about the city", "why is the bread ?", "write a law , please")


def _three(backend: Backend) -> tuple[list[Tokens], dict[Site, Tensor], list[Site]]:
    rows = backend.template().encode_all(TEXTS)
    sites = [s for s in sorted(backend.sites) if s.point != "resid_post"]
    return rows, all_states(backend, rows, sites), sites


class _Plain:
    """The same patch the plain way, on one unpadded prompt."""

    pointwise = False

    def __init__(self, cell: Cell, values: Tensor) -> None:
        self.cell, self.values, self.sites = cell, values, frozenset({cell.site})

    def __call__(self, x: Tensor, at: At) -> Tensor:
        x = x.clone()
        x[0, self.cell.first : self.cell.stop] = self.values[self.cell.first : self.cell.stop]
        return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "qwen3_next", "gpt2"])
def test_every_cell_equals_the_plain_way_and_itself_is_a_no_op(family: str, kind: Kind) -> None:
    backend = tiny_backend(family, kind, batch_size=7)
    rows, states, sites = _three(backend)
    cells = study.span_cells(rows[0], sites)
    got = patched_log_odds(backend, rows[0], states, cells, TOKENS)
    base = log_odds(backend, rows, TOKENS)
    torch.testing.assert_close(got[0], base[:1].expand(len(cells)), atol=1e-5, rtol=0)
    for i in range(0, len(cells), 3):
        plain = log_odds(backend, rows[:1], TOKENS, _Plain(cells[i], states[cells[i].site][1]))
        torch.testing.assert_close(got[1, i : i + 1], plain, atol=1e-5, rtol=0)


def test_all_positions_or_the_last_state_make_it_the_donor() -> None:
    backend = tiny_backend("qwen2")
    rows, states, _ = _three(backend)
    base = log_odds(backend, rows, TOKENS)
    last = len(rows[0].ids)
    whole = [Cell(Site(layer), 0, last) for layer in range(backend.n_layers + 1)]
    end = Cell(Site(backend.n_layers), last - 1, last)
    got = patched_log_odds(backend, rows[0], states, [*whole, end], TOKENS)
    assert float((base - base[0]).abs().max()) > 0.1
    torch.testing.assert_close(got, base[:, None].expand_as(got), atol=1e-5, rtol=0)


def test_a_patch_of_the_last_token_is_the_cell_there() -> None:
    """Alone, and as one of many settings of a batch, with the log-odds that generation under it reads."""
    backend = tiny_backend("qwen2")
    rows, states, _ = _three(backend)
    last, sites = len(rows[0].ids), [Site(1), Site(3)]
    cells = [Cell(site, last - 1, last) for site in sites]
    wanted = patched_log_odds(backend, rows[0], states, cells, TOKENS)
    edits = [PatchLast(site, states[site][1, -1]) for site in sites]
    got = log_odds_of_each(backend, rows[:1], TOKENS, edits)[:, 0]
    torch.testing.assert_close(got, wanted[1], atol=1e-5, rtol=0)
    read = [replies[0].log_odds for replies in replies_of_each(
        backend, rows[:1], ["why"], OpeningJudge(), edits, max_new_tokens=2, refusal_tokens=TOKENS
    )]  # fmt: skip
    torch.testing.assert_close(torch.tensor(read).double(), wanted[1], atol=1e-5, rtol=0)


def test_the_template_prefix_is_the_same_in_all_prompts() -> None:
    backend = tiny_backend("qwen2")
    rows, states, _ = _three(backend)
    for value in states.values():
        prefix = value[:, : rows[0].prefix]
        torch.testing.assert_close(prefix, prefix[:1].expand_as(prefix), atol=1e-5, rtol=0)


def test_a_patch_where_nothing_is_run_is_an_error() -> None:
    """A fault: it says that it leaves the template prefix, which is then run once for all rows, but names a position in it."""
    backend = tiny_backend("llama")
    rows, _, _ = _three(backend)
    lie = Patch(Site(1), torch.tensor([0]), torch.tensor([1]), torch.zeros(1, backend.d_model), leaves_prefix=True)
    with pytest.raises(UserError, match="in the prefix"):
        log_odds(backend, rows, TOKENS, lie)
    log_odds(backend, rows, TOKENS, replace(lie, leaves_prefix=False))
    uneven = backend.template().encode_all(["why", "tell me why"])
    with pytest.raises(UserError, match="equal lengths"):
        all_states(backend, uneven, [Site(1)])


def _tokens(instruction: int) -> Tokens:
    return Tokens(tuple(range(instruction + 5)), 3, 3 + instruction, 5 + instruction)


def test_pairs_are_of_equal_length_and_other_prompts_of_other_subjects() -> None:
    lengths = [4, 4, 4, 6, 4, 4, 4, 6, 9, 9]
    rows = [_tokens(n) for n in lengths]
    subjects = ["a", "a", "b", "a", "x", "x", "y", "x", "a", "x"]
    pairs = make_pairs(rows, [0, 1, 2, 3, 8], [4, 5, 6, 7, 9], subjects, 12, 0)
    assert len(pairs) == 3  # only length 4 has another prompt of each class
    assert {p.refused for p in pairs} == {0, 1, 2} and {p.answered for p in pairs} == {4, 5, 6}
    for p in pairs:
        assert p.other_refused != p.refused and p.other_answered != p.answered
        assert subjects[p.other_refused] != subjects[p.refused]
        assert len({lengths[i] for i in vars(p).values()}) == 1
    assert len(make_pairs(rows, [0, 1, 2], [4, 5, 6], subjects, 2, 0)) == 2
    assert make_pairs(rows, [3], [7], subjects, 2, 0) == []


def test_a_planted_cell_is_found_and_only_it() -> None:
    generator = torch.Generator().manual_seed(0)
    gap = 3 + 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)
    change = 0.2 * torch.randn(12, 2, 20, generator=generator, dtype=torch.float64)
    change[:, 0, 7] += 0.5 * gap
    found, mirrored = patch_map(change, gap, 0), patch_map(-change, -gap, 0)
    control([found, mirrored])
    assert [i for i, q in enumerate(found["q"]) if q <= 0.05] == [7]
    assert found["share"]["low"][7] < 0.5 < found["share"]["high"][7]
    assert abs(found["null"]["value"][7]) < 0.1
    assert mirrored["share"]["value"] == pytest.approx(found["share"]["value"])  # a share has no direction
    best, share = held_out_best(change[:, 0], gap)
    assert best == 7 and share.low < 0.5 < share.high


def test_swapped_donors_find_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(40):
        change = torch.randn(8, 2, 15, generator=generator, dtype=torch.float64)
        found = patch_map(change, torch.full((8,), 3.0, dtype=torch.float64), 0, 50)
        control([found])
        hits += min(found["q"]) <= 0.05
    assert hits <= 5


def test_the_hand_over_is_where_the_late_place_overtakes() -> None:
    gap = -torch.full((10,), 2.0, dtype=torch.float64)  # answered into refused: log-odds fall
    layers = [1, 3, 5, 7]
    share = torch.tensor([[1.0, 0.8, 0.3, 0.0]], dtype=torch.float64)
    noise = 0.05 * torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    early = (share + noise) * gap[:, None]
    late = (1 - share) * gap[:, None]
    assert hand_over(early, late, gap, layers, 0) == {"value": 5.0, "low": 5.0, "high": 5.0, "n": 10}
    assert hand_over(early + 4 * gap[:, None], late, gap, layers, 0) is None


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [*study_arguments(tmp_path, monkeypatch), "--report", "96", "--pairs", "6"]


def test_the_whole_study_resumes_and_draws(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, arguments) == 0
    first = capsys.readouterr().out
    data = load_result(tmp_path / "out", kind=study.KIND).data
    assert data["applicable"], data["reason"]
    assert data["layers"] == [1, 3] and data["spans"][0] == "instruction" and 4 <= data["n"] <= 6
    last = next(
        i
        for i, c in enumerate(data["cells"])
        if (c["layer"], c["point"], c["span"]) == (3, "resid_pre", len(data["spans"]) - 1)
    )
    for into in data["into"].values():
        assert into["share"]["value"][last] > 0.5  # one block before the end nearly all sits at the last token
        assert all(0 <= p <= q <= 1 for p, q in zip(into["p"], into["q"], strict=True))
    steps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("*/result.json")}
    assert len(steps) == data["n"] + len(study.INTO)  # a step per pair, and the judged patches of either way
    assert set(data["read_out"]) == {"patches into refused prompts", "patches into answered prompts"}
    assert run_command(Config, run, arguments) == 0
    assert capsys.readouterr().out == first
    assert {p: p.stat().st_mtime_ns for p in steps} == steps
    _draws_the_same(tmp_path, ["patch_effects"])


def _draws_the_same(tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        for out in ("a", "b"):
            module = importlib.import_module(f"figures.{name}")
            assert module.main(["--result", str(tmp_path / "out"), "--out", str(tmp_path / out)]) == 0
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 3 * len(names)
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_too_few_pairs_and_no_refusals_are_plain_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = study_arguments(tmp_path, monkeypatch)
    assert run_command(Config, run, few) == 0
    assert "pairs of equal length" in capsys.readouterr().out
    never = study_arguments(tmp_path, monkeypatch, refuses=False)
    assert run_command(Config, run, [*never, "--scores", str(tmp_path / "never")]) == 0
    assert "not applicable: base refusal 0%" in capsys.readouterr().out
    assert not load_result(tmp_path / "out", kind=study.KIND).data["applicable"]
    assert figure.KIND == study.KIND and not (tmp_path / "out" / "figures").exists()
