"""The related papers' methods, a file each; METHODS names those that `analyses/compare_methods.py` compares."""

from rsteer_interp.methods.base import Examples, Material, Method, Treatment

METHODS: dict[str, type[Method]] = {}

__all__ = ["METHODS", "Examples", "Material", "Method", "Treatment"]
