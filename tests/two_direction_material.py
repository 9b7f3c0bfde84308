"""A Material on a tiny model whose states are drawn: refusal along a sparse r and harm along a sparse g, at one layer only."""

from __future__ import annotations

import torch
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.methods.base import Examples, Material
from tests.tiny_models import D_MODEL, tiny_backend

LAYER = 2
EXECUTION, DETECTION = torch.zeros(2, D_MODEL, dtype=torch.float64)
EXECUTION[[3, 17, 29]] = torch.tensor([0.6, -0.6, 0.53], dtype=torch.float64)
DETECTION[[5, 17, 20]] = torch.tensor([0.7, -0.3, -0.65], dtype=torch.float64)
EXECUTION, DETECTION = EXECUTION / EXECUTION.norm(), DETECTION / DETECTION.norm()
REFUSED_SHARE = {"removed": 0.8, "contrast": 0.2}


def planted_material(family: str = "llama", n: int = 40, strength: float = 6.0, seed: int = 0) -> Material:
    """h = noise + strength [refused] r + strength [harmful] g at block input LAYER, noise alone at the others."""
    backend = tiny_backend(family)
    g = torch.Generator().manual_seed(seed)

    def examples(name: str, start: int) -> Examples:
        refused = torch.rand(n, generator=g) < REFUSED_SHARE.get(name, 0.0)
        states: dict[Site, Tensor] = {}
        for layer in range(1, backend.n_layers + 1):
            x = torch.randn(n, D_MODEL, generator=g, dtype=torch.float64)
            if layer == LAYER:
                x = x + strength * (refused[:, None] * EXECUTION + (name == "harmful") * DETECTION)
            states[Site(layer)] = x.float()
        texts = [f"tell me about word{(start + i) % 100} and word{i}" for i in range(n)]
        return Examples(texts, torch.where(refused, 1.0, -1.0), states, [f"{name} {i // 4}" for i in range(n)])

    names = ("removed", "contrast", "harmful", "harmless", "general")
    fit, select = ({name: examples(name, 10 * i) for i, name in enumerate(names)} for _ in range(2))
    return Material(
        backend,
        backend.template(),
        (5, 9),
        fit,
        select,
        "removed",
        "contrast",
        "harmful",
        ("harmless", "general"),
        seed,
    )
