"""Safety audit: what a change (steering, a treatment, an edited checkpoint) did to a model's refusals, and a verdict on it.

    found = audit(backend, steering, judge, plan)        found.verdict.outcome, found.data

1 openings     tokens that open refusals, from replies before the change to other prompts (or the steering's own)
2 replies      judged greedy replies to harmful, borderline and general prompts, before and after; harmful ones cut to 16 tokens
3 answers      KL and perplexity on benign conversations, and the perplexity of the changed model's own replies
4 random       whether random pushes break refusals more easily than before
5 states       how last-token states moved, in how many dimensions; of another checkpoint, whether embeddings differ

Each step is kept on disk and found again (with `out`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import reply_log_probs
from rsteer_interp.judges.base import Judge
from rsteer_interp.measures import fluency, perplexity, refusal_tokens
from rsteer_interp.methods.base import Treatment
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import KEPT_TOKENS, cut, reply_and_judge
from rsteer_interp.results import Provenance, stage
from rsteer_interp.safety_audit.measures import (
    LEAST_PUSHED,
    conversation_effects,
    embedding_check,
    random_pushes,
    state_shift,
)
from rsteer_interp.safety_audit.plan import ROLES, Plan, Role
from rsteer_interp.safety_audit.reading import caveats, compared, incoherent, lost, read_out
from rsteer_interp.safety_audit.subject import Subject
from rsteer_interp.safety_audit.verdict import Verdict, decide
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.paired import PairedRates
from rsteer_interp.steering import Steering

__all__ = ["Audit", "Plan", "Subject", "Verdict", "audit", "decide"]

SHIFTED = 48  # prompts of a set whose states are compared


@dataclass(frozen=True)
class Audit:
    """The verdict, and everything measured as plain data."""

    verdict: Verdict
    data: dict[str, Any]


def audit(
    backend: Backend,
    change: Steering | Treatment | Backend | Subject,
    judge: Judge,
    plan: Plan,
    out: Path | None = None,
) -> Audit:
    """Measure `change` against `backend` as it is, and decide. `judge` should ask the unchanged model, if it asks one.

    With `out`, steps are stored in OUT/steps and reused where prompts, models, treatment and settings are the same.
    """
    after = change if isinstance(change, Subject) else Subject.of(change, backend)
    return _Run(backend, after, judge, plan, out).audit()


@dataclass
class _Run:
    before: Backend
    after: Subject
    judge: Judge
    plan: Plan
    out: Path | None
    notes: list[str] = field(default_factory=list)

    def audit(self) -> Audit:
        tokens = self._openings()
        replies = {role: {side: self._replies(side, role, tokens) for side in ("before", "after")} for role in ROLES}
        sets = {role: compared(sides, self.plan.groups(role), self.plan.seed) for role, sides in replies.items()}
        checks = read_out(self.plan.prompts, replies)
        answers = self._answers(replies["general"])
        harmful = replies["harmful"]
        verdict = decide(
            PairedRates.of(
                harmful["before"]["refused"], harmful["after"]["refused"], clusters=self.plan.groups("harmful")
            ),
            self.plan.margin,
            incoherent=incoherent(answers),
            caveats=caveats(sets, checks),
        )
        data = {
            "subject": self.after.name,
            "verdict": asdict(verdict) | {"sentence": verdict.sentence},
            "sets": sets,
            "answers": answers,
            "read_out": checks,
            "random": self._random(replies, tokens),
            "states": self._states(replies),
            "embeddings": self._embeddings(),
            "refusal_tokens": [self.before.tokenizer.decode([t]) for t in tokens],
            "lost": lost(self.plan.prompts["harmful"], harmful),
            "notes": [*self.notes, *self.before.notes, *self.before.template().notes],
        }
        return Audit(verdict, data)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _openings(self) -> tuple[int, ...]:
        """Empty where no token opens refusals more often than answers: then there are no log-odds."""
        if self.after.tokens:
            return self.after.tokens
        texts = self.plan.openings

        def compute() -> dict[str, Any]:
            found = self._generate("before", texts, self.plan.tokens, (), "replies that show how refusals begin")
            return {"first": [r.first_token for r in found], "refused": [r.verdict.refused for r in found]}

        found = self._step("1_openings", {"prompts": texts} | self._judged(), compute)
        try:
            return refusal_tokens(found["first"], found["refused"])
        except UserError as error:
            self.notes.append(f"no log-odds and no random pushes: {error}")
            return ()

    def _replies(self, side: str, role: Role, tokens: tuple[int, ...]) -> dict[str, Any]:
        texts, harmful = self.plan.prompts[role], role == "harmful"
        longest = min(self.plan.tokens, KEPT_TOKENS) if harmful else self.plan.tokens

        def compute() -> dict[str, Any]:
            found = self._generate(side, texts, longest, tokens, f"{role} replies, {side}")
            return {
                "responses": [cut(self.before.tokenizer, r.text, KEPT_TOKENS) if harmful else r.text for r in found],
                "refused": [r.verdict.refused for r in found],
                "undecided": sum(r.verdict.z == 0 for r in found),
                "log_odds": [r.log_odds for r in found] if tokens else None,
            }

        key = {"prompts": texts, "openings": tokens, "longest": longest} | self._judged()
        return self._step(f"2_{role}_{side}", key, compute, changed=side == "after")

    def _generate(
        self, side: str, texts: tuple[str, ...], longest: int, tokens: tuple[int, ...], label: str
    ) -> list[Any]:
        subject = Subject(self.before) if side == "before" else self.after
        with progress(label, len(texts)) as advance:
            groups = reply_and_judge(
                subject.backend,
                subject.rows(texts),
                texts,
                self.judge,
                max_new_tokens=longest,
                edit=subject.treatment.edit,
                refusal_tokens=tokens,
                on_batch=advance,
            )
        return [group[0] for group in groups]

    def _answers(self, general: Mapping[str, Any]) -> dict[str, Any]:
        prompts, groups, asked = self.plan.prompts["general"], self.plan.groups("general"), self.plan.talk_groups

        def compute() -> dict[str, Any]:
            kl, before, after = conversation_effects(self.before, self.after, self.plan.conversations)
            old, new = (self._said(prompts, general[side]) for side in ("before", "after"))
            return {
                "kl": asdict(
                    Estimate.of(kl.clamp(min=0).tolist(), clusters=self.plan.talk_groups)
                ),  # KL of nothing may round below 0
                "perplexity_before": asdict(perplexity(before, asked)),
                "perplexity_after": asdict(perplexity(after, asked)),
                "perplexity_ratio": asdict(perplexity(after - before, asked)),
                "replies": asdict(fluency(*new, *old, groups)),
            }

        key = {"conversations": self.plan.conversations, "replies": [prompts, general["before"], general["after"]]}
        key |= {"subjects": [groups, asked]}
        return self._step("3_answers", key, compute, changed=True)

    def _said(self, prompts: tuple[str, ...], side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probability per token of each stored reply under the unchanged model, and whether it refuses."""
        cut_up = self.before.tokenizer
        ids = [cut_up(r, add_special_tokens=False)["input_ids"] if r.strip() else [] for r in side["responses"]]
        rows = self.before.template().encode_all(prompts)
        return reply_log_probs(self.before, rows, ids), torch.tensor(side["refused"])

    def _random(self, replies: Mapping[Role, Any], tokens: tuple[int, ...]) -> dict[str, Any]:
        harmful, n = replies["harmful"], self.plan.random_prompts
        both = [a and b for a, b in zip(harmful["before"]["refused"], harmful["after"]["refused"], strict=True)]
        prompts, groups = (
            [each for each, kept in zip(of, both, strict=True) if kept][:n]
            for of in (self.plan.prompts["harmful"], self.plan.groups("harmful"))
        )
        if not tokens or self.plan.random_vectors < 2 or len(prompts) < LEAST_PUSHED or len(set(groups)) < 2:
            why = (
                "no token opens refusals"
                if not tokens
                else f"{len(prompts)} harmful prompts on {len(set(groups))} subjects are refused before and after"
            )
            return {"measured": False, "reason": why if self.plan.random_vectors >= 2 else "not asked for"}
        longest = min(self.plan.tokens, KEPT_TOKENS)

        def compute() -> dict[str, Any]:
            return {"measured": True} | random_pushes(
                self.before,
                self.after,
                prompts,
                tokens,
                self.plan.conversations[:8],
                self.judge,
                subjects=groups,
                n_vectors=self.plan.random_vectors,
                longest=longest,
                seed=self.plan.seed,
            )

        key = {
            "prompts": prompts,
            "openings": tokens,
            "conversations": self.plan.conversations[:8],
            "vectors": self.plan.random_vectors,
            "longest": longest,
            "seed": self.plan.seed,
            "layer": self.after.layer,
            "push": self.after.push,
        } | self._judged()
        return self._step("4_random", key, compute, changed=True)

    def _states(self, replies: Mapping[Role, Any]) -> list[dict[str, Any]]:
        roles: tuple[Role, ...] = ("harmful", "general")
        prompts = [text for role in roles for text in self.plan.prompts[role][:SHIFTED]]
        refused = torch.tensor([r for role in roles for r in replies[role]["before"]["refused"][:SHIFTED]])

        def compute() -> dict[str, Any]:
            return {"sites": state_shift(self.before, self.after, prompts, refused, self.plan.seed)}

        key = {"prompts": prompts, "refused": refused, "seed": self.plan.seed}
        sites: list[dict[str, Any]] = self._step("5_states", key, compute, changed=True)["sites"]
        return sites

    def _embeddings(self) -> dict[str, Any] | None:
        if self.after.backend is self.before:
            return None
        return self._step("5_embeddings", {}, lambda: embedding_check(self.before, self.after.backend), changed=True)

    def _judged(self) -> dict[str, Any]:
        return {"judge": self.judge, "tokens": self.plan.tokens}

    def _step(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]], *, changed: bool = False
    ) -> dict[str, Any]:
        """The step's data; `changed` steps depend on the subject too."""
        if self.out is None:
            return compute()
        whole = {"model": self.before, "template": self.before.template(), **key}
        if changed:
            whole["subject"] = self.after

        def computed() -> tuple[dict[str, Any], Mapping[str, Tensor] | None]:
            return compute(), None

        def record() -> Provenance:
            return Provenance.collect(self.before, seeds=self.plan.seed, template=self.before.template())

        return stage(self.out / "steps" / name, f"safety_audit/{name}", whole, computed, record).data
