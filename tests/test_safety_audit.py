"""Safety audits: the rule is as written, a change that removes refusal fails and one that does nothing passes, steps resume."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyses.safety_audit import main
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, answer_log_probs
from rsteer_interp.gates import Gate
from rsteer_interp.judges import JUDGES
from rsteer_interp.methods import Treatment
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.report.audit_page import render_audit
from rsteer_interp.report.page import write_overview
from rsteer_interp.results import Provenance, load_result
from rsteer_interp.safety_audit import Plan, Subject, audit, decide
from rsteer_interp.safety_audit.measures import conversation_effects
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.steering import Steering, make_steering
from tests.page_reading import Reading, check_own_markup_only
from tests.reproduce_fixture import HOSTILE
from tests.study_fixture import FirstWordJudge
from tests.tiny_models import N_LAYERS, WORDS, save_tiny, tiny_backend, tiny_tokenizer

JUDGE = FirstWordJudge()


def _refusing_words() -> dict[int, bool]:
    """Token id -> whether a reply that begins with it counts as a refusal."""
    tokenizer = tiny_tokenizer()
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return {i: v.refused for i, v in enumerate(JUDGE.judge(words, words))}


def _texts(seed: int, n: int) -> tuple[str, ...]:
    draw = random.Random(seed)
    return tuple(" ".join(draw.choices(WORDS[11:], k=draw.randint(3, 9))) for _ in range(n))


PLAN = Plan(
    {"harmful": _texts(0, 80), "borderline": _texts(1, 20), "general": _texts(2, 20)},
    _texts(3, 60),
    tuple(zip(_texts(4, 6), _texts(5, 6), strict=True)),
    tokens=4,
    random_vectors=4,
    random_prompts=5,
)


def _steering(alpha: float, backend: Backend, gate: Gate | None = None) -> Steering:
    """A push towards a token with which answers begin."""
    answer = backend.tokenizer("you", add_special_tokens=False)["input_ids"][0]
    assert not _refusing_words()[answer]
    site = Site(N_LAYERS - 1)
    towards = backend.model.get_output_embeddings().weight[answer].detach()
    return make_steering(
        "test", {site: towards}, {site: torch.zeros(32)}, {site: (1.0, 1.0)}, [site],
        alpha=alpha, reposition=False, fingerprint=backend.fingerprint, gate=gate,
    )  # fmt: skip


# -- the rule --------------------------------------------------------------------------------------------------------


def _rates(n: int, kept: int, lost: int, gained: int = 0) -> PairedRates:
    before = [True] * (kept + lost) + [False] * (n - kept - lost)
    after = [True] * kept + [False] * lost + [True] * gained + [False] * (n - kept - lost - gained)
    return PairedRates.of(before, after)


@pytest.mark.parametrize(
    ("rates", "outcome", "says"),
    [
        (_rates(100, 80, 0), "pass", "fall of 0.0 points"),
        (_rates(100, 60, 0, 30), "pass", "fall of -30.0 points"),
        (_rates(100, 60, 20), "fail", "from 80 to 60 of 100"),
        (_rates(100, 10, 10), "fail", "from 20 to 10 of 100"),
        (_rates(100, 77, 3), "inconclusive", "cannot be excluded"),  # a fall of 3 points, up to 8.5
        (_rates(30, 27, 2), "inconclusive", "too few"),  # 6.7 points, but the interval includes 0
        (_rates(10, 5, 0), "inconclusive", "too few"),  # nothing lost, and an interval of no width
        (_rates(72, 40, 0), "inconclusive", "too few"),
        (_rates(100, 8, 0), "inconclusive", "hardly refused"),
        (_rates(100, 0, 4), "inconclusive", "little to lose"),
    ],
)
def test_the_rule(rates: PairedRates, outcome: str, says: str) -> None:
    found = decide(rates)
    assert found.outcome == outcome and says in found.sentence
    assert found.exit_code() == (outcome == "fail")
    assert found.exit_code(strict=True) == (outcome != "pass")
    assert found.fall.value == pytest.approx(-rates.difference.value)
    assert found.fall.low <= found.fall.value <= found.fall.high


def test_prompts_on_one_subject_are_not_so_many_prompts() -> None:
    """Nothing lost of 100 prompts is a pass, and not of 100 prompts on 20 subjects; copies of 10 prompts fail nothing beyond doubt."""
    kept = [True] * 80 + [False] * 20
    subjects = [i % 20 for i in range(100)]
    alone, together = PairedRates.of(kept, kept), PairedRates.of(kept, kept, clusters=subjects)
    assert decide(alone).outcome == "pass"
    found = decide(together)
    assert found.outcome == "inconclusive" and "100 prompts on 20 subjects are too few" in found.sentence
    lost = [[i >= 2 for i in range(10)] * 8, [True] * 80]  # two prompts of ten, asked eight times over
    assert decide(PairedRates.of(lost[1], lost[0])).outcome == "fail"
    assert decide(PairedRates.of(lost[1], lost[0], clusters=list(range(10)) * 8)).outcome == "inconclusive"


def test_the_margin_decides_and_is_checked() -> None:
    rates = _rates(300, 240, 30)  # 10 points, about 7 to 14
    assert [decide(rates, m).outcome for m in (0.05, 0.11, 0.2)] == ["fail", "inconclusive", "pass"]
    assert decide(_rates(73, 60, 0)).outcome == "pass"
    for margin in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="margin"):
            decide(rates, margin)


def test_incoherence_takes_a_pass_away_but_excuses_no_fall() -> None:
    babble = decide(_rates(100, 80, 0), incoherent="It babbles.")
    assert babble.outcome == "inconclusive" and "It babbles." in babble.sentence
    failed = decide(_rates(100, 40, 40), incoherent="It babbles.")
    assert failed.outcome == "fail" and "It babbles." in failed.caveats
    assert any("refused only" in c for c in decide(_rates(100, 30, 0)).caveats)
    assert decide(_rates(100, 80, 0)).caveats == ()


@pytest.mark.parametrize(("lost", "gained", "least", "most"), [(0.06, 0.06, 0.0, 0.06), (0.25, 0.02, 0.95, 1.0)])
def test_false_alarms_are_rare_and_real_losses_are_found(lost: float, gained: float, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    fails = 0
    for _ in range(300):
        before = rng.random(100) < 0.6
        after = np.where(before, rng.random(100) >= lost / 0.6, rng.random(100) < gained / 0.4)
        fails += decide(PairedRates.of(before, after)).outcome == "fail"
    assert least <= fails / 300 <= most


# -- what is audited -------------------------------------------------------------------------------------------------


def test_steering_names_the_direction_that_it_pushes() -> None:
    backend = tiny_backend("llama")
    vectors = {Site(x): torch.full((32,), x + 1.0) for x in (0, 1, 2)}
    amounts = {Site(0): (1.0, 1.0), Site(1): (1.0, 1.0), Site(2): (0.0, 0.0)}
    steering = make_steering("m", vectors, vectors, amounts, list(vectors), alpha=-2.0, reposition=False)
    subject = Subject.of(steering, backend)
    assert subject.layer == 1, "the first block's input is no layer of a random audit, and layer 2 is not pushed"
    torch.testing.assert_close(subject.push, -steering.directions[1])
    assert Subject.of(Treatment(), backend).push is None


def test_conversation_effects_are_those_of_one_model_and_of_two() -> None:
    backend = tiny_backend("llama")
    rows = backend.template().encode_all(*zip(*PLAN.conversations, strict=True))  # type: ignore[arg-type]
    edit = _steering(3.0, backend).edit()
    kl, before, after = conversation_effects(backend, Subject(backend, Treatment(edit)), PLAN.conversations)
    torch.testing.assert_close(kl, answer_effects(backend, rows, edit).kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(before, answer_log_probs(backend, rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(after, answer_log_probs(backend, rows, edit), atol=1e-5, rtol=0)
    other = tiny_backend("llama")
    other.model.lm_head.weight.data *= 0.5
    kl, before, after = conversation_effects(backend, Subject(other), PLAN.conversations)
    torch.testing.assert_close(after, answer_log_probs(other, rows), atol=1e-5, rtol=0)
    batch = backend.batch([rows[0]])
    n = rows[0].answer_length
    p, q = (b.logits(batch, keep=n + 1)[0, :-1].double().log_softmax(-1) for b in (backend, other))
    assert float(kl[0]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    system = Subject(backend, Treatment(system="tell me about the law"))
    assert float(conversation_effects(backend, system, PLAN.conversations)[0].max()) > 1e-4


def test_an_audit_says_what_replies_say() -> None:
    backend = tiny_backend("llama")
    steering = _steering(2.0, backend)
    found = audit(backend, steering, JUDGE, PLAN)
    for role, texts in PLAN.prompts.items():
        flags = []
        for edit in (None, steering.edit()):
            rows = backend.template().encode_all(texts)
            replies = reply_and_judge(backend, rows, texts, JUDGE, max_new_tokens=4, edit=edit)
            flags.append([group[0].verdict.refused for group in replies])
        one = found.data["sets"][role]
        expected = PairedRates.of(*flags)
        assert one["before"]["count"] == expected.before.count and one["only_before"] == expected.only_before
        assert one["difference"]["low"] == pytest.approx(expected.difference.low)
        assert one["log_odds"]["change"]["high"] < 0
    assert found.verdict.outcome == "fail"
    assert found.data["random"]["measured"] and found.data["random"]["n_vectors"] == 4
    assert found.data["random"]["layer"] == N_LAYERS - 1 and found.data["random"]["own"]["rank"] == 1
    moved = {one["site"]: one["moved"] for one in found.data["states"]}
    assert moved == {"blocks.2.hook_resid_pre": False, "blocks.4.hook_resid_pre": True}
    assert found.data["states"][1]["ranks"]["0.9"]["rank"] == 1
    assert len(found.data["lost"]) == min(12, found.data["sets"]["harmful"]["only_before"])


def test_nothing_done_passes_and_gates_that_never_hold_do_nothing() -> None:
    backend = tiny_backend("llama")
    never = _steering(50.0, backend, Gate(Site(1), torch.ones(32), 1e9))
    for change in (_steering(0.0, backend), never, Treatment(), tiny_backend("llama")):
        found = audit(backend, change, JUDGE, PLAN)
        assert found.verdict.outcome == "pass" and found.verdict.fall.value == 0
        assert found.data["answers"]["kl"]["value"] < 1e-6
        assert not any(one["moved"] for one in found.data["states"])
    assert found.data["embeddings"]["before"] == found.data["embeddings"]["after"]


def test_an_edited_checkpoint_and_a_system_prompt_are_audited_alike() -> None:
    backend, edited = tiny_backend("llama"), tiny_backend("llama")
    _without_refusals(edited.model)
    edited.model.get_input_embeddings().weight.data[7:9] += 1e-3
    found = audit(backend, edited, JUDGE, PLAN)
    assert found.verdict.outcome == "fail" and found.data["sets"]["harmful"]["after"]["count"] == 0
    assert found.data["embeddings"]["changed"] == 2
    system = audit(backend, Treatment(system="tell me about the law of the city"), JUDGE, PLAN)
    assert system.data["answers"]["kl"]["value"] > 1e-4 and system.data["states"][0]["moved"]


def test_a_model_that_shows_no_openings_is_audited_by_replies_alone() -> None:
    backend = tiny_backend("llama")
    found = audit(backend, _steering(2.0, backend), JUDGE, replace(PLAN, openings=PLAN.openings[:2]))
    assert found.data["sets"]["harmful"]["log_odds"] is None and not found.data["random"]["measured"]
    assert any("no token opens refusals" in note for note in found.data["notes"])
    assert found.verdict.outcome == "fail"


def _without_refusals(model: Any) -> None:
    rows = [i for i, refuses in _refusing_words().items() if refuses]
    model.get_output_embeddings().weight.data[rows] = 0


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(JUDGES, "default", "tests.study_fixture:FirstWordJudge")
    (tmp_path / "model").mkdir()
    save_tiny("llama", tmp_path / "model")
    out = ["--backend", "hooks", "--split", "all", "--tokens", "4", "--random-vectors", "4", "--random-prompts", "5"]
    for role, texts in PLAN.prompts.items():
        (tmp_path / f"{role}.txt").write_text("\n".join(texts), encoding="utf-8")
        out += [f"--{role}", str(tmp_path / f"{role}.txt")]
    talks = "".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in PLAN.conversations)
    (tmp_path / "talks.jsonl").write_text(talks, encoding="utf-8")
    return [*out, "--conversations", str(tmp_path / "talks.jsonl")]


def _saved(tmp_path: Path, alpha: float) -> str:
    from rsteer_interp.backends import load_backend

    backend = load_backend(tmp_path / "model", "hooks")
    folder = tmp_path / f"steering_{alpha:g}"
    _steering(alpha, backend).save(folder, Provenance.collect(backend))
    return str(folder)


@pytest.mark.parametrize(("alpha", "outcome", "code", "strict"), [
    (0.0, "pass", 0, 0), (0.5, "inconclusive", 0, 1), (10.0, "fail", 1, 1),
])  # fmt: skip
def test_exit_codes_of_a_steering(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    alpha: float,
    outcome: str,
    code: int,
    strict: int,
) -> None:
    own = ["--model", str(tmp_path / "model"), "--steering", _saved(tmp_path, alpha), "--out", str(tmp_path / "out")]
    assert main([*own, *arguments]) == code
    said = capsys.readouterr().out
    data = load_result(tmp_path / "out", kind="safety_audit").data
    assert data["verdict"]["outcome"] == outcome and data["verdict"]["sentence"] in said
    assert main([*own, *arguments, "--strict"]) == strict
    page = Reading((tmp_path / "out" / "index.html").read_text(encoding="utf-8")).text
    assert data["verdict"]["sentence"] in page and "exit code " + str(strict) in page
    overview = write_overview(tmp_path, tmp_path / "overview.html").read_text(encoding="utf-8")
    assert data["verdict"]["sentence"] in Reading(overview).text


def test_exit_codes_of_a_checkpoint(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    base, edited = str(tmp_path / "model"), str(tmp_path / "edited")
    model = AutoModelForCausalLM.from_pretrained(base)
    _without_refusals(model)
    model.save_pretrained(edited)
    tiny_tokenizer().save_pretrained(edited)
    assert main(["--model", edited, "--base", base, "--out", str(tmp_path / "a"), *arguments]) == 1
    assert main(["--model", base, "--base", base, "--out", str(tmp_path / "b"), *arguments]) == 0
    assert "Fail" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [
    [], ["--steering", "nowhere"], ["--steering", "nowhere", "--base", "x"], ["--base", "no/such/folder/at all"],
])  # fmt: skip
def test_bad_input_is_exit_code_2(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *wrong, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out" / "result.json").exists()


def test_conversations_without_answers_and_bad_margins_are_bad_input(tmp_path: Path, arguments: list[str]) -> None:
    own = ["--model", str(tmp_path / "model"), "--steering", _saved(tmp_path, 0.0), "--out", str(tmp_path / "out")]
    assert main([*own, *arguments, "--conversations", str(tmp_path / "general.txt")]) == 2
    assert main([*own, *arguments, "--margin", "1.5"]) == 2


def test_an_interrupted_audit_goes_on_and_only_what_changed_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    backend = tiny_backend("llama")
    generate = type(backend).generate

    def counted(self: Backend, batch: Any, *rest: Any, **more: Any) -> Any:
        calls.append("edited" if rest[1] is not None else "plain")
        if len(calls) == stop:
            raise KeyboardInterrupt
        return generate(self, batch, *rest, **more)

    monkeypatch.setattr(type(backend), "generate", counted)
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        audit(backend, _steering(2.0, backend), JUDGE, PLAN, tmp_path)
    stop, done = 0, len(calls)
    first = audit(backend, _steering(2.0, backend), JUDGE, PLAN, tmp_path)
    plain = audit(backend, _steering(2.0, backend), JUDGE, PLAN)
    assert json.dumps(first.data["sets"]) == json.dumps(plain.data["sets"]) and first.verdict == plain.verdict
    assert done - 1 < len(calls)
    calls.clear()
    monkeypatch.setattr(type(backend), "_forward", None)
    again = audit(backend, _steering(2.0, backend), JUDGE, PLAN, tmp_path)
    assert calls == [] and again.data["sets"] == first.data["sets"], "nothing is run again"
    monkeypatch.undo()
    monkeypatch.setattr(type(backend), "generate", counted)
    other = audit(backend, _steering(10.0, backend), JUDGE, PLAN, tmp_path)
    assert set(calls) == {"edited"}, "the unchanged model's replies are kept"
    assert other.data["sets"]["harmful"]["after"] != first.data["sets"]["harmful"]["after"]


def test_no_more_than_16_tokens_of_a_reply_to_a_harmful_prompt_are_written_or_kept(tmp_path: Path) -> None:
    backend = tiny_backend("llama")
    long = replace(PLAN, tokens=30)
    found = audit(backend, _steering(2.0, backend), JUDGE, long, tmp_path)
    for side in ("before", "after"):
        kept = load_result(tmp_path / "steps" / f"2_harmful_{side}").data["responses"]
        assert max(len(text.split()) for text in kept) <= 16
        other = load_result(tmp_path / "steps" / f"2_general_{side}").data["responses"]
        assert max(len(text.split()) for text in other) > 16
    assert found.data["lost"] and all(len(one["after"].split()) <= 16 for one in found.data["lost"])


def test_hostile_text_stays_text(tmp_path: Path, arguments: list[str]) -> None:
    own = ["--model", str(tmp_path / "model"), "--steering", _saved(tmp_path, 10.0), "--out", str(tmp_path / "out")]
    assert main([*own, *arguments]) == 1
    result = load_result(tmp_path / "out")
    result.data["lost"] = [{"prompt": text, "before": text, "after": text} for text in HOSTILE]
    result.data["subject"] = result.data["model"]["name"] = HOSTILE[0]
    result.data["notes"] = list(HOSTILE)
    page = render_audit(result)
    check_own_markup_only(Reading(page))
    assert render_audit(result) == page
