"""Batching: how prompts become batches, cut by length, halved when memory runs out, shared out over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rsteer_interp import processes
from rsteer_interp.batch import Batch, ChatTemplate, Tokens, length_groups, make_batch, shared_prefix, thrifty_groups
from rsteer_interp.errors import UserError

T = TypeVar("T")

# What starting one more pass costs, in tokens: the template prefix on one row and the calls of all layers. Measured on a CPU (64
# and 128 are equal within noise); an accelerator is far from its peak with few tokens, so there the figure is a guess.
PASS_COST = {"cpu": 64}
PASS_COST_ELSEWHERE = 2048


@dataclass(frozen=True)
class Prepared:
    """Batches made once for many runs, with the indices of their rows among the `n` prompts."""

    n: int
    batches: tuple[tuple[list[int], Batch], ...]

    def __len__(self) -> int:
        return self.n


Rows = Sequence[Tokens] | Prepared


class Batching(ABC):
    """The part of a Backend that makes batches: `template`, `batch`, `batches`, `spread`, `prepare`."""

    model: Any
    tokenizer: Any
    batch_size: int
    notes: list[str]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where token ids go in."""

    @property
    @abstractmethod
    def can_share_prefix(self) -> bool:
        """Whether a prefix may be computed apart from padded rows: exact for plain full attention, not for sliding windows
        or recurrent layers, whose state would count the padding between prefix and row."""

    @property
    def max_length(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(getattr(text_config, name, None), int):
                return int(getattr(text_config, name))
        return None

    def template(self, system: str | None = None, **options: Any) -> ChatTemplate:
        """The model's chat template, bound to its tokenizer and context length."""
        return ChatTemplate(self.tokenizer, system, options, self.max_length)

    def batch(self, rows: Sequence[Tokens]) -> Batch:
        pad = self.tokenizer.pad_token_id if getattr(self.tokenizer, "pad_token_id", None) is not None else 0
        return make_batch(rows, int(pad), self.device)

    def groups(self, rows: Sequence[Tokens], size: int) -> list[list[int]]:
        """Indices of rows in the batches of at most `size` that a prompt pass runs fastest: few padded tokens, few passes."""
        if not rows:
            return []
        shared = shared_prefix(rows) if self.can_share_prefix else 0
        return list(thrifty_groups(rows, size, shared, PASS_COST.get(self.device.type, PASS_COST_ELSEWHERE)))

    def batches(
        self, rows: Rows, run: Callable[[Batch], T], batch_size: int | None = None, *, wide: bool = False
    ) -> Iterator[tuple[list[int], T]]:
        """Call `run` on batches of similar length; yields (indices of rows, result). Out of memory halves the batch.

        `wide`: as few batches as possible, for decoding, whose cost hardly depends on their rows; else cut by length, so that
        little padding is run. Batches that `prepare` made are used as they are.
        """
        if isinstance(rows, Prepared):
            yield from ((group, run(batch)) for group, batch in rows.batches)
            return

        def cut(indices: list[int]) -> list[list[int]]:
            chosen, size = [rows[i] for i in indices], min(batch_size or self.batch_size, self.batch_size)
            found = length_groups(chosen, size) if wide else self.groups(chosen, size)
            return [[indices[j] for j in group] for group in found]

        pending = cut(list(range(len(rows))))
        while pending:
            group = pending.pop(0)
            try:
                result = run(self.batch([rows[i] for i in group]))
            except (torch.OutOfMemoryError, MemoryError):
                if len(group) == 1:
                    raise UserError(
                        f"out of memory with a single prompt of {len(rows[group[0]].ids)} tokens; use a smaller model, "
                        "a smaller dtype or device_map='auto'"
                    ) from None
                self.batch_size = len(group) // 2
                self.notes.append(f"out of memory at batch size {len(group)}; continued with {self.batch_size}")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                pending = cut(sorted(i for later in [group, *pending] for i in later))
                continue
            yield group, result

    def spread(
        self, rows: Rows, run: Callable[[Batch], T], batch_size: int | None = None, *, wide: bool = False
    ) -> Iterator[tuple[list[int], T]]:
        """`batches`, shared out over the processes of a torchrun (see `processes`): each runs its part, all get all results.

        `run` must give its result back: what it leaves elsewhere (in an edit, say) would be of this process's part alone.
        """
        n = processes.count()
        if n == 1:
            yield from self.batches(rows, run, batch_size, wide=wide)
            return
        part = slice(processes.rank(), None, n)
        mine: Rows
        if isinstance(rows, Prepared):
            own, mine = list(range(len(rows))), Prepared(len(rows), rows.batches[part])
        else:
            batch_size = min(batch_size or self.batch_size, self.batch_size, -(-len(rows) // n))
            own = [i for group in list(length_groups(rows, batch_size))[part] for i in group]
            mine = [rows[i] for i in own]
        with processes.alone():
            found = [([own[i] for i in g], value) for g, value in self.batches(mine, run, batch_size, wide=wide)]
        yield from processes.gathered(found)

    def prepare(self, rows: Sequence[Tokens], layer: int, batch_size: int | None = None) -> Prepared:
        """Batches for a sweep of edits at or after block `layer`; where the backend can, each with the Start there."""
        return Prepared(len(rows), tuple(self.batches(rows, lambda batch: batch, batch_size)))
