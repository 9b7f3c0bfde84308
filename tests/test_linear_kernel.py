"""oneDNN's linear layers are PyTorch's own up to rounding, keep gradients, and touch nothing they should not."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rsteer_interp.backends.linear_kernel import use_onednn
from tests.tiny_models import tiny_model


def test_logits_agree_and_every_linear_is_taken() -> None:
    plain, fast = tiny_model("llama"), tiny_model("llama")
    assert use_onednn(fast) == sum(type(m) is nn.Linear for m in plain.modules()) > 0
    ids = torch.arange(12)[None] % 100
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_gradients_still_flow() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    assert use_onednn(layer) == 1
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected)


def test_other_dtypes_and_replaced_layers_are_left_alone() -> None:
    half = nn.Linear(6, 4).to(torch.bfloat16)
    assert use_onednn(half) == 0
    layer = nn.Linear(6, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert use_onednn(layer) == 0
    assert use_onednn(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2))) == 1


def test_a_copy_of_a_model_uses_its_own_weights() -> None:
    layer = nn.Linear(6, 4)
    use_onednn(layer)
    other = copy.deepcopy(layer)
    with torch.inference_mode():
        other.weight.fill_(0.0)
        other.bias.fill_(2.0)
        assert torch.equal(other(torch.ones(1, 6)), torch.full((1, 4), 2.0))
        assert not torch.equal(layer(torch.ones(1, 6)), torch.full((1, 4), 2.0))
