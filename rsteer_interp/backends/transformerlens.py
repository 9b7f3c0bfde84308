"""TransformerLens backend: the model inside a TransformerBridge, on raw weights; the reference, with all its hooks.

The only file that imports transformer_lens, and only when a backend is made. Sites are TransformerLens hook names as
they are; a block's `attn_out` and `mlp_out` are offered when resid_pre + attn_out + mlp_out = resid_post holds for it.
Heads come as `z` sites and through `decompose` and `attention`; everything else the bridge has (neurons, ...) through
`.bridge` and `.hook_names`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend, StopForward, adds_up
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.key_values import share_prefix
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError

_INSIDE = ("z", "attn_out", "mlp_out")  # points between a block's input and its output


class TransformerLensBackend(Backend):
    """A transformers causal language model wrapped by TransformerLens, which changes the model object itself.

    The bridge puts its own modules into the given model and switches its attention to `eager`, so hand in a model that
    nobody else uses.
    """

    name = "transformerlens"

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str = "", batch_size: int = 64) -> None:
        super().__init__(model, tokenizer, fingerprint=fingerprint, batch_size=batch_size)
        config = model.config.get_text_config()
        self.n_layers, self.d_model = int(config.num_hidden_layers), int(config.hidden_size)
        self.bridge = _boot(model, tokenizer)
        self._hooks = self._find_hooks()
        names = {Site(layer, "z"): str(Site(layer, "z")) for layer in range(self.n_layers)}
        self._head_hooks = {site: name for site, name in names.items() if name in self.bridge.hook_dict}
        self._full_attention: bool | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self._hooks)

    @property
    def head_sites(self) -> frozenset[Site]:
        return frozenset(self._head_hooks)

    @property
    def hook_names(self) -> frozenset[str]:
        """Every name that `.bridge.run_with_hooks` takes on this model."""
        return frozenset(self.bridge.hook_dict)

    def withdraw(self, site: Site) -> None:
        for point in ("attn_out", "mlp_out"):
            self._hooks.pop(Site(site.layer, point), None)  # type: ignore[arg-type]

    @property
    def can_share_prefix(self) -> bool:
        if self._full_attention is None:
            ids = self._probe()
            mask, positions = (
                torch.ones_like(ids, dtype=torch.bool),
                torch.arange(ids.shape[1], device=ids.device)[None],
            )
            with torch.inference_mode():
                cache = self._forward(ids, mask, positions, cache=None, hooks={}, keep=1, use_cache=True)[1]
            self._full_attention = share_prefix(cache, self.notes)
        return self._full_attention

    def _probe(self) -> Int[Tensor, "1 6"]:
        vocab = self.model.get_input_embeddings().weight.shape[0]
        return torch.arange(6, device=self.device)[None] * 7 % int(vocab)

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
        def hook(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
            return lambda x, hook: function(x)  # the bridge passes its hook point by this name

        def leave(x: Tensor, hook: Any) -> Tensor:
            raise StopForward

        names = {**self._hooks, **self._head_hooks}
        named = [(names[site], hook(hooks[site])) for site in sorted(hooks)]
        if keep == 0 and not use_cache:
            named.append((self._stop_name(max(hooks)), leave))
        try:
            logits, cache = self.bridge.run_with_hooks(
                ids,
                fwd_hooks=named,
                return_type="logits_and_cache",
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
                logits_to_keep=max(keep, 1),
            )
        except StopForward:
            return None, None
        return logits[:, -keep:] if keep else None, cache if use_cache else None

    def _stop_name(self, last: Site) -> str:
        # After the last wanted site: at the end of its block for a writer, else right there.
        return f"blocks.{last.layer}.hook_resid_post" if last.point in _INSIDE else self._hooks[last]

    # -- what single heads and MLPs do, by TransformerLens's own tools -------------------------------------------------

    def decompose(
        self, batch: Batch, layer: int, v: Float[Tensor, " d"]
    ) -> tuple[Float[Tensor, "row component"], list[str]]:
        """<what each component wrote before block `layer`, v> at the last token, float64, and the components' names.

        By `ActivationCache.get_full_resid_decomposition`: heads (L0H0, ...), MLPs (0_mlp_out, ...), embed, pos_embed,
        bias. They add up to <resid_pre, v>; UserError where they don't (norms after the heads, layers without heads).
        """
        words = f"on {type(self.model).__name__} heads and MLPs do not add up to the stream"
        if len(self._head_hooks) < self.n_layers:
            raise UserError(
                f"{words}: only {len(self._head_hooks)} of {self.n_layers} blocks have heads; use another model"
            )
        total = f"blocks.{layer - 1}.hook_resid_post"
        wanted = {f"blocks.{i}.hook_mlp_out" for i in range(layer)} | set(self._head_hooks.values()) | {total}
        with torch.inference_mode():
            _, cache = self.bridge.run_with_cache(
                batch.ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.positions,
                names_filter=lambda name: name in wanted or name in ("hook_embed", "hook_pos_embed"),
                pos_slice=(-1, None),
                use_cache=False,
                logits_to_keep=1,
            )
            parts, names = cache.get_full_resid_decomposition(
                layer=layer,
                expand_neurons=False,
                project_output_onto=v.to(self.device, self.model.dtype),
                return_labels=True,
            )
            parts = parts[..., 0].T.double().cpu()
            whole = (cache[total][:, 0].double() @ v.to(self.device).double()).cpu()
        if not bool(whole.isfinite().all()):
            raise UserError(f"{type(self.model).__name__} has states that are not finite; use a wider dtype")
        off = (parts.sum(1) - whole).abs().max() / parts.abs().sum(1).max()
        if not float(off) < 50 * torch.finfo(self.model.dtype).eps:
            raise UserError(
                f"{words} (off by {float(off):.1g} of their size); use a model without norms after its heads"
            )
        return parts, names

    def attention(self, row: Tokens, heads: Sequence[tuple[int, int]]) -> Float[Tensor, "head pos"]:
        """Attention of (layer, head) pairs from the last token of one prompt to each of its tokens; rows add up to 1."""
        batch = self.batch([row])
        names = {f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}
        with torch.inference_mode():
            _, cache = self.bridge.run_with_cache(
                batch.ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.positions,
                names_filter=lambda name: name in names,
                use_cache=False,
                logits_to_keep=1,
            )
        return torch.stack(
            [cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1].float().cpu() for layer, head in heads]
        )

    def _find_hooks(self) -> dict[Site, str]:
        """Hook name of every site, the writers of a block found by arithmetic among its hooks."""
        hooks = {Site(layer): f"blocks.{layer}.hook_resid_pre" for layer in range(self.n_layers)}
        hooks |= {Site(layer, "resid_post"): f"blocks.{layer}.hook_resid_post" for layer in range(self.n_layers)}
        hooks[Site(self.n_layers)] = f"blocks.{self.n_layers - 1}.hook_resid_post"
        missing = sorted(set(hooks.values()) - set(self.bridge.hook_dict))
        if missing:
            raise UserError(f"TransformerLens has no {missing[0]} on {type(self.model).__name__}; use backend='hooks'")
        wanted = set(hooks.values()) | {name for name in self.bridge.hook_dict if _is_block_output(name)}
        seen: dict[str, Tensor] = {}

        def record(name: str) -> Callable[..., Tensor]:
            def keep(x: Tensor, hook: Any) -> Tensor:
                if isinstance(x, Tensor):
                    seen.setdefault(name, x.detach().clone())
                return x

            return keep

        with torch.inference_mode():
            ids = self._probe()
            self.bridge.run_with_hooks(
                ids,
                fwd_hooks=[(name, record(name)) for name in sorted(wanted)],
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
        for layer in range(self.n_layers):
            pair = _writers(layer, seen)
            if pair is not None:
                hooks[Site(layer, "attn_out")], hooks[Site(layer, "mlp_out")] = pair
        return hooks


def _boot(model: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    if not model.config.architectures:  # a model made from a config alone does not say what it is; saving it would
        model.config.architectures = [type(model).__name__]
    # The bridge reloads a tokenizer from its folder unless it already adds BOS. It gets a copy that says so, since one
    # made in memory has no folder; the copy is for looking at tokens only, as a backend never tokenizes.
    own = copy.deepcopy(tokenizer)
    own.init_kwargs = {**own.init_kwargs, "name_or_path": "", "add_bos_token": True}
    try:
        return TransformerBridge.boot_transformers(
            model.config.name_or_path or type(model).__name__,
            hf_model=model,
            tokenizer=own,
            device=str(model.get_input_embeddings().weight.device) if not hasattr(model, "hf_device_map") else None,
            dtype=model.dtype,
        )
    except Exception as error:  # the bridge raises whatever its adapter raises
        reason = str(error).split(". ")[0].splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"TransformerLens cannot hold {type(model).__name__} ({reason}); use backend='hooks'"
        ) from error


def _is_block_output(name: str) -> bool:
    """What may be what a block adds to the stream: `blocks.3.hook_attn_out`, `blocks.3.ln1_post.hook_out`, ..."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return False
    return parts[2:] in (["hook_attn_out"], ["hook_mlp_out"]) or (len(parts) == 4 and parts[3] == "hook_out")


def _writers(layer: int, seen: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of the two hooks that add up with the block's input to its output, the ones of the usual names first."""
    start = f"blocks.{layer}."
    before, after = seen.get(f"{start}hook_resid_pre"), seen.get(f"{start}hook_resid_post")
    if before is None or after is None:
        return None
    usual = [f"{start}hook_attn_out", f"{start}hook_mlp_out"]
    others = [name for name in seen if name.startswith(start) and name.endswith(".hook_out")]  # in order of firing
    for first, second in [tuple(usual), *combinations(others, 2)]:
        a, b = seen.get(first), seen.get(second)
        if a is None or b is None or not a.shape == b.shape == after.shape:
            continue
        if adds_up(before, a, b, after):
            return first, second
    return None
