"""What is left of refusal when one direction is taken out of the weights? Sweep where it is read, edit, save a checkpoint.

Weight orthogonalisation (Arditi et al., arXiv 2406.11717; A Granular Study of Safety Pretraining, arXiv 2510.02768): the mean
difference of last-prompt-token states of a set that is refused and one that is answered, read at layer int(L * fraction), is
removed from every weight that writes to the stream. The sweep uses the equal activation edit and prompts of the select split;
for fraction 1 it takes the direction before and after the final norm. The saved checkpoint is loaded again and measured on the
report split: first-token log-odds, and judged replies, of which only rates are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    out: Path
    """Result folder: the sweep, and in it `checkpoint`, an ordinary model folder, which must not exist yet."""
    model: str = "demo"
    """Demo model name, hub id, folder or GGUF file. Its weights must be whole: no quantisation, no offloading."""
    direction: Path | None = None
    """Vector file or steering folder whose direction is removed; None: fit one here."""
    layer: int | None = None
    """Which layer's direction of that file; not needed where it holds one."""
    fraction: float | None = None
    """Read the direction at layer int(L * fraction). None: sweep, and take the best (see kl_limit)."""
    fractions: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Fractions of the sweep."""
    final_norm: bool = False
    """With fraction 1.0: take the direction after the final norm, as the Granular study's default does."""
    refused: str = "political_sensitive"
    """Prompt set or file whose refusal is to go; harmful is what the papers use."""
    answered: str = "political_matched"
    """Prompts that the model answers, on like subjects."""
    kept: str = "harmful"
    """Prompts whose refusal is watched beside."""
    filtered: bool = True
    """Fit on prompts with refusal log-odds above 0 (refused) and below 0 (answered) alone, as Arditi et al. do."""
    scale: float = 1.0
    """Share of the direction that is taken out; negative adds refusal."""
    writers: Literal["all", "granular"] = "all"
    """all: every weight that writes to the stream. granular: not the embedding and the first block."""
    fit: int = 64
    """Prompts of each set that the direction is fitted on."""
    select: int = 32
    """Prompts of each set in the sweep."""
    report: int = 96
    """Prompts of each set on which the checkpoint is measured."""
    conversations: int = 12
    """Benign conversations for the KL."""
    random: int = 20
    """Random directions of each null: p can be no smaller than 1 / (1 + random)."""
    kl_limit: float = 0.1
    """The sweep takes the direction, read in the first 80 % of the layers, that leaves the least refusal with a KL (nats per token) up to this."""
    sweep_only: bool = False
    """Write no checkpoint."""
    refusal_words: tuple[str, ...] = ("I", "As", "Sorry")
    """Words that open this model's refusals; the log-odds are those of their first tokens."""
    judge: str = "default"
    """Judge of the checkpoint's replies: default (by patterns alone, as the edited model is not to judge itself), pattern or endpoint."""
    tokens: int = 24
    """Longest reply that is judged."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """Type in which the model is loaded, edited and saved. auto: bfloat16 on an accelerator, float32 on a CPU."""
    batch_size: int = 64
    """Most rows at once; halved when memory runs out."""
    seed: int = 0
    """Seed of prompt samples, random directions and bootstraps."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""


def run(config: Config) -> Path:
    """Fit or read, sweep, edit, save, measure; returns the result folder."""
    from rsteer_interp.abliteration import abliterate

    return abliterate(config)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
