"""What is in this steering vector, and what does it do? Convert it to and from other programs' files, and run the controls.

Reads a file (rsteer, GGUF control vector of llama.cpp or repeng, steering-vectors as safetensors or JSON, plain .npy or
safetensors tensor) or a saved steering folder; writes any of them. With `--check`, on a model: relative dose, effect on the
refusal log-odds of prompts that it refuses beside random rotations of the edit, judged replies, and KL on benign answers. Pickles
are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    source: Path
    """Vector file, or folder of a saved steering configuration."""
    out: Path | None = None
    """File to write (a folder for --to steering); None: only read it, and check it with --check."""
    to: Literal["rsteer", "gguf", "repeng", "steering-vectors", "tensor", "steering"] = "rsteer"
    """Format to write. rsteer and steering keep everything; the others hold vectors that are added."""
    source_format: Literal["auto", "rsteer", "gguf", "repeng", "steering-vectors", "tensor"] = "auto"
    """Format of the source; auto: by its content."""
    layer: int | None = None
    """Layer of a plain tensor that holds a single vector, or the one row to take."""
    at: Literal["input", "output"] = "input"
    """Whether a plain tensor's layers are block inputs or block outputs."""
    points_to: Literal["stated", "refusing", "complying"] = "stated"
    """Which way the vectors of a foreign file point. stated: what the file says, refusing where it says nothing."""
    strength: float = 1.0
    """What the amounts are multiplied by; negative turns the edit round."""
    model: str | None = None
    """Model that it is for: demo model name, hub id, folder or GGUF file. With one, width, layers and fingerprint are checked."""
    check: bool = False
    """Run the controls on the model; they are printed, and saved beside `out` where that is given."""
    refused: str = "political_sensitive"
    """Controls: prompt set or file; those of the select split that the model refuses by first-token log-odds are used."""
    prompts: int = 32
    """Controls: most prompts."""
    conversations: int = 12
    """Controls: benign conversations for the KL."""
    random: int = 20
    """Controls: random rotations of the edit; n of them give no p below 1 / (1 + n)."""
    refusal_words: tuple[str, ...] = ("I", "As", "Sorry")
    """Controls: words that open this model's refusals, where the configuration does not name the tokens itself."""
    judge: str = "default"
    """Controls: judge of replies: default, pattern, local or endpoint."""
    model_hint: str | None = None
    """Name of the model's architecture in a GGUF file. None: the model's own, where one is given."""
    other_model: bool = False
    """Allow a file that was made for a model with other weights (same width and depth needed)."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    device_map: str | None = None
    """Passed to transformers (hooks backend), for example auto."""
    batch_size: int = 64
    """Most rows at once; halved when memory runs out."""
    seed: int = 0
    """Seed of prompt samples, random edits and bootstraps."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""


def run(config: Config) -> Path | None:
    """Read, check, write; returns what was written."""
    from rsteer_interp.conversion import convert

    return convert(config)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
