"""What does a saved steering configuration do to these prompts? Base and steered replies, side by side.

Writes `responses.jsonl`: per prompt `set`, `prompt`, and two objects `base` and `steered`, each with `response`, `refused`,
`confidence` (the judge's probability of a refusal) and `log_odds` (first-token refusal log-odds); and `summary.json` with the
refusal rate of each set before and after. Responses of sets named like `harmful` are cut to 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    steering: Path
    """Folder of a saved steering configuration, for example results/reproduce/steering/wrmd."""
    prompts: str
    """File of prompts (.jsonl with `prompt` and perhaps `set`, or .txt, .csv, .parquet), or a built-in set's name."""
    out: Path
    """Folder for the result; complete or absent."""
    model: str = "demo"
    """The model that the configuration was made for: demo model name, hub id, folder or GGUF file."""
    judge: str = "default"
    """Judge of replies: default, pattern, local or endpoint."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    device_map: str | None = None
    """Passed to transformers (hooks backend), for example auto."""
    max_new_tokens: int = 32
    """Longest reply."""
    harmful_tokens: int = 16
    """Longest reply written down for prompts of harmful sets."""
    batch_size: int = 64
    """Most rows at once; halved when memory runs out."""
    other_model: bool = False
    """Apply it although the model's weights are not the ones it was made for (same width and depth needed)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""


def run(config: Config) -> Path:
    """Generate, judge, write; returns the folder."""
    from rsteer_interp.application import apply_steering

    return apply_steering(config)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
