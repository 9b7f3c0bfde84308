"""Prompt files as people have them: read right, whole and in order, or refused in one line that names the file's line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsteer_interp.errors import UserError
from rsteer_interp.prompt_files import read_records
from rsteer_interp.prompts import Prompt, PromptSet, load_prompts


def read(folder: Path, name: str, content: str | bytes) -> PromptSet:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_prompts(path)


def refused(folder: Path, name: str, content: str) -> str:
    with pytest.raises(UserError) as error:
        read(folder, name, content)
    said = str(error.value)
    assert "\n" not in said and name in said
    return said


def table(folder: Path, rows: list[dict[str, Any]]) -> PromptSet:
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return load_prompts(folder / "a.parquet")


@pytest.mark.parametrize(
    "inside", ["\n", "\n\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", ",", ";", '""']
)
def test_a_quoted_cell_may_hold_anything(tmp_path: Path, inside: str) -> None:
    prompts = read(tmp_path, "a.csv", f'prompt,subject\n"one{inside}two",a\nplain,b\n')
    assert prompts.texts == [f"one{inside.replace(chr(34) * 2, chr(34))}two", "plain"]
    assert [p.subject for p in prompts] == ["a", "b"]


@given(
    st.lists(
        st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=6,
    )
)
def test_what_a_csv_writer_writes_is_what_is_read(texts: list[str]) -> None:
    from tempfile import TemporaryDirectory

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([["prompt", "subject"], *([text, "s"] for text in texts)])
    lines = "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    with TemporaryDirectory() as folder:
        for name, content in (("a.csv", out.getvalue()), ("a.jsonl", lines)):
            (path := Path(folder) / name).write_bytes(content.encode())
            assert [row["prompt"] for row in read_records(path)] == texts  # every row, those that repeat another, too


def test_a_long_cell_is_read_whole(tmp_path: Path) -> None:
    long = "why " * 60_000
    assert read(tmp_path, "a.csv", f"prompt,subject\n{long.strip()},a\n").texts == [long.strip()]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("prompt\nTell me, please\nplain\n", 2, "3 cells|2 cells"),
        ("prompt,subject\nplain,a\nshort\n", 3, "1 cells, fewer"),
        ('prompt,subject\nplain,a\n"Tell me about rivers,a\nTell me about laws,b\n', 3, "not closed"),
        ('prompt,subject\n"She said \\"hello\\" to me, then",a\nplain,b\n', 2, "inside a quoted cell"),
        ('prompt,subject\n"one\ntwo",a\nx,y,z\n', 4, "3 cells, more"),
        ("prompt,subject\n ,a\n", 2, "blank"),
        ("prompt,split\nTell me,training\n", 2, "write fit, select or report"),
        ("sep=;\nprompt;subject\na;b;c\n", 3, "3 cells"),
        ("\n\nprompt,subject\na,b,c\n", 4, "3 cells"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, content: str, line: int, what: str) -> None:
    said = refused(tmp_path, "a.csv", content)
    assert f"line {line}" in said
    assert any(part in said for part in what.split("|"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt;subject\nTell me, please;a\n"),
        ("a.csv", "sep=|\nprompt|subject\nTell me, please|a\n"),
        ("a.tsv", "prompt\tsubject\nTell me, please\ta\n"),
        ("a.csv", '\ufeffprompt,subject\n"Tell me, please",a\n'),
        ("A.CSV", 'Prompt, SUBJECT \r\n"Tell me, please",a\r\n'),
        ("a.csv", 'Forbidden_Prompt,Topic\n"Tell me, please",a\n'),
        ("a.csv", 'Behavior,FunctionalCategory,Tags,ContextString\n"Tell me, please",a,,\n'),
        ("a.json", '[{"question": "Tell me, please", "category": "a"}]'),
        ("a.JSONL", '{"Goal": "Tell me, please", "Behavior": "short", "Category": "a"}\n'),
    ],
)
def test_names_delimiters_and_marks_in_use(tmp_path: Path, name: str, content: str) -> None:
    (prompt,) = read(tmp_path, name, content)
    assert (prompt.prompt, prompt.subject) == ("Tell me, please", "a")


def test_a_table_without_a_header_says_what_to_do(tmp_path: Path) -> None:
    said = refused(tmp_path, "a.csv", "Tell me about rivers\nTell me about laws\n")
    assert "header" in said and ".txt" in said and "Tell me about rivers" in said
    assert "column" in refused(tmp_path, "a.csv", "prompt,prompt\na,b\n")


def test_a_line_of_text_ends_at_line_ends_alone(tmp_path: Path) -> None:
    prompts = read(tmp_path, "a.txt", "first\u2028second\r\nabout laws\x0cpage two\n\nthird\x85fourth")
    assert prompts.texts == ["first\u2028second", "about laws\x0cpage two", "third\x85fourth"]


def test_an_input_is_joined_and_a_key_called_header_is_a_key(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "The river.", "output": "..."},
        {"instruction": "Sing.", "input": ""},
    ]
    assert read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))).texts == ["Translate.\n\nThe river.", "Sing."]
    rows = [{"prompt": "Tell me", "header": "Geography"}, {"prompt": "Tell you"}]
    assert read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))).texts == ["Tell me", "Tell you"]
    context = [{"Behavior": "Sum it up.", "ContextString": "A long text."}]
    assert read(tmp_path, "a.json", json.dumps(context)).texts == ["A long text.\n\n---\n\nSum it up."]


def test_nulls_are_nothing_and_numbers_are_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"thing {i}", "subject": "a" if i == 0 else None} for i in range(4)]
    prompts = table(tmp_path, rows)
    assert len({p.subject for p in prompts}) == 4 and all("nan" not in p.subject.lower() for p in prompts)
    prompts = table(tmp_path, [{"prompt": "x", "category": 3}, {"prompt": "y", "category": None}])
    assert [p.category for p in prompts] == ["3", ""]
    assert prompts.prompts[0].subject == "3"
    prompts = table(tmp_path, [{"prompt": "x", "category": ["war", "law"]}])
    assert prompts.prompts[0].category == "war / law"


def test_one_turn_is_a_prompt_and_more_is_said(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Tell me"}, {"role": "assistant", "content": "Gladly."}
    more = user | {"content": "Tell me more"}
    prompts = table(tmp_path, [{"messages": [user]}, {"messages": [more, answer]}])
    assert prompts.texts == ["Tell me", "Tell me more"] and prompts.prompts[1].answer == "Gladly."
    assert read(tmp_path, "a.json", json.dumps([{"conversations": [{"from": "human", "value": "Tell me"}]}])).texts == [
        "Tell me"
    ]
    assert read(tmp_path, "a.json", json.dumps([{"turns": ["Tell me"]}])).texts == ["Tell me"]
    with pytest.raises(UserError, match="row 1: a conversation with the roles system, user"):
        table(tmp_path, [{"prompt": [{"role": "system", "content": "s"}, user]}])


def test_a_row_without_a_prompt_is_never_dropped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 2 has no prompt"):
        table(tmp_path, [{"prompt": "x"}, {"prompt": None}])
    assert "line 2 has no prompt (its columns: name, words)" in refused(
        tmp_path, "a.jsonl", '{"prompt": "x"}\n{"name": 1, "words": "y"}\n'
    )


def test_splitting_and_sampling_take_time_as_the_prompts_do() -> None:
    """Counted in accesses, not seconds: ten times the subjects, ten times the work."""

    def work(n: int) -> int:
        seen = 0

        class Counted(str):
            def __hash__(self) -> int:
                nonlocal seen
                seen += 1
                return super().__hash__()

        prompts = PromptSet(
            "x", tuple(Prompt.model_construct(prompt=f"p{i}", subject=Counted(i // 2)) for i in range(n))
        )
        prompts.split("fit")
        prompts.sample(n // 2, 0)
        return seen

    assert work(4000) < 11 * work(400)
