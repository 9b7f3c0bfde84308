"""The default judge (first version: patterns alone; the cascade with the local model follows)."""

from __future__ import annotations

from rsteer_interp.judges.pattern import PatternJudge


class DefaultJudge(PatternJudge):
    """Patterns for now."""

    name = "default"
