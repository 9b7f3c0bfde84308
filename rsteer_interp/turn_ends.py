"""Ends of a turn: the tokens at which a reply is over, from every place that names one and from the chat template.

A checkpoint's eos token is often the end of a document, which a chat model never writes (Llama 3, Gemma, many GGUF files):
replies would run on into an invented next turn.
"""

from __future__ import annotations

from typing import Any

_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message
_REPLY = "rsteer0reply"


def turn_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids named in the generation config, the config and the tokenizer, and what the template puts after a reply."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = {template_end(tokenizer)}
    for source in (getattr(model, "generation_config", None), config, text_config, tokenizer):
        for name in _FIELDS:
            value = getattr(source, name, None)
            found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(int(token) for token in found if token is not None)


def template_end(tokenizer: Any) -> int | None:
    """The control token that the chat template writes after an assistant's last turn; None where it writes none."""
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # no template, or one that refuses a finished turn: then the named tokens are all there is
        return None
    _, found, after = text.rpartition(_REPLY)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found and after.strip() else []
    # Ordinary text after a reply ("### User:") begins with a token that replies may hold, or an unknown one.
    first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return first if first in control else None
