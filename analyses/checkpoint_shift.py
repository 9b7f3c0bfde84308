"""In how many dimensions do the states of one checkpoint differ from another's? Base and instruct, or a model and its edited copy.

After The Hidden Dimensions of LLM Alignment (arXiv 2502.09674). Last-prompt-token states of the same prompts in both, at some depths:
spectrum of the shift in three variants (identity, matrix, map; see `rsteer_interp.checkpoint_shift`), effective ranks beside shifts
of the same sizes in random directions and beside other prompts' states, the share of a shift that all prompts have in common,
repeatability between halves, and the first component's cosine with the harmful set's mean minus the harmless one's. One model is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    before: str
    """Demo model name, hub id, folder or GGUF file: the earlier checkpoint. Its tokenizer encodes the prompts."""
    after: str
    """The later checkpoint, of the same width, depth and vocabulary."""
    out: Path = Path("results/checkpoint_shift")
    """Result folder."""
    contrast: tuple[str, str] = ("harmful", "harmless_matched")
    """Two prompt sets; components are compared with the mean state of the first minus that of the second. Sets, not verdicts."""
    others: tuple[str, ...] = ("political_sensitive", "political_matched", "general", "borderline")
    """Further prompt sets; the variants that fit a map need more prompts than the model is wide."""
    prompts: int = 240
    """Prompts of each set, at most."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.0)
    """Where states are read, as shares of the depth; 1 is what the final norm reads."""
    draws: int = 50
    """Draws of each null."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    device_map: str | None = None
    """transformers' device map, for models spread over several devices."""
    batch_size: int = 96
    """Most rows at once; halved when memory runs out."""
    seed: int = 0
    """Seed of prompt samples, nulls and splits."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""


def run(config: Config) -> Path:
    """Read both, compare, write the result folder and its figure, print the table; returns the folder."""
    from rsteer_interp.studies.checkpoint_shift import run_shift

    return run_shift(config, scripts=Path(__file__).resolve().parent.parent / "figures")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
