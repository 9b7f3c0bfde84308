"""Backend: the one loop that runs a model with an edit (seam 1).

A backend supplies one primitive, `_forward`, which runs some tokens with
functions installed at sites; prefix sharing, decoding and sampling are written once, here, on top of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.backends.batching import Batching
from rsteer_interp.backends.edits import At, Edit, Phase, Site, compose, decide_ahead, leaves_prefix, rowwise
from rsteer_interp.backends.finite import NotFinite, Reading, StatesNotFinite, check_logits, check_states, check_steps
from rsteer_interp.backends.key_values import fill_blank, joined
from rsteer_interp.backends.linear_kernel import prefers_onednn, use_onednn
from rsteer_interp.backends.sampling import Replies, Sampling, choose, uniform_numbers
from rsteer_interp.batch import Batch, Start
from rsteer_interp.errors import UserError
from rsteer_interp.key import of_model
from rsteer_interp.turn_ends import turn_ends

T = TypeVar("T")


class StopForward(Exception):
    """Raised inside a hook to leave the forward pass after the last site that anybody wants."""


@dataclass
class _Run:
    """One run of one batch with one edit: what the hooks of every pass need to know."""

    batch: Batch
    edit: Edit | None
    model: str  # its class, for messages
    everywhere: bool = False  # look at every site for states that are not finite, not at the last alone
    memory: dict[Any, Any] = field(default_factory=dict)

    def hooks(
        self, phase: Phase, step: int, positions: Tensor, mask: Tensor, rows: Tensor
    ) -> dict[Site, Callable[[Tensor], Tensor]]:
        if self.edit is None:
            return {}
        # What is not finite stays so on its way through the stream: looking at the last site is looking at all.
        last = max(self.edit.sites, default=None) if phase != "decode" else None

        def at_site(site: Site) -> Callable[[Tensor], Tensor]:
            def apply(x: Tensor) -> Tensor:
                assert self.edit is not None
                spot = At(
                    site,
                    phase,
                    step,
                    positions.to(x.device),
                    mask.to(x.device),
                    rows.to(x.device),
                    self.batch,
                    self.memory,
                )
                out = self.edit(x, spot)
                if out.shape != x.shape:
                    raise UserError(f"edit at {site} returned shape {tuple(out.shape)} for input {tuple(x.shape)}")
                out = out.to(x.dtype)
                if site == last or (self.everywhere and last is not None):
                    check_states(out, mask, site, self.model)
                return out

            return apply

        return {site: at_site(site) for site in self.edit.sites}


class Backend(Batching):
    """A chat model that can be read and edited at Sites: `logits`, `generate`, `run` and the list of `sites`."""

    name: str

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str = "", batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint
        self.batch_size = batch_size
        self.prompts_run = (
            0  # prompts that went through the model so far: what a method's fitting costs, on any machine
        )
        self.notes: list[str] = []  # what this backend could not do and did another way; goes into the run's record
        self.stop_ids = turn_ends(model, tokenizer)
        if prefers_onednn() and use_onednn(model):
            self.notes.append("fp32 linear layers run by oneDNN, which is faster than MKL on this processor")
        self.checkpoint: Any = None  # the Checkpoint it was loaded from, when `load_backend` made it

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What results depend on here (see `key.of_model`), as it is when first asked for: memory may run out later."""
        return of_model(self)

    # -- what a backend supplies ---------------------------------------------------------------------------------

    n_layers: int
    d_model: int

    @property
    @abstractmethod
    def sites(self) -> frozenset[Site]:
        """Every site that can be read and edited."""

    @property
    def head_sites(self) -> frozenset[Site]:
        """The `z` sites, of single heads' outputs, which can be read and edited too; none unless the backend says so."""
        return frozenset()

    @abstractmethod
    def withdraw(self, site: Site) -> None:
        """Offer a block's `attn_out` and `mlp_out` no longer: the self-check found that they are not what they should be."""

    @abstractmethod
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
        """Run tokens after `cache` (None: none); logits of the last `keep` positions (0: none) and the extended cache. With
        `stop`, and in a pass without logits or cache, it may end after the last hooked site. Hooks must be gone afterwards,
        whatever happens."""

    # -- running -------------------------------------------------------------------------------------------------

    def check_sites(self, edit: Edit | None) -> None:
        missing = sorted(edit.sites - self.sites - self.head_sites) if edit is not None else []
        if missing:
            raise UserError(
                f"the {self.name} backend has no site {missing[0]} on this model; it has {self._site_summary()}"
            )

    def _site_summary(self) -> str:
        points = sorted({site.point for site in self.sites})
        return f"{', '.join(points)} of layers 0 to {self.n_layers - 1}, and blocks.{self.n_layers}.hook_resid_pre"

    def run(self, batch: Batch, edit: Edit, *, grad: bool = False) -> None:
        """Run the body of the model for what the edit does or records; no logits, stops after the last site."""
        with _grad(grad):
            self._prompt_pass(self._run(batch, edit), keep=0, use_cache=False)

    def logits(
        self, batch: Batch, edit: Edit | None = None, *, keep: int = 1, grad: bool = False
    ) -> Float[Tensor, "row keep vocab"]:
        """Logits at the last `keep` columns (with left padding, the last is every row's last token).

        What stands at a row's columns inside the template prefix that all rows share is undefined. UserError where a real
        token's logits hold a NaN or +inf, or -inf alone.
        """
        with _grad(grad):
            logits, _, _ = self._prompt_pass(self._run(batch, edit), keep=keep, use_cache=False)
        assert logits is not None
        return logits

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        edit: Edit | None = None,
        sampling: Sampling | None = None,
        read: Callable[[Float[Tensor, "row vocab"]], Tensor] | None = None,
    ) -> Replies:
        """Greedy replies, or `sampling.n` sampled ones per prompt from one prompt pass. Stops at every end of a turn (`turn_ends`).

        Rows that have ended leave the batch. `read` is applied to the first token's logits, which are there anyway.
        """
        with _grad(False):
            return self._generate(self._run(batch, edit), max_new_tokens, sampling, read)

    def _run(self, batch: Batch, edit: Edit | None) -> _Run:
        return _Run(batch, edit, type(self.model).__name__)

    def _prompt_pass(self, run: _Run, *, keep: int, use_cache: bool) -> tuple[Tensor | None, Any, Tensor]:
        """Logits, cache and mask after the prompt tokens. UserError for what is not finite, naming the first site if a
        second pass that looks at every one finds it."""
        self.check_sites(run.edit)
        try:
            return self._one_pass(run, keep=keep, use_cache=use_cache)
        except NotFinite as error:
            if run.everywhere:
                raise
            stream = Reading(frozenset(Site(layer) for layer in range(self.n_layers + 1)))
            again = _Run(run.batch, compose(run.edit, stream), run.model, everywhere=True)
            first = error
            try:
                self._one_pass(again, keep=keep, use_cache=use_cache)
            except StatesNotFinite as found:
                first = found
            except UserError:
                pass  # no state is at fault, or an edit cannot be run twice
            raise first from None

    def _one_pass(self, run: _Run, *, keep: int, use_cache: bool) -> tuple[Tensor | None, Any, Tensor]:
        """The pass itself; the prefix that all rows share is computed once where exact."""
        decide_ahead(run.edit, run.batch, run.memory)
        batch = run.batch
        self.prompts_run += len(batch)
        rows = torch.arange(len(batch), device=batch.ids.device)
        shared = self._shared_width(batch, run.edit, keep)
        start = None if use_cache else _usable_start(batch, run.edit, shared)
        first_block = start.layer if start is not None else 0
        ids, mask, positions, cache = batch.ids, batch.mask, batch.positions, None
        full_mask = mask
        if shared:
            cache = self._prefix_cache(run, shared, start, stop=keep == 0 and not use_cache)
            width = max(len(row.ids) for row in batch.rows) - shared
            ids, positions = ids[:, -width:], positions[:, -width:]
            # Columns before a row's own tokens hold a copy of prefix tokens: they are in the cache already.
            mask = mask[:, -width:] & (positions >= shared)
            full_mask = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, shared), mask], 1)
        hooks = run.hooks("prompt", 0, positions, mask, rows)
        if start is not None:
            hooks |= _begun(start.states, hooks, first_block)
        with self._bypass(first_block):
            logits, cache = self._forward(
                ids, full_mask, positions, cache=cache, hooks=hooks, keep=keep, use_cache=use_cache
            )
        if logits is not None:
            check_logits(logits, full_mask, run.edit, run.model)
        return logits, cache, full_mask

    def _shared_width(self, batch: Batch, edit: Edit | None, keep: int) -> int:
        shared = min(batch.shared_prefix, batch.ids.shape[1] - max(keep, 1))
        if edit is not None and not edit.pointwise:
            shared = min(shared, int(batch.span_end("prefix").min())) if leaves_prefix(edit) else 0
        worthwhile = shared >= 4 and len(batch) > 1
        return shared if worthwhile and self.can_share_prefix else 0

    def _bypass(self, n_blocks: int) -> AbstractContextManager[None]:
        """Leave out the first blocks of the model (only asked for by a backend that prepares a Start)."""
        assert n_blocks == 0, f"the {self.name} backend cannot leave out blocks"
        return nullcontext()

    def _prefix_cache(self, run: _Run, shared: int, start: Start | None, stop: bool) -> Any:
        """Cache of the shared prefix, computed on one row of every setting (edit included) and repeated over the rows; with
        `stop`, of the blocks alone that a pass needs which ends after the edit's last site."""
        batch, device = run.batch, run.batch.ids.device
        settings = [own for own, _ in batch.by_setting.values()]
        ids = torch.tensor([batch.rows[0].ids[:shared]], device=device).expand(len(settings), -1)
        positions = torch.arange(shared, device=device).expand(len(settings), -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        hooks = run.hooks("prefix", 0, positions, mask, torch.stack([own[0] for own in settings]).to(device))
        first_block = start.layer if start is not None else 0
        if start is not None:
            hooks |= _begun(start.prefix.expand(len(settings), -1, -1), hooks, first_block)
        with self._bypass(first_block):
            _, cache = self._forward(ids, mask, positions, cache=None, hooks=hooks, keep=0, use_cache=True, stop=stop)
        fill_blank(cache, first_block, len(settings), shared)
        which = torch.zeros(len(batch), dtype=torch.long)
        for i, own in enumerate(settings):
            which[own] = i
        cache.reorder_cache(which.to(device))
        return cache

    def _generate(
        self,
        run: _Run,
        max_new_tokens: int,
        sampling: Sampling | None,
        read: Callable[[Tensor], Tensor] | None,
    ) -> Replies:
        batch, device = run.batch, run.batch.ids.device
        logits, cache, mask = self._first_step(run)
        first = read(logits).cpu() if read is not None else None
        n = sampling.n if sampling else 1
        rows = torch.arange(len(batch), device=device).repeat_interleave(n)
        if n > 1:
            logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
            cache.reorder_cache(rows)
        uniforms = uniform_numbers(batch, sampling, max_new_tokens).to(device) if sampling else None
        positions = batch.lengths[rows]
        replies = torch.arange(len(rows), device=device)  # which reply each current row is
        ids = torch.zeros((len(rows), max_new_tokens), dtype=torch.long, device=device)
        log_probs = torch.zeros((len(rows), max_new_tokens), dtype=torch.float32, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        for step in range(max_new_tokens):
            token, log_prob = choose(logits, uniforms[replies, step] if uniforms is not None else None, sampling)
            alive = replies[~done]
            ids[alive, step], log_probs[alive, step] = token[~done], log_prob[~done]
            lengths[alive] += 1
            done = done | torch.isin(token, stop)
            if step == max_new_tokens - 1 or bool(done.all()):
                break
            if bool(done.any()):
                keep_rows = (~done).nonzero()[:, 0]
                cache.reorder_cache(keep_rows)
                token, rows, replies, mask, positions = (t[keep_rows] for t in (token, rows, replies, mask, positions))
                done = done[keep_rows]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            hooks = run.hooks("decode", step + 1, positions[:, None], torch.ones_like(mask[:, :1]), rows)
            step_logits, cache = self._forward(
                token[:, None], mask, positions[:, None], cache=cache, hooks=hooks, keep=1, use_cache=True
            )
            assert step_logits is not None
            logits, positions = step_logits[:, -1], positions + 1
        check_steps(log_probs, run.edit, run.model)
        return Replies(ids.cpu(), lengths.cpu(), log_probs.cpu(), first)

    def _first_step(self, run: _Run) -> tuple[Tensor, Any, Tensor]:
        """First logits, cache and mask of every row. Where rows do not depend on each other, those of like length run
        their prompt pass together, without the padding of the longest, and decode in one batch all the same."""
        batch, edit = run.batch, run.edit
        parts = [list(range(len(batch)))]
        if (edit is None or rowwise(edit)) and self.can_share_prefix:
            parts = self.groups(batch.rows, len(batch))
        runs = (
            [run] if len(parts) == 1 else [self._run(self.batch([batch.rows[i] for i in part]), edit) for part in parts]
        )
        passed = [self._prompt_pass(each, keep=1, use_cache=True) for each in runs]
        logits = torch.cat([found[:, -1] for found, _, _ in passed if found is not None])
        if len(parts) == 1:
            return logits, passed[0][1], passed[0][2]
        rows = [i for part in parts for i in part]
        cache, mask = joined([cache for _, cache, _ in passed], [mask for _, _, mask in passed], rows)
        order = torch.tensor(rows).argsort()
        run.memory |= _joined_memory(runs, order)
        return logits[order.to(logits.device)], cache, mask

    def decode(self, replies: Replies) -> list[str]:
        """Text of each reply, without its end and without special tokens."""
        texts = []
        for row, length in zip(replies.ids.tolist(), replies.lengths.tolist(), strict=True):
            ended = length > 0 and row[length - 1] in self.stop_ids  # a tokenizer may not call its end of turn special
            texts.append(self.tokenizer.decode(row[: length - ended], skip_special_tokens=True))
        return texts


def _usable_start(batch: Batch, edit: Edit | None, shared: int) -> Start | None:
    """The batch's Start, cut for a pass that shares `shared` tokens, if the edit begins at or after it."""
    if batch.start is None:
        return None
    # resid_post of the block before is the same place, but comes first: the Start would undo an edit there.
    edited = edit.sites if edit is not None else frozenset()
    if any(site < Site(batch.start.layer) for site in edited):
        return None
    return batch.start.split_at(shared, batch.lengths)


def _begun(
    states: Tensor, hooks: Mapping[Site, Callable[[Tensor], Tensor]], layer: int
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """The hook that puts known states in at a block's input, before what is hooked there already."""
    edited = hooks.get(Site(layer))
    # Recorded in inference mode, they could not be kept for a backward pass; a copy can.
    known = states.clone() if torch.is_grad_enabled() else states
    return {Site(layer): lambda x: edited(known) if edited else known}


def _joined_memory(runs: Sequence[_Run], order: Tensor) -> dict[Any, Tensor]:
    """What edits keep about the rows of each run, as tensors with an entry per row of all, in the given order."""
    found: dict[Any, Tensor] = {}
    for key, value in (entry for run in runs for entry in run.memory.items()):
        if key not in found:  # a run without rows of a setting knows nothing of its edit
            parts = [run.memory.get(key, value.new_zeros(len(run.batch), *value.shape[1:])) for run in runs]
            found[key] = torch.cat(parts)[order.to(value.device)]
    return found


@contextmanager
def _grad(on: bool) -> Iterator[None]:
    with torch.enable_grad() if on else torch.inference_mode():
        yield


def adds_up(before: Tensor, a: Tensor, b: Tensor, after: Tensor) -> bool:
    """Whether before + a + b = after, up to the rounding of two additions at the size of the stream, per coordinate."""
    size = before.abs() + a.abs() + b.abs()
    off = (before.double() + a.double() + b.double() - after.double()).abs()
    return bool((off <= 8 * torch.finfo(after.dtype).eps * size).all())
