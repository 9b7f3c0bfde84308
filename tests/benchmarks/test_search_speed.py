"""The configuration search: every setting screened on the first token, only the promising ones judged by their replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.evaluation import answer_log_probs, log_odds, log_odds_of_each
from rsteer_interp.judges import load_judge
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.prompts import load_prompts
from rsteer_interp.refusal_scores import confidence_of, reply_and_judge
from rsteer_interp.selection import Setting, find_setting, grid
from tests.benchmarks.compare import Rival, assert_same, compare, seconds
from tests.benchmarks.fitted import Fitted
from tests.benchmarks.rivals import Change, changed_inputs, forward, generate, on_both_kernels

# The demo preset's grid and its proportions, at a quarter of its prompts.
KS, ALPHAS = (2, 8), (-0.5, -0.75, -1.0)
SCREENED, CONVERSATIONS, JUDGED, SAMPLES, NEW_TOKENS, TARGET = 4, 2, 8, 2, 16, 1.3


def _changes(fitted: Fitted, setting: Setting) -> dict[int, Change]:
    """The setting as functions for plain hooks."""
    steering = fitted.steering(setting)

    def change(v: Tensor, reference: Tensor, amount: float) -> Change:
        def changed(x: Tensor) -> Tensor:
            kept = x - ((x - reference) @ v)[..., None] * v if setting.reposition else x
            return kept + amount * v

        return changed

    parts = zip(steering.sites, steering.directions, steering.references, strict=True)
    return {site.layer: change(v, reference, steering.amounts[site]) for site, v, reference in parts}


def test_configuration_search(benchmark: Any, backend: Backend, fitted: Fitted, rounds: int) -> None:
    template, judge, model = backend.template(), load_judge("pattern"), backend.model
    texts = load_prompts("political_sensitive").split("select").sample(JUDGED, 0).texts
    rows = template.encode_all(texts)
    harmful = template.encode_all(load_prompts("harmful").split("select").sample(SCREENED, 0).texts)
    talks = load_prompts("conversations").split("select").sample(CONVERSATIONS, 0)
    answered = template.encode_all(talks.texts, [talk.answer or "" for talk in talks])
    settings, sampling = grid(KS, ALPHAS, (False, True)), Sampling(SAMPLES, 1.0, 1)
    first = min(site.layer for setting in settings for site in fitted.steering(setting).sites)
    batch = backend.batch(rows)
    judged_settings: list[int] = []

    def replies(setting: Setting | None) -> Tensor:
        edit = fitted.steering(setting).edit() if setting else None
        return confidence_of(
            reply_and_judge(backend, rows, texts, judge, max_new_tokens=NEW_TOKENS, edit=edit, sampling=sampling)
        )

    unsteered = replies(None).mean()  # known before any search

    def search() -> None:
        political, others = backend.prepare(rows[:SCREENED], first), backend.prepare(harmful, first)
        conversations = backend.prepare(answered, first, CONVERSATIONS)
        odds = log_odds(backend, political, fitted.tokens)
        answers = answer_log_probs(backend, conversations)
        judged_settings.append(0)

        def removals(chosen: Sequence[Setting]) -> list[float]:
            edits = [fitted.steering(setting).edit() for setting in chosen]
            log_odds_of_each(backend, others, fitted.tokens, edits)
            steered = log_odds_of_each(backend, political, fitted.tokens, edits)
            return (2 * odds.sigmoid() - 2 * steered.sigmoid()).mean(1).tolist()

        def answer_shift(setting: Setting) -> float:
            edit = fitted.steering(setting).edit()
            return float((answer_log_probs(backend, conversations, edit) - answers).abs().mean())

        def judged_removal(setting: Setting) -> float:
            judged_settings[-1] += 1
            return float(unsteered - replies(setting).mean())

        find_setting(
            settings, target=TARGET, removals=removals, answer_shift=answer_shift, judged_removal=judged_removal
        )

    tried = settings[len(settings) // 2 + 1]
    with torch.inference_mode(), changed_inputs(model, _changes(fitted, tried)):
        theirs = refusal_log_odds(forward(model, batch)[:, -1], fitted.tokens)
    prepared = backend.prepare(rows, first)
    assert_same(log_odds(backend, prepared, fitted.tokens, fitted.steering(tried).edit()), theirs)

    def generated() -> None:
        with changed_inputs(model, _changes(fitted, tried)):
            generate(model, batch, NEW_TOKENS, template.pad_id, sorted(backend.stop_ids), SAMPLES)

    compare(
        benchmark,
        f"configuration search with replies, {len(settings)} settings",
        seconds(search),
        [
            *on_both_kernels("transformers generate per setting", model, generated, 0.4, len(settings)),
            Rival("our own generate per setting", seconds(lambda: replies(tried), len(settings)), 0.4, "same"),
        ],
        max(2, rounds - 1),
        note=f"{JUDGED} prompts x {SAMPLES} replies of {NEW_TOKENS} tokens; rivals timed on one setting and scaled to "
        f"{len(settings)}",
    )
    benchmark.extra_info["comparison"]["note"] += f"; the search judged the replies of {max(judged_settings)} settings"
