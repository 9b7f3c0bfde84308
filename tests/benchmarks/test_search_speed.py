"""The configuration search: settings judged by their replies in the order of what they do to ordinary answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.each import Each, repeated
from rsteer_interp.backends.edits import Edit
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.evaluation import answer_log_probs, log_odds
from rsteer_interp.judges import load_judge
from rsteer_interp.measures import refusal_log_odds
from rsteer_interp.prompts import load_prompts
from rsteer_interp.refusal_scores import confidence_of, reply_and_judge
from rsteer_interp.selection import Setting, find_setting, grid
from rsteer_interp.statistics.intervals import Estimate
from tests.benchmarks.compare import Rival, assert_same, compare, seconds
from tests.benchmarks.fitted import Fitted
from tests.benchmarks.rivals import Change, changed_inputs, forward, generate, on_both_kernels

# The demo preset's grid and its proportions, at a quarter of its prompts.
KS, ALPHAS = (2, 8), (-0.5, -0.75, -1.0)
CONVERSATIONS, JUDGED, FIRST, SAMPLES, NEW_TOKENS, TARGET = 2, 8, 3, 2, 16, 1.0


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
    asked = load_prompts("political_sensitive").split("select").sample(JUDGED, 0)
    texts = asked.texts
    rows = template.encode_all(texts)
    talks = load_prompts("conversations").split("select").sample(CONVERSATIONS, 0)
    answered = template.encode_all(talks.texts, [talk.answer or "" for talk in talks])
    settings, sampling = grid(KS, ALPHAS, (False, True)), Sampling(SAMPLES, 1.0, 1)
    subjects = [prompt.subject for prompt in asked]
    first = min(site.layer for setting in settings for site in fitted.steering(setting).sites)
    batch = backend.batch(rows)
    judged_replies: list[int] = []

    def confidences(edits: Sequence[Edit | None], start: int, end: int) -> Tensor:
        replies = reply_and_judge(
            backend,
            repeated(rows[start:end], len(edits)),
            texts[start:end] * len(edits),
            judge,
            max_new_tokens=NEW_TOKENS,
            edit=Each(tuple(edits)),
            sampling=sampling,
        )
        return confidence_of(replies).view(len(edits), -1)

    unsteered = confidences([None], 0, JUDGED)[0]  # known before any search

    def search() -> None:
        conversations = backend.prepare(answered, first, CONVERSATIONS)
        answers = answer_log_probs(backend, conversations)
        edits = {setting: fitted.steering(setting).edit() for setting in settings}
        shifts = {
            setting: Estimate.of((answer_log_probs(backend, conversations, edit) - answers).abs())
            for setting, edit in edits.items()
        }
        judged_replies.append(0)
        fallen: dict[Setting, list[float]] = {setting: [] for setting in settings}

        def falls(chosen: Sequence[Setting], n: int) -> list[list[float]]:
            have = len(fallen[chosen[0]])
            if have < n:
                after = confidences([edits[setting] for setting in chosen], have, n)
                judged_replies[-1] += after.numel() * SAMPLES
                for setting, fall in zip(chosen, unsteered[have:n] - after, strict=True):
                    fallen[setting] += fall.tolist()
            return [fallen[setting][:n] for setting in chosen]

        find_setting(
            shifts, falls, subjects, target=TARGET, first=FIRST, at_once=backend.batch_size // (FIRST * SAMPLES)
        )

    tried = settings[len(settings) // 2 + 1]
    with torch.inference_mode(), changed_inputs(model, _changes(fitted, tried)):
        theirs = refusal_log_odds(forward(model, batch)[:, -1], fitted.tokens)
    prepared = backend.prepare(rows, first)
    assert_same(log_odds(backend, prepared, fitted.tokens, fitted.steering(tried).edit()), theirs)

    def generated() -> None:
        with changed_inputs(model, _changes(fitted, tried)):
            generate(model, batch, NEW_TOKENS, template.pad_id, sorted(backend.stop_ids), SAMPLES)

    def alone() -> None:
        confidences([fitted.steering(tried).edit()], 0, JUDGED)

    compare(
        benchmark,
        f"configuration search with replies, {len(settings)} settings",
        seconds(search),
        [
            *on_both_kernels("transformers generate per setting", model, generated, 0.4, len(settings)),
            Rival("our own generate per setting", seconds(alone, len(settings)), 0.4, "same"),
        ],
        max(2, rounds - 1),
        note=f"{JUDGED} prompts x {SAMPLES} replies of {NEW_TOKENS} tokens; rivals timed on one setting and scaled to "
        f"{len(settings)}",
    )
    whole = JUDGED * SAMPLES * len(settings)
    benchmark.extra_info["comparison"]["note"] += f"; the search judged {max(judged_replies)} of {whole} replies"
