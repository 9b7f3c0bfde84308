"""Ends of a turn: a reply stops at every token that a checkpoint or its chat template names, and holds none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.turn_ends import template_end, turn_ends
from tests.tiny_models import KINDS, SPECIAL, Kind, tiny_model, tiny_rows, tiny_tokenizer

DOCUMENT_END = SPECIAL.index("<|pad|>")  # what the checkpoint calls eos, and never writes in a chat
LONG = 24


def a_model() -> Any:
    model = tiny_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = DOCUMENT_END
    return model


def a_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Its eos is the document's end, and its template ends a turn with nothing but a full stop, if not told otherwise."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = template or (tokenizer.chat_template or "").replace("<|im_end|>", ".")
    return tokenizer


def in_generation_config(model: Any, tokenizer: Any, token: int) -> None:
    model.generation_config.eos_token_id = [DOCUMENT_END, token]


def in_config(model: Any, tokenizer: Any, token: int) -> None:
    model.config.eos_token_id = [token]


def in_tokenizer(model: Any, tokenizer: Any, token: int) -> None:
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)


def as_end_of_turn(model: Any, tokenizer: Any, token: int) -> None:
    model.generation_config.eot_token_id = token


def in_template(model: Any, tokenizer: Any, token: int) -> None:
    word = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = tokenizer.chat_template.replace(" . {%", f" {word} {{%")


def in_template_of_a_token_that_is_not_special(model: Any, tokenizer: Any, token: int) -> None:
    word = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_tokens([word])
    tokenizer.chat_template = tokenizer.chat_template.replace(" . {%", f" {word} {{%")


NAMED = (in_generation_config, in_config, in_tokenizer, as_end_of_turn, in_template)


def reply(backend: Backend, encoder: Any) -> list[int]:
    # Rows of one template for all, so that what the model reads does not change with the name of the end.
    rows = tiny_rows(encoder)[:1]
    out = backend.generate(backend.batch(rows), LONG)
    return out.ids[0, : int(out.lengths[0])].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMED, in_template_of_a_token_that_is_not_special])
def test_a_reply_stops_at_an_end_wherever_it_is_named(kind: Kind, name: Callable[[Any, Any, int], None]) -> None:
    endless = load_backend(a_model(), kind, tokenizer=a_tokenizer())
    assert endless.stop_ids == {DOCUMENT_END}
    whole = reply(endless, endless)
    assert len(whole) == LONG
    end = whole[5]
    model, tokenizer = a_model(), a_tokenizer()
    name(model, tokenizer, end)
    backend = load_backend(model, kind, tokenizer=tokenizer)
    assert backend.stop_ids >= {end}
    ended = reply(backend, endless)
    assert ended == whole[: whole.index(end) + 1]
    text = backend.decode(backend.generate(backend.batch(tiny_rows(endless)[:1]), LONG))[0]
    assert text.split() == [tokenizer.convert_ids_to_tokens(t) for t in ended[:-1]]


END = "<|im_end|>"
TEMPLATES = {
    "chatml": ("{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}", END),
    "the tokenizer's eos": ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "<|pad|>"),
    "only after the last reply": (
        "{% for m in messages %}{{ m.content }} {{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|im_start|>' }}"
        "{% endfor %}",
        END,
    ),
    "plain text": ("{% for m in messages %}{{ m.content }} why {% endfor %}", None),
    "nothing": ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    "no replies": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} <|im_end|>{% endif %}{% endfor %}",
        None,
    ),
    "an error": ("{{ raise_exception('users alone') }}", None),
    "text between": ("{% for m in messages %}{{ m.content }} so <|im_end|>{% endfor %}", None),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_end_of_a_template_is_the_control_token_right_after_a_reply(kind: str) -> None:
    template, end = TEMPLATES[kind]
    tokenizer = a_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [END, "<|im_start|>"]})
    assert template_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    assert turn_ends(a_model(), tokenizer) == {DOCUMENT_END} | ({template_end(tokenizer)} - {None})


def test_without_a_template_the_named_tokens_are_all() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert turn_ends(a_model(), tokenizer) == {DOCUMENT_END, SPECIAL.index(END)}
