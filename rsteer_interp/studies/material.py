"""The splits of a study as methods see them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.methods import Examples, Material
from rsteer_interp.prompts import Split
from rsteer_interp.studies.study import Study


def material_of(
    study: Study, remove: str, contrast: str, keep: str, ordinary: tuple[str, ...], protected: tuple[str, ...] = ()
) -> Material:
    """Judged prompts of these sets with their states; what each set is to a method is in `Material`."""

    sets = (remove, contrast, keep, *ordinary)
    return Material(
        study.backend,
        study.template,
        study.refusal_tokens,
        examples(study, "fit", sets),
        examples(study, "select", sets),
        remove,
        contrast,
        keep,
        ordinary,
        study.config.seed,
        protected,
    )


def examples(study: Study, split: Split, sets: Sequence[str]) -> dict[str, Examples]:
    """Judged prompts of one split with their states, by set."""
    found = {}
    for name in sets:
        scored = study.scored(split, name)
        grade = partial(_graded, study, split, name)
        found[name] = Examples(scored.texts, scored.confidence, study.states(split, name), scored.subjects, grade)
    return found


def _graded(study: Study, split: Split, name: str) -> Float[Tensor, " prompt"]:
    return study.graded(split, name).confidence
