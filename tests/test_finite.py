"""What is not finite is one clear error where it first appears, and never an answer, a verdict or a line of JSON."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rsteer_interp
from rsteer_interp.activations import last_states, mean_norms
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.command_line import run as run_command
from rsteer_interp.embedding_noise import EmbeddingNoise
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, answer_log_probs, log_odds
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import AblateSubspace, Affine, Displace, ablate, add, set_component
from rsteer_interp.judges.local import LocalJudge
from rsteer_interp.measures import kl_divergence, masked_mean, refusal_log_odds
from rsteer_interp.provenance import json_text
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.results import Provenance
from rsteer_interp.steering import Steering, load_steering, make_steering
from rsteer_interp.vector_file import packed, unpacked
from rsteer_interp.weight_edit import orthogonalise, save_checkpoint
from tests.study_fixture import FirstWordJudge
from tests.tiny_models import (
    D_MODEL,
    KINDS,
    PROMPTS,
    answered_rows,
    draw,
    tiny_backend,
    tiny_model,
    tiny_rows,
    tiny_tokenizer,
)

NAN, INF = float("nan"), float("inf")
SITE = Site(2)
V = draw(D_MODEL, seed=1).float()


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return tiny_backend("llama", request.param)


@dataclass(frozen=True, eq=False)
class Spoils:
    """Puts a value into the states at a site: of padding, or of real tokens."""

    value: float
    real: bool
    sites: frozenset[Site] = frozenset({SITE})

    pointwise = False
    rowwise = True

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return torch.where((at.mask == self.real)[..., None], self.value, x)


def a_word(backend: Backend, prompt: int) -> int:
    """A token of one prompt alone."""
    ids = [set(row.ids) for row in tiny_rows(backend)]
    return min(ids[prompt] - set().union(*(each for i, each in enumerate(ids) if i != prompt)))


# --- logits ------------------------------------------------------------------------------------------------------


READERS: dict[str, Callable[[Backend], Any]] = {
    "logits": lambda b: b.logits(b.batch(tiny_rows(b))),
    "logits of every token": lambda b: b.logits(b.batch(tiny_rows(b)), keep=4),
    "log-odds": lambda b: log_odds(b, tiny_rows(b), [5]),
    "states": lambda b: last_states(b, tiny_rows(b), [SITE]),
    "norms": lambda b: mean_norms(b, tiny_rows(b), [SITE]),
    "generate": lambda b: b.generate(b.batch(tiny_rows(b)), 3),
    "samples": lambda b: b.generate(b.batch(tiny_rows(b)), 3, sampling=Sampling(2)),
    "answers": lambda b: answer_log_probs(b, answered_rows(b)),
    "effects": lambda b: answer_effects(b, answered_rows(b), add({SITE: V}, {SITE: 1.0})),
    "verdicts": lambda b: reply_and_judge(
        b, tiny_rows(b), PROMPTS, FirstWordJudge(), max_new_tokens=2, refusal_tokens=[5]
    ),
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reader", READERS)
def test_one_spoilt_row_of_the_embedding_is_an_error_for_whoever_reads(
    backend: Backend, reader: str, value: float
) -> None:
    READERS[reader](backend)  # sound
    with torch.no_grad():
        backend.model.get_input_embeddings().weight[a_word(backend, 0)] = value
    with pytest.raises(UserError, match="not finite") as caught:
        READERS[reader](backend)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_token_whose_unembedding_is_spoilt_is_an_error_though_no_state_is(backend: Backend) -> None:
    with torch.no_grad():
        backend.model.get_output_embeddings().weight[7] = NAN
    last_states(backend, tiny_rows(backend), [SITE])
    with pytest.raises(UserError, match=r"LlamaForCausalLM gives logits that are not finite for 6 of 6 prompts; use"):
        backend.logits(backend.batch(tiny_rows(backend)))


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("reader", ["logits", "log-odds", "generate"])
def test_the_first_site_that_is_not_finite_is_named(backend: Backend, reader: str, edited: bool) -> None:
    """One look per pass finds that something is wrong; a second pass, in that case alone, finds where."""
    with torch.no_grad():
        backend.model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = NAN
    edit = add({Site(3): V}, {Site(3): 1.0}) if edited else None
    batch = backend.batch(tiny_rows(backend))
    run = {
        "logits": lambda: backend.logits(batch, edit),
        "log-odds": lambda: log_odds(backend, tiny_rows(backend), [5], edit),
        "generate": lambda: backend.generate(batch, 2, edit),
    }
    with pytest.raises(UserError, match=r"states at blocks.2.hook_resid_pre are not finite"):
        run[reader]()


def test_a_state_spoilt_while_decoding_is_an_error(backend: Backend) -> None:
    batch = backend.batch(tiny_rows(backend))
    backend.stop_ids = frozenset()
    with pytest.raises(UserError, match=r"not finite at token 2 of a reply under Late at blocks.2.*smaller amount"):
        backend.generate(batch, 4, Late())


@dataclass(frozen=True, eq=False)
class Late:
    """Spoils one row from the first decoding step on."""

    sites: frozenset[Site] = frozenset({SITE})
    pointwise = False
    rowwise = True

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return torch.where((at.rows == 1)[:, None, None], NAN, x) if at.phase == "decode" else x


@pytest.mark.parametrize("value", [NAN, INF])
def test_padding_may_hold_anything(backend: Backend, value: float) -> None:
    rows, end = tiny_rows(backend), frozenset({Site(backend.n_layers)})  # where no attention carries it on
    edit = Spoils(value, real=False, sites=end)
    batch = backend.batch(rows)
    assert not bool(batch.mask[:, -20:].all())
    torch.testing.assert_close(backend.logits(batch, edit), backend.logits(batch))
    assert not bool(backend.logits(batch, edit, keep=20).isfinite().all())
    states = last_states(backend, rows, list(end), edit)
    assert all(bool(each.isfinite().all()) for each in states.values())
    with pytest.raises(UserError, match=r"states at blocks.4.hook_resid_pre are not finite"):
        last_states(backend, rows, list(end), replace(edit, real=True))


def test_a_vocabulary_padded_with_minus_infinity_is_fine(backend: Backend) -> None:
    """Some models forbid the padding of their vocabulary: minus infinity is a probability of zero, not a fault."""
    rows, padding = answered_rows(backend), [190, 191, 199]
    plain = log_odds(backend, tiny_rows(backend), [5])

    def forbid(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., padding] = -torch.inf
        return output

    handle = backend.model.get_output_embeddings().register_forward_hook(forbid)
    odds = log_odds(backend, tiny_rows(backend), [5])
    assert bool(odds.isfinite().all()) and not torch.equal(odds, plain)
    assert bool(log_odds(backend, tiny_rows(backend), padding).isfinite().all())  # impossible tokens: about -18.4
    replies = backend.generate(backend.batch(rows), 6, sampling=Sampling(2))
    assert bool(replies.log_probs.isfinite().all()) and not set(padding) & set(replies.ids.flatten().tolist())
    effects = answer_effects(backend, rows, add({SITE: V}, {SITE: 1.0}))
    assert bool(effects.kl.isfinite().all()) and bool((effects.kl > 0).all())
    handle.remove()
    backend.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out - torch.inf)
    with pytest.raises(UserError, match="not finite"):  # nothing at all is allowed: no distribution
        backend.logits(backend.batch(rows))


# --- edits -------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([0.0, INF])
EDITS: dict[str, Callable[[], Any]] = {
    "amount": lambda: add({SITE: V}, {SITE: INF}),
    "amounts of rows": lambda: add({SITE: V}, {SITE: ROWS}),
    "an overflow": lambda: add({SITE: V}, {SITE: 1e200 * 1e200}),
    "kappa": lambda: Affine(SITE, V, kappa=NAN),
    "reference": lambda: set_component({SITE: V}, {SITE: V * NAN}, {SITE: 1.0}),
    "direction": lambda: ablate({SITE: V * INF}),
    "displacement": lambda: Displace(SITE, V, V * NAN),
    "subspace scale": lambda: AblateSubspace(SITE, torch.eye(D_MODEL)[:2], scale=INF),
    "noise": lambda: EmbeddingNoise(torch.eye(D_MODEL)[:1], INF),
    "gate threshold": lambda: Gate(SITE, V, NAN),
    "gate direction": lambda: Gate(SITE, V * NAN, 0.0),
    "alpha": lambda: a_steering(alpha=float("1e999")),
    "scale": lambda: replace(a_steering(), scales=(NAN,)),
    "alpha times scale": lambda: replace(a_steering(alpha=1e200), scales=(1e200,)),
    "weights": lambda: orthogonalise(tiny_model("llama"), V, scale=INF),
    "temperature": lambda: Sampling(temperature=0.0),
}


def a_steering(alpha: float = -1.0) -> Steering:
    return make_steering("md", {SITE: V}, {SITE: V}, {SITE: (1.0, 1.0)}, [SITE], alpha=alpha, reposition=False)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_no_finite_size_is_refused_when_it_is_made(name: str) -> None:
    with pytest.raises(UserError, match=r"finite|temperature 0.0 draws nothing") as caught:
        EDITS[name]()
    assert "; " in str(caught.value)


def test_an_edit_that_overflows_is_named() -> None:
    backend = tiny_backend("llama")
    backend.model.to(torch.float16)
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM: states at blocks.2.hook_resid_pre are not finite.*a smaller edit"
    ):
        log_odds(backend, tiny_rows(backend), [5], add({SITE: V}, {SITE: 1e6}))


def test_a_saved_steering_with_a_number_that_overflows_is_refused(tmp_path: Path) -> None:
    a_steering().save(tmp_path / "one", Provenance.collect(config={}))
    path = tmp_path / "one" / "result.json"
    for wrong in ("1e999", "-1e999", "NaN", "Infinity"):
        path.write_text(path.read_text().replace('"alpha": -1.0', f'"alpha": {wrong}'))
        with pytest.raises(UserError, match=rf"result.json holds {wrong}"):
            load_steering(tmp_path / "one")
        path.write_text(path.read_text().replace(f'"alpha": {wrong}', '"alpha": -1.0'))
    assert load_steering(tmp_path / "one").alpha == -1.0


def test_a_vector_file_with_a_number_that_overflows_is_refused(tmp_path: Path) -> None:
    sound = packed(a_steering())
    path = tmp_path / "v.safetensors"
    path.write_bytes(sound.replace(b'\\"alpha\\": -1.0', b'\\"alpha\\":1e999'))
    with pytest.raises(UserError, match="finite"):
        unpacked(path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = NAN
    with pytest.raises(UserError, match=r"model.norm.weight is not finite, nothing was saved"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "edited", {})
    assert not (tmp_path / "edited").exists()


# --- measures ----------------------------------------------------------------------------------------------------


def test_measures_refuse_what_is_no_number() -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = NAN
    with pytest.raises(UserError, match="refusal log-odds is not a finite number"):
        refusal_log_odds(logits, [2])
    values = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    assert masked_mean(values, torch.tensor([[True, False], [True, True]])).tolist() == [1.0, 2.5]
    for mask in ([[True, True], [True, True]], [[False, False], [True, True]]):
        with pytest.raises(UserError, match="a mean over tokens is not a finite number"):
            masked_mean(values, torch.tensor(mask))
    base, edited = torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, -INF]]])
    with pytest.raises(UserError, match="not a finite number"):  # the edit forbids what the base says
        masked_mean(kl_divergence(base, edited), torch.ones(1, 1, dtype=torch.bool))


def test_a_judge_that_knows_neither_verdict_says_so(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = LocalJudge(backend)
    monkeypatch.setattr(LocalJudge, "word_ids", lambda self: (5, 6))
    monkeypatch.setattr(LocalJudge, "_rows", lambda self, pairs: tiny_rows(self.backend)[: len(pairs)])
    assert all(map(math.isfinite, judge.log_odds([("why", "bread")])))

    def forbid(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where(torch.arange(output.shape[-1]) == 5, -torch.inf, output)

    backend.model.get_output_embeddings().register_forward_hook(forbid)
    with pytest.raises(UserError, match="rules out both verdicts, or one"):
        judge.log_odds([("why", "bread")])


# --- command line and JSON ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Options of a command for this test."""

    dose: float = 1.0
    doses: tuple[float, ...] = field(default=(0.5,))


@pytest.mark.parametrize(("given", "named"), [(["--dose", "1e999"], "--dose is inf"), (["--doses", "1", "nan"], "nan")])
def test_no_command_takes_a_number_that_is_none(
    capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    def never(config: Config) -> None:
        raise AssertionError("ran")

    assert run_command(Config, never, given) == 2
    out = capsys.readouterr().err
    assert out.startswith("error: ") and named in out and out.count("\n") == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_json_text_refuses_by_name_what_json_has_no_word_for(value: float) -> None:
    with pytest.raises(UserError, match=r"summary.rates\[1\] is -?(nan|inf)"):
        json_text({"rates": [0.5, value]}, "summary")
    assert json.loads(json_text({"b": 1, "a": torch.tensor([0.5])}, indent=None)) == {"b": 1, "a": [0.5]}


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [
        (node.func.attr, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def test_every_place_that_writes_json_has_decided_about_nan() -> None:
    """`json.dumps` writes NaN, which is no JSON, and pydantic writes null for it, unless they are told."""
    package = Path(rsteer_interp.__file__).parent
    roots = (package, package.parent / "analyses", package.parent / "figures")
    undecided, by_pydantic = [], []
    for path in sorted(path for root in roots for path in root.rglob("*.py")):
        for name, call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            if name in ("dump", "dumps") and not any(word.arg == "allow_nan" for word in call.keywords):
                undecided.append(f"{path.name}:{call.lineno}")
            if name == "model_dump_json":
                by_pydantic.append(path.name)
    assert undecided == []
    assert by_pydantic == ["model_cache.py"]  # sizes and digests


# --- what it costs -----------------------------------------------------------------------------------------------


def test_logits_are_looked_at_once_a_pass_and_states_once_whatever_the_edits(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsteer_interp.backends import base

    seen: list[str] = []
    for name in ("check_logits", "check_states", "check_steps"):
        whole = getattr(base, name)
        monkeypatch.setattr(base, name, lambda *a, name=name, whole=whole: (seen.append(name), whole(*a))[1])
    sites = [Site(layer) for layer in range(4)]
    edit = add(dict.fromkeys(sites, V), dict.fromkeys(sites, 0.1))
    batch = backend.batch(tiny_rows(backend))
    assert batch.shared_prefix > 0
    backend.logits(batch, edit)
    assert sorted(seen) == ["check_logits", "check_states", "check_states"]  # the shared prefix is a pass of its own
    seen.clear()
    backend.run(batch, edit)
    assert seen == ["check_states", "check_states"]
    seen.clear()
    backend.generate(batch, 5)
    assert set(seen) == {"check_logits", "check_steps"} and seen.count("check_steps") == 1
