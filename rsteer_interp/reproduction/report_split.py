"""Steps 4 and 5: base and steered greedy replies on the report split, and what the edits do to ordinary answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rsteer_interp.evaluation import ANSWER_ROWS, effects_of_each
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import Reply, cut, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.steering import Steering


def evaluate(context: Context, label: str, steering: Steering | None, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Judged greedy replies per set, and refusal rates with Wilson intervals over subjects; `label` names the step."""
    asked = {name: context.prompts("report", {name: n}) for name, n in context.preset.report.items()}

    def compute() -> tuple[dict[str, Any], None]:
        edit = steering.edit() if steering is not None else None
        replies = []
        with progress(f"replies, {label}", sum(map(len, asked.values()))) as advance:
            for name, prompts in asked.items():
                texts = [p.prompt for p in prompts]
                got = reply_and_judge(
                    context.backend,
                    context.encode(prompts),
                    texts,
                    context.judge,
                    max_new_tokens=context.preset.harmful_tokens if name == HARMFUL else context.preset.tokens,
                    edit=edit,
                    refusal_tokens=tokens,
                    on_batch=advance,
                )
                replies += [
                    {"set": name, "prompt": text, **_written(context, name, group[0])}
                    for text, group in zip(texts, got, strict=True)
                ]
        return {"replies": replies}, None

    key = {"steering": steering, "tokens": tokens}
    replies = context.stage(f"4_evaluation_{label}", key, compute).data["replies"]
    subjects = {name: [p.subject for p in prompts] for name, prompts in asked.items()}
    rates = {
        name: asdict(Rate.of([r["refused"] for r in replies if r["set"] == name], clusters=of))
        for name, of in subjects.items()
    }
    return {"rates": rates, "replies": replies, "subjects": subjects}


def answers(context: Context, steerings: Mapping[str, Steering]) -> dict[str, Any]:
    """What each method does to ordinary answers: shift L_g and KL on benign conversations that the finder did not use."""
    talks = context.conversations("report", context.preset.report_conversations)

    def compute() -> tuple[dict[str, Any], None]:
        first = min(site.layer for steering in steerings.values() for site in steering.sites)
        rows = context.backend.prepare(context.encode(talks), first, ANSWER_ROWS)
        with progress("answer shift", len(talks)) as advance:
            found = effects_of_each(context.backend, rows, [s.edit() for s in steerings.values()], advance)
        effects = {m: [e.shift.tolist(), e.kl.tolist()] for m, e in zip(steerings, found, strict=True)}
        return {"effects": effects}, None

    subjects = [talk.subject for talk in talks]
    return {
        m: {
            name: asdict(Estimate.of(values, clusters=subjects, seed=context.seed))
            for name, values in zip(("answer_shift", "kl"), both, strict=True)
        }
        for m, both in context.stage("5_answers", {"steerings": steerings}, compute).data["effects"].items()
    }


def _written(context: Context, prompt_set: str, reply: Reply) -> dict[str, Any]:
    return {
        "response": cut(context.backend.tokenizer, reply.text) if prompt_set == HARMFUL else reply.text,
        "refused": reply.verdict.refused,
        "confidence": reply.verdict.confidence,
        "log_odds": reply.log_odds,
    }
