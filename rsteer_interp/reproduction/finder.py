"""Step 3: per method, the smallest answer shift among the settings that reach the removal target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.batching import Rows
from rsteer_interp.backends.edits import Edit
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.equal_norm import rotated_edits
from rsteer_interp.evaluation import answer_log_probs, log_odds_of_each
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import confidence_of, reply_and_judge
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import HARMFUL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.reproduction.vectors import Vectors
from rsteer_interp.selection import Setting, find_setting, grid
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.steering import Steering, make_steering

NULL_DRAWS = 20  # the smallest p that they can give is 1/21


def settings(context: Context) -> list[Setting]:
    return grid(context.preset.ks, context.preset.alphas, (False, True))


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


class Screen:
    """Measures edits on a few select prompts: removal and harmful refusal by log-odds, answer shift on conversations.

    Everything before the first steered layer is computed once for all settings.
    """

    def __init__(self, context: Context, select: Scored, tokens: tuple[int, ...], first_layer: int) -> None:
        self.context, self.tokens = context, tokens
        backend, preset = context.backend, context.preset
        refusing = select.refusing[: preset.screened]
        self.refusing = refusing
        self.confidence = select.confidence[refusing]
        harmful = context.prompts("select", {HARMFUL: preset.screened})
        self.political = backend.prepare(context.template.encode_all([select.texts[i] for i in refusing]), first_layer)
        self.harmful = backend.prepare(context.encode(harmful), first_layer)
        talks = context.conversations("select", preset.finder_conversations)
        self.talks = backend.prepare(context.encode(talks), first_layer, 8)
        self.base_odds = self.odds(self.political, [None])[0]
        self.base_answers = answer_log_probs(backend, self.talks)

    def odds(self, rows: Rows, edits: Sequence[Edit | None]) -> Float[Tensor, "edit prompt"]:
        return log_odds_of_each(self.context.backend, rows, self.tokens, edits)

    def removal(self, odds: Float[Tensor, " prompt"]) -> float:
        """Fall of the mean expected c, with the first token's refusal probability p for the share of refusals: 2p - 1."""
        return float((2 * self.base_odds.sigmoid() - 2 * odds.sigmoid()).mean())

    def answer_shift(self, edit: Edit | None) -> float:
        return float((answer_log_probs(self.context.backend, self.talks, edit) - self.base_answers).abs().mean())


def find(
    context: Context, vectors: Vectors, select: Scored, screen: Screen, tokens: tuple[int, ...], target: float
) -> dict[str, Any]:
    """The method's trials and choice, as plain data."""

    def compute() -> tuple[dict[str, Any], None]:
        points: dict[Setting, dict[str, Any]] = {}
        candidates = settings(context)
        with progress(f"searching {vectors.method.upper()} settings", len(candidates)) as advance:

            def edit_of(setting: Setting) -> Edit | None:
                return steering_for(context, vectors, setting, tokens).edit()

            def removals(chosen: Sequence[Setting]) -> list[float]:
                edits = [edit_of(setting) for setting in chosen]
                political, harmful = (screen.odds(rows, edits) for rows in (screen.political, screen.harmful))
                points.update(zip(chosen, map(_point, political, harmful), strict=True))
                advance(len(chosen))
                return [screen.removal(odds) for odds in political]

            def judged(setting: Setting) -> float:
                rows = select.refusing[: context.preset.judged]
                texts = [select.texts[i] for i in rows]
                replies = reply_and_judge(
                    context.backend,
                    context.template.encode_all(texts),
                    texts,
                    context.judge,
                    max_new_tokens=context.preset.tokens,
                    edit=edit_of(setting),
                    sampling=Sampling(context.preset.samples, 1.0, context.seed + 1),
                )
                return float((select.confidence[rows] - confidence_of(replies)).mean())

            found = find_setting(
                candidates,
                target=target,
                removals=removals,
                answer_shift=lambda setting: screen.answer_shift(edit_of(setting)),
                judged_removal=judged,
            )
        return {
            "chosen": asdict(found.chosen),
            "target_met": found.target_met,
            "trials": [asdict(t) | points[t.setting] for t in found.trials],
            "n_refusing": len(select.refusing),
        }, None

    key = {"method": vectors.method, "target": target, "tokens": tokens, "preset": str(context.preset)}
    return context.stage(f"3_finder_{vectors.method}", key, compute).data


def random_cloud(context: Context, reference: Steering, screen: Screen) -> list[dict[str, Any]]:
    """The unsteered point, then those of the reference's edit turned by one random rotation for all its sites."""

    def compute() -> tuple[dict[str, Any], None]:
        edits: list[Edit | None] = [None, *null_edits(context, reference.edit())]
        with progress("random directions", 2) as advance:
            political = screen.odds(screen.political, edits)
            advance(1)
            harmful = screen.odds(screen.harmful, edits)
            advance(1)
        base, *random = (
            {"removal": screen.removal(odds), **_point(odds, other)}
            for odds, other in zip(political, harmful, strict=True)
        )
        points = [{"method": "base", "null": False, **base, "removal": 0.0}]
        return {"points": points + [{"method": "random", "null": True, **point} for point in random]}, None

    key = {"amounts": sorted(reference.amounts.values()), "method": reference.method, "rotations": NULL_DRAWS}
    points: list[dict[str, Any]] = context.stage("3_finder_random", key, compute).data["points"]
    return points


def null_edits(context: Context, edit: Edit | None) -> list[Edit | None]:
    """No edit's null is no edit."""
    if edit is None:
        return [None] * NULL_DRAWS
    backend = context.backend
    return [*rotated_edits(edit, backend.run, backend.d_model, NULL_DRAWS, context.seed)]


def _point(political: Float[Tensor, " prompt"], harmful: Float[Tensor, " prompt"]) -> dict[str, Any]:
    """Refusal rates by the sign of the log-odds."""
    return {"political": asdict(Rate.of((political > 0).tolist())), "harmful": asdict(Rate.of((harmful > 0).tolist()))}


def chosen_setting(found: dict[str, Any]) -> Setting:
    return Setting(**found["chosen"]["setting"])
