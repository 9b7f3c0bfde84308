"""Step 4: base and steered greedy replies on the report split, and what the edit does to ordinary answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rsteer_interp.evaluation import answer_effects
from rsteer_interp.nulls import Estimate, Rate
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import Reply, cut, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL
from rsteer_interp.steering import Steering


def evaluate(context: Context, label: str, steering: Steering | None, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Judged greedy replies per set, refusal rates with Wilson intervals, answer shift and KL; `label` names the step."""

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
        return {"rates": rates, "replies": replies, **_answers(context, label, steering)}, None

    key = {"steering": _key(steering), "tokens": tokens, "preset": str(context.preset)}
    return context.stage(f"4_evaluation_{label}", key, compute).data


def _answers(context: Context, label: str, steering: Steering | None) -> dict[str, Any]:
    edit = steering.edit() if steering is not None else None
    if edit is None:
        return {"answer_shift": None, "kl": None}
    talks = context.conversations("report", context.preset.report_conversations)
    with progress(f"answer shift, {label}", len(talks)) as advance:
        effects = answer_effects(context.backend, context.encode(talks), edit, advance)
    seed = context.seed
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


def _key(steering: Steering | None) -> dict[str, Any] | None:
    if steering is None:
        return None
    return {
        "method": steering.method,
        "amounts": {str(site): amount for site, amount in steering.amounts.items()},
        "reposition": steering.reposition,
        "directions": steering.directions.double().sum(0).tolist(),
    }
