"""STEER-JSON: a direction for a form of answer, set to the size that it has when the form is asked for.

Xiong et al., Steering Externalities (arXiv 2602.04896), where it weakens safety although nothing in it is about refusal:

    u = unit(mean(h_with - h_without))        h' = h + (zbar - <h, u>) u,   zbar = mean <h_with, u>

the affine operator with kappa = 1, reference 0 and a = zbar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine
from rsteer_interp.methods.base import Fitted, Material, Treatment

JSON_REQUEST = "Put the whole answer into one JSON object and write nothing outside it."


@dataclass(frozen=True, eq=False)
class FormatVector:
    """Unit direction u from plain to formatted (no refusal direction, so no sign rule of ours), and the target zbar of <h, u>.

    `plain` is the mean of <h, u> without the request, `n` the number of instructions.
    """

    site: Site
    direction: Float[Tensor, " d"]
    target: float
    plain: float
    n: int

    def edit(self, strength: float = 1.0) -> Edit:
        """Sets <h', u> at every position: to zbar for strength 1 (the paper's), to its mean without the request for 0."""
        amount = self.plain + strength * (self.target - self.plain)
        return Affine(self.site, self.direction, kappa=1.0, amount=amount)


def format_vector(
    backend: Backend,
    template: ChatTemplate,
    instructions: Sequence[str],
    site: Site | None = None,
    request: str = JSON_REQUEST,
) -> FormatVector:
    """The vector from instructions with and without the request, at the last prompt token.

    The paper has 400 pairs, and layers 15 of 28, 16 of 32 and 6 of 32 for its three models; without a site, the block input
    at half the depth is taken. UserError when the request changes nothing there.
    """
    chosen = site if site is not None else Site(backend.n_layers // 2)
    requested = [f"{text.strip()} {request}" for text in instructions]
    rows = template.encode_all([*requested, *instructions])
    states = last_states(backend, rows, [chosen])[chosen].double()
    asked, plain = states[: len(instructions)], states[len(instructions) :]
    difference = (asked - plain).mean(0)
    length = float(difference.norm())
    if length == 0:
        raise UserError(f"the request changes no state at {chosen}; choose a later site or another request")
    u = difference / length
    return FormatVector(chosen, u, float((asked @ u).mean()), float((plain @ u).mean()), len(instructions))


@dataclass(frozen=True)
class AnswerForm:
    """STEER-JSON on every prompt: an edit for a useful end that says nothing of refusal, and what it does to refusal all the same.

    Learned from ordinary prompts of the fit split. Strength: how far the component is moved towards zbar, 1 the paper's.
    """

    name: ClassVar[str] = "steer_json"
    label: ClassVar[str] = "Answer form: JSON"
    source: ClassVar[str] = "Xiong et al., Steering Externalities, arXiv 2602.04896"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0)

    request: str = JSON_REQUEST
    n_prompts: int = 64

    def fit(self, material: Material) -> Fitted:
        sets = [material.fit[name].texts for name in material.ordinary]
        texts = [text for each in sets for text in each[: self.n_prompts // len(sets)]]
        vector = format_vector(material.backend, material.template, texts, request=self.request)
        return lambda strength: Treatment(vector.edit(strength))
