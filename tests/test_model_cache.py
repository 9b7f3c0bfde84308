"""The model cache: what loads from it is, byte for byte, what was converted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rsteer_interp import checkpoints, model_cache
from rsteer_interp.checkpoints import resolve
from rsteer_interp.errors import CheckpointError
from rsteer_interp.loading import load
from rsteer_interp.model_cache import BEFORE, MANIFEST, content_digest, read_manifest, write_manifest
from tests.checkpoint_material import cache, llama_folder, offer, sha256, tiny, tiny_llama, tiny_tokenizer
from tests.gguf_files import write_gguf

__all__ = ["cache", "llama_folder", "tiny"]


def overwrite(path: Path, content: bytes, *, unseen: bool) -> None:
    """New content of the same size; `unseen` puts the time of change back."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    times = (before.st_atime_ns, before.st_mtime_ns)
    os.utime(path, ns=times if unseen else (times[0], times[1] + 1))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_the_manifest_holds_the_digest_of_every_file(tiny: SimpleNamespace) -> None:
    folder = resolve("tiny").folder
    assert folder is not None
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    for name, known in files.items():
        content = (folder / name).read_bytes()
        assert (known["bytes"], known["sha256"]) == (len(content), sha256(content))


@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_overwritten_at_the_same_size_never_load_under_the_old_source(
    cache: Path, tmp_path: Path, name: str, unseen: bool
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    found = resolve(path)
    assert found.folder is not None
    sound, identity = (found.folder / name).read_bytes(), load(found, device="cpu").fingerprint
    at = sound.index(b'"rope_theta": 1') + 14 if name == "config.json" else len(sound) - 1
    overwrite(found.folder / name, flipped(sound, at), unseen=unseen)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was converted .*delete the folder"):
        resolve(path)
    overwrite(found.folder / name, sound, unseen=unseen)
    assert load(resolve(path), device="cpu").fingerprint == identity
    shutil.rmtree(found.folder)  # the remedy
    assert load(resolve(path), device="cpu").fingerprint == identity


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished folder with a file of which only a sample is read."""
    monkeypatch.setattr(model_cache, "_HEAD", 1 << 12)
    monkeypatch.setattr(model_cache, "_PAGES", 8)
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    write_manifest(tmp_path, name="large", source="somewhere", gguf_sha256="")
    return tmp_path


def test_one_byte_that_no_sample_sees_is_found_by_its_time_or_by_verify(large: Path) -> None:
    weights = large / "model.safetensors"
    sound = weights.read_bytes()
    spread = [at for at in range(0, len(sound), 4096) if _notices(large, sound, at)]
    assert 0 in spread and len(sound) - 4096 in spread and 9 <= len(spread) <= 17
    hidden = next(at for at in range(0, len(sound), 4096) if at not in spread)
    overwrite(weights, flipped(sound, hidden), unseen=True)
    assert read_manifest(large) is not None  # cheap, and blind to this
    with pytest.raises(CheckpointError, match=r"model.safetensors is not the file"):
        read_manifest(large, verify=True)
    overwrite(weights, flipped(sound, hidden), unseen=False)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not the file"):
        read_manifest(large)


def _notices(folder: Path, sound: bytes, at: int) -> bool:
    weights = folder / "model.safetensors"
    overwrite(weights, flipped(sound, at), unseen=True)
    try:
        return read_manifest(folder) is None
    except CheckpointError:
        return True
    finally:
        overwrite(weights, sound, unseen=True)


def test_a_folder_that_was_copied_is_read_whole_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(large / "model.safetensors")
    read: list[str] = []
    whole = model_cache.sha256
    monkeypatch.setattr(model_cache, "sha256", lambda path: (read.append(path.name), whole(path))[1])
    assert read_manifest(large) is not None and read == ["model.safetensors"]
    assert read_manifest(large) is not None and read == ["model.safetensors"]
    assert {path.name for path in large.iterdir()} == {"model.safetensors", MANIFEST}


# --- folders of version 0.1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_a_folder_of_version_0_1_is_taken_over_if_it_is_what_that_version_made(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    resolve("tiny")
    (tiny.folder / MANIFEST).unlink()
    names = [path.name for path in tiny.folder.iterdir()]
    offer(monkeypatch, replace(tiny.demo, content_sha256=content_digest(tiny.folder, names)))
    (tiny.folder / BEFORE).write_text(json.dumps({"format": 1, "files": dict.fromkeys(names, 0)}))
    weights = tiny.folder / "model.safetensors"
    if not same:
        overwrite(weights, flipped(weights.read_bytes(), 9), unseen=True)
    found = resolve("tiny")
    assert found.source == tiny.demo.source and weights.read_bytes() == tiny.content
    assert len(tiny.index.fetched) == (3 if same else 6)
    assert (tiny.folder / MANIFEST).is_file() and (tiny.folder / BEFORE).is_file() == same


# --- every byte, on demand ---------------------------------------------------------------------------------------


def test_verify_reads_every_byte_of_a_converted_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    folder = resolve(path).folder
    assert folder is not None
    asked: list[bool] = []
    whole = model_cache.read_manifest
    monkeypatch.setattr(
        checkpoints, "read_manifest", lambda at, *, verify: (asked.append(verify), whole(at, verify=verify))[1]
    )
    assert resolve(path, verify=True).folder == folder and asked == [True]


def test_verify_compares_a_hub_model_with_the_names_of_its_blobs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for file in llama_folder.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"  # kept by sha256, as the hub does; the others by git's sha1
        name = sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(blobs / name)
    monkeypatch.setattr(checkpoints, "_cached_snapshot", lambda hub_id, revision: snapshot)
    commit = "c" * 40
    assert resolve(f"org/name@{commit}", verify=True).folder == snapshot
    for name in ("config.json", "model.safetensors"):
        sound = (snapshot / name).read_bytes()
        overwrite(snapshot / name, flipped(sound, len(sound) - 3), unseen=True)
        assert resolve(f"org/name@{commit}").folder == snapshot
        with pytest.raises(CheckpointError, match=f"org/name: {name} is not what the hub has"):
            resolve(f"org/name@{commit}", verify=True)
        overwrite(snapshot / name, sound, unseen=True)


def test_where_nobody_recorded_digests_verify_says_so(llama_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny-llama: nobody recorded digests"):
        resolve(llama_folder, verify=True)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM: nobody recorded digests"):
        resolve(tiny_llama(), tokenizer=tiny_tokenizer(), verify=True)
