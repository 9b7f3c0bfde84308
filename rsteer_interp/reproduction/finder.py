"""Step 3: per method, the smallest answer shift among the settings that reach the removal target, by judged replies alone.

Either update (addition, reposition) gets a search of its own, so that the two can be compared where they remove alike; the
method's choice is the better of the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.each import Each, repeated
from rsteer_interp.backends.edits import Edit
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.equal_norm import rotated_edits
from rsteer_interp.evaluation import answer_log_probs
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Prompt
from rsteer_interp.refusal_scores import confidence_of, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.reproduction.vectors import Vectors
from rsteer_interp.selection import Found, Setting, find_setting, grid
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.steering import Steering, make_steering

UPDATES = (False, True)  # addition, reposition
NULL_DRAWS = 19  # the smallest p that they can give is 1/20


def settings(context: Context) -> list[Setting]:
    return grid(context.preset.ks, context.preset.alphas, UPDATES)


def steering_for(context: Context, vectors: Vectors, setting: Setting, tokens: tuple[int, ...]) -> Steering:
    return make_steering(
        vectors.method,
        vectors.directions,
        vectors.references,
        vectors.scales,
        vectors.top(setting.k, context.backend.n_layers),
        alpha=setting.alpha,
        reposition=setting.reposition,
        refusal_tokens=tokens,
        fingerprint=context.backend.fingerprint,
    )


@dataclass(frozen=True, eq=False)
class Refusing:
    """Sensitive select prompts that refuse, subjects alternating, with c of the replies they were chosen by and of fresh ones.

    Both are of the model as it is. Prompts chosen for a high noisy c score lower when asked again, so that a fall is counted from
    `fresh`: no edit then removes nothing.
    """

    texts: list[str]
    subjects: list[str]
    scored: Float[Tensor, " prompt"]
    fresh: Float[Tensor, " prompt"]

    def report(self) -> dict[str, Any]:
        means = {"scored": self.scored, "fresh": self.fresh}
        return {name: asdict(Estimate.of(c.tolist(), clusters=self.subjects)) for name, c in means.items()}


def refusing(context: Context, select: Scored) -> Refusing:
    """At most `preset.judged` of them."""
    seen: Counter[str] = Counter()
    turn = {}
    for i in select.political:
        turn[i] = seen[select.subjects[i]]
        seen[select.subjects[i]] += 1
    rows = sorted(turn, key=lambda i: turn[i])[: context.preset.judged]
    texts = [select.texts[i] for i in rows]

    def compute() -> tuple[dict[str, Any], None]:
        with progress("asking refusing prompts again", len(rows)) as advance:
            (fresh,) = confidences(context, texts, [None])
            advance(len(rows))
        return {"confidence": fresh.tolist()}, None

    data = context.stage("3_finder_unsteered", {"refusing": texts}, compute).data
    fresh = torch.tensor(data["confidence"], dtype=torch.float64)
    return Refusing(texts, [select.subjects[i] for i in rows], select.confidence[rows], fresh)


def confidences(context: Context, texts: Sequence[str], edits: Sequence[Edit | None]) -> Float[Tensor, "edit prompt"]:
    """c of fresh sampled replies to the prompts under every edit, decoded together.

    Their random numbers are not those of the scores, and the same under every edit, so that an edit that changes nothing has the
    same replies as none.
    """
    replies = reply_and_judge(
        context.backend,
        repeated(context.template.encode_all(texts), len(edits)),
        list(texts) * len(edits),
        context.judge,
        max_new_tokens=context.preset.tokens,
        edit=edits[0] if len(edits) == 1 else Each(tuple(edits)),
        sampling=Sampling(context.preset.judged_samples, 1.0, context.seed + 1),
    )
    return confidence_of(replies).view(len(edits), len(texts))


def find(
    context: Context, vectors: Vectors, prompts: Refusing, tokens: tuple[int, ...], target: float
) -> dict[str, Any]:
    """The method's trials and choice, as plain data."""
    preset, every = context.preset, len(prompts.texts)

    def compute() -> tuple[dict[str, Any], None]:
        edits = {s: steering_for(context, vectors, s, tokens).edit() for s in settings(context)}
        with progress(f"searching {vectors.method.upper()} settings", len(edits)) as advance:
            shifts = answer_shifts(context, vectors, edits)
            fallen: dict[Setting, list[float]] = {setting: [] for setting in edits}

            def falls(chosen: Sequence[Setting], n: int) -> list[list[float]]:
                have = len(fallen[chosen[0]])
                if have < n:
                    after = confidences(context, prompts.texts[have:n], [edits[setting] for setting in chosen])
                    for setting, fall in zip(chosen, prompts.fresh[have:n] - after, strict=True):
                        fallen[setting] += fall.tolist()
                advance(len(chosen) if have == 0 else 0)
                return [fallen[setting][:n] for setting in chosen]

            found = [
                find_setting(
                    {setting: shift for setting, shift in shifts.items() if setting.reposition == update},
                    falls,
                    prompts.subjects,
                    target=target,
                    first=preset.first,
                    at_once=max(1, context.backend.batch_size // (preset.first * preset.judged_samples)),
                )
                for update in UPDATES
            ]
        best = min(found, key=_rank)
        return {
            "chosen": asdict(best.chosen),
            "target_met": best.target_met,
            "trials": [asdict(trial) for each in found for trial in each.trials],
            "n": every,
        }, None

    key = {"vectors": vectors, "target": target, "tokens": tokens, "refusing": prompts.texts, "fresh": prompts.fresh}
    return context.stage(f"3_finder_{vectors.method}", key, compute).data


def _rank(found: Found) -> tuple[bool, float]:
    """Those that meet the target first, by answer shift; the others by what they remove."""
    assert found.chosen.removal is not None
    value = found.chosen.answer_shift.value if found.target_met else -found.chosen.removal.value
    return not found.target_met, value


def answer_shifts(context: Context, vectors: Vectors, edits: Mapping[Setting, Edit | None]) -> dict[Setting, Estimate]:
    """L_g of every setting on the finder's conversations; what comes before the first steered layer is computed once."""
    backend, talks = context.backend, context.conversations("select", context.preset.finder_conversations)
    first = min(site.layer for site in vectors.top(max(setting.k for setting in edits), backend.n_layers))
    rows = backend.prepare(context.encode(talks), first, 8)
    base = answer_log_probs(backend, rows)
    subjects = [talk.subject for talk in talks]
    return {
        setting: Estimate.of((answer_log_probs(backend, rows, edit) - base).abs().tolist(), clusters=subjects)
        for setting, edit in edits.items()
    }


def random_cloud(context: Context, reference: Steering) -> dict[str, Any]:
    """Refusal rates of select prompts as the model is, then under the reference's edit turned by one random rotation for all its
    sites."""
    prompts = {name: context.prompts("select", {name: context.preset.null}) for name in (POLITICAL, HARMFUL)}

    def compute() -> tuple[dict[str, Any], None]:
        edits: list[Edit | None] = [None, *null_edits(context, reference.edit())]
        rates = {}
        for name, asked in prompts.items():
            subjects = [prompt.subject for prompt in asked]
            flags = refused(context, asked, edits, f"random directions, {name}")
            rates[name] = [asdict(Rate.of(row, clusters=subjects)) for row in flags]
        base, *random = (dict(zip(rates, row, strict=True)) for row in zip(*rates.values(), strict=True))
        return {"base": base, "random": random}, None

    key = {"steering": reference, "asked": prompts, "n": NULL_DRAWS}
    data = context.stage("3_finder_random", key, compute).data
    return {"base": data["base"], "random": data["random"]}


def null_edits(context: Context, edit: Edit | None) -> list[Edit | None]:
    """No edit's null is no edit."""
    if edit is None:
        return [None] * NULL_DRAWS
    backend = context.backend
    return [*rotated_edits(edit, backend.run, backend.d_model, NULL_DRAWS, context.seed)]


def refused(context: Context, prompts: Sequence[Prompt], edits: Sequence[Edit | None], label: str) -> list[list[bool]]:
    """Whether the greedy reply to each prompt refuses under every edit, decoded together: flags[edit][prompt]. Replies are not kept."""
    texts, n = [prompt.prompt for prompt in prompts] * len(edits), len(prompts)
    with progress(label, len(texts)) as advance:
        replies = reply_and_judge(
            context.backend,
            repeated(context.encode(prompts), len(edits)),
            texts,
            context.judge,
            max_new_tokens=context.preset.harmful_tokens,
            edit=Each(tuple(edits)),
            on_batch=advance,
        )
    flags = [group[0].verdict.refused for group in replies]
    return [flags[i : i + n] for i in range(0, len(flags), n)]


def chosen_setting(found: Mapping[str, Any]) -> Setting:
    return Setting(**found["chosen"]["setting"])
