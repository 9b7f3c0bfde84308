"""Result folders: complete or absent at every moment, resumable, same bytes for same data, checked on loading."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import BaseModel

from rsteer_interp.errors import UserError
from rsteer_interp.results import Provenance, Result, load_result, plain, save_result, stage

FINGERPRINT = "a1b2c3d4e5f60718"
BACKEND = SimpleNamespace(
    name="hooks",
    fingerprint=FINGERPRINT,
    notes=["out of memory at batch size 64; continued with 32"],
    checkpoint=SimpleNamespace(name="tiny", source="hub:someone/tiny@0123"),
    model=SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa"), device=torch.device("cpu"), dtype=torch.float32
    ),
)
RECORD = Provenance.collect(BACKEND, config={"seed": 3}, command=["analyses/one.py", "--seed", "3"])


def save(folder: Path, value: float, **options: Any) -> Result:
    tensors = {"v": torch.full((4, 3), value), "ids": torch.arange(5)}
    return save_result(folder, "test", {"value": value}, tensors, provenance=RECORD, **options)


def value_of(result: Result) -> float:
    """The one value of a result; fails on a mixture of two."""
    assert set(result.tensor("v", 4, 3).flatten().tolist()) == {result.data["value"]}
    return float(result.data["value"])


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith((".lock", ".work")))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    written = save(tmp_path / "one", 2.0)
    read = load_result(tmp_path / "one", kind="test", fingerprint=FINGERPRINT)
    assert (read.data, read.digest, read.kind, read.provenance) == (written.data, written.digest, "test", RECORD)
    assert torch.equal(read.tensor("ids", -1), torch.arange(5)) and value_of(read) == 2.0
    assert visible(tmp_path) == ["one"]
    assert visible(tmp_path / "one") == ["provenance.json", "result.json", "tensors.safetensors"]
    made = save_result(tmp_path / "two", "test", {"b": {"d": 1, "c": 2}, "a": 3}, provenance=RECORD)
    assert json.dumps(made.data) == json.dumps(load_result(tmp_path / "two").data)  # also in the order of names


def test_a_result_without_tensors_has_no_tensor_file(tmp_path: Path) -> None:
    save(tmp_path / "one", 1.0)
    save_result(tmp_path / "one", "test", {"value": 2}, provenance=RECORD)
    assert visible(tmp_path / "one") == ["provenance.json", "result.json"]
    assert load_result(tmp_path / "one").tensors == {}


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    save_result(
        tmp_path / "a", "test", {"x": 1, "y": [0.1]}, {"p": torch.ones(2), "q": torch.zeros(3)}, provenance=RECORD
    )
    later = RECORD.model_copy(update={"created": "2030-01-01T00:00:00+00:00"})
    save_result(
        tmp_path / "b", "test", {"y": (0.1,), "x": 1}, {"q": torch.zeros(3), "p": torch.ones(2)}, provenance=later
    )
    for name in ("result.json", "tensors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "2030" in (tmp_path / "b" / "provenance.json").read_text()


# --- killed at any moment ----------------------------------------------------------------------------------------

STEPS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "open")


def dies_while_saving(folder: Path, moment: int) -> bool:
    """Saves in a forked child that dies, without any cleaning up, before its n-th step on disk; False if it lived."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in STEPS and str(folder.parent) in str(arguments[0]) and next(steps) == moment:
                os._exit(9)

        try:
            sys.addaudithook(hook)
            save(folder, 2.0)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["absent", "result", "result and figures", "figures"])
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, before: str) -> None:
    seen: list[float] = []
    for moment in itertools.count(1):
        folder = tmp_path / str(moment) / "one"
        folder.parent.mkdir()
        if "result" in before:
            save(folder, 1.0)
        if "figures" in before:
            (folder / "figures").mkdir(parents=True)
            (folder / "figures" / "a.pdf").write_text("drawn")
        died = dies_while_saving(folder, moment)
        if (folder / "result.json").exists():  # as any other program would read it
            content, tensors = json.loads((folder / "result.json").read_text()), folder / "tensors.safetensors"
            assert float(safetensors.torch.load_file(tensors)["v"].mean()) == content["data"]["value"]
        try:
            seen.append(value_of(load_result(folder)))
        except UserError as error:
            assert "no result in" in str(error)
            seen.append(0.0)
        if folder.exists():
            left = {"provenance.json", "result.json", "tensors.safetensors"} if seen[-1] else set()
            assert set(visible(folder)) == left | ({"figures"} if "figures" in before else set())
            assert visible(folder.parent) == ["one"]
        if "figures" in before:
            assert (folder / "figures" / "a.pdf").read_text() == "drawn"
        if not died:
            break
    assert len(seen) > 8, "the child hardly ever died: the test tests nothing"
    assert seen == sorted(seen) and set(seen) == {1.0 if "result" in before else 0.0, 2.0}


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "one", 1.0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; nothing was changed"):
            save(tmp_path / "one", 2.0)
    assert value_of(load_result(tmp_path / "one")) == 1.0
    assert visible(tmp_path) == ["one"]


# --- resuming ----------------------------------------------------------------------------------------------------


def test_a_stage_runs_once_per_key(tmp_path: Path) -> None:
    calls: list[int] = []

    def run(key: dict[str, Any]) -> Result:
        def compute() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            calls.append(1)
            return {"value": key["seed"]}, {"v": torch.full((4, 3), float(key["seed"]))}

        return stage(tmp_path / "stage", "test", key, compute, lambda: RECORD)

    first = run({"seed": 1, "model": FINGERPRINT})
    assert run({"model": FINGERPRINT, "seed": 1}).digest == first.digest and len(calls) == 1
    assert run({"seed": 2, "model": FINGERPRINT}).data == {"value": 2} and len(calls) == 2
    content = json.loads((tmp_path / "stage" / "result.json").read_text())
    assert content["key"] and content["key"] != first.key
    (tmp_path / "stage" / "tensors.safetensors").write_bytes(b"broken")
    assert run({"seed": 2, "model": FINGERPRINT}).data == {"value": 2} and len(calls) == 3


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> tuple[dict[str, Any], None]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "stage", "test", {}, fail, RECORD)
    assert visible(tmp_path) == []


def test_a_stage_may_load_and_run_others_while_it_computes(tmp_path: Path) -> None:
    def outer() -> tuple[dict[str, Any], None]:
        inner = stage(tmp_path / "out" / "inner", "inner", {}, lambda: ({"x": 1}, None), RECORD)
        assert not earlier or load_result(tmp_path / "out").digest == earlier[0].digest
        return {"inner": inner.digest}, None

    earlier: list[Result] = []
    earlier.append(stage(tmp_path / "out", "outer", {"n": 1}, outer, RECORD))
    stage(tmp_path / "out", "outer", {"n": 2}, outer, RECORD)
    assert load_result(tmp_path / "out" / "inner").data == {"x": 1}


def test_two_at_once_compute_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def compute() -> tuple[dict[str, Any], None]:
        calls.append(1)
        time.sleep(0.3)
        return {"x": 1}, None

    threads = [
        threading.Thread(target=lambda: stage(tmp_path / "s", "test", {}, compute, RECORD), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert calls == [1]
    assert "is in use by another run; waiting" in capsys.readouterr().err


def test_a_reader_beside_a_writer_never_sees_a_mixture(tmp_path: Path) -> None:
    save(tmp_path / "one", 0.0)
    stop = threading.Event()

    def write() -> None:
        for i in range(1, 30):
            save(tmp_path / "one", float(i))
        stop.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    values = []
    while not stop.is_set():
        values.append(value_of(load_result(tmp_path / "one")))
    writer.join()
    assert values == sorted(values)


# --- refused, in one line that names the thing and the remedy ------------------------------------------------------


def test_what_loading_refuses(tmp_path: Path) -> None:
    one = tmp_path / "one"
    save(one, 1.0)

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            load_result(one, **options)
        assert str(one) in str(caught.value) and "\n" not in str(caught.value) and ";" in str(caught.value)
        return str(caught.value)

    assert "holds a result of kind 'test', not 'reproduce'" in refused(kind="reproduce")
    assert "belongs to another model (tiny" in refused(fingerprint="0" * 16)
    with pytest.raises(UserError, match=r"no tensor 'w' \(it has: ids, v\)"):
        load_result(one).tensor("w")
    with pytest.raises(UserError, match=r"shape \(4, 3\), not \(-1, 4\)"):
        load_result(one).tensor("v", -1, 4)
    good = (one / "tensors.safetensors").read_bytes()
    (one / "tensors.safetensors").write_bytes(good[:-1])
    assert "not the file that belongs to result.json" in refused()
    (one / "tensors.safetensors").unlink()
    assert "tensors.safetensors is missing" in refused()
    (one / "tensors.safetensors").write_bytes(good)
    (one / "provenance.json").write_text("{}")
    assert "provenance.json is not valid" in refused()
    text = (one / "result.json").read_text()
    for broken in (text[:40], text.replace("1.0", "NaN"), "[]", "\xff"):
        (one / "result.json").write_bytes(broken.encode("latin-1"))
        assert "cannot be read" in refused()
    (one / "result.json").write_text('{"by": "another program"}')
    assert "not a result of this toolkit" in refused()
    with pytest.raises(UserError, match="no result in"):
        load_result(tmp_path / "nowhere" / "at all")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tensor_file_that_is_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr("rsteer_interp.results._storable", lambda name, tensor: tensor)
    save_result(tmp_path / "one", "test", {}, {"v": torch.tensor([value])}, provenance=RECORD)
    with pytest.raises(UserError, match="tensor 'v' holds values that are not finite"):
        load_result(tmp_path / "one")


def test_what_saving_refuses(tmp_path: Path) -> None:
    one = tmp_path / "one"
    for bad, name in ((float("nan"), "data.table[1].rate is nan"), (np.float32("inf"), "data.table[1].rate is inf")):
        with pytest.raises(UserError) as caught:
            save_result(one, "test", {"table": [{"rate": 1.0}, {"rate": bad}]}, provenance=RECORD)
        assert name in str(caught.value)
    with pytest.raises(UserError, match="'v' has 1 values that are not finite"):
        save_result(one, "test", {}, {"v": torch.tensor([1.0, torch.nan])}, provenance=RECORD)
    with pytest.raises(UserError, match=r"data\.f is a function"):
        save_result(one, "test", {"f": save}, provenance=RECORD)
    assert visible(tmp_path) == []
    save(one, 1.0)
    with pytest.raises(UserError, match="already holds a result of kind 'test'"):
        save_result(one, "other", {}, provenance=RECORD)
    with pytest.raises(UserError, match="already holds a result of kind 'test'"):
        stage(one, "other", {}, lambda: ({}, None), RECORD)
    (one / "result.json").write_text('{"kind": "test"}')
    with pytest.raises(UserError, match="another program"):
        save(one, 2.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save(tmp_path / "file", 1.0)
    with pytest.raises(UserError, match="cannot make"):
        save(tmp_path / "file" / "below", 1.0)


# --- values and provenance ---------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Model(BaseModel):
    rates: tuple[float, ...]


@dataclass
class Settings:
    out: Path
    colour: Colour = Colour.RED
    layers: tuple[int, ...] = (1, 2)
    api_key: str = "topsecret"
    max_new_tokens: int = 16
    model: str = "/home/someone/models/tiny"
    seed: int = 5


def test_values_become_plain() -> None:
    value = {
        1: np.int64(3),
        "array": np.array([[0.5, 1.5]], dtype=np.float32),
        "model": Model(rates=(0.25,)),
        "tensor": torch.tensor([1, 2]),
        "set": {"b", "a"},
        "settings": dataclasses.replace(Settings(Path("results/demo")), colour=Colour.RED),
        "flag": np.bool_(True),
        "text": "half a pair: \ud83d",
    }
    out = json.loads(json.dumps(plain(value), allow_nan=False))
    assert (
        out["1"] == 3
        and out["array"] == [[0.5, 1.5]]
        and out["model"] == {"rates": [0.25]}
        and out["set"] == ["a", "b"]
    )
    assert out["settings"]["out"] == "results/demo" and out["settings"]["colour"] == "red" and out["flag"] is True
    out["text"].encode()


def test_provenance_tells_the_run_and_not_the_machine(tmp_path: Path) -> None:
    record = Provenance.collect(
        BACKEND,
        config=Settings(tmp_path / "out dir"),
        prompt_sets=[SimpleNamespace(name="harmful", digest="d1")],
        template=SimpleNamespace(digest="d2"),
        inputs={"scores": SimpleNamespace(digest="d3"), "directions": "d4"},
        notes=[f"read {tmp_path}/prompts.jsonl, then https://me:pw@host.example/v1/chat went on"],
        command=[
            str(tmp_path / "analyses" / "one.py"), "--out", str(tmp_path / "out dir"), "--api-key", "topsecret",
            f"--prompts={tmp_path}/p.jsonl", "--token=hf_abcdefghijklmnopqrstuvwxyz", "--split", "a/b", "~/models/x",
        ],
    )  # fmt: skip
    text = record.model_dump_json()
    for leaked in (str(tmp_path), "topsecret", "hf_abc", "/home", "me:pw", "~/"):
        assert leaked not in text
    assert record.command == (
        "one.py --out out dir --api-key (removed) --prompts=p.jsonl --token=(removed) --split a/b x"
    )
    assert record.notes[1] == "read prompts.jsonl, then https://host.example/v1/chat went on"
    assert (record.model_name, record.model_source) == ("tiny", "hub:someone/tiny@0123")
    assert (record.device, record.dtype, record.attention) == ("cpu", "float32", "sdpa")
    assert (record.seeds, record.prompt_sets, record.template) == ([5], {"harmful": "d1"}, "d2")
    assert record.inputs == {"scores": "d3", "directions": "d4"}
    assert record.config["max_new_tokens"] == 16 and record.config["model"] == "tiny"
    assert record.notes[0] == BACKEND.notes[0] and "torch" in record.packages


def test_loading_results_needs_no_transformers() -> None:
    heavy = "{'transformers', 'transformer_lens', 'matplotlib'}"
    code = f"import sys, rsteer_interp.results; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
