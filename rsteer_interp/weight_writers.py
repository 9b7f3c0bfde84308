"""The parameters that write to the residual stream of a decoder, found by arithmetic and not by family name.

    a parameter p writes at a site when p + r v^T changes what arrives there by something parallel to r, for random r and v

and the writers found at a site are complete when r^T p = 0 for all of them leaves no r component in what arrives. A norm or
a gain between the last linear map and the stream (Gemma 2 and 3, OLMo 2) turns the change away from r (methods 1.13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from rsteer_interp.backends.base import StopForward, adds_up
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.hooks import find_blocks
from rsteer_interp.errors import UserError

_PROBE_TOKENS = 48  # enough that a router sends some of them to every expert of a common mixture


@dataclass(frozen=True)
class Writer:
    """A parameter whose `axis` runs along the residual stream, and the site where it arrives (Site(0): embeddings)."""

    name: str
    axis: int
    site: Site


@torch.no_grad()
def find_writers(model: Any, *, seed: int = 0) -> tuple[Writer, ...]:
    """Every parameter that writes to the stream of a transformers decoder, in the order of its forward pass.

    UserError, naming the site, where no set of parameters accounts for what arrives (see the module's docstring); for
    quantised or offloaded weights; and for experts that no token of a short probe reaches.
    """
    _check_editable(model)
    config = model.config.get_text_config()
    width, blocks = int(config.hidden_size), find_blocks(model, int(config.num_hidden_layers))
    probe = _Probe(width, torch.Generator().manual_seed(seed))
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, _PROBE_TOKENS), generator=probe.generator)
    options = {"input_ids": ids.to(model.get_input_embeddings().weight.device), "use_cache": False}
    paths = {module: name for name, module in model.named_modules()}
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    found = [
        Writer(name, axis, Site(0))
        for name, axis in probe.writers(
            lambda changed: _first_block_input(model, blocks[0], options, changed), outside, Site(0)
        )
    ]
    for layer, calls in enumerate(_writing_calls(model, blocks, options)):
        for site, call in zip((Site(layer, "attn_out"), Site(layer, "mlp_out")), calls, strict=True):
            with _called(call.module) as reached:
                call.run({})
            parameters = dict(call.module.named_parameters())
            own = probe.writers(call.run, parameters, site, reached)
            found += [Writer(f"{paths[call.module]}.{name}", axis, site) for name, axis in own]
    return tuple(found)


@dataclass(frozen=True)
class _Call:
    """One call of a sub-module in the forward pass, which can be repeated with other parameters."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def run(self, changed: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = _first(functional_call(self.module, dict(changed), self.args, self.kwargs))
        return out


@dataclass(frozen=True)
class _Probe:
    """Tells which parameters write to the stream from what a random change of each does."""

    width: int
    generator: torch.Generator

    def writers(
        self,
        run: Callable[[Mapping[str, Tensor]], Tensor],
        parameters: Mapping[str, Tensor],
        site: Site,
        reached: Callable[[str], bool] = lambda name: True,
    ) -> list[tuple[str, int]]:
        """Names and axes of the parameters that write what `run` returns; UserError unless they are complete."""
        base = self._rows(run({}))
        lengths = base.norm(dim=1).clamp(min=1e-30)
        r = torch.randn(self.width, generator=self.generator, dtype=torch.float64)
        r = (r / r.norm()).to(base.device)
        found = []
        for name, parameter in parameters.items():
            axes = [axis for axis, size in enumerate(parameter.shape) if size == self.width]
            if not axes or not bool(parameter.any()):
                continue  # nothing of it is there to project
            tolerance, moved = _tolerance(parameter.dtype), False
            for axis in axes:
                pushed = self._pushed(parameter, axis, r, float(base.square().mean().sqrt()))
                change = self._rows(run({name: pushed})) - base
                rest = change - (change @ r)[:, None] * r
                moves = float((change.norm(dim=1) / lengths).max()) > tolerance  # one token is enough
                moved = moved or moves
                if moves and float(rest.norm()) <= tolerance * float(change.norm()):
                    found.append((name, axis))
                    break
            if not moved and not reached(name):
                raise UserError(
                    f"'{name}' at {site} is reached by none of {_PROBE_TOKENS} probe tokens, so it cannot be told whether "
                    "it writes to the stream; ablate activations instead"
                )
        self._check_complete(run, parameters, found, r, base, site)
        return found

    def _pushed(self, parameter: Tensor, axis: int, r: Tensor, size: float) -> Tensor:
        """p + r v^T with v as large as makes the change of the output about as large as the output."""
        others = [n for i, n in enumerate(parameter.shape) if i != axis]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        scale = float(torch.linalg.vector_norm(parameter, dtype=wide)) / math.sqrt(parameter.numel())
        v = torch.randn(others, generator=self.generator) if others else torch.ones(())
        push = (v * (scale if others else size) * math.sqrt(self.width)).to(parameter.device, wide)
        return (parameter.to(wide) + (push[..., None] * r.to(wide)).movedim(-1, axis)).to(parameter.dtype)

    def _check_complete(
        self,
        run: Callable[[Mapping[str, Tensor]], Tensor],
        parameters: Mapping[str, Tensor],
        found: Sequence[tuple[str, int]],
        r: Tensor,
        base: Tensor,
        site: Site,
    ) -> None:
        changed = {}
        for name, axis in found:
            changed[name] = parameters[name].clone()
            project(changed[name], axis, r, 1.0)
        # In units of what a random direction has of a state.
        left = float(((self._rows(run(changed)) @ r).abs() / base.norm(dim=1).clamp(min=1e-30)).max()) * math.sqrt(
            self.width
        )
        tolerance = _tolerance(next(iter(parameters.values())).dtype)
        if not left <= tolerance:
            raise UserError(
                f"what arrives at {site} is not written by weights alone (a norm or a gain follows them, and brings a direction "
                "back that they have lost); weights of this model cannot be orthogonalised, ablate activations instead"
            )

    def _rows(self, output: Tensor) -> Float[Tensor, "token d"]:
        return output.detach().reshape(-1, self.width).double()


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding may leave of a change: half precision rounds every sum of products."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _check_editable(model: Any) -> None:
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise UserError(f"{name} has quantised weights, which cannot be orthogonalised; load it without quantisation")
    for parameter in model.parameters():
        if parameter.device.type == "meta":
            raise UserError(f"weights of {name} are offloaded; give it a device that holds them all, or device='cpu'")
        if not parameter.is_floating_point():
            raise UserError(f"{name} has weights of type {parameter.dtype}; load it in fp32, bf16 or fp16")


def _first_block_input(
    model: Any, block: nn.Module, options: Mapping[str, Any], changed: Mapping[str, Tensor]
) -> Tensor:
    held_: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        held_.append(_block_input(args, kwargs))
        raise StopForward

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        functional_call(model, dict(changed), (), dict(options))
    except StopForward:
        pass
    finally:
        hook.remove()
    return held_[0]


def _writing_calls(model: Any, blocks: Sequence[nn.Module], options: Mapping[str, Any]) -> list[tuple[_Call, _Call]]:
    """Per block, the calls of the two children with block input + first + second = block output."""
    calls: list[list[_Call]] = [[] for _ in blocks]
    ends: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:

        def watch(layer: int, child: nn.Module) -> None:
            def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if isinstance(_first(output), Tensor):
                    copies = tree_map_only(Tensor, torch.clone, (args, kwargs, _first(output)))
                    calls[layer].append(_Call(child, *copies))

            stack.callback(child.register_forward_hook(keep, with_kwargs=True).remove)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ends.append((_block_input(args, kwargs).clone(), _first(output).clone()))

        for layer, block in enumerate(blocks):
            for child in block.children():
                watch(layer, child)
            stack.callback(block.register_forward_hook(end, with_kwargs=True).remove)
        model(**options)
    return [_adding(layer, calls[layer], *ends[layer]) for layer in range(len(blocks))]


def _adding(layer: int, calls: Sequence[_Call], before: Tensor, after: Tensor) -> tuple[_Call, _Call]:
    for a, b in combinations([call for call in calls if call.output.shape == after.shape], 2):
        if adds_up(before, a.output, b.output, after):
            return a, b
    raise UserError(
        f"no two sub-modules of block {layer} add up to what it writes to the stream (is their output scaled?); weights of "
        "this model cannot be orthogonalised, ablate activations instead"
    )


@contextmanager
def _called(module: nn.Module) -> Iterator[Callable[[str], bool]]:
    """Whether the owner of a parameter ran while the block did."""
    seen: set[str] = set()
    with ExitStack() as stack:
        for path, part in module.named_modules():
            stack.callback(part.register_forward_hook(lambda *_, path=path: seen.add(path)).remove)
        yield lambda name: name.rpartition(".")[0] in seen


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _block_input(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def project(parameter: Tensor, axis: int, unit: Float[Tensor, " d"], scale: float) -> None:
    """W <- W - scale r r^T W along `axis` of a parameter: in place, in float64, a few thousand rows at a time."""
    rows = parameter.detach().movedim(axis, -1)
    rows = rows if rows.ndim > 1 else rows[None]
    for matrix in rows if rows.ndim > 2 else rows[None]:
        for part in matrix.split(4096):
            exact = part.double()
            part.copy_(exact - scale * (exact @ unit)[..., None] * unit)
