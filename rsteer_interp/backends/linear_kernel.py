"""The matrix-product kernel of fp32 linear layers on a CPU: oneDNN where PyTorch's default, MKL, is the slow one.

MKL keeps to its AVX2 path on processors that Intel did not make; oneDNN uses their AVX-512. Measured on 2 cores of an AMD
EPYC, fp32: 174 against 429 GFLOP/s for 96 x 896 x 4864 (PyTorch 2.13). Both are fp32 products with another order of sums.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn


def prefers_onednn() -> bool:
    """The rule, by the machine alone so that a resumed run computes as it began: an AVX-512 processor not by Intel."""
    cpus = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpus.is_file()
        and "GenuineIntel" not in cpus.read_text(encoding="utf-8", errors="replace")
    )


def use_onednn(model: nn.Module) -> int:
    """Send the model's plain fp32 CPU linear layers through oneDNN whenever no gradient is asked for; returns how many.

    Layers of other classes, on other devices or whose forward somebody else has replaced are left as they are.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # not sharded over processes
        and "forward" not in module.__dict__
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    ]
    for layer in layers:
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
    return len(layers)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b. The oneDNN operator has no gradient, so with gradients on it is PyTorch's own."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.numel() == 0:
        return nn.functional.linear(x, layer.weight, layer.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return out
