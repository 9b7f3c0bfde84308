"""The kinds of refusal that are compared: whose refusals, against which answered prompts, and where each can be asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.refusal_scores import NEUTRAL_BAND
from rsteer_interp.reproduction.scores import LEAST_CLASS, Scored
from rsteer_interp.statistics.intervals import membership

HARMFUL, HARMLESS, WORLD, BORDERLINE = "harmful", "harmless_matched", "world_politics", "borderline"
SENSITIVE, MATCHED = "political_sensitive", "political_matched"
SETS = (SENSITIVE, MATCHED, WORLD, HARMFUL, HARMLESS, BORDERLINE)


@dataclass(frozen=True)
class Kind:
    """Refused prompts of one set against answered prompts of another, or of the same subject, where topic cannot help.

    A `main` kind also names the prompts on which steering is measured: the refused ones of its set.
    """

    name: str
    label: str
    refused: str
    answered: str
    main: bool = True

    @property
    def inside(self) -> bool:
        """Whether refused and answered prompts are of one set, and then compared subject by subject."""
        return self.refused == self.answered


KINDS = (
    Kind("political", "political", SENSITIVE, MATCHED),
    Kind("safety", "safety", HARMFUL, HARMLESS),
    Kind("over_matched", "over-refusal, political", MATCHED, MATCHED),
    Kind("over_borderline", "over-refusal, borderline", BORDERLINE, BORDERLINE),
    Kind("over_harmless", "over-refusal, harmless", HARMLESS, HARMLESS),
    Kind("world", "world politics", WORLD, MATCHED),
    Kind("political_inside", "political, inside subjects", SENSITIVE, SENSITIVE, main=False),
    Kind("safety_inside", "safety, inside subjects", HARMFUL, HARMFUL, main=False),
    Kind("world_inside", "world politics, inside subjects", WORLD, WORLD, main=False),
)


def members(kinds: tuple[Kind, ...], scored: Scored) -> tuple[Bool[Tensor, "kind n"], Bool[Tensor, "kind n"]]:
    """Which prompts are the refused, and which the answered ones, of each kind; undecided prompts are neither.

    Of a kind inside its subjects: the prompts of subjects that have both.
    """
    refused, answered = scored.confidence > NEUTRAL_BAND, scored.confidence < -NEUTRAL_BAND
    belongs = _subjects(scored)

    def of(kind: Kind) -> tuple[Tensor, Tensor]:
        r, a = (
            torch.tensor([s == name for s in scored.sets]) & mask
            for name, mask in ((kind.refused, refused), (kind.answered, answered))
        )
        if kind.inside:
            both = (r.double() @ belongs > 0) & (a.double() @ belongs > 0)
            mixed = belongs @ both.double() > 0
            r, a = r & mixed, a & mixed
        return r, a

    found = [of(kind) for kind in kinds]
    return torch.stack([r for r, _ in found]), torch.stack([a for _, a in found])


def weights(kinds: tuple[Kind, ...], scored: Scored) -> tuple[Float[Tensor, "kind n"], Float[Tensor, "kind n"]]:
    """How much each of those prompts counts in the mean of its side: all the same, or, of a kind inside its subjects, so that a
    subject counts n_r n_a / (n_r + n_a) on either side and the difference is one of prompts on the same subject."""
    refused, answered = (mask.double() for mask in members(kinds, scored))
    belongs = _subjects(scored)
    for i, kind in enumerate(kinds):
        if kind.inside:
            n_r, n_a = refused[i] @ belongs, answered[i] @ belongs
            share = 1 / (n_r + n_a).clamp(min=1)
            refused[i] *= belongs @ (n_a * share)
            answered[i] *= belongs @ (n_r * share)
    return refused, answered


def _subjects(scored: Scored) -> Float[Tensor, "n subject"]:
    member = torch.from_numpy(membership(scored.groups))
    return torch.nn.functional.one_hot(member).double()


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
