"""Subject: what is audited, a model and what is done to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens
from rsteer_interp.embedding_integrity import weights_digest
from rsteer_interp.methods.base import Treatment
from rsteer_interp.steering import Steering


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with a treatment (an edit, a system prompt, both or neither). `tokens` open refusals, where that is known;
    `weights` is the digest of another checkpoint's every weight.

    `layer` and `push`: a direction in the sense in which it is added, to be compared with random ones at that block input.
    """

    backend: Backend
    treatment: Treatment = field(default_factory=Treatment)
    name: str = "the changed model"
    tokens: tuple[int, ...] = ()
    weights: str = ""
    layer: int | None = None
    push: Float[Tensor, " d"] | None = None

    @classmethod
    def of(cls, change: Steering | Treatment | Backend, backend: Backend) -> Subject:
        """A steering configuration or a treatment on `backend`, or another checkpoint, which is a backend of its own."""
        if isinstance(change, Backend):
            name = getattr(change.checkpoint, "name", "another checkpoint")
            return cls(change, name=name, weights=weights_digest(change))
        if isinstance(change, Treatment):
            return cls(backend, change, "the treatment")
        name = f"steering by {change.method}"
        subject = cls(backend, Treatment(change.edit()), name, change.refusal_tokens)
        at = [
            i for i, site in enumerate(change.sites) if site.point == "resid_pre" and 0 < site.layer < backend.n_layers
        ]
        amounts = [change.amounts[site] for site in change.sites]
        pushed = [i for i in at if amounts[i] != 0]
        if not pushed:
            return subject
        nearest = min(pushed, key=lambda i: abs(change.sites[i].layer - backend.n_layers // 2))
        sense = 1.0 if amounts[nearest] > 0 else -1.0
        return dataclasses.replace(subject, layer=change.sites[nearest].layer, push=sense * change.directions[nearest])

    def rows(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> list[Tokens]:
        """Prompts in the model's own template, with the treatment's system prompt."""
        return self.backend.template(self.treatment.system).encode_all(prompts, answers)

    @property
    def identity(self) -> dict[str, Any]:
        """What a number depends on: the model, its template, every weight of another checkpoint, and the treatment."""
        template = self.backend.template(self.treatment.system)
        return {"model": self.backend, "template": template, "weights": self.weights, "treatment": self.treatment}
