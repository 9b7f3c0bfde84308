"""Prompts in files as people have them: text, CSV and its kin, JSON, JSON lines, parquet; every row read right, or one line that says why not.

Columns are found by names in use, whatever their case, blanks and underscores; `_TEXT` and the others list them. Rows are never dropped
and cells never cut: a row without a prompt, with more or fewer cells than the header, or with a quote that does not close is an error
that names the file's line.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsteer_interp.errors import UserError

_TEXT = (
    "prompt", "goal", "question", "forbidden prompt", "instruction", "query", "request", "text", "behavior", "behaviour",
    "messages", "conversation", "conversations", "turns",
)  # fmt: skip
_CONTEXT = {
    "instruction": ("input",),
    "behavior": ("context string", "context"),
    "behaviour": ("context string", "context"),
}
_SUBJECT = ("subject", "topic", "category", "semantic category", "functional category")
_SPLITS = ("fit", "select", "report")
_DELIMITERS = (",", ";", "\t", "|")
ROWS_SHOWN = 8


@dataclass(frozen=True)
class Record:
    """One row: its cells by column name, and where it stands in its file (`line 3`, `row 3`)."""

    cells: Mapping[str, Any]
    place: str


def read_records(path: Path) -> list[dict[str, Any]]:
    """The fields of a prompt (`prompt`, `subject`, `category`, `split`, `set`, `answer`) of every row of a file.

    UserError, one line, for a file that cannot be read and for a row that is not a prompt.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [{"prompt": line.strip()} for line in utf8(path).split("\n") if line.strip()]
    readers = {
        ".csv": _table,
        ".tsv": _table,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_array,
        ".parquet": _parquet,
    }
    if suffix not in readers:
        raise UserError(f"cannot read prompts from '{path.name}'; use one of .txt, {', '.join(readers)}")
    return fields_of(readers[suffix](path), path.name)


def fields_of(records: Sequence[Record], name: str) -> list[dict[str, Any]]:
    """The fields of a prompt in every record; `name` is what errors call their source."""
    return [_fields(record, f"{name}, {record.place}") for record in records]


def utf8(path: Path) -> str:
    """The file's text with line ends as \\n. UserError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path.name}' is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read '{path.name}': {error.strerror}") from None


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(path: Path) -> list[Record]:
    """Rows of a table with a header. The delimiter is what `sep=` says, a tab for .tsv, else the one that gives a known column."""
    text, first = utf8(path), 1
    delimiter = "\t" if path.suffix.lower() == ".tsv" else None
    head, _, rest = text.partition("\n")
    if head.lower().startswith("sep=") and len(head.strip()) <= 5:
        delimiter, text, first = head[4:5] or "\t", rest, 2
    first += len(text) - len(text := text.lstrip("\n"))
    if not text.strip():
        return []
    delimiter = delimiter or _delimiter(text.partition("\n")[0])
    rows = _rows(path.name, text, delimiter, first)
    header = next(rows)[1]
    names = [_key(cell) for cell in header]
    if not set(names) & {_key(name) for name in _TEXT}:
        raise UserError(
            f"'{path.name}' has no column of prompts (its first line: {', '.join(header[:ROWS_SHOWN])[:200]}); give it a header row with "
            "a column 'prompt', or save one prompt a line as .txt"
        )
    twice = next((cell for cell in header if cell.strip() and names.count(_key(cell)) > 1), None)
    if twice is not None:
        raise UserError(f"'{path.name}' has two columns '{twice}'; rename one of them")
    return [Record(dict(zip(header, cells, strict=True)), f"line {line}") for line, cells in rows]


def _rows(name: str, text: str, delimiter: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """Cells of every row that is not blank, with the line it begins at; as many as the first row has."""
    limit = csv.field_size_limit(sys.maxsize)  # a prompt may be long
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        begins, width = first, 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                what = "a quote is not closed" if "end of data" in str(error) else "a quote stands inside a quoted cell"
                raise UserError(
                    f"'{name}' line {begins}: {what}; write a quote inside a quoted cell twice (\"\"), and close each cell's"
                ) from None
            if cells and width and len(cells) != width:
                more = "more" if len(cells) > width else "fewer"
                raise UserError(
                    f"'{name}' line {begins} has {len(cells)} cells, {more} than the header's {width}; put cells that hold the "
                    f"delimiter '{'tab' if delimiter == chr(9) else delimiter}' in quotes, and give every cell"
                )
            if cells:
                width = width or len(cells)
                yield begins, cells
            begins = first + reader.line_num
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str) -> str:
    """The one that splits the header into most cells, a known column among them; a comma where none does."""
    known = {_key(name) for name in _TEXT}

    def cells(delimiter: str) -> list[str]:
        return next(csv.reader([header], delimiter=delimiter), [])

    fitting = [d for d in _DELIMITERS if known & {_key(cell) for cell in cells(d)}]
    return max(fitting, key=lambda d: len(cells(d)), default=",")


# -- JSON and parquet ------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path.name}' line {number} is not JSON ({error.msg}); one object per line") from None
        records.append(Record(_object(value, f"'{path.name}' line {number}"), f"line {number}"))
    return records


def _json_array(path: Path) -> list[Record]:
    try:
        value = json.loads(utf8(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path.name}' line {error.lineno} is not JSON ({error.msg}); give an array of objects"
        ) from None
    if not isinstance(value, list):
        raise UserError(
            f'\'{path.name}\' is not an array; write [{{"prompt": "..."}}, ...], or one object a line as .jsonl'
        )
    rows = [{"prompt": item} if isinstance(item, str) else item for item in value]
    return [Record(_object(row, f"'{path.name}' row {i}"), f"row {i}") for i, row in enumerate(rows, 1)]


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{place} is not an object; write {{"prompt": "..."}}')
    return value


def _parquet(path: Path) -> list[Record]:
    import pyarrow.parquet

    try:  # through Arrow and not a data frame: nulls stay nulls, integers integers
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow has no common base class for unreadable files
        reason = str(error).splitlines()[0]
        raise UserError(f"'{path.name}' is not a readable parquet file ({reason})") from None
    return [Record(row, f"row {i}") for i, row in enumerate(rows, 1)]


# -- a row as a prompt -----------------------------------------------------------------------------------------------


def _fields(record: Record, place: str) -> dict[str, Any]:
    cells = {_key(name): (name, value) for name, value in record.cells.items() if name is not None}
    column = next((name for name in _TEXT if _key(name) in cells and cells[_key(name)][1] is not None), None)
    if column is None:
        raise UserError(
            f"{place} has no prompt (its columns: {', '.join(map(str, list(record.cells)[:ROWS_SHOWN])) or 'none'}); name the column "
            "with the prompts 'prompt', and leave none of its cells empty"
        )
    prompt, answer = _text(cells[_key(column)][1], place)
    for name in _CONTEXT.get(column, ()):
        extra = cells.get(_key(name), ("", None))[1]
        if isinstance(extra, str) and extra.strip():  # Alpaca's input comes after, HarmBench's context before
            prompt = f"{prompt}\n\n{extra}" if column == "instruction" else f"{extra}\n\n---\n\n{prompt}"
    if not prompt.strip():
        raise UserError(f"{place}: the prompt is blank; write it, or take the row out")
    fields: dict[str, Any] = {"prompt": prompt}
    subject = next((v for v in (_label(cells.get(_key(n)), place) for n in _SUBJECT) if v), None)
    for name, value in (
        ("subject", subject),
        ("category", _label(cells.get("category"), place)),
        ("set", _label(cells.get("set"), place)),
        ("split", _split(_label(cells.get("split"), place), place)),
        ("answer", answer if answer is not None else _label(cells.get("answer"), place)),
    ):
        if value:
            fields[name] = value
    return fields


def _text(value: Any, place: str) -> tuple[str, str | None]:
    """The request in a cell, and the answer after it where the cell is a conversation that has one."""
    if isinstance(value, str):
        return value, None
    if not isinstance(value, list):
        raise UserError(f"{place}: the prompt is of type {type(value).__name__}, not text; give text")
    if value and all(isinstance(turn, str) for turn in value):
        turns = [("user" if i % 2 == 0 else "assistant", turn) for i, turn in enumerate(value)]
    else:
        turns = [_turn(turn, place) for turn in value]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{place}: a conversation with the roles {', '.join(roles) or 'none'} cannot be read; give one request of the user, with or "
            "without an answer"
        )
    return turns[0][1], turns[1][1] if len(turns) > 1 else None


def _turn(turn: Any, place: str) -> tuple[str, str]:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        if isinstance(role, str) and isinstance(content, str):
            return role, content
    raise UserError(
        f'{place}: a message of the conversation has no role and text; write {{"role": "user", "content": "..."}}'
    )


def _label(cell: tuple[str, Any] | None, place: str) -> str | None:
    """A label as text: integers too, lists joined; None for an empty cell."""
    if cell is None or cell[1] is None:
        return None
    name, value = cell
    if isinstance(value, list):
        value = " / ".join(str(item) for item in value if item is not None)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UserError(f"{place}: '{name}' is of type {type(value).__name__}; give text or a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _split(word: str | None, place: str) -> str | None:
    if word is None or word.lower() in _SPLITS:
        return word.lower() if word else None
    raise UserError(
        f"{place}: the split is '{word}'; write fit, select or report, or leave the column out to split by subject"
    )


def _key(name: Any) -> str:
    return "".join(c for c in str(name).lower() if c.isalnum())
