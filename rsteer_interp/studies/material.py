"""The fit and select splits of a study as methods see them."""

from __future__ import annotations

from rsteer_interp.methods import Examples, Material
from rsteer_interp.prompts import Split
from rsteer_interp.studies.study import Study


def material_of(
    study: Study, remove: str, contrast: str, keep: str, ordinary: tuple[str, ...], protected: tuple[str, ...] = ()
) -> Material:
    """Judged prompts of these sets with their states; what each set is to a method is in `Material`."""

    def examples(split: Split, name: str) -> Examples:
        scored = study.scored(split, name)
        return Examples(scored.texts, scored.confidence, study.states(split, name))

    sets = (remove, contrast, keep, *ordinary)
    return Material(
        study.backend,
        study.template,
        study.refusal_tokens,
        {name: examples("fit", name) for name in sets},
        {name: examples("select", name) for name in sets},
        remove,
        contrast,
        keep,
        ordinary,
        study.config.seed,
        protected,
    )
