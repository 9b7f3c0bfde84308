"""PromptSet: prompts with a set name, subject, kind and split; built-in sets, files, and Hugging Face data sets.

Splits (fit / select / report) are disjoint by subject: directions are fitted on one, configurations chosen on the
second, and everything reported comes from the third.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsteer_interp.errors import UserError

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
_TEXT_COLUMNS = ("prompt", "Goal", "goal", "question", "instruction", "text")
_SUBJECT_COLUMNS = ("subject", "Category", "category", "topic")


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
        chosen = tuple(p for p in self.prompts if (p.split or _split_of(p.subject, self.prompts)) == split)
        if not chosen:
            raise UserError(
                f"prompt set '{self.name}' has no prompts in split '{split}'; it needs at least three subjects"
            )
        return PromptSet(self.name, chosen)

    def sample(self, n: int, seed: int) -> PromptSet:
        """At most `n` prompts, spread evenly over the subjects, in an order that depends on the seed alone."""
        order = random.Random(f"{seed}|{self.name}")
        by_subject = {subject: [p for p in self.prompts if p.subject == subject] for subject in self.subjects}
        for prompts in by_subject.values():
            order.shuffle(prompts)
        subjects = list(by_subject)
        order.shuffle(subjects)
        chosen: list[Prompt] = []
        while len(chosen) < min(n, len(self.prompts)):
            for subject in subjects:
                if by_subject[subject] and len(chosen) < n:
                    chosen.append(by_subject[subject].pop())
        return PromptSet(self.name, tuple(chosen))


def _split_of(subject: str, prompts: Sequence[Prompt]) -> Split:
    """Split of a subject: subjects ranked by hash, the first 40 % to fit, the next 20 % to select, the rest to report."""
    ranked = sorted({p.subject for p in prompts}, key=lambda s: hashlib.blake2b(s.encode()).digest())
    first = round(len(ranked) * SPLIT_SHARES["fit"])
    second = first + max(1, round(len(ranked) * SPLIT_SHARES["select"]))
    place = ranked.index(subject)
    return "fit" if place < first else "select" if place < second else "report"


def load_prompts(reference: str | Path) -> PromptSet:
    """Prompts from a built-in set's name, a .txt / .csv / .jsonl / .parquet file, or a hub data set.

    A hub data set is written `hf:owner/name@revision/config#split` (config and split optional), for example
    `hf:JailbreakBench/JBB-Behaviors@main/behaviors#harmful`.
    """
    text = str(reference)
    if text in BUILT_IN:
        with resources.as_file(resources.files("rsteer_interp") / "data" / f"{text}.jsonl") as path:
            return _checked(text, _read_jsonl(path))
    if text.startswith("hf:"):
        return _checked(text, _read_hub(text[3:]))
    path = Path(text)
    if not path.exists():
        raise UserError(
            f"no prompt set or file '{text}'; built-in sets: {', '.join(BUILT_IN)}; files: .txt, .csv, .jsonl, .parquet; "
            "hub data sets: hf:owner/name@revision"
        )
    readers = {".txt": _read_text, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"cannot read prompts from '{path.name}'; use one of {', '.join(readers)}")
    return _checked(path.stem, readers[path.suffix](path))


def _checked(name: str, records: list[dict[str, Any]]) -> PromptSet:
    prompts = []
    for i, record in enumerate(records):
        row = dict(record)
        row["prompt"] = _pick(row, _TEXT_COLUMNS)
        row["subject"] = str(_pick(row, _SUBJECT_COLUMNS) or f"prompt_{i}")
        row["set"] = row.get("set") or name
        try:
            prompts.append(Prompt.model_validate(row))
        except ValidationError as error:
            detail = error.errors()[0]
            raise UserError(
                f"prompt {i + 1} of '{name}': {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
            ) from None
    if not prompts:
        raise UserError(f"prompt set '{name}' is empty; give at least one prompt")
    return PromptSet(name, tuple(prompts))


def _pick(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name)), None)


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path.name}' is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read '{path.name}': {error.strerror}") from None


def _read_text(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": line.strip()} for line in _utf8(path).splitlines() if line.strip()]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(_utf8(path).splitlines()))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path.name}' line {number} is not JSON ({error.msg}); one object per line") from None
        if not isinstance(record, dict):
            raise UserError(f'\'{path.name}\' line {number} is not an object; write {{"prompt": "..."}}')
        if not record.get("header"):
            records.append(record)
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pandas

    try:
        return list(pandas.read_parquet(path).to_dict("records"))  # type: ignore[arg-type]
    except Exception as error:  # pyarrow has no common base class for unreadable files
        raise UserError(f"'{path.name}' is not a readable parquet file ({error})") from None


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
    return [dict(row) for row in data]
