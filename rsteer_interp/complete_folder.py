"""Complete-or-absent folders: a set of files that appears in a folder all at once, and survives a kill at any moment.

Files are written into `.NAME.partial` beside the folder, flushed to the disk, and renamed to `.NAME.ready`: from then
on they count. Then they are moved into place; whoever next takes the folder finishes a move that was cut off. One of
the files is the seal: a folder that has it is complete.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rsteer_interp.errors import UserError


@contextmanager
def held(folder: Path, files: tuple[str, ...], *, write: bool, lock: str = "lock") -> Iterator[Path]:
    """The folder's real place, locked against other processes and threads (one thread may take it twice), with moves
    that were cut off finished. The last of `files` is the seal. Reading where nothing can be written takes no lock."""
    place = folder.resolve()
    if not place.name:
        raise UserError(f"'{folder}' cannot hold a result; name a folder")
    if write:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make '{folder}': {error.strerror}; name another folder") from None
    elif not place.is_dir() and not beside(place, "ready").is_dir():
        yield place  # nothing there, so nothing to lock
        return
    guard = FileLock(beside(place, lock), is_singleton=True)
    try:
        try:
            guard.acquire(timeout=0)
        except Timeout:
            print(f"'{folder}' is in use by another run; waiting for it", file=sys.stderr)
            guard.acquire()
    except OSError as error:
        if write:
            raise UserError(f"cannot write beside '{folder}': {error.strerror or error}; name another folder") from None
        yield place
        return
    try:
        if lock == "lock" and guard.lock_counter == 1:
            _finish(place, files)
        yield place
    finally:
        guard.release()


def publish(folder: Path, place: Path, files: tuple[str, ...], contents: Mapping[str, bytes]) -> None:
    """Make `contents` (some of `files`, the seal among them) the folder's files, all of them or none; what it held
    under the other names of `files` goes, anything else in it stays. Call with the folder held."""
    partial = beside(place, "partial")
    try:
        partial.mkdir()
        for name in files:
            if name in contents:
                _write(partial / name, contents[name])
        _sync(partial)
        partial.rename(beside(place, "ready"))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or str(error)
        raise UserError(f"cannot write '{folder}': {reason}; nothing was changed, make room and run again") from None
    _finish(place, files)


def _finish(place: Path, files: tuple[str, ...]) -> None:
    """Bring files that count into place, whatever was done of it before; remove what was left half-written."""
    ready, old, seal = beside(place, "ready"), beside(place, "old"), files[-1]
    try:
        if (ready / seal).is_file():
            if (place / seal).is_file():
                place.rename(old)
            if place.is_dir():  # no complete set in it, perhaps other files: the seal comes last
                for name in files:
                    if (ready / name).is_file():
                        (ready / name).replace(place / name)
                _sync(place)
            else:
                ready.rename(place)
            _sync(place.parent)
        if ready.is_dir():
            shutil.rmtree(ready)  # spent: its seal has moved
        if old.is_dir() and not place.exists():
            old.rename(place)  # this code does not leave it so; the older files are better than none
        if old.is_dir():
            for entry in sorted(old.iterdir()):
                if entry.name not in files and not (place / entry.name).exists():
                    entry.rename(place / entry.name)
            shutil.rmtree(old)
        if beside(place, "partial").is_dir():
            shutil.rmtree(beside(place, "partial"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot move files into '{place.name}': {reason}; close what uses it and run again") from None


def beside(place: Path, what: str) -> Path:
    """The hidden sibling of a folder that serves `what` (lock, partial, ready, old)."""
    return place.with_name(f".{place.name}.{what}")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a folder's list of names, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
