"""Do both backends compute the same model? Largest differences per site, hooked and unhooked, prompt pass and decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsteer_interp.command_line import run as run_command


@dataclass(frozen=True)
class Config:
    model: str = "demo"
    """Demo model name, hub id (org/name or org/name@revision), local folder or GGUF file."""
    prompts: str = "general"
    """Built-in set or file of prompts."""
    n: int = 4
    """Prompts compared."""
    new_tokens: int = 8
    """Tokens decoded per prompt."""
    out: Path = Path("results/parity")
    """Folder for the certificate (a result of kind `parity`)."""
    device: str = "auto"
    """auto: the accelerator where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    seed: int = 0
    """Seed of the prompt sample."""


def run(config: Config) -> Path:
    """Load the model in both backends, compare, write the certificate and print its one line."""
    from rsteer_interp.backends import load_backend
    from rsteer_interp.backends.parity import parity_certificate
    from rsteer_interp.errors import UserError
    from rsteer_interp.prompts import load_prompts
    from rsteer_interp.results import Provenance, save_result

    prompts = load_prompts(config.prompts).sample(config.n, config.seed)
    hooks = load_backend(config.model, "hooks", device=config.device, dtype=config.dtype)
    bridge = load_backend(config.model, "transformerlens", device=config.device, dtype=config.dtype)
    certificate = parity_certificate(
        hooks, bridge, hooks.template().encode_all(prompts.texts), new_tokens=config.new_tokens
    )
    provenance = Provenance.collect(hooks, config=config, prompt_sets=[prompts], template=hooks.template())
    save_result(config.out, "parity", certificate, provenance=provenance)
    print(certificate)
    if not certificate.passed:
        raise UserError(
            f"the backends differ by more than the stated tolerance; see {config.out}, and use the hooks one"
        )
    return config.out


if __name__ == "__main__":
    raise SystemExit(run_command(Config, run))
