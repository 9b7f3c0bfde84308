"""The converted-model cache: safetensors folders that are complete or absent, and still what was converted.

    <user cache>/rsteer_interp/models/<name>/             a finished model: weights, config, tokenizer, manifest
    <user cache>/rsteer_interp/models/.staging/<name>/    verified archives or GGUF of an unfinished one (resumed)

A folder is made in staging and appears by one rename. Its manifest holds size and digests of every file. Every use checks
the sizes and a sample of the bytes; a file that was written since, and all files on demand, are read whole.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import platformdirs
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from rsteer_interp.errors import CheckpointError

MANIFEST = "rsteer-model.json"
BEFORE = "rsteer-manifest.json"
"""The manifest of version 0.1, which knew sizes alone."""
_SPACE_MARGIN = 100_000_000  # bytes left free beyond what the files themselves take
_HEAD, _PAGE, _PAGES = (
    1 << 24,
    1 << 12,
    1024,
)  # of a file's bytes: the first 16 MiB, and 1024 pages spread over the rest
_PACKAGES = ("transformers", "gguf", "torch")


class CachedFile(BaseModel):
    """One file of a finished folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str
    sample: str
    """`sampled_digest`, which costs milliseconds."""
    modified: int
    """The file's time of change, in ns, when its content was last known to have that sha256."""


class Manifest(BaseModel):
    """What a finished folder holds: written last, so that a folder without it is not a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    name: str
    source: str
    gguf_sha256: str
    files: dict[str, CachedFile]
    written_with: dict[str, str]
    """Versions of the packages that dequantised the weights."""


def models_folder() -> Path:
    """Where converted models are kept: the platform's user cache directory (on Linux, XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("rsteer_interp", appauthor=False) / "models"


# --- manifests ---------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, *, name: str, source: str, gguf_sha256: str) -> None:
    """Seal a folder: digests of every file that is in it now."""
    files = {
        file.name: _described(file)
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".") and file.name not in (MANIFEST, BEFORE)
    }
    packages = {package: importlib.metadata.version(package) for package in _PACKAGES}
    _store(folder, Manifest(name=name, source=source, gguf_sha256=gguf_sha256, files=files, written_with=packages))


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest | None:
    """The manifest of a finished folder; None where it is absent, unreadable, or a file is missing or cut short.

    A folder whose files have the right sizes and other contents is a CheckpointError: whatever it is, it is not the model
    that its manifest names. `verify` reads every byte; else only a sample, and the whole of a file that was written since.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        now = {name: (folder / name).stat() for name in manifest.files}
    except (OSError, ValidationError):
        return None
    if any(now[name].st_size != known.bytes for name, known in manifest.files.items()):
        return None
    touched = {name for name, known in manifest.files.items() if now[name].st_mtime_ns != known.modified}
    for name, known in manifest.files.items():
        whole = verify or name in touched
        if (sha256(folder / name) != known.sha256) if whole else (sampled_digest(folder / name) != known.sample):
            raise CheckpointError(
                f"{folder}: {name} is not the file that was converted from {manifest.source}; "
                "delete the folder to have it made again"
            )
    if touched:  # copied or restored, and the same: need not be read whole next time
        files = {n: known.model_copy(update={"modified": now[n].st_mtime_ns}) for n, known in manifest.files.items()}
        manifest = manifest.model_copy(update={"files": files})
        with suppress(OSError):  # a cache that cannot be written
            _store(folder, manifest)
    return manifest


def adopt(folder: Path, content: str, name: str, source: str, gguf_sha256: str) -> bool:
    """Give a folder of version 0.1 a manifest with digests, if its content is the known one; whether it did."""
    try:
        files = json.loads((folder / BEFORE).read_bytes())["files"]
        known = content_digest(folder, files) == content
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if known:
        write_manifest(folder, name=name, source=source, gguf_sha256=gguf_sha256)
    return known


def content_digest(folder: Path, names: Iterable[str]) -> str:
    """One sha256 for all the named files of a folder."""
    lines = [f"{name} {sha256(folder / name)}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sampled_digest(path: Path) -> str:
    """Digest of a file's size, its first 16 MiB (a safetensors header among them) and 1024 pages spread over the rest."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=16)
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_HEAD))
        for n in range(_PAGES if size > _HEAD else 0):
            file.seek(_HEAD + n * max(size - _HEAD - _PAGE, 0) // (_PAGES - 1))
            digest.update(file.read(_PAGE))
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(file: Path) -> CachedFile:
    stat = file.stat()
    return CachedFile(bytes=stat.st_size, sha256=sha256(file), sample=sampled_digest(file), modified=stat.st_mtime_ns)


def _store(folder: Path, manifest: Manifest) -> None:
    partial = folder / f".{MANIFEST}.{os.getpid()}"
    partial.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


# --- making a folder ---------------------------------------------------------------------------------------------


def made_once(name: str, make: Callable[[Path], Path]) -> Path:
    """The finished folder `name`; when it is absent, what `make(staging)` returns, moved there by one rename."""
    folder = models_folder() / name
    if read_manifest(folder):
        return folder
    staging = models_folder() / ".staging" / name
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{staging}: cannot write the model cache ({error.strerror}); free or move it") from error
    with _locked(staging.with_name(f"{name}.lock"), name):
        if read_manifest(folder):  # another process finished it while this one waited
            return folder
        _drop_unfinished(staging)  # of a run that was killed
        staging.mkdir(exist_ok=True)
        try:
            converted = make(staging)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder: it has no valid manifest
            os.replace(converted, folder)
        except BaseException as error:
            _drop_unfinished(staging)
            if is_disk_full(error):
                raise CheckpointError(f"{models_folder()}: the disk is full; free some space and repeat") from error
            raise
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _drop_unfinished(staging: Path) -> None:
    """Remove what cannot be resumed: everything but verified archives and the joined GGUF; an empty folder goes too."""
    if not staging.is_dir():
        return
    for entry in staging.iterdir():
        if entry.name not in ("archives", "model.gguf"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    archives = staging / "archives"
    if archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()
    if not any(staging.iterdir()):
        staging.rmdir()


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process is preparing it; waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def need_space(folder: Path, needed: int, purpose: str) -> None:
    """CheckpointError where a folder's disk has no room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPACE_MARGIN:
        raise CheckpointError(
            f"{folder}: the disk is too full to {purpose}, needs {_gigabytes(needed + _SPACE_MARGIN)}, "
            f"has {_gigabytes(free)}; free some space, or move the cache (XDG_CACHE_HOME on Linux)"
        )


def is_disk_full(error: BaseException) -> bool:
    # safetensors reports it as an error of its own, with the system's words in the message
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
