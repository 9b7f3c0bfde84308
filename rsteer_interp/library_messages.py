"""What libraries say while a model is read: their bars are hidden, their warnings are kept for the caller to pass on."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

_TABLE = "LOAD REPORT"


@contextmanager
def quiet_libraries(*, bars: bool) -> Iterator[list[str]]:
    """No talk from transformers inside, and without `bars` no progress bars of any library; put back afterwards.

    Yields the warnings that transformers logs meanwhile, which the caller must look at: it logs there that it draws missing
    weights at random, or cannot tie two weights. Python's own warnings are shown when the block ends.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as untyped

    theirs: Any = untyped
    had_bars = theirs.is_progress_bar_enabled()
    with ExitStack() as after:
        said = after.enter_context(_collected())
        if not bars:
            theirs.disable_progress_bar()
            if had_bars:
                after.callback(theirs.enable_progress_bar)
            if not are_progress_bars_disabled():
                disable_progress_bars()
                after.callback(enable_progress_bars)
            after.enter_context(_shown_afterwards())
            # The dequantisation writes a bar that has no switch.
            after.enter_context(redirect_stderr(io.StringIO()))
        yield said


def pass_on(name: str, said: list[str]) -> None:
    """Show what transformers logged about a model, one line each, once; not its table of keys, see `weight_keys`."""
    lines = (message.strip().splitlines()[0] for message in said if message.strip() and _TABLE not in message)
    for line in dict.fromkeys(lines):
        warnings.warn(f"{name}: transformers says: {line}", stacklevel=3)


def reported(said: list[str]) -> str:
    """The weights in transformers' table of what went wrong, as one line."""
    rows = (line.split("|") for message in said if _TABLE in message for line in message.splitlines())
    cells = [[re.sub(r"\x1b\[[0-9;]*m", "", cell).strip() for cell in row] for row in rows if len(row) > 1]
    return ", ".join(f"{row[1].lower()} of {row[0]}" for row in cells if row[1].isupper())[:300]


class _Collector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _collected() -> Iterator[list[str]]:
    """The transformers logger, at the level of warnings and above, goes into a list instead of standard error."""
    logger, said = logging.getLogger("transformers"), list[str]()
    before = logger.level, logger.handlers[:], logger.propagate
    logger.setLevel(logging.WARNING)
    logger.handlers[:], logger.propagate = [_Collector(said)], False
    try:
        yield said
    finally:
        logger.setLevel(before[0])
        logger.handlers[:], logger.propagate = before[1], before[2]


@contextmanager
def _shown_afterwards() -> Iterator[None]:
    """Python warnings raised inside are raised again when standard error is back."""
    seen: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as seen:
            yield
    finally:
        for warning in seen:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
