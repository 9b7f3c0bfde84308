"""Which of these responses are refusals, and how far does a judge agree with hand labels?

Reads a JSONL file of objects with `prompt` and `response`, and perhaps `label` (+1 refusal, 0 unclear, -1 answer). Writes
`verdicts.jsonl`, one line per response in the same order, with `refused` and `confidence` (the judge's probability of a
refusal) added; and, when there are labels, `agreement.json` (accuracy, AUC, Cohen's kappa, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    responses: Path
    """JSONL file with `prompt` and `response` in every line, and perhaps `label`."""
    out: Path
    """Folder for the result; complete or absent."""
    judge: str = "default"
    """default (patterns, and a local model for what they leave unclear), pattern, local or endpoint."""
    model: str | None = None
    """Model that the judges default and local ask: demo model name, hub id, folder or GGUF file. None: the default judge goes by patterns alone, the local judge takes the demo model."""
    backend: Literal["auto", "hooks", "transformerlens"] = "auto"
    """How that model is run. auto: hooks, or TransformerLens for models under 300M parameters."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read it."""
    verify: bool = False
    """Read every byte of the model's files before, and compare with the digests that were recorded."""
    base_url: str | None = None
    """Endpoint judge: address of an OpenAI-compatible server, up to /v1 (or environment variable RSTEER_JUDGE_URL)."""
    judge_model: str | None = None
    """Endpoint judge: name of the model on that server (or environment variable RSTEER_JUDGE_MODEL)."""
    key_variable: str | None = None
    """Endpoint judge: name of the environment variable that holds the key, if the server wants one."""
    votes: int = 1
    """Endpoint judge: verdicts asked for each response."""
    concurrency: int = 8
    """Endpoint judge: requests under way at once."""
    timeout: float = 120.0
    """Endpoint judge: seconds until a request is given up and repeated."""


def run(config: Config) -> Path:
    """Read, judge, write; returns the folder."""
    from rsteer_interp.judges.responses import judge_responses

    return judge_responses(config)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
