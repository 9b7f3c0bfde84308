"""Steps 4 and 5: base and steered greedy replies on the report split, and what the edits do to ordinary answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rsteer_interp.evaluation import ANSWER_ROWS, AnswerEffects, effects_of_each
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import Reply, cut, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.steering import Steering


def evaluate(context: Context, label: str, steering: Steering | None, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Judged greedy replies per set, and refusal rates with Wilson intervals; `label` names the step."""

    def compute() -> tuple[dict[str, Any], None]:
        edit = steering.edit() if steering is not None else None
        counts = context.preset.report
        rates, replies = {}, []
        with progress(f"replies, {label}", sum(counts.values())) as advance:
            for name, n in counts.items():
                prompts = context.prompts("report", {name: n})
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
                rates[name] = asdict(Rate.of([group[0].verdict.refused for group in got]))
                replies += [
                    {"set": name, "prompt": text, **_written(context, name, group[0])}
                    for text, group in zip(texts, got, strict=True)
                ]
        return {"rates": rates, "replies": replies}, None

    return context.stage(f"4_evaluation_{label}", {"steering": steering, "tokens": tokens}, compute).data


def answers(context: Context, steerings: Mapping[str, Steering]) -> dict[str, Any]:
    """What each method does to ordinary answers: shift L_g and KL on benign conversations that the finder did not use."""

    def compute() -> tuple[dict[str, Any], None]:
        talks = context.conversations("report", context.preset.report_conversations)
        first = min(site.layer for steering in steerings.values() for site in steering.sites)
        rows = context.backend.prepare(context.encode(talks), first, ANSWER_ROWS)
        with progress("answer shift", len(talks)) as advance:
            found = effects_of_each(context.backend, rows, [s.edit() for s in steerings.values()], advance)
        return {m: _estimates(effects, context.seed) for m, effects in zip(steerings, found, strict=True)}, None

    return context.stage("5_answers", {"steerings": steerings}, compute).data


def _estimates(effects: AnswerEffects, seed: int) -> dict[str, Any]:
    return {
        "answer_shift": asdict(Estimate.of(effects.shift.tolist(), seed=seed)),
        "kl": asdict(Estimate.of(effects.kl.tolist(), seed=seed)),
    }


def _written(context: Context, prompt_set: str, reply: Reply) -> dict[str, Any]:
    return {
        "response": cut(context.backend.tokenizer, reply.text) if prompt_set == HARMFUL else reply.text,
        "refused": reply.verdict.refused,
        "confidence": reply.verdict.confidence,
        "log_odds": reply.log_odds,
    }
