"""What every step of the reproduction needs: model, judge, prompts, folder, and how a stage is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import ChatTemplate, Tokens
from rsteer_interp.judges.base import Judge
from rsteer_interp.key import UNKEYED
from rsteer_interp.prompts import Prompt, PromptSet, Split, load_prompts
from rsteer_interp.reproduction.presets import Preset
from rsteer_interp.results import Provenance, Result, stage


@dataclass
class Context:
    """The run's fixed parts. `seconds` collects how long each step took in this process."""

    backend: Backend
    judge: Judge
    preset: Preset
    folder: Path
    seed: int
    settings: Mapping[str, Any]  # the config, but for the folder
    seconds: dict[str, float] = field(default_factory=dict)
    kind: str = "reproduce"

    @cached_property
    def template(self) -> ChatTemplate:
        return self.backend.template()

    @property
    def sites(self) -> list[Site]:
        """Every block input but the first, and what the final norm reads.

        At the first, the last prompt token is the same embedding for every prompt: nothing can be read there.
        """
        return [Site(layer) for layer in range(1, self.backend.n_layers + 1)]

    @cached_property
    def prompt_sets(self) -> list[PromptSet]:
        names = {*self.preset.fit, *self.preset.select, *self.preset.report, "conversations"}
        return [load_prompts(name) for name in sorted(names)]

    def prompts(self, split: Split, counts: Mapping[str, int]) -> list[Prompt]:
        """Sampled prompts of one split, set after set."""
        return [p for name, n in counts.items() for p in load_prompts(name).split(split).sample(n, self.seed)]

    def conversations(self, part: Split, n: int) -> PromptSet:
        """Benign conversations; the finder and the report use different ones (split by subject)."""
        free = load_prompts("conversations").unsplit
        if part == "report":
            return free.split("report").sample(n, self.seed)
        kept = free.split("fit").prompts + free.split("select").prompts
        return PromptSet(free.name, kept).sample(n, self.seed)

    def encode(self, prompts: Sequence[Prompt] | PromptSet) -> list[Tokens]:
        """Token rows; a conversation's answer is appended to its prompt."""
        return [self.template.encode(p.prompt, p.answer) for p in prompts]

    def provenance(self) -> Provenance:
        return Provenance.collect(
            self.backend,
            config=dict(self.settings),
            seeds=self.seed,
            template=self.template,
            prompt_sets=self.prompt_sets,
        )

    def stage(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], tuple[Any, Mapping[str, Tensor] | None]]
    ) -> Result:
        """The step's result: from disk when it is there for the same key, else computed, timed and saved.

        `key` holds what the outcome depends on beside the run's fixed parts, as objects (see `key`).
        """
        full_key = {
            "model": self.backend,
            "template": self.template,
            "judge": self.judge,
            "preset": self.preset,
            "prompts": self.prompt_sets,
            "seed": self.seed,
            # A step of one method holds what was fitted by it.
            "settings": {name: value for name, value in self.settings.items() if name not in UNKEYED | {"methods"}},
            **key,
        }

        def timed() -> tuple[Any, Mapping[str, Tensor] | None]:
            begin = time.perf_counter()
            data, tensors = compute()
            self.seconds[name] = time.perf_counter() - begin
            return {**data, "seconds": self.seconds[name]}, tensors

        result = stage(self.folder / "steps" / name, f"{self.kind}/{name}", full_key, timed, self.provenance)
        self.seconds[name] = result.data["seconds"]
        return result
