"""Kept steps are used again for the same objects alone: each test changes one thing that today's names would hide."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import rsteer_interp.reproduction.finder as finder
import rsteer_interp.results as results
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import TODAY, ChatTemplate
from rsteer_interp.directions import Direction, Evidence, MeanDifference
from rsteer_interp.judges.base import Verdict
from rsteer_interp.judges.default import DefaultJudge
from rsteer_interp.judges.endpoint import EndpointJudge
from rsteer_interp.judges.local import LocalJudge
from rsteer_interp.judges.pattern import PatternJudge
from rsteer_interp.key import digest, versions
from rsteer_interp.methods import METHODS, Material
from rsteer_interp.provenance import Provenance
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.finder import Refusing
from rsteer_interp.reproduction.presets import PRESETS
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.reproduction.vectors import Vectors
from rsteer_interp.results import load_result, stage
from rsteer_interp.selection import LayerScore
from rsteer_interp.studies import layers
from rsteer_interp.studies.config import StudyConfig
from rsteer_interp.studies.method_comparison import _key as key_of_method
from rsteer_interp.studies.selective_steering.search import best_bands
from rsteer_interp.studies.study import Study
from tests.tiny_models import PROMPTS, TEMPLATE, tiny_backend, tiny_model, tiny_tokenizer

RECORD = Provenance(created="2026-01-01T00:00:00+00:00")
ROOT = Path(__file__).parent.parent
V = torch.randn(32, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Says:
    """Calls every reply what it is told to."""

    confidence: float
    name: ClassVar[str] = "says"

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(self.confidence)] * len(prompts)


def a_study(folder: Path, judge: Any = None, backend: Any = None, config: Any = StudyConfig, **options: Any) -> Study:
    options = {"fit": 6, "select": 6, "report": 6, "tokens": 3} | options
    made = config(out=folder / "out", scores=folder / "scores", **options)
    return Study("test", backend or tiny_backend("llama"), judge or Says(0.9), made)


def key_expressions(path: Path) -> Iterator[ast.expr]:
    """What is assigned or added to a `key`, and the key that a call of `stage` or `key` is given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "key" for t in targets):
                yield node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("stage", "_stage")
        ):
            yield from node.args[1:2]


def test_no_key_holds_a_name_a_repr_or_a_sum_in_place_of_the_thing() -> None:
    hiding, found, seen = {"repr", "str", "id", "hash", "sum", "asdict"}, [], 0
    for path in sorted((ROOT / "rsteer_interp").rglob("*.py")):
        if path.parts[-2] not in ("studies", "safety_audit", "reproduction") and path.parts[-3] != "studies":
            continue
        for expression in key_expressions(path):
            seen += 1
            for node in ast.walk(expression):
                called = node.func if isinstance(node, ast.Call) else None
                word = getattr(called, "id", None) or getattr(called, "attr", None)
                attribute = getattr(node, "attr", None)
                if word in hiding or attribute in ("name", "method", "estimator", "digest", "fingerprint"):
                    found.append(f"{path.name}:{expression.lineno}: {ast.unparse(expression)}")
    assert seen > 20 and not found, found


# -- judges ----------------------------------------------------------------------------------------------------------


def test_another_endpoint_is_asked_and_its_verdicts_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def ask(judge: EndpointJudge, client: Any, prompt: str, response: str) -> str:
        asked.append((judge.model, judge.base_url))
        return f"<answer> {'refusal' if judge.model == 'a' else 'not refusal'} </answer>"

    monkeypatch.setattr(EndpointJudge, "_ask", ask)

    def refused(model: str, address: str = "http://one.example/v1") -> list[float]:
        judge = EndpointJudge(address, model, cache=tmp_path / "asked.jsonl")
        return a_study(tmp_path, judge).scored("fit", "harmful").confidence.tolist()

    assert set(refused("a")) == {1.0} and set(asked) == {("a", "http://one.example/v1")}
    assert set(refused("b")) == {-1.0} and asked[-1][0] == "b"
    assert "computing step 'fit_harmful' again: judge.model" in capsys.readouterr().err
    refused("b", "http://two.example/v1")
    assert asked[-1][1] == "http://two.example/v1", "the cache of verdicts is of one server"
    n = len(asked)
    assert set(refused("b", "http://two.example/v1")) == {-1.0} and len(asked) == n


def test_an_endpoint_is_known_by_what_changes_verdicts_and_by_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = EndpointJudge("http://one.example/v1", "m")
    same = [
        replace(one, base_url="http://user:secret@one.example/v1?api_key=secret"),
        replace(one, key_variable="KEY", concurrency=1, timeout=1.0, retries=9, cache=tmp_path / "asked.jsonl"),
    ]
    assert len({digest(judge) for judge in (one, *same)}) == 1 and "secret" not in str(same[0].identity)
    others = [replace(one, base_url="http://two.example/v1"), replace(one, model="n"), replace(one, votes=3)]
    others += [replace(one, max_tokens=9)]
    found = {digest(judge) for judge in (one, *others)}
    monkeypatch.setattr("rsteer_interp.judges.endpoint.rubric", lambda: "another rubric")
    assert len(found | {digest(one)}) == 6


def test_a_local_judge_is_known_by_its_model_and_calibration_also_after_fitting() -> None:
    judge = LocalJudge(tiny_backend("llama"))
    before = digest(DefaultJudge(judge))
    judge._fitted = (0.1, 0.2)  # as `calibrated` keeps it
    assert digest(DefaultJudge(judge)) == before
    others = [
        LocalJudge(tiny_backend("qwen2")),
        LocalJudge(judge.backend, (0.0, 1.0)),
        LocalJudge(judge.backend, (0.0, 2.0)),
    ]
    assert len({digest(one) for one in (judge, DefaultJudge(judge), DefaultJudge(), PatternJudge(), *others)}) == 7


def test_a_prompts_subject_belongs_to_its_score(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"

    def subjects(names: str) -> set[str]:
        rows = [{"prompt": text, "subject": s, "split": "fit"} for text, s in zip(PROMPTS, names, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return set(a_study(tmp_path).scored("fit", str(path)).subjects)

    assert subjects("aabbcc") == set("abc")
    assert subjects("aabbcd") == set("abcd")


# -- directions, edits, methods --------------------------------------------------------------------------------------

SITES = [Site(1), Site(2), Site(3), Site(4)]
FITTED = {s: Direction(V + s.layer, s, "probe", {}, (), {}, "", V * s.layer, "neutral") for s in SITES}
VECTORS = Vectors(
    "probe",
    FITTED,
    {s.layer: LayerScore(0.1 * s.layer, 0.5) for s in SITES},
    dict.fromkeys(SITES, (1.0, 2.0)),
)
SELECT = Refusing(
    list(PROMPTS), list("abcdef"), torch.linspace(0.5, 1.0, 6).double(), torch.linspace(0.4, 0.9, 6).double()
)


def swapped(by_site: dict[Any, Any]) -> dict[Any, Any]:
    """The same values, two of them at each other's places: no sum over places changes."""
    a, b, *_ = by_site
    return by_site | {a: by_site[b], b: by_site[a]}


@pytest.mark.parametrize(
    "changed",
    [
        replace(VECTORS, fitted={s: replace(d, vector=-d.vector) for s, d in FITTED.items()}),
        replace(VECTORS, fitted=swapped(FITTED)),
        replace(VECTORS, fitted={s: replace(d, offset=-d.offset) for s, d in FITTED.items()}),
        replace(VECTORS, scales=VECTORS.scales | {Site(2): (1.0, 3.0)}),
        replace(VECTORS, scores=swapped(VECTORS.scores)),
        replace(SELECT, fresh=-SELECT.fresh),
        replace(SELECT, texts=SELECT.texts[::-1]),
    ],
    ids=["sign", "order", "references", "scales", "scores", "fresh", "prompts"],
)
def test_a_probe_of_the_same_name_gets_a_setting_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Any
) -> None:
    def asked(context: Context, name: str, key: dict[str, Any], compute: Any) -> Any:
        return SimpleNamespace(data=digest(key))

    monkeypatch.setattr(Context, "stage", asked)
    context = Context(tiny_backend("llama"), Says(0.9), PRESETS["demo"], tmp_path, 0, {})

    def key(vectors: Vectors = VECTORS, select: Refusing = SELECT) -> Any:
        return finder.find(context, vectors, select, (1, 2), 1.3)

    same = replace(VECTORS, fitted={s: replace(d, vector=d.vector.clone()) for s, d in FITTED.items()})
    assert key() == key(same) != key(**{"vectors" if isinstance(changed, Vectors) else "select": changed})


def test_a_causal_curve_is_that_of_its_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analyses.layer_concentration import Config

    study = a_study(tmp_path, config=Config)
    monkeypatch.setattr(Study, "refusal_tokens", (5, 9))
    measured: list[int] = []
    whole = layers.single_site

    def counted(*arguments: Any) -> Any:
        measured.append(arguments[4].sign()[0])
        return whole(*arguments)

    monkeypatch.setattr(layers, "single_site", counted)
    evidence = {s: Evidence(torch.randn(6, 32), torch.tensor([1.0, 1, 1, -1, -1, -1])) for s in study.sites}
    units = {s: MeanDifference().fit(e).float() for s, e in evidence.items()}
    for directions in (units, units, {s: -v for s, v in units.items()}):
        report = Scored(list(PROMPTS[:4]), ["a"] * 4, list("abcd"), torch.ones(4).double())
        layers._causal(study, study.config, directions, report, evidence)  # type: ignore[arg-type]
    assert len(measured) == 6, "three block inputs, for v once and for -v"


def test_bands_are_ranked_for_v_and_for_minus_v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(tmp_path)
    monkeypatch.setattr(Study, "refusal_tokens", (5, 9))
    v, unit = dict.fromkeys(study.sites, V), dict.fromkeys(study.sites, 1.0)

    def shifts(v: dict[Site, torch.Tensor], unit: dict[Site, float]) -> list[float]:
        return [row["shift"] for row in best_bands(study, "2_bands", v, unit, PROMPTS[:4], 1, 0.5)[1]]

    assert shifts(v, unit) == shifts(v, unit) != shifts(dict.fromkeys(v, -V), unit)
    assert shifts(v, unit) != shifts(v, dict.fromkeys(unit, 2.0))


def test_a_method_of_the_same_name_is_another_when_its_fields_or_its_code_are(tmp_path: Path) -> None:
    from analyses.compare_methods import Config

    @dataclass(frozen=True)
    class Mine:
        share: float = 0.5
        table: Any = None
        name: ClassVar[str] = "mine"
        strengths: ClassVar[tuple[float, ...]] = (1.0,)

        def fit(self, material: Material) -> Any:
            return lambda strength: strength

        def __repr__(self) -> str:
            return "Mine"

    class Other(Mine):
        def fit(self, material: Material) -> Any:
            return lambda strength: -strength

    Other.__qualname__ = Mine.__qualname__
    study = a_study(tmp_path, config=Config)
    one = Mine(table=torch.zeros(2000))
    bent = torch.zeros(2000)
    bent[1000] = 1.0  # torch's repr leaves out the middle
    others = [Mine(0.6, one.table), Mine(table=bent), Other(table=one.table), METHODS["random"]()]
    keys = {digest(key_of_method(study, study.config, method)) for method in (one, *others)}  # type: ignore[arg-type]
    assert len(keys) == 5
    judged = replace(study, judge=Says(0.1))
    assert digest(key_of_method(judged, study.config, one)) not in keys  # type: ignore[arg-type]


# -- packages, precision, the day ------------------------------------------------------------------------------------


def run_stage(folder: Path, **key: Any) -> tuple[bool, str]:
    """Whether the step was computed."""
    ran: list[int] = []
    stage(folder / "2_states", "test", {"layer": 1} | key, lambda: (ran.append(1) or {}, None), RECORD)  # type: ignore[func-returns-value]
    return bool(ran), load_result(folder / "2_states").key or ""


def test_other_packages_compute_again_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"torch", "transformers", "transformer-lens"} <= versions().keys()
    assert run_stage(tmp_path)[0] and not run_stage(tmp_path)[0]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(results, "versions", lambda: versions() | {"torch": "1.0"})
    assert run_stage(tmp_path)[0]
    assert capsys.readouterr().err == (
        "computing step '2_states' again: packages.torch of what it depends on changed\n"
    )
    assert run_stage(tmp_path, layer=2)[0]
    assert "again: layer of what" in capsys.readouterr().err


def test_a_step_of_an_earlier_version_is_computed_again_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(tmp_path)
    path = tmp_path / "2_states" / "result.json"
    old = json.loads(path.read_text()) | {"key": "0123456789abcdef"}
    old.pop("key_parts")
    path.write_text(json.dumps(old))
    assert run_stage(tmp_path)[0] and "an earlier version of this package kept it" in capsys.readouterr().err


def cast_backend(dtype: torch.dtype, batch_size: int = 8) -> Backend:
    return load_backend(tiny_model("llama").to(dtype), "hooks", tokenizer=tiny_tokenizer(), batch_size=batch_size)


def test_below_float32_the_batch_size_kernel_and_devices_belong_to_the_key() -> None:
    def of(dtype: torch.dtype, batch_size: int = 8, attention: str = "sdpa") -> str:
        backend = cast_backend(dtype, batch_size)
        backend.model.config._attn_implementation = attention
        return digest(backend)

    exact, half = torch.float32, torch.bfloat16
    assert of(exact) == of(exact, 16) == of(exact, 8, "eager")
    assert len({of(exact), of(half), of(half, 16), of(half, 8, "eager"), of(torch.float16)}) == 5


def test_a_batch_that_was_halved_for_memory_leaves_the_key_as_it_was() -> None:
    backend = cast_backend(torch.bfloat16)
    before = digest(backend)
    backend.batch_size = 1
    assert digest(backend) == before


def test_a_model_without_a_fingerprint_is_known_by_its_weights() -> None:
    one, other = tiny_backend("llama"), tiny_backend("llama")
    one.fingerprint = other.fingerprint = ""
    with torch.no_grad():
        other.model.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    assert digest(one) != digest(other)


DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{% macro day() %}{{ strftime_now('%A, %-d %B') }}{% endmacro %}\n<|im_start|> {{ date_string }} {{ day() }} <|im_end|> "
)


def test_a_template_that_asks_for_the_date_reads_the_same_every_day() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED + TEMPLATE
    template = ChatTemplate(tokenizer)
    own = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    text, *_ = template.render("hi")
    assert TODAY.strftime("%d %b %Y") in text and f"{TODAY:%A}, {TODAY.day} {TODAY:%B}" in text
    now = datetime.now()
    assert text == own.replace(now.strftime("%d %b %Y"), TODAY.strftime("%d %b %Y")).replace(
        now.strftime("%A, %-d %B"), f"{TODAY:%A}, {TODAY.day} {TODAY:%B}"
    ), "all else is the template's own, line breaks too"
    assert ChatTemplate(tokenizer, options={"date_string": "today"}).render("hi")[0].count("today") == 1
    assert template.notes and Provenance.collect(template=template).notes == list(template.notes)
    assert ChatTemplate(tiny_tokenizer()).notes == ()


def test_another_vocabulary_under_the_same_template_is_another_key() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["volcano"])
    assert digest(ChatTemplate(one)) != digest(ChatTemplate(other))
    assert digest(ChatTemplate(one, "Be brief.")) != digest(ChatTemplate(one))
    before = digest(ChatTemplate(one))
    one(["a", "what is the law"], padding=True, truncation=True, max_length=3)  # leaves its settings in the tokenizer
    assert digest(ChatTemplate(one)) == before
