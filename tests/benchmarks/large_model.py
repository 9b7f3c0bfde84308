"""What a large model needs, from counted operations and bytes: `python -m tests.benchmarks.large_model`.

Lower bounds: every operation at the devices' peak, every byte at their full bandwidth, no communication. Nothing here is
measured. Shapes are those of the published configurations; the device is an H100 SXM by its data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    active: float
    """Parameters that one token passes through, embedding left out, output head included."""
    experts: int = 1
    chosen: int = 1
    """Experts per layer, and how many of them a token takes."""

    def read_per_step(self, rows: int) -> float:
        """Bytes of weights that one decoding step of a batch reads: all but the experts that no row takes."""
        touched = 1 - (1 - self.chosen / self.experts) ** rows if self.experts > 1 else 1.0
        shared = self.active - self.active_experts
        return BYTES * (shared + touched * (self.parameters - shared))

    @property
    def active_experts(self) -> float:
        """Parameters of the chosen experts, from total = shared + E x and active = shared + k x."""
        if self.experts == 1:
            return 0.0
        return (self.parameters - self.active) * self.chosen / (self.experts - self.chosen)


@dataclass(frozen=True)
class Device:
    name: str
    operations: float  # per second, bf16, dense
    bandwidth: float  # bytes per second
    memory: float  # bytes


@dataclass(frozen=True)
class Work:
    """The full preset's heaviest step: sampled replies of every prompt."""

    prompts: int = 1000
    shared_tokens: int = 24
    own_tokens: int = 25
    samples: int = 8
    new_tokens: int = 48
    rows: int = 512  # rows decoded at once


MODELS = (
    Model("Qwen3-Next-80B-A3B, mixture of experts", 80e9, 3e9, experts=512, chosen=10),
    Model("a dense 80B", 80e9, 80e9),
)
H100 = Device("H100 80 GB", 989e12, 3.35e12, 80e9)


def needs(model: Model, work: Work, device: Device, n: int) -> dict[str, float]:
    """Gigabytes per device with the weights shared out over all, and least seconds of capture and of replies."""
    tokens = work.shared_tokens + work.prompts * work.own_tokens
    capture = 2 * model.active * tokens / (n * device.operations)
    steps = work.new_tokens * -(-work.prompts * work.samples // work.rows)
    read = steps * model.read_per_step(work.rows) / (n * device.bandwidth)
    computed = 2 * model.active * work.prompts * work.samples * work.new_tokens / (n * device.operations)
    return {
        "weights, GB per device": BYTES * model.parameters / n / 1e9,
        "capture, s": capture,
        "replies, s": max(read, computed) + capture,
    }


def main() -> None:
    work = Work()
    table = Table(title=f"Lower bounds on 8 x {H100.name}: {work}")
    table.add_column("model")
    columns = list(needs(MODELS[0], work, H100, 8))
    for column in columns:
        table.add_column(column)
    for model in MODELS:
        found = needs(model, work, H100, 8)
        table.add_row(model.name, *(f"{found[column]:.3g}" for column in columns))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
