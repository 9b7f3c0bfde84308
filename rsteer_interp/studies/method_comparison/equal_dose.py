"""Every method's own null: its edit turned by one random rotation for all sites. What remains is what the directions do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import torch

from rsteer_interp.equal_norm import rotated_edits
from rsteer_interp.methods import Treatment
from rsteer_interp.studies.doses import Dosed, mean_doses
from rsteer_interp.studies.method_comparison.reading import Reading


@dataclass(frozen=True)
class EqualDose:
    """Shares of refused report prompts, by judged replies, of the edit and of each random draw: removed set answered, kept set refused.

    `dose` is the mean of |edit| / |what it edits| over the own tokens of the removed set's prompts, at the site where it is largest.
    """

    dose: float
    removed: float
    kept: float
    null_removed: tuple[float, ...]
    null_kept: tuple[float, ...]


def equal_dose(reading: Reading, treatment: Treatment, label: str, n: int, draws: int, seed: int) -> EqualDose | None:
    """The edit beside `draws` rotations of it; None for a treatment without an edit."""
    edit = treatment.edit
    if edit is None:
        return None
    backend, material = reading.study.backend, reading.material
    asked, dosed = reading.refused_prompts("report", n), Dosed(edit)
    rows = reading.template(treatment).encode_all(asked[material.remove].texts)
    for _ in backend.batches(rows, lambda batch: backend.run(batch, dosed)):
        pass
    nulls = rotated_edits(edit, backend.run, backend.d_model, draws, seed)
    treatments = [treatment, *(replace(treatment, edit=null) for null in nulls)]
    found = reading.replies_of_each(asked, treatments, f"{label}: equal dose")
    removed = [fmean(reply.answers for reply in replies[material.remove]) for replies in found]
    kept = [fmean(reply.verdict.refused for reply in replies[material.keep]) for replies in found]
    dose = torch.stack([d.max() for d in mean_doses(dosed.totals).values()]).max()
    return EqualDose(float(dose), removed[0], kept[0], tuple(removed[1:]), tuple(kept[1:]))
