"""Subject: what is audited, a model and what is done to it; and the digest that tells its stored steps from others'."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens
from rsteer_interp.embedding_integrity import weights_digest
from rsteer_interp.errors import UserError
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
    def digest(self) -> str:
        """Of the weights and of everything that the treatment holds."""
        return f"{self.weights or self.backend.fingerprint}|{content_digest(self.treatment)}"


def content_digest(value: Any) -> str:
    """blake2b of plain values, tensors and dataclasses of them; private fields (caches) do not count.

    UserError for an object that does not show what it holds: two of those could not be told apart on disk.
    """
    digest = hashlib.blake2b(digest_size=8)
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor{tuple(value.shape)}".encode() + value.detach().cpu().double().numpy().tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        digest.update(type(value).__qualname__.encode())
        for one in dataclasses.fields(value):
            if not one.name.startswith("_"):
                digest.update(one.name.encode())
                _update(digest, getattr(value, one.name))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, frozenset | set):
        _update(digest, sorted(value, key=str))
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, Sequence):
        digest.update(f"sequence{len(value)}".encode())
        for item in value:
            _update(digest, item)
    else:
        raise UserError(
            f"a {type(value).__name__} does not show what it holds, so its results cannot be stored; "
            "make the edit a dataclass, or audit without a folder"
        )
