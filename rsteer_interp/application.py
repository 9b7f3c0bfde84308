"""Apply a saved steering configuration to anybody's prompts: judged base and steered replies, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rsteer_interp.backends import configured_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit
from rsteer_interp.complete_folder import held, publish
from rsteer_interp.judges import load_judge
from rsteer_interp.judges.base import Judge
from rsteer_interp.processes import is_first
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Prompt, load_prompts
from rsteer_interp.provenance import Provenance, json_text
from rsteer_interp.refusal_scores import Reply, cut, reply_and_judge
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.steering import load_steering

if TYPE_CHECKING:
    from analyses.apply_steering import Config

FILES = ("responses.jsonl", "provenance.json", "summary.json")  # the last one makes the folder complete


def apply_steering(config: Config) -> Path:
    """Write `responses.jsonl`, `summary.json` and `provenance.json` to `config.out`, all of them or nothing."""
    prompts = list(load_prompts(config.prompts))
    backend = configured_backend(config, config.model, config.backend)
    steering = load_steering(config.steering, backend, other_model=config.other_model)
    judge = load_judge(config.judge, backend)
    tokens = steering.refusal_tokens
    base = _replies(backend, judge, prompts, None, tokens, config.max_new_tokens, "base replies")
    steered = _replies(backend, judge, prompts, steering.edit(), tokens, config.max_new_tokens, "steered replies")
    lines = [
        {
            "set": prompt.set,
            "prompt": prompt.prompt,
            "base": _written(backend, prompt, a, config.harmful_tokens),
            "steered": _written(backend, prompt, b, config.harmful_tokens),
        }
        for prompt, a, b in zip(prompts, base, steered, strict=True)
    ]
    summary = _summary(lines, [p.subject for p in prompts])
    record = Provenance.collect(backend, config=config, template=backend.template())
    contents = {
        "responses.jsonl": "".join(json_text(line, "reply", indent=None) + "\n" for line in lines),
        "provenance.json": json_text(record, "provenance") + "\n",
        "summary.json": json_text(summary, "summary") + "\n",
    }
    if is_first():
        with held(config.out, FILES, write=True) as place:
            publish(config.out, place, FILES, {name: text.encode() for name, text in contents.items()})
    _print(summary)
    return config.out


def _replies(
    backend: Backend,
    judge: Judge,
    prompts: Sequence[Prompt],
    edit: Edit | None,
    tokens: Sequence[int],
    max_new_tokens: int,
    label: str,
) -> list[Reply]:
    texts = [p.prompt for p in prompts]
    with progress(label, len(prompts)) as advance:
        groups = reply_and_judge(
            backend,
            backend.template().encode_all(texts),
            texts,
            judge,
            max_new_tokens=max_new_tokens,
            edit=edit,
            refusal_tokens=tokens,
            on_batch=advance,
        )
    return [group[0] for group in groups]


def _written(backend: Backend, prompt: Prompt, reply: Reply, harmful_tokens: int) -> dict[str, Any]:
    harmful = "harmful" in prompt.set.lower()
    return {
        "response": cut(backend.tokenizer, reply.text, harmful_tokens) if harmful else reply.text,
        "refused": reply.verdict.refused,
        "confidence": reply.verdict.confidence,
        "log_odds": reply.log_odds,
    }


def _summary(lines: Sequence[dict[str, Any]], subjects: Sequence[str]) -> dict[str, Any]:
    """Refusal rate per set with Wilson interval over subjects and n, before and after."""

    def rate(name: str, side: str) -> dict[str, Any]:
        found = [(line[side]["refused"], s) for line, s in zip(lines, subjects, strict=True) if line["set"] == name]
        return asdict(Rate.of([refused for refused, _ in found], clusters=[s for _, s in found]))

    sets = sorted({line["set"] for line in lines})
    return {name: {side: rate(name, side) for side in ("base", "steered")} for name in sets}


def _print(summary: dict[str, Any]) -> None:
    table = Table(title="Refusal % (95 % Wilson interval over subjects)")
    for column in ("set", "n", "subjects", "base", "steered"):
        table.add_column(column)
    for name, sides in summary.items():
        cells = [f"{100 * r['rate']:.1f} ({100 * r['low']:.0f}-{100 * r['high']:.0f})" for r in sides.values()]
        table.add_row(name, str(sides["base"]["n"]), str(sides["base"]["units"]), *cells)
    Console().print(table)
