"""Two processes of a torchrun give what one gives: states, moments, log-odds, replies, verdicts, stages and their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsteer_interp import processes
from rsteer_interp.activations import last_moments, last_states, mean_norms
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, answer_log_probs, log_odds, log_odds_of_each
from rsteer_interp.interventions import add
from rsteer_interp.refusal_scores import reply_and_judge
from rsteer_interp.results import Provenance, load_result, stage
from tests.study_fixture import FirstWordJudge
from tests.tiny_models import save_tiny, tiny_backend, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    f"{start} about the {noun}" for start in ("tell me", "write", "explain to me") for noun in ("city", "river", "law")
]
SITES = [Site(1), Site(4)]


def _double() -> Backend:
    """A tiny model in float64, so that what batching does to rounding stays below 1e-10."""
    from rsteer_interp.backends import load_backend

    return load_backend(tiny_model("llama").double(), "hooks", tokenizer=tiny_tokenizer(), batch_size=4)


def _measure(out: Path) -> None:
    """Everything that is shared out, measured; tensors and replies go to a folder that is this process's own."""
    backend = _double()
    template = backend.template()
    rows, talks = template.encode_all(TEXTS), template.encode_all(TEXTS, ["i can tell you"] * len(TEXTS))
    vectors = {Site(2): torch.randn(backend.d_model, generator=torch.Generator().manual_seed(0))}
    edit = add(vectors, {Site(2): 2.0})
    found: dict[str, torch.Tensor] = {
        f"states {site}": x for site, x in last_states(backend, rows, SITES, edit).items()
    }
    for site, moments in last_moments(backend, rows, SITES).items():
        found |= {f"mean {site}": moments.mean, f"covariance {site}": moments.covariance}
    found["log-odds"] = log_odds(backend, rows, [5, 9], edit)
    found["prepared"] = log_odds(backend, backend.prepare(rows, 2), [5, 9], edit)
    edits = [None, edit, add(vectors, {Site(2): -3.0})]
    for i, odds in enumerate(log_odds_of_each(backend, rows, [5, 9], edits)):
        found[f"log-odds of setting {i}"] = odds
    found["one prompt"] = log_odds(backend, rows[:1], [5, 9])
    found["answers"] = answer_log_probs(backend, talks, edit)
    found["kl"] = answer_effects(backend, talks, edit).kl
    found["norms"] = torch.tensor(list(mean_norms(backend, rows, SITES).values()), dtype=torch.float64)
    calls: list[int] = []

    def compute() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        calls.append(processes.rank())
        replies = reply_and_judge(
            backend, rows, TEXTS, FirstWordJudge(), max_new_tokens=5, edit=edit, sampling=Sampling(2, 1.0, 3)
        )
        return {"replies": [[(r.text, r.verdict.z) for r in group] for group in replies]}, {"x": found["log-odds"]}

    for _ in range(2):  # the second time it is there
        result = stage(out.parent / "stage", "test", {"a": 1}, compute, Provenance.collect)
    assert calls == [processes.rank()]
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in found.items()}, out / "found.safetensors")
    (out / "replies.json").write_text(json.dumps(result.data["replies"]), encoding="utf-8")
    print("measured")


def _sharded_model(folder: Path) -> None:
    """Log-odds and greedy tokens of the model in `folder`, its weights shared out by transformers' tensor parallel."""
    from rsteer_interp.backends import load_backend

    backend = load_backend(folder / "model", device_map="tp")
    assert backend.name == "hooks" and processes.count() == 1
    found = _read(backend)
    save_file(found, folder / f"process{processes.rank()}.safetensors")


def _read(backend: Backend) -> dict[str, torch.Tensor]:
    rows = backend.template().encode_all(TEXTS)
    edit = add({Site(2): torch.arange(1.0, backend.d_model + 1)}, {Site(2): 2.0})
    states = last_states(backend, rows, [Site(3, "mlp_out"), Site(4)], edit)
    tokens = backend.generate(backend.batch(rows), 4, edit).ids
    return {"log-odds": log_odds(backend, rows, [5, 9], edit), "tokens": tokens} | {
        str(s): x for s, x in states.items()
    }


def main(what: str, folder: str) -> None:
    if what == "prompts":
        with processes.together():
            _measure(Path(folder) / f"process{processes.rank()}")
    else:
        with processes.together("tp"):
            _sharded_model(Path(folder))
    processes.leave(0)


def _torchrun(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))}
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    ran = _torchrun(2, "-m", "tests.test_processes", "prompts", str(folder))
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder, ran.stdout


def test_two_processes_give_what_one_gives(both: tuple[Path, str], tmp_path: Path) -> None:
    _measure(tmp_path / "process0")
    one = load_file(tmp_path / "process0" / "found.safetensors")
    for rank in (0, 1):
        there = both[0] / f"process{rank}"
        two = load_file(there / "found.safetensors")
        assert two.keys() == one.keys()
        for name, x in one.items():
            tolerance = 1e-6 if name.startswith("states") else 1e-10  # states are stored in float32
            torch.testing.assert_close(two[name], x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert (there / "replies.json").read_text() == (tmp_path / "process0" / "replies.json").read_text()


def test_the_first_process_prints_and_writes(both: tuple[Path, str]) -> None:
    folder, printed = both
    assert printed.count("measured") == 1
    result = load_result(folder / "stage", kind="test")
    assert len(result.data["replies"]) == len(TEXTS) and result.tensor("x", len(TEXTS)).dtype == torch.float64


def test_the_work_is_really_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes runs a part, and together they run every prompt once; what runs inside a part is not shared again."""
    backend = tiny_backend("llama", batch_size=64)
    rows, seen = backend.template().encode_all(TEXTS), []
    monkeypatch.setattr(processes, "gathered", lambda own: list(own))
    for rank in (0, 1):
        monkeypatch.setattr(processes, "_world", processes._World(rank, 2, True))

        def inner(batch: Any) -> int:
            assert processes.count() == 1
            return len(list(backend.spread(list(batch.rows), len)))

        shares = [i for group, n in backend.spread(rows, inner) for i in group if n == 1]
        assert 0 < len(shares) < len(rows)
        seen += shares
    assert sorted(seen) == list(range(len(rows)))


def test_a_model_shared_out_by_tensor_parallel_gives_the_same(tmp_path: Path) -> None:
    from rsteer_interp.backends import load_backend

    (tmp_path / "model").mkdir()
    save_tiny("llama", tmp_path / "model")
    ran = _torchrun(2, "-m", "tests.test_processes", "model", str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-2000:]
    whole = _read(load_backend(tmp_path / "model", "hooks"))
    for rank in (0, 1):
        found = load_file(tmp_path / f"process{rank}.safetensors")
        assert torch.equal(found.pop("tokens"), whole["tokens"])
        for name, x in found.items():
            torch.testing.assert_close(x, whole[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(UserError, match="torchrun"):
        load_backend(tmp_path / "model", device_map="tp")


def test_without_torchrun_nothing_is_started() -> None:
    with processes.together():
        assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert processes.from_first(lambda: 5) == 5


if __name__ == "__main__":
    main(*sys.argv[1:])
