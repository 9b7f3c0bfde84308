"""Look at, and steer, how chat models refuse. The names below are the front door; each is imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsteer_interp.activations import last_states
    from rsteer_interp.backends import load_backend
    from rsteer_interp.backends.base import At, Backend, Edit, Sampling, Site, compose
    from rsteer_interp.directions import ESTIMATORS, Direction, Evidence, fit_directions
    from rsteer_interp.errors import UserError
    from rsteer_interp.interventions import ablate, add, set_component
    from rsteer_interp.judges import load_judge
    from rsteer_interp.prompts import load_prompts
    from rsteer_interp.steering import load_steering

_WHERE = {
    "At": "backends.base",
    "Backend": "backends.base",
    "Direction": "directions",
    "ESTIMATORS": "directions",
    "Edit": "backends.base",
    "Evidence": "directions",
    "Sampling": "backends.base",
    "Site": "backends.base",
    "UserError": "errors",
    "ablate": "interventions",
    "add": "interventions",
    "compose": "backends.base",
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
