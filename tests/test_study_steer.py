"""Selective steering on a tiny random model: the shortcut is exact, choices are as stated, configurations load and apply."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from analyses import apply_steering
from analyses.steer import Config, run
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.command_line import run as run_command
from rsteer_interp.directions.retain import null_space
from rsteer_interp.evaluation import reply_log_probs
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import add
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.results import load_result
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.steering import Steering, load_steering
from rsteer_interp.studies.selective_steering import KIND
from rsteer_interp.studies.selective_steering.condition import holds, scores
from rsteer_interp.studies.selective_steering.directions import families, kept_refusal
from rsteer_interp.studies.selective_steering.frontier import frontier as report_frontier
from rsteer_interp.studies.selective_steering.replies import Outcome, outcome, outcomes_of_each
from rsteer_interp.studies.selective_steering.report_split import induction_targets, removal_targets
from rsteer_interp.studies.selective_steering.search import Candidate, Found, bands, search, steering_for
from rsteer_interp.studies.study import Study
from tests.pushes import equal_dose, pushes
from tests.study_fixture import study_arguments
from tests.tiny_models import tiny_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steer")


@pytest.fixture
def arguments(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    small = ["--samples", "2", "--frontier", "4", "--conversations", "3", "--doses", "0.1", "0.5"]
    return [*study_arguments(place, monkeypatch), *small]


@pytest.fixture
def study(arguments: list[str]) -> Study:
    return Study.open(KIND, tyro.cli(Config, args=arguments))


def _steering(study: Study, gate: Gate | None, decoding: bool = True) -> Steering:
    sites = [Site(2), Site(3)]
    vectors = dict(zip(sites, random_unit_vectors(2, study.backend.d_model, 0).float(), strict=True))
    unit = dict.fromkeys(sites, 4.0)
    return steering_for(study, "test", vectors, vectors, unit, Candidate((2, 3), 1.0, decoding), -1.0, gate)


@pytest.mark.parametrize("pooling", ["last", "instruction"])
def test_running_only_the_edited_prompts_gives_what_running_all_gives(study: Study, pooling: Any) -> None:
    w = torch.randn(study.backend.d_model, generator=torch.Generator().manual_seed(1)).double()
    free = Gate(Site(1), w, 0.0, "projection", pooling)
    name = "borderline"
    gate = replace(free, threshold=float(scores(study, "report", free, name).median()))
    held = holds(study, gate, "report", name)
    assert 0 < int(held.sum()) < len(held)
    steering = _steering(study, gate)
    got = outcome(study, "report", name, steering)
    texts = study.replies("report", name).texts
    replies = reply_and_judge(
        study.backend, study.template.encode_all(texts), texts, study.judge, max_new_tokens=4, edit=steering.edit()
    )
    assert got.after.tolist() == [group[0].verdict.refused for group in replies]
    assert not torch.equal(got.after, got.before)
    said = [() if group[0].empty else group[0].ids for group in replies]
    expected = reply_log_probs(study.backend, study.template.encode_all(texts), said)
    torch.testing.assert_close(got.log_prob_after[held], expected[held], atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(got.edited, held)


def test_configurations_decoded_together_give_what_each_gives(study: Study) -> None:
    w = torch.randn(study.backend.d_model, generator=torch.Generator().manual_seed(1)).double()
    gate = replace(
        Gate(Site(1), w, 0.0), threshold=float(scores(study, "report", Gate(Site(1), w, 0.0), "harmful").median())
    )
    steerings = [_steering(study, None), _steering(study, gate), _steering(study, gate, decoding=False)]
    for got, steering in zip(outcomes_of_each(study, "report", "harmful", steerings), steerings, strict=True):
        alone = outcome(study, "report", "harmful", steering)
        assert torch.equal(got.after, alone.after) and torch.equal(got.edited, alone.edited)
        torch.testing.assert_close(got.log_prob_after, alone.log_prob_after, atol=1e-5, rtol=0, equal_nan=True)


def test_the_families_keep_what_they_promise(study: Study) -> None:
    found, _ = families(study, study.config)  # type: ignore[arg-type]
    harm = kept_refusal(study, study.config)  # type: ignore[arg-type]
    for site, (kept, answered) in harm.items():
        gap = kept.mean - answered.mean
        assert abs(float(found["null_space"][site].double() @ gap)) < 1e-5 * float(gap.norm())
        torch.testing.assert_close(
            found["null_space"][site].double(),
            torch.nn.functional.normalize(null_space(found["md"][site], [gap]), dim=0),
            atol=1e-6,
            rtol=0,
        )
        for vectors in found.values():
            assert float(vectors[site].norm()) == pytest.approx(1, abs=1e-5)


def test_the_frontiers_null_is_the_mean_difference_turned_by_one_rotation_for_all_layers(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large a push in the sum of the layers, of which the plain draws for each layer were not."""
    found, references = families(study, study.config)  # type: ignore[arg-type]
    asked: list[Edit] = []

    def caught(*args: Any, **options: Any) -> None:
        asked.extend(args[4])
        raise InterruptedError

    frontier = sys.modules[report_frontier.__module__]
    monkeypatch.setattr(frontier, "replies_of_each", caught)
    unit = dict.fromkeys(study.sites, 3.0)
    gate = Gate(Site(1), torch.ones(study.backend.d_model).double(), 0.0)
    with pytest.raises(InterruptedError):
        report_frontier(study, study.config, found, references, unit, (1, 2, 3), gate)  # type: ignore[arg-type]
    random = asked[-frontier.RANDOM :]
    own = add({Site(n): found["md"][Site(n)] for n in (1, 2, 3)}, {Site(n): -0.5 * 3.0 for n in (1, 2, 3)})
    pushed, *nulls = pushes(study.backend, tiny_rows(study.backend), own, *random)
    assert len(nulls) == frontier.RANDOM and all(equal_dose(pushed, null) for null in nulls)


def _fake_outcomes(monkeypatch: pytest.MonkeyPatch, rates: Any, asked: list[Any] | None = None, n: int = 100) -> None:
    """Replies as `rates(dose, while decoding)` says: the share refused, the nats lost per token, the share of empty replies."""

    def fake(study: Any, split: str, name: str, steerings: Any) -> list[Outcome]:
        assert split == "select"
        found = []
        for steering in steerings:
            refused, nats, empty = rates(-steering.alpha, steering.while_decoding)
            after = torch.arange(n) < n * refused
            log_prob = torch.full((n,), -1.0 - nats, dtype=torch.float64)
            log_prob[n - round(n * empty) :] = torch.nan
            before, own = torch.arange(n) % 2 == 0, torch.full((n,), -1.0, dtype=torch.float64)
            subjects = [str(i) for i in range(n)]
            found.append(Outcome(subjects, before, after, torch.ones(n, dtype=torch.bool), own, log_prob))
        if asked is not None:
            asked.append([(round(-s.alpha, 6), s.while_decoding) for s in steerings])
        return found

    monkeypatch.setattr(sys.modules[search.__module__], "outcomes_of_each", fake)


def _searched(study: Study, stage: str, doses: tuple[float, ...], places: list[bool], bound: float) -> Found:
    config = replace(study.config, doses=doses)  # type: ignore[type-var]

    def steering_of(candidate: Candidate) -> Steering:
        return replace(_steering(study, None, candidate.while_decoding), alpha=-candidate.dose)

    at = [((2, 3), decoding) for decoding in places]
    return search(study, config, stage, steering_of, "harmful", at, lambda r: r.rate <= bound)  # type: ignore[arg-type]


def test_doses_rise_until_the_aim_is_met_and_the_most_fluent_wins(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {(0.1, False): (0.5, 0.0, 0.0), (0.2, False): (0.05, 0.4, 0.0), (0.1, True): (0.5, 0.1, 0.0),
             (0.2, True): (0.08, 0.2, 0.0)}  # fmt: skip
    asked: list[Any] = []
    _fake_outcomes(monkeypatch, lambda dose, decoding: rates[round(dose, 6), decoding], asked)
    found = _searched(study, "search_a", (0.1, 0.2, 0.4), [False, True], 0.1)
    assert found.chosen == Candidate((2, 3), 0.2, True) and found.met and not found.edge
    assert asked == [[(0.1, False), (0.1, True)], [(0.2, False), (0.2, True)]], (
        "no dose after the first that meets the aim"
    )
    places = [(t.candidate.while_decoding, t.candidate.dose) for t in found.trials]
    assert places == sorted(places), "as they were given, whatever shared a round"


def test_silence_is_neither_an_answer_nor_fluent(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dose at which most replies are empty refuses nothing; once it counted as certain (log-probability 0) and won."""
    _fake_outcomes(
        monkeypatch, lambda dose, decoding: (0.05, 0.3, 0.9 if decoding else 0.0) if dose > 0.15 else (1, 0, 0)
    )
    found = _searched(study, "search_silent", (0.1, 0.2, 0.4), [False, True], 0.1)
    assert found.chosen == Candidate((2, 3), 0.2, False) and found.met
    silent = [t for t in found.trials if t.candidate.while_decoding and t.candidate.dose > 0.15]
    assert silent and all(t.fluency.empty == 90 and t.refused.rate <= 0.1 for t in silent)


@pytest.mark.parametrize(("needed", "edge"), [(0.03, False), (0.3, False), (1.5, False), (1e-4, True), (1e4, True)])
def test_doses_go_beyond_the_grid_until_the_smallest_that_does_is_between_two(
    study: Study, monkeypatch: pytest.MonkeyPatch, needed: float, edge: bool
) -> None:
    """A planted dose from which on the aim is met, below, inside and above the grid: its ratio to the chosen one is a step at
    most; out of reach the result says that it is at the edge."""
    _fake_outcomes(monkeypatch, lambda dose, decoding: (0.0 if dose >= needed else 1.0, 0.1, 0.0))
    found = _searched(study, f"search_{needed}", (0.1, 0.2, 0.4), [False], 0.1)
    doses = sorted(t.candidate.dose for t in found.trials)
    assert found.edge == edge and found.met == (needed < 1e4)
    if not edge:
        assert needed <= found.chosen.dose < 2 * needed and doses[0] < found.chosen.dose
    assert doses[0] >= 0.1 / 8 - 1e-9 and doses[-1] <= 3.2 + 1e-9


def test_bands_lie_between_the_condition_and_the_last_layer() -> None:
    for n_layers, first in ((4, 1), (12, 3), (24, 6), (48, 20)):
        found = bands(n_layers, first)
        assert found and all(first <= x < n_layers - 1 for band in found for x in band)
        assert len(set(found)) == len(found)


def test_targets_say_what_is_missed() -> None:
    config = Config()

    def row(before: float, after: float, stayed: float) -> dict[str, Any]:
        rates = {k: vars(Rate.from_count(round(100 * v), 100)) for k, v in (("before", before), ("after", after))}
        one = {"value": 1.5, "low": 1.4, "high": 1.6, "n": 100}
        change = {"value": after - before, "low": after - before - 0.1, "high": after - before + 0.1, "n": 100}
        stay = vars(Rate.from_count(round(100 * stayed), 100))
        return {**rates, "difference": change, "stay_refused": stay, "fluency": {"ratio": one, "empty": 6, "n": 100}}

    names = (config.remove, config.contrast, *config.keep)
    sets = {name: row(0.4, 0.4, 1.0) for name in names} | {config.remove: row(0.7, 0.2, 0.2)}
    sets["borderline"] = row(0.3, 0.35, 1.0)
    found = {
        "sets": sets,
        "kl": {"value": 0.06, "low": 0.0, "high": 0.1, "n": 3},
        "fluency": {"ratio": None, "empty": 6, "n": 100},
    }
    missed = [t["name"] for t in removal_targets(config, found) if not t["met"]]
    assert [name.split()[0] for name in missed] == [
        config.remove,
        "borderline",
        "KL",
        "perplexity",
        f"{config.remove}:",
    ]
    induced = {"sets": {"taxes": row(0.1, 0.89, 1.0), "general": row(0.0, 0.06, 1.0), "harmful": row(0.5, 0.46, 1.0)}}
    assert [t["met"] for t in induction_targets("taxes", induced)] == [False, False, True]


def test_saved_configurations_apply_elsewhere(
    arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Config, run, arguments) == 0
    data = load_result(place / "out", kind=KIND).data
    assert data["applicable"], data["reason"]
    for part in ("remove", "induce"):  # the watched sets are read on report alone, for either condition
        condition = data[part]["condition"]
        assert "world_politics" in condition["holds"]
        assert "world_politics" not in condition["holds_select"] and "world_politics" not in condition["outside"]
    prompts = place / "mine.txt"
    prompts.write_text("tell me about the city\nwhy is the river ?\n")
    model = arguments[arguments.index("--model") + 1]
    for name, sign in (("remove", -1), ("induce", 1)):
        saved = place / "out" / "steering" / name
        steering = load_steering(saved)
        assert steering.gate is not None and steering.alpha * sign > 0
        applied = ["--steering", str(saved), "--prompts", str(prompts), "--model", model, "--backend", "hooks"]
        applied += ["--judge", "pattern", "--out", str(place / f"applied_{name}")]
        assert run_command(apply_steering.Config, apply_steering.run, applied) == 0
        assert (place / f"applied_{name}" / "summary.json").is_file()
    capsys.readouterr()
