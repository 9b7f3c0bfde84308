"""The options that every study has; an analysis' Config adds its own. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INCIDENTAL = frozenset({"out", "scores", "batch_size", "device_map", "verify"})
"""Where things lie and how they run: no part of a question."""


@dataclass(frozen=True)
class StudyConfig:
    model: str = "demo"
    """Demo model name, hub id (org/name or org/name@revision), local folder or GGUF file."""
    out: Path = Path("results/study")
    """Result folder; finished stages in it are reused."""
    scores: Path = Path("results/scores")
    """Folder of judged prompts and their states, which all studies of a model share."""
    fit: int = 64
    """Prompts of each set on which directions are fitted."""
    select: int = 40
    """Prompts of each set on which layers and settings are chosen."""
    report: int = 96
    """Prompts of each set on which results are reported."""
    tokens: int = 24
    """Longest reply that is judged."""
    samples: int = 4
    """Sampled replies per prompt for the graded c that weighted estimators are fitted on; even, so that votes can split."""
    judge: str = "default"
    """Judge of replies: default, pattern, local or endpoint."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    device_map: str | None = None
    """transformers' device map, for models spread over several devices (hooks backend)."""
    trust_remote_code: bool = False
    """Run code that comes with the model's repository; read it first."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""
    batch_size: int = 96
    """Most rows at once; halved when memory runs out. Below float32 results move with it: steps kept at another are run again."""
    seed: int = 0
    """Seed of prompt samples, random directions, permutations and bootstraps."""
