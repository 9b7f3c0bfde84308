"""The other ways to do the same work, written as their users write them, on the very model that ours runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from rsteer_interp.backends.linear_kernel import prefers_onednn, use_onednn
from rsteer_interp.batch import Batch
from tests.benchmarks.compare import Cost, Rival, seconds

Change = Callable[[Tensor], Tensor]

# Without a kernel of ours on this processor, both ways would be the same.
KERNELS = ("plain", "same") if prefers_onednn() else ("plain",)


@contextmanager
def kernel(model: nn.Module, name: str) -> Iterator[None]:
    """The model's linear layers as PyTorch runs them ("plain") or as this library does ("same", as it was loaded)."""
    if name == "plain":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if name == "plain" and prefers_onednn():
            use_onednn(model)


def on_both_kernels(
    name: str, model: nn.Module, run: Callable[[], Any], goal: float, times: float = 1.0
) -> list[Rival]:
    """The rival as its user gets it and, where they differ, with the kernel that ours has."""

    def under(which: str) -> Cost:
        timed = seconds(run, times)

        def cost() -> float:
            with kernel(model, which):
                return timed()

        return cost

    return [Rival(name, under(which), goal, which) for which in KERNELS]


@torch.inference_mode()
def forward(model: Any, batch: Batch, **options: Any) -> Tensor:
    """transformers' own forward pass of a padded batch; logits of the last token unless told otherwise."""
    out: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        **({"use_cache": False, "logits_to_keep": 1} | options),
    ).logits
    return out


def decoder_blocks(model: Any) -> Sequence[nn.Module]:
    blocks: Sequence[nn.Module] = model.get_decoder().layers
    return blocks


@contextmanager
def changed_inputs(model: Any, changes: Mapping[int, Change]) -> Iterator[None]:
    """Forward pre-hooks that change the state entering some blocks."""

    def hook(change: Change) -> Any:
        return lambda module, args, kwargs: ((change(args[0]), *args[1:]), kwargs)

    with ExitStack() as stack:
        for layer, change in changes.items():
            block = decoder_blocks(model)[layer]
            stack.callback(block.register_forward_pre_hook(hook(change), with_kwargs=True).remove)
        yield


def sliced_by_hooks(model: Any, batch: Batch) -> Tensor:
    """(layer, row, d): the last token's state entering every block and leaving the last, sliced inside plain hooks."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x[:, -1].clone())
        return x

    blocks = decoder_blocks(model)
    with changed_inputs(model, dict.fromkeys(range(len(blocks)), keep)):
        handle = blocks[-1].register_forward_hook(lambda module, args, out: _see(keep, out))
        try:
            forward(model, batch)
        finally:
            handle.remove()
    return torch.stack(kept)


def _see(keep: Change, out: Any) -> None:
    keep(out[0] if isinstance(out, tuple) else out)


@torch.inference_mode()
def cached_by_bridge(bridge: Any, batch: Batch, n_layers: int) -> Tensor:
    """The same from TransformerLens' `run_with_cache` with the residual names only and gradients off."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    names.append(f"blocks.{n_layers - 1}.hook_resid_post")
    _, cache = bridge.run_with_cache(
        batch.ids,
        names_filter=lambda name: name in names,
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=1,
    )
    return torch.stack([cache[name][:, -1] for name in names])


def generate(model: Any, batch: Batch, new_tokens: int, pad: int, stop: Sequence[int], samples: int = 0) -> Tensor:
    """New tokens by transformers' `generate`: greedy, or `samples` draws per prompt at temperature 1."""
    drawn = {"do_sample": True, "num_return_sequences": samples} if samples else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=pad, eos_token_id=list(stop), **drawn,
    )  # fmt: skip
    with torch.inference_mode():
        out: Tensor = model.generate(batch.ids, attention_mask=batch.mask.long(), generation_config=config)
    return out[:, batch.ids.shape[1] :]


@torch.inference_mode()
def generate_by_bridge(bridge: Any, batch: Batch, new_tokens: int) -> Tensor:
    """New tokens by TransformerLens' `generate`, greedy, with its key-value cache."""
    out: Tensor = bridge.generate(
        batch.ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        attention_mask=batch.mask.long(),
        return_type="tokens",
        verbose=False,
    )
    return out[:, batch.ids.shape[1] :]


@torch.inference_mode()
def published_ablation_logits(model: Any, batch: Batch, direction: Tensor) -> Tensor:
    """One pass of the selection loop of Arditi et al. (arXiv 2406.11717): the direction is projected out at every block's
    input, attention output and MLP output, and the logits of all positions are made, of which the last is read."""

    def ablated(x: Tensor) -> Tensor:
        unit = direction / (direction.norm(dim=-1, keepdim=True) + 1e-8)
        return x - (x @ unit).unsqueeze(-1) * unit

    def output(module: nn.Module, args: Any, out: Any) -> Any:
        return (ablated(out[0]), *out[1:]) if isinstance(out, tuple) else ablated(out)

    blocks = decoder_blocks(model)
    with ExitStack() as stack, changed_inputs(model, dict.fromkeys(range(len(blocks)), ablated)):
        for block in blocks:
            for writer in (block.self_attn, block.mlp):
                stack.callback(writer.register_forward_hook(output).remove)
        return forward(model, batch, logits_to_keep=0, use_cache=True)[:, -1]


@torch.inference_mode()
def published_addition_logits(model: Any, batch: Batch, layer: int, vector: Tensor) -> Tensor:
    """One pass of the same loop that adds the vector at one block's input, logits of all positions again."""
    with changed_inputs(model, {layer: lambda x: x + vector}):
        return forward(model, batch, logits_to_keep=0, use_cache=True)[:, -1]
