"""What fitting a method costs, as if it were alone: what another has run already is charged to it as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rsteer_interp.backends.base import Backend

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Seconds, and prompts that went through the model."""

    seconds: float = 0.0
    prompts: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.prompts + other.prompts)


@dataclass
class Account:
    """Costs of the work that methods share, by key; each method says what it uses."""

    backend: Backend
    costs: dict[Hashable, Cost] = field(default_factory=dict)
    used: set[Hashable] = field(default_factory=set)
    fresh: set[Hashable] = field(default_factory=set)  # run since `charged` began: in its time already

    @contextmanager
    def run(self, keys: Collection[Hashable]) -> Iterator[None]:
        """Work for these keys, which share its cost equally."""
        begin, before = time.perf_counter(), self.backend.prompts_run
        yield
        n = max(len(keys), 1)
        share = Cost((time.perf_counter() - begin) / n, (self.backend.prompts_run - before) / n)
        self.costs |= dict.fromkeys(keys, share)
        self.fresh |= set(keys)

    def use(self, keys: Iterable[Hashable]) -> None:
        self.used |= set(keys)

    def charged(self, work: Callable[[], T]) -> tuple[T, Cost]:
        """The work's result, and its cost with that of all it uses and did not run."""
        self.used, self.fresh = set(), set()
        begin, before = time.perf_counter(), self.backend.prompts_run
        result = work()
        total = Cost(time.perf_counter() - begin, self.backend.prompts_run - before)
        for key in self.used - self.fresh:
            total += self.costs[key]
        return result, total
