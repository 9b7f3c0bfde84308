"""Hooks backend: forward (pre-)hooks on any transformers decoder; device maps, quantised weights, tensor parallel.

The decoder blocks and the sub-modules that write to the stream are found by structure and arithmetic, not by family
name: a pair of sub-modules is `attn_out`, `mlp_out` exactly when resid_pre + attn_out + mlp_out = resid_post.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from rsteer_interp.backends.base import Backend, StopForward, adds_up
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.backends.key_values import share_prefix
from rsteer_interp.batch import Batch, Start, Tokens
from rsteer_interp.errors import UserError


class HooksBackend(Backend):
    """Any transformers causal language model, run by itself with hooks on its decoder blocks."""

    name = "hooks"

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str = "", batch_size: int = 64) -> None:
        super().__init__(model, tokenizer, fingerprint=fingerprint, batch_size=batch_size)
        config = model.config.get_text_config()
        self.n_layers, self.d_model = int(config.num_hidden_layers), int(config.hidden_size)
        self.blocks = find_blocks(model, self.n_layers)
        self._writers = self._find_writers()
        self._full_attention: bool | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def sites(self) -> frozenset[Site]:
        resid = {Site(layer) for layer in range(self.n_layers + 1)}
        resid |= {Site(layer, "resid_post") for layer in range(self.n_layers)}
        for layer, pair in enumerate(self._writers):
            if pair is not None:
                resid |= {Site(layer, "attn_out"), Site(layer, "mlp_out")}
        return frozenset(resid)

    def withdraw(self, site: Site) -> None:
        self._writers[site.layer] = None

    @property
    def can_share_prefix(self) -> bool:
        if self._full_attention is None:
            cache = self._forward(*self._probe(), cache=None, hooks={}, keep=1, use_cache=True)[1]
            self._full_attention = share_prefix(cache, self.notes)
        return self._full_attention

    def _probe(self) -> tuple[Tensor, Tensor, Tensor]:
        vocab = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(6, device=self.device)[None] * 7 % vocab
        return ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(6, device=self.device)[None]

    def _forward(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Bool[Tensor, "row total"],
        positions: Int[Tensor, "row pos"],
        *,
        cache: Any,
        hooks: Mapping[Site, Callable[[Tensor], Tensor]],
        keep: int,
        use_cache: bool,
        stop: bool = False,
    ) -> tuple[Float[Tensor, "row keep vocab"] | None, Any]:
        with ExitStack() as stack:
            for site in sorted(hooks):
                stack.callback(self._install(site, hooks[site]).remove)
            head = self.model.get_output_embeddings()
            if keep == 0 and use_cache and cache is None and (stop or head is not None):
                cache = DynamicCache(config=self.model.config)  # ours, because a pass that is left gives nothing back
            if stop or (keep == 0 and not use_cache):
                stack.callback(self._install_stop(max(hooks)).remove)
            elif keep == 0 and head is not None:
                stack.callback(head.register_forward_pre_hook(_stop).remove)
            try:
                out = self.model(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=use_cache,
                    logits_to_keep=max(keep, 1),
                )
            except StopForward:
                return None, cache if use_cache else None
        cache = getattr(out, "past_key_values", None) if use_cache else None
        return out.logits[:, -keep:] if keep else None, cache

    def prepare_each(
        self, rows: Sequence[Tokens], layers: Sequence[int], batch_size: int | None = None
    ) -> dict[int, Prepared]:
        plain = Prepared(len(rows), tuple(self.batches(rows, lambda batch: batch, batch_size)))
        found: dict[int, list[tuple[list[int], Batch]]] = {layer: [] for layer in layers}
        for group, batch in plain.batches:
            record = _RecordAll(frozenset(Site(layer) for layer in layers if layer))
            if record.sites:
                self.run(batch, record)
            for layer in layers:
                start = record.start(layer) if layer else None  # before the first block there is nothing to leave out
                found[layer].append((group, replace(batch, start=start)))
        return {layer: Prepared(len(rows), tuple(each)) for layer, each in found.items()}

    @contextmanager
    def _bypass(self, n_blocks: int) -> Iterator[None]:
        skipped = self.blocks[:n_blocks]
        own = [block.__dict__.get("forward") for block in skipped]  # accelerate puts one there on dispatched models
        try:
            for block in skipped:
                block.forward = _pass_on
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _install(self, site: Site, function: Callable[[Tensor], Tensor]) -> Any:
        if site.point in ("attn_out", "mlp_out"):
            pair = self._writers[site.layer]
            assert pair is not None
            return pair[site.point == "mlp_out"].register_forward_hook(
                lambda module, args, output: _replace_first(output, function(_first(output)))
            )
        layer = site.layer + (site.point == "resid_post")
        if layer == self.n_layers:
            return self.blocks[-1].register_forward_hook(
                lambda module, args, output: _replace_first(output, function(_first(output)))
            )
        return self.blocks[layer].register_forward_pre_hook(
            lambda module, args, kwargs: _replace_input(args, kwargs, function), with_kwargs=True
        )

    def _install_stop(self, last: Site) -> Any:
        # After the last wanted site: at the end of its block, or at its block's input when that is all that is wanted.
        layer = last.order[0]
        if last.point in ("attn_out", "mlp_out") or layer == self.n_layers:
            return self.blocks[min(layer, self.n_layers - 1)].register_forward_hook(_stop)
        return self.blocks[layer].register_forward_pre_hook(_stop)

    def _find_writers(self) -> list[tuple[nn.Module, nn.Module] | None]:
        """Per block, the two sub-modules whose outputs add up with the block's input to its output."""
        if not self.blocks:
            return []
        seen: list[list[tuple[nn.Module, Tensor]]] = [[] for _ in self.blocks]
        inputs: list[Tensor] = [torch.empty(0)] * self.n_layers
        outputs: list[Tensor] = [torch.empty(0)] * self.n_layers
        with ExitStack() as stack, torch.inference_mode():

            def watch(layer: int, child: nn.Module) -> None:
                def record(module: nn.Module, args: Any, output: Any) -> None:
                    value = _first(output)
                    if isinstance(value, Tensor):
                        seen[layer].append((child, value.detach().clone()))

                stack.callback(child.register_forward_hook(record).remove)

            for layer, block in enumerate(self.blocks):
                for child in block.children():
                    watch(layer, child)

                def ends(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                    inputs[layer], outputs[layer] = _block_input(args, kwargs).clone(), _first(output).clone()

                stack.callback(block.register_forward_hook(ends, with_kwargs=True).remove)
            ids, mask, positions = self._probe()
            self.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        return [_adding_pair(seen[i], inputs[i], outputs[i]) for i in range(self.n_layers)]


def find_blocks(model: Any, n_layers: int) -> list[nn.Module]:
    """The decoder's list of blocks: the first ModuleList in the decoder that is as long as the model is deep."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    raise UserError(
        f"{type(model).__name__} has no list of {n_layers} decoder blocks; only decoder models are supported"
    )


def _adding_pair(
    seen: list[tuple[nn.Module, Tensor]], before: Tensor, after: Tensor
) -> tuple[nn.Module, nn.Module] | None:
    candidates = [(module, value) for module, value in seen if value.shape == after.shape]
    for (first, a), (second, b) in combinations(candidates, 2):
        if adds_up(before, a, b, after):
            return first, second
    return None


@dataclass(frozen=True, eq=False)
class _RecordAll:
    """Keeps the states of a prompt pass at some sites, all columns, those of a shared prefix apart."""

    sites: frozenset[Site]
    states: dict[tuple[str, Site], Tensor] = field(default_factory=dict)

    pointwise = True

    def __call__(self, x: Tensor, at: At) -> Tensor:
        self.states[at.phase, at.site] = x.clone()
        return x

    def start(self, layer: int) -> Start:
        states = self.states["prompt", Site(layer)]
        return Start(layer, states, self.states.get(("prefix", Site(layer)), states[:1, :0]))


def _stop(*_: Any) -> None:
    raise StopForward


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    """A block's forward that does nothing."""
    return _block_input(args, kwargs)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _replace_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


def _block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]  # type: ignore[no-any-return]


def _replace_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Tensor], Tensor]
) -> tuple[Any, Any]:
    if args:
        return (function(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}
