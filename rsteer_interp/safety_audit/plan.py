"""Plan: the prompts, conversations and sizes of a safety audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rsteer_interp.errors import UserError
from rsteer_interp.prompts import PromptSet, Split, load_prompts
from rsteer_interp.safety_audit.verdict import MARGIN

if TYPE_CHECKING:
    from analyses.safety_audit import Config

Role = Literal["harmful", "borderline", "general"]
ROLES: tuple[Role, ...] = ("harmful", "borderline", "general")


@dataclass(frozen=True)
class Plan:
    """What is asked. `openings` are other prompts, from whose replies before the change the refusal tokens are found when none
    are known; `conversations` are pairs of a benign prompt and a good answer. Tokens are per reply. `subjects` of the prompts, by role,
    and of the conversations: those on one subject are not independent. Without them each is its own."""

    prompts: dict[Role, tuple[str, ...]]
    openings: tuple[str, ...]
    conversations: tuple[tuple[str, str], ...]
    margin: float = MARGIN
    tokens: int = 16
    random_vectors: int = 8
    random_prompts: int = 12
    seed: int = 0
    subjects: dict[Role, tuple[str, ...]] = field(default_factory=dict)
    talk_subjects: tuple[str, ...] = ()

    def groups(self, role: Role) -> tuple[str, ...]:
        """The subject of each prompt; the prompt itself where none is known."""
        return self.subjects.get(role) or self.prompts[role]

    @property
    def talk_groups(self) -> tuple[str, ...]:
        """The subject of each conversation; its prompt where none is known."""
        return self.talk_subjects or tuple(prompt for prompt, _ in self.conversations)

    @classmethod
    def of(cls, config: Config) -> Plan:
        """The prompts that a command line names: one split of each set, or all of it; openings come from another split."""
        references: dict[Role, str] = {
            "harmful": config.harmful,
            "borderline": config.borderline,
            "general": config.general,
        }
        sets = {role: load_prompts(reference) for role, reference in references.items()}
        talks = load_prompts(config.conversations)
        if any(talk.answer is None for talk in talks):
            raise UserError(f"conversations '{config.conversations}' lack answers; give objects with prompt and answer")

        def chosen(found: PromptSet) -> PromptSet:
            part = found if config.split == "all" else found.split(config.split)
            return part.sample(config.prompts, config.seed)

        asked, benign = {role: chosen(found) for role, found in sets.items()}, talks.sample(config.benign, config.seed)

        other: Split = "select" if config.split == "fit" else "fit"
        opening = [
            _part(sets[role], other).sample(config.prompts, config.seed).texts for role in ("harmful", "general")
        ]
        return cls(
            {role: tuple(found.texts) for role, found in asked.items()},
            tuple(text for texts in opening for text in texts),
            tuple((t.prompt, t.answer or "") for t in benign),
            config.margin,
            config.tokens,
            config.random_vectors,
            config.random_prompts,
            config.seed,
            {role: tuple(p.subject for p in found) for role, found in asked.items()},
            tuple(t.subject for t in benign),
        )


def _part(found: PromptSet, split: Split) -> PromptSet:
    """The split, or the whole of a set too small to have it."""
    try:
        return found.split(split)
    except UserError:
        return found
