"""Method: a published way to change how a model refuses; Material, what it may learn from; Treatment, what it gives.

Every method of the comparison does the same job here: take away the refusal of one prompt set and keep that of another. It
learns from the fit and select splits alone, and its one strength is chosen for it on the select split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.methods.cost import Account
from rsteer_interp.statistics.intervals import Estimate

States = Mapping[Site, Float[Tensor, "prompt d"]]


@dataclass(frozen=True, eq=False)
class Treatment:
    """What is done to a model: an edit, a system prompt, or both; neither is the unchanged model."""

    edit: Edit | None = None
    system: str | None = None


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts of one set and split: refusal confidence c in [-1, 1] of the unchanged model (+1 refused, -1 answered, 0
    undecided), and the state of the last prompt token at every block input but the first and at the final norm's.

    `grade` gives c from several sampled replies, for methods that weigh prompts by |c|; it runs the model when it is first asked.
    """

    texts: list[str]
    confidence: Float[Tensor, " prompt"]
    states: States
    subjects: list[str]
    grade: Callable[[], Float[Tensor, " prompt"]] | None = None

    @property
    def refused(self) -> Bool[Tensor, " prompt"]:
        return self.confidence > 0

    @property
    def answered(self) -> Bool[Tensor, " prompt"]:
        return self.confidence < 0

    @property
    def graded(self) -> Float[Tensor, " prompt"]:
        """Graded confidence; `confidence` where there is none else."""
        return self.confidence if self.grade is None else self.grade()

    def where(self, mask: Bool[Tensor, " prompt"]) -> Examples:
        """The prompts for which the mask is true."""
        kept = mask.nonzero()[:, 0].tolist()
        texts, subjects = ([values[i] for i in kept] for values in (self.texts, self.subjects))
        grade = None if (whole := self.grade) is None else lambda: whole()[mask]
        states = {site: x[mask] for site, x in self.states.items()}
        return Examples(texts, self.confidence[mask], states, subjects, grade)


@dataclass(frozen=True, eq=False)
class Material:
    """What a method may learn from. `fit` and `select` hold Examples by set name; the other fields say which set is what."""

    backend: Backend
    template: ChatTemplate
    refusal_tokens: tuple[int, ...]  # tokens that open refusals, for log-odds
    fit: Mapping[str, Examples]
    select: Mapping[str, Examples]
    remove: str  # the set whose refusals are to go (political_sensitive)
    contrast: str  # ordinary prompts on like subjects (political_matched)
    keep: str  # the set whose refusals are to stay (harmful)
    ordinary: tuple[str, ...]  # sets that are to be left alone (harmless_matched, general)
    seed: int = 0
    protected: tuple[str, ...] = ()  # further fit prompts that are to be left alone, which nobody judged

    @cached_property
    def account(self) -> Account:
        """Costs of what methods share."""
        return Account(self.backend)

    @property
    def n_layers(self) -> int:
        return self.backend.n_layers


@dataclass(frozen=True)
class Check:
    """What a method's own paper claims, as one number on prompts that neither the fit nor the choice of its strength saw, with its
    interval over subjects and n; `null` says in words and numbers what it would be if the claim were empty."""

    what: str
    value: Estimate
    null: str


Fitted = Callable[[float], Treatment]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass whose fields are hyperparameters, with the four class variables and `fit`.

    `strengths`, ascending and positive, are what is tried on the select split; more is more removal. A method without a
    knob has one. A method may also have `checks(material, strength, held) -> list[Check]`, which the comparison shows with it: `held`
    are the same sets' prompts of the report split, by name, on which alone it measures.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    strengths: ClassVar[tuple[float, ...]]

    def fit(self, material: Material) -> Fitted:
        """Learn from the material; the result maps a strength to its Treatment."""
        ...
