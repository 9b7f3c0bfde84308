"""Batch: token ids, mask, positions and spans of chat prompts, made once, here, from the tokenizer's own chat template.

A backend never tokenizes. Padding is on the left, so that the last column is the last prompt token of every row; the
mask and the position ids always travel with the ids (a left-padded row without them is silently wrong).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsteer_interp.errors import UserError

TODAY = datetime(2025, 1, 1)
"""The date that chat templates which tell the model today's date (`strftime_now`) get here, so that a prompt is the same every
day. A template's own variable (`date_string`) goes before it, where `options` holds one."""
_CLOCK = "strftime_now"
_SENTINEL = "\ue000instruction\ue001"  # private-use characters: no template and no tokenizer treats them specially


@dataclass(frozen=True)
class Tokens:
    """One rendered prompt: ids, and where its template prefix, instruction and template suffix end.

    `ids[:prefix]` is the template before the instruction, `ids[prefix:instruction]` the instruction,
    `ids[instruction:prompt]` the template after it (generation prompt included), `ids[prompt:]` the answer, if any.
    `setting` says under which of several edits the row is run (see `backends.each`).
    """

    ids: tuple[int, ...]
    prefix: int
    instruction: int
    prompt: int
    setting: int = 0

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt


@dataclass(frozen=True)
class Start:
    """Unedited states entering block `layer`: a sweep of edits at or after it need not run the blocks before.

    `prefix` holds those of the leading tokens that all rows share, `states` those of the columns after them.
    """

    layer: int
    states: Float[Tensor, "row pos d"]
    prefix: Float[Tensor, "1 shared d"]

    def split_at(self, shared: int, lengths: Int[Tensor, " row"]) -> Start | None:
        """The same for a pass that shares fewer leading tokens; None for one that shares more than are known to be shared."""
        known = self.prefix.shape[1]
        if shared >= known:
            return self if shared == known else None
        width = int(lengths.max()) - shared
        states = self.states.new_zeros(len(lengths), width, self.states.shape[2])
        states[:, known - shared :] = self.states
        positions = torch.arange(shared, known, device=lengths.device)
        columns = width - lengths[:, None] + positions  # left padding
        states[torch.arange(len(lengths), device=lengths.device)[:, None], columns] = self.prefix[0, shared:]
        return Start(self.layer, states, self.prefix[:, :shared])


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded rows of token ids with mask, position ids and span ends (as position ids, so padding-free).

    A batch is equal to itself alone; `rows` are its content.
    """

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    positions: Int[Tensor, "row pos"]
    rows: tuple[Tokens, ...]
    shared_prefix: int  # leading tokens that are the same in all rows
    start: Start | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def answer_mask(self) -> Bool[Tensor, "row pos"]:
        """True at the tokens of the answer that follows each prompt."""
        ends = torch.tensor([row.prompt for row in self.rows], device=self.ids.device)
        return self.mask & (self.positions >= ends[:, None])

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        """Number of real tokens of each row, which is the position id of the first generated token."""
        return self.mask.sum(-1)

    @cached_property
    def by_setting(self) -> dict[int, tuple[Int[Tensor, " own"], Batch]]:
        """Per setting: the indices of its rows, on the CPU, and the batch of them alone."""
        settings = torch.tensor([row.setting for row in self.rows])
        found = {}
        for setting in dict.fromkeys(settings.tolist()):
            own = (settings == setting).nonzero()[:, 0]
            ids, mask, positions = (x[own.to(x.device)] for x in (self.ids, self.mask, self.positions))
            found[setting] = (own, Batch(ids, mask, positions, tuple(self.rows[i] for i in own), self.shared_prefix))
        return found

    def span_end(self, name: str) -> Int[Tensor, " row"]:
        """Position id at which each row's `prefix`, `instruction` or `prompt` span ends."""
        return torch.tensor([getattr(row, name) for row in self.rows], device=self.ids.device)


def make_batch(rows: Sequence[Tokens], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """Left-pad rows into one Batch on a device."""
    if not rows:
        raise UserError("cannot make a batch of no prompts; check the prompt set and its split")
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
        mask[i, width - len(row.ids) :] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device), tuple(rows), shared_prefix(rows))


def shared_prefix(rows: Sequence[Tokens]) -> int:
    """How many leading tokens all rows have in common."""
    # Every row keeps at least one token of its own, so that there is something to run after the prefix.
    limit = min(min(len(row.ids) - 1 for row in rows), min(row.prompt - 1 for row in rows))
    first = rows[0].ids
    for i in range(limit):
        if any(row.ids[i] != first[i] for row in rows):
            return i
    return max(limit, 0)


def length_groups(rows: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows in groups of similar length, longest first (so that running out of memory shows at once)."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def thrifty_groups(rows: Sequence[Tokens], batch_size: int, shared: int, pass_cost: int) -> Iterator[list[int]]:
    """Groups as `length_groups`, cut between lengths where that wastes least: fewest tokens run, padding included, when every
    group costs `pass_cost` tokens more and the first `shared` tokens of a row cost nothing. By dynamic programming over cuts.
    """
    order = [i for group in length_groups(rows, len(rows)) for i in group]
    widths = [len(rows[i].ids) - shared for i in order]
    cuts = [0, *(k for k in range(1, len(rows)) if widths[k] != widths[k - 1]), len(rows)]

    def chunks(first: int, last: int) -> list[tuple[int, int]]:
        return [(k, min(k + batch_size, last)) for k in range(first, last, batch_size)]

    def cost(first: int, last: int) -> int:
        return sum(pass_cost + (end - begin) * widths[begin] for begin, end in chunks(first, last))

    least: dict[int, tuple[int, int]] = {0: (0, 0)}  # per cut: tokens run before it, and the cut before
    for n, last in enumerate(cuts[1:], 1):
        least[last] = min((least[first][0] + cost(first, last), first) for first in cuts[:n])
    chosen, last = [], len(rows)
    while last:
        chosen.append((least[last][1], last))
        last = least[last][1]
    for first, last in reversed(chosen):
        yield from (order[begin:end] for begin, end in chunks(first, last))


@dataclass(frozen=True)
class ChatTemplate:
    """Renders an instruction with the tokenizer's chat template, to ids, without adding special tokens a second time.

    `options` go to the template as they are (`{"enable_thinking": False}` for models that can think aloud). A template that
    asks for the date gets TODAY.
    """

    tokenizer: Any
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise UserError(
                f"tokenizer '{name}' has no chat template; use an instruction-tuned (chat) model or set "
                "tokenizer.chat_template"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer {type(self.tokenizer).__name__} is not a fast tokenizer, so spans cannot be located; "
                "save a tokenizer.json for it"
            )

    def render(self, instruction: str) -> tuple[str, int, int]:
        """Text of the prompt, and the character range of the instruction in it."""
        before, after = self._frame()
        return before + instruction + after, len(before), len(before) + len(instruction)

    def _frame(self) -> tuple[str, str]:
        messages = [{"role": "user", "content": _SENTINEL}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **(self.options | self._dated)
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise UserError(
                f"the chat template refused these messages ({error}); try without a system prompt"
            ) from None
        before, found, after = text.partition(_SENTINEL)
        if not found or _SENTINEL in after:
            raise UserError("the chat template does not show the instruction exactly once; spans cannot be located")
        return before, after

    def encode(self, instruction: str, answer: str | None = None) -> Tokens:
        """Token ids and spans of one prompt, with the answer's tokens appended when one is given."""
        # Templates strip the message; so do we, so that what is measured is what `apply_chat_template` would give.
        text, start, stop = self.render(instruction.strip())
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        if not ids:
            raise UserError(f"the tokenizer returned no tokens for the prompt {instruction[:60]!r}")
        # A token that straddles a border belongs to the instruction.
        prefix = sum(1 for _, end in offsets if end <= start)
        instruction_end = max(prefix, sum(1 for begin, _ in offsets if begin < stop))
        prompt_end = len(ids)
        if answer:
            ids += self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if self.max_length is not None and len(ids) > self.max_length:
            raise UserError(
                f"prompt of {len(ids)} tokens is longer than the model's context of {self.max_length}: "
                f"{instruction[:60]!r}...; shorten or drop it"
            )
        return Tokens(tuple(ids), prefix, instruction_end, prompt_end)

    def encode_all(self, instructions: Sequence[str], answers: Sequence[str] | None = None) -> list[Tokens]:
        if answers is None:
            return [self.encode(text) for text in instructions]
        return [self.encode(text, answer) for text, answer in zip(instructions, answers, strict=True)]

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is masked and never read."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @cached_property
    def _dated(self) -> dict[str, str]:
        """The template, of those that ask for the date, with a clock of its own, which stands at TODAY."""
        text = self.options.get("chat_template") or self.tokenizer.chat_template
        if isinstance(text, dict):  # several by name
            text = text.get("default", "")
        return {"chat_template": _clock() + text} if _CLOCK in text else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as the template's author would have it."""
        return (f"the chat template tells the model that today is {TODAY.day} {TODAY:%B %Y}",) if self._dated else ()

    @property
    def digest(self) -> str:
        """Hash of the rendered template around an instruction, for provenance."""
        return hashlib.blake2b("\0".join(self._frame()).encode(), digest_size=8).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What token ids depend on, for keys: the template as it frames an instruction, and the tokenizer."""
        return {"frame": self._frame(), "tokenizer": self._vocabulary}

    @cached_property
    def _vocabulary(self) -> str:
        """Hash of the tokenizer, without padding and truncation, which callers set and which are not used here."""
        whole = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = {name: part for name, part in whole.items() if name not in ("padding", "truncation")}
        return hashlib.blake2b(json.dumps(kept, sort_keys=True, allow_nan=False).encode(), digest_size=8).hexdigest()


def _clock() -> str:
    """Template text that defines `strftime_now` anew; a date has its directives filled in one by one."""
    filled = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAbBcdGHIjmMpSuUVwWxXyYzZ"}
    filled |= {f"%-{letter}": filled[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}  # without zeros before
    return (
        f"{{%- macro {_CLOCK}(format) -%}}{{%- set ns = namespace(text=format) -%}}"
        f"{{%- for directive, value in {filled!r}.items() -%}}"
        "{%- set ns.text = ns.text.replace(directive, value) -%}{%- endfor -%}{{- ns.text -}}{%- endmacro +%}"
    )
