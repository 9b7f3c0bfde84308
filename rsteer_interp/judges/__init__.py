"""Judges: does a reply refuse? `load_judge` makes one by name; all have `judge(prompts, responses) -> list[Verdict]`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import UserError
from rsteer_interp.judges.base import UNDECIDED, Judge, Verdict, parse_verdict

if TYPE_CHECKING:
    from rsteer_interp.backends.base import Backend

__all__ = ["JUDGES", "UNDECIDED", "Judge", "Verdict", "load_judge", "parse_verdict"]

JUDGES: dict[str, str] = {
    "default": "rsteer_interp.judges.default:DefaultJudge",
    "pattern": "rsteer_interp.judges.pattern:PatternJudge",
    "local": "rsteer_interp.judges.local:LocalJudge",
    "endpoint": "rsteer_interp.judges.endpoint:EndpointJudge",
}
"""Name on the command line -> where the class is; each has a classmethod `load(backend, **options)`. Imported when used."""


def load_judge(name: str = "default", backend: Backend | None = None, **options: Any) -> Judge:
    """The judge of that name. `backend` is the model that a local judge asks (default: none); options are the judge's."""
    if name not in JUDGES:
        raise UserError(f"unknown judge '{name}'; choose from {', '.join(JUDGES)}")
    module, _, attribute = JUDGES[name].partition(":")
    load: Callable[..., Judge] = getattr(import_module(module), attribute).load
    try:
        return load(backend, **options)
    except TypeError as error:
        raise UserError(f"judge '{name}' does not take these options: {error}") from None
