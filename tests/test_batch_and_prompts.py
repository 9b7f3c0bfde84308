"""Chat templates become the ids that the tokenizer itself gives, with the right spans; sets split by subject."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsteer_interp.batch import ChatTemplate, Tokens, length_groups, make_batch, thrifty_groups
from rsteer_interp.errors import UserError
from rsteer_interp.prompts import BUILT_IN, Apart, Prompt, load_prompts
from tests.tiny_models import tiny_tokenizer

TEXTS = ["tell me about the city", "why is the river ?", "write"]


def test_ids_are_those_of_the_tokenizers_own_template() -> None:
    tokenizer = tiny_tokenizer()
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(ChatTemplate(tokenizer).encode(text).ids) == list(wanted)


def test_spans_partition_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    for text in TEXTS:
        tokens = ChatTemplate(tokenizer).encode(text, "i can tell you")
        assert tokenizer.decode(tokens.ids[tokens.prefix : tokens.instruction]).split() == text.split()
        assert tokenizer.decode(tokens.ids[tokens.prompt :]).split() == ["i", "can", "tell", "you"]
        assert tokens.answer_length == 4
        assert 0 < tokens.prefix < tokens.instruction < tokens.prompt


def test_batch_pads_left_and_masks() -> None:
    rows = [Tokens((5, 6, 7, 8), 1, 2, 3), Tokens((5, 9), 1, 1, 2)]
    batch = make_batch(rows, pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [0, 0, 5, 9]]
    assert batch.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert batch.positions[1, 2:].tolist() == [0, 1]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.shared_prefix == 1
    assert batch.answer_mask.tolist() == [[False, False, False, True], [False] * 4]


def test_shared_prefix_leaves_each_row_a_token() -> None:
    same = [Tokens((1, 2, 3), 1, 2, 3)] * 2
    assert make_batch(same, 0).shared_prefix == 2


def test_length_groups_hold_every_row_once() -> None:
    rows = [Tokens(tuple(range(n)), 0, 0, n) for n in (3, 9, 1, 4, 4)]
    groups = list(length_groups(rows, 2))
    assert sorted(i for group in groups for i in group) == list(range(5))
    assert groups[0][0] == 1


def _tokens_run(groups: list[list[int]], lengths: list[int], shared: int, cost: int) -> int:
    return sum(len(g) * (max(lengths[i] for i in g) - shared) + cost for g in groups)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(6, 12), min_size=1, max_size=7),
    size=st.integers(1, 8),
    shared=st.integers(0, 5),
    cost=st.integers(0, 20),
)
def test_thrifty_groups_are_the_cheapest_that_sort_by_length(
    lengths: list[int], size: int, shared: int, cost: int
) -> None:
    rows = [Tokens(tuple(range(n)), 0, 0, n) for n in lengths]
    found = list(thrifty_groups(rows, size, shared, cost))
    assert sorted(i for group in found for i in group) == list(range(len(rows)))
    assert all(len(group) <= size for group in found)
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    every = []
    for cuts in range(2 ** (len(rows) - 1)):  # every way to cut the sorted rows
        groups = [[order[0]]]
        for k, i in enumerate(order[1:]):
            if cuts >> k & 1:
                groups.append([])
            groups[-1].append(i)
        if all(len(group) <= size for group in groups):
            every.append(_tokens_run(groups, lengths, shared, cost))
    if size >= len(rows):
        assert _tokens_run(found, lengths, shared, cost) == min(every)
    assert _tokens_run(found, lengths, shared, cost) <= _tokens_run(
        list(length_groups(rows, size)), lengths, shared, cost
    )


def test_template_errors_name_the_remedy() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="longer than the model's context"):
        ChatTemplate(tokenizer, max_length=5).encode("tell me about the city")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="exactly once"):
        ChatTemplate(tokenizer).encode("tell me")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets(name: str) -> None:
    least = {"political_sensitive": 240, "political_matched": 240, "world_politics": 100, "harmful": 120}
    least |= {
        "harmless_matched": 120,
        "borderline": 60,
        "general": 200,
        "taxes": 100,
        "conversations": 128,
        "unusual": 60,
    }
    prompts = load_prompts(name)
    assert len(prompts) >= least[name]
    texts = [t.lower() for t in prompts.texts]
    assert len(set(texts)) == len(texts)
    splits = {s: {p.subject for p in prompts if p.split == s} for s in ("fit", "select", "report")}
    assert not (
        splits["fit"] & splits["select"] or splits["fit"] & splits["report"] or splits["select"] & splits["report"]
    )
    if name == "political_sensitive":
        assert len(prompts.subjects) >= 24
    if name == "harmful":
        assert len({p.category for p in prompts}) == 10


def test_no_prompt_is_in_two_sets() -> None:
    counts = Counter(text.lower() for name in BUILT_IN for text in load_prompts(name).texts)
    assert [text for text, n in counts.items() if n > 1] == []


def test_sample_spreads_over_subjects_and_repeats() -> None:
    report = load_prompts("harmful").split("report")
    a, b = report.sample(40, 0), report.sample(40, 0)
    assert a.texts == b.texts != report.sample(40, 1).texts
    counts = Counter(p.subject for p in a)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_readers_agree(tmp_path: Path) -> None:
    import pandas

    texts = ["Who wrote this?", "Warum, und wann?"]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": t, "set": "mine"}) for t in texts), encoding="utf-8"
    )
    pandas.DataFrame({"Goal": texts, "Category": ["x", "y"]}).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame({"prompt": texts}).to_parquet(tmp_path / "a.parquet")
    for suffix in ("txt", "jsonl", "csv", "parquet"):
        assert load_prompts(tmp_path / f"a.{suffix}").texts == texts
    assert {p.set for p in load_prompts(tmp_path / "a.jsonl")} == {"mine"}
    assert load_prompts(tmp_path / "a.csv").subjects == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "not an object"),
        ("a.jsonl", b'{"words": "x"}', "line 1 has no prompt .its columns: words"),
        ("a.parquet", b"nonsense", "not a readable parquet"),
        ("a.docx", b"", "use one of"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_unknown_set_lists_the_built_in_ones() -> None:
    with pytest.raises(UserError, match="political_sensitive"):
        load_prompts("no_such_set")


def test_sets_without_splits_are_split_by_subject(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {s} {i}", "subject": f"s{s}"} for s in range(10) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = load_prompts(tmp_path / "a.jsonl")
    parts = {name: prompts.split(name).subjects for name in ("fit", "select", "report")}  # type: ignore[arg-type]
    assert [len(parts[name]) for name in ("fit", "select", "report")] == [4, 2, 4]
    assert sorted(s for part in parts.values() for s in part) == prompts.subjects
    assert len(prompts.split("fit")) == 12


def test_copies_of_a_prompt_count_once_and_the_user_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eighty copies of one prompt were n = 80, and lay in all three splits."""
    path = tmp_path / "eighty_copies.txt"
    path.write_text("Tell me about the city.\n" * 40 + "  tell me  about THE city. \n" * 40 + "Why?\nHow?\nWhen?\n")
    found = load_prompts(path)
    assert found.texts == ["Tell me about the city.", "Why?", "How?", "When?"]
    assert "'eighty_copies' has 83 prompts of which 4 are different" in capsys.readouterr().err
    load_prompts(path)
    assert capsys.readouterr().err == ""  # said once
    splits = [found.split(split).texts for split in ("fit", "select", "report")]
    assert sorted(text for texts in splits for text in texts) == sorted(found.texts)


def test_a_prompt_in_two_splits_of_a_set_stays_where_it_first_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", "fit", "one"), ("b", "select", "two"), ("c", "report", "ONE"), ("d", "report", "three")]
    path = tmp_path / "in_two_splits.jsonl"
    path.write_text("".join(json.dumps({"prompt": t, "subject": s, "split": w}) + "\n" for s, w, t in rows))
    found = load_prompts(path)
    assert found.split("fit").texts == ["one"] and found.split("report").texts == ["three"]
    assert "4 prompts of which 3 are different" in capsys.readouterr().err


def test_a_prompt_in_two_splits_of_a_run_is_one_clear_error() -> None:
    """Fitted on under one set's name and reported under another's."""
    apart, ours, theirs = (
        Apart(),
        [Prompt(prompt="Why is the sky blue?", set="ours")],
        [Prompt(prompt="why is  the sky BLUE?", set="theirs"), Prompt(prompt="How?", set="theirs")],
    )
    apart.check("fit", ours)
    apart.check("fit", ours)
    apart.check("fit", theirs)  # the same split: nothing is measured on what was fitted
    with pytest.raises(UserError, match="in the fit split of 'ours' and in the report split of 'theirs'"):
        apart.check("report", theirs)
    built_in = Apart()
    for name in BUILT_IN:
        for split in {p.split for p in load_prompts(name) if p.split}:
            built_in.check(split, load_prompts(name).split(split))
