"""PromptSet: prompts with a set name, subject, kind and split; built-in sets, files, and Hugging Face data sets.

Splits (fit / select / report) are disjoint by subject: directions are fitted on one, configurations chosen on the
second, and everything reported comes from the third. Prompts of the same words, whatever their case and blanks, are one prompt: a set
holds it once, where it first stands, and no run has it in two splits (`Apart`).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rsteer_interp.errors import UserError
from rsteer_interp.processes import is_first
from rsteer_interp.prompt_files import Record, fields_of, read_records

Split = Literal["fit", "select", "report"]
SPLIT_SHARES: dict[Split, float] = {"fit": 0.4, "select": 0.2, "report": 0.4}
BUILT_IN = (
    "political_sensitive",
    "political_matched",
    "world_politics",
    "harmful",
    "harmless_matched",
    "borderline",
    "general",
    "taxes",
    "unusual",
    "conversations",
)


class Prompt(BaseModel):
    """One prompt as read from disk; `answer` only in conversation sets."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str = Field(min_length=1)
    subject: str = "unspecified"
    category: str = ""
    split: Split | None = None
    set: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """A named, ordered collection of prompts."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.prompt for prompt in self.prompts]

    @property
    def subjects(self) -> list[str]:
        return sorted({prompt.subject for prompt in self.prompts})

    @property
    def digest(self) -> str:
        """Hash of the prompts' text and order, for provenance."""
        return hashlib.blake2b("\0".join(self.texts).encode(), digest_size=8).hexdigest()

    @property
    def unsplit(self) -> PromptSet:
        """The same prompts without splits of their own, so that `split` goes by subject."""
        return PromptSet(self.name, tuple(p.model_copy(update={"split": None}) for p in self.prompts))

    def split(self, split: Split) -> PromptSet:
        """The prompts of one split; sets without splits of their own are split by a hash of the subject."""
        by_subject = _splits_of(p.subject for p in self.prompts)
        chosen = tuple(p for p in self.prompts if (p.split or by_subject[p.subject]) == split)
        if not chosen:
            raise UserError(
                f"prompt set '{self.name}' has no prompts in split '{split}'; it needs at least three subjects"
            )
        return PromptSet(self.name, chosen)

    def sample(self, n: int, seed: int) -> PromptSet:
        """At most `n` prompts, spread evenly over the subjects, in an order that depends on the seed alone."""
        order = random.Random(f"{seed}|{self.name}")
        by_subject: dict[str, list[Prompt]] = {subject: [] for subject in self.subjects}
        for prompt in self.prompts:
            by_subject[prompt.subject].append(prompt)
        for prompts in by_subject.values():
            order.shuffle(prompts)
        subjects = list(by_subject)
        order.shuffle(subjects)
        chosen: list[Prompt] = []
        while subjects and len(chosen) < n:
            chosen += [by_subject[subject].pop() for subject in subjects[: n - len(chosen)]]
            subjects = [subject for subject in subjects if by_subject[subject]]
        return PromptSet(self.name, tuple(chosen))


def _splits_of(subjects: Iterable[str]) -> dict[str, Split]:
    """Split of every subject: subjects ranked by hash, the first 40 % to fit, the next 20 % to select, the rest to report."""
    ranked = sorted(set(subjects), key=lambda s: hashlib.blake2b(s.encode()).digest())
    first = round(len(ranked) * SPLIT_SHARES["fit"])
    second = first + max(1, round(len(ranked) * SPLIT_SHARES["select"]))
    return {s: "fit" if i < first else "select" if i < second else "report" for i, s in enumerate(ranked)}


def load_prompts(reference: str | Path) -> PromptSet:
    """Prompts from a built-in set's name, a file (see `prompt_files`), or a hub data set.

    A hub data set is written `hf:owner/name@revision/config#split` (config and split optional), for example
    `hf:JailbreakBench/JBB-Behaviors@main/behaviors#harmful`.
    """
    text = str(reference)
    if text in BUILT_IN:
        with resources.as_file(resources.files("rsteer_interp") / "data" / f"{text}.jsonl") as path:
            return _checked(text, _built_in(path))
    if text.startswith("hf:"):
        return _checked(text, _read_hub(text[3:]))
    path = Path(text)
    if not path.is_file():
        raise UserError(
            f"no prompt set or file '{text}'; built-in sets: {', '.join(BUILT_IN)}; files: .txt, .csv, .tsv, .json, .jsonl, .parquet; "
            "hub data sets: hf:owner/name@revision"
        )
    return _checked(path.stem, read_records(path))


def _checked(name: str, records: Sequence[dict[str, Any]]) -> PromptSet:
    prompts = [Prompt.model_validate({"subject": f"prompt_{i}", "set": name, **row}) for i, row in enumerate(records)]
    if not prompts:
        raise UserError(f"prompt set '{name}' is empty; give at least one prompt")
    once: dict[str, Prompt] = {}
    for prompt in prompts:
        once.setdefault(words_of(prompt.prompt), prompt)
    if len(once) < len(prompts):
        _say(
            f"note: prompt set '{name}' has {len(prompts)} prompts of which {len(once)} are different; each counts once, where it "
            "first stands"
        )
    return PromptSet(name, tuple(once.values()))


@cache
def _say(note: str) -> None:
    """Once for a note, on standard error, by the first process."""
    if is_first():
        print(note, file=sys.stderr, flush=True)


def words_of(text: str) -> str:
    """What makes two prompts the same: their words, without case and with single blanks."""
    return " ".join(text.split()).casefold()


class Apart:
    """Which split each prompt of a run is in, over all its sets: nothing may be reported on a prompt that something was fitted to
    or chosen on, under whatever set's name."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Split, str]] = {}

    def check(self, split: Split, prompts: Iterable[Prompt]) -> None:
        """UserError for a prompt that came up in another split."""
        for prompt in prompts:
            found, name = self._places.setdefault(words_of(prompt.prompt), (split, prompt.set))
            if found != split:
                raise UserError(
                    f"'{prompt.prompt[:60]}' is in the {found} split of '{name}' and in the {split} split of '{prompt.set}'; take it "
                    "out of one of the two sets"
                )


def _built_in(path: Path) -> list[dict[str, Any]]:
    """The first line of a built-in set is no prompt: it says how the set was written."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[1:] if line]


def _read_hub(reference: str) -> list[dict[str, Any]]:
    """Records of a hub data set `owner/name@revision/config#split`."""
    head, _, split = reference.partition("#")
    name, _, tail = head.partition("@")
    revision, _, config = tail.partition("/")
    try:
        from datasets import load_dataset

        data = load_dataset(name, config or None, revision=revision or None, split=split or None)
    except Exception as error:  # the hub client raises many unrelated types; all mean the same to the user
        raise UserError(
            f"hub data set '{name}' cannot be had ({type(error).__name__}); check its id, revision and the network"
        ) from None
    if hasattr(data, "keys"):
        raise UserError(f"hub data set '{name}' has splits {', '.join(data.keys())}; choose one: hf:{head}#<split>")
    return fields_of([Record(row, f"row {i}") for i, row in enumerate(data, 1)], name)
