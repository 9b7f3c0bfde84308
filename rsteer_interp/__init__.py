"""Look at, and steer, how chat models refuse. The names below are the front door; each is imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsteer_interp.activations import last_states
    from rsteer_interp.backends import load_backend
    from rsteer_interp.backends.base import Backend
    from rsteer_interp.backends.edits import At, Edit, Site, compose
    from rsteer_interp.backends.sampling import Sampling
    from rsteer_interp.directions import ESTIMATORS, Direction, Evidence, fit_directions
    from rsteer_interp.errors import UserError
    from rsteer_interp.interventions import ablate, add, set_component
    from rsteer_interp.judges import load_judge
    from rsteer_interp.prompts import load_prompts
    from rsteer_interp.steering import load_steering

_WHERE = {
    "At": "backends.edits",
    "Backend": "backends.base",
    "Direction": "directions",
    "ESTIMATORS": "directions",
    "Edit": "backends.edits",
    "Evidence": "directions",
    "Sampling": "backends.sampling",
    "Site": "backends.edits",
    "UserError": "errors",
    "ablate": "interventions",
    "add": "interventions",
    "compose": "backends.edits",
    "fit_directions": "directions",
    "last_states": "activations",
    "load_backend": "backends",
    "load_judge": "judges",
    "load_prompts": "prompts",
    "load_steering": "steering",
    "set_component": "interventions",
}

__all__ = [
    "ESTIMATORS",
    "At",
    "Backend",
    "Direction",
    "Edit",
    "Evidence",
    "Sampling",
    "Site",
    "UserError",
    "ablate",
    "add",
    "compose",
    "fit_directions",
    "last_states",
    "load_backend",
    "load_judge",
    "load_prompts",
    "load_steering",
    "set_component",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rsteer_interp' has no attribute '{name}'")
    return getattr(import_module(f"rsteer_interp.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
