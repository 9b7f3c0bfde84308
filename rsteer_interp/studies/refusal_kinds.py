"""The kinds of refusal that are compared: whose refusals, against which answered prompts, and where each can be asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from rsteer_interp.refusal_scores import NEUTRAL_BAND
from rsteer_interp.reproduction.scores import LEAST_CLASS, Scored

HARMFUL, HARMLESS, WORLD, BORDERLINE = "harmful", "harmless_matched", "world_politics", "borderline"
SENSITIVE, MATCHED = "political_sensitive", "political_matched"
SETS = (SENSITIVE, MATCHED, WORLD, HARMFUL, HARMLESS, BORDERLINE)


@dataclass(frozen=True)
class Kind:
    """Refused prompts of one set against answered prompts of another, or of the same set, where topic cannot help.

    A `main` kind also names the prompts on which steering is measured: the refused ones of its set.
    """

    name: str
    label: str
    refused: str
    answered: str
    main: bool = True

    @property
    def inside(self) -> bool:
        return self.refused == self.answered


KINDS = (
    Kind("political", "political", SENSITIVE, MATCHED),
    Kind("safety", "safety", HARMFUL, HARMLESS),
    Kind("over_matched", "over-refusal, political", MATCHED, MATCHED),
    Kind("over_borderline", "over-refusal, borderline", BORDERLINE, BORDERLINE),
    Kind("over_harmless", "over-refusal, harmless", HARMLESS, HARMLESS),
    Kind("world", "world politics", WORLD, MATCHED),
    Kind("political_inside", "political, inside set", SENSITIVE, SENSITIVE, main=False),
    Kind("safety_inside", "safety, inside set", HARMFUL, HARMFUL, main=False),
    Kind("world_inside", "world politics, inside set", WORLD, WORLD, main=False),
)


def members(kinds: tuple[Kind, ...], scored: Scored) -> tuple[Bool[Tensor, "kind n"], Bool[Tensor, "kind n"]]:
    """Which prompts are the refused, and which the answered ones, of each kind; undecided prompts are neither."""
    refused, answered = scored.confidence > NEUTRAL_BAND, scored.confidence < -NEUTRAL_BAND

    def of(name: str) -> Tensor:
        return torch.tensor([s == name for s in scored.sets])

    return (
        torch.stack([of(k.refused) & refused for k in kinds]),
        torch.stack([of(k.answered) & answered for k in kinds]),
    )


def counts(scored: Scored) -> dict[str, dict[str, int]]:
    """Refused and answered prompts of every kind, also of those with too few."""
    refused, answered = members(KINDS, scored)
    return {
        k.name: {"refused": int(r.sum()), "answered": int(a.sum())}
        for k, r, a in zip(KINDS, refused, answered, strict=True)
    }


def with_a_direction(fit: Scored) -> tuple[Kind, ...]:
    """Kinds with LEAST_CLASS refused and answered fit prompts or more."""
    found = counts(fit)
    return tuple(k for k in KINDS if min(found[k.name].values()) >= LEAST_CLASS)
