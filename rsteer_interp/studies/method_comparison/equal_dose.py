"""Every method's own null: its edit turned by one random rotation for all sites. What remains is what the directions do."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Edit
from rsteer_interp.equal_norm import rotated_edits
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.methods import Treatment
from rsteer_interp.studies.doses import Dosed, mean_doses
from rsteer_interp.studies.method_comparison.reading import Reading


@dataclass(frozen=True)
class EqualDose:
    """Shares of refused report prompts by log-odds, of the edit and of each random draw.

    `dose` is the mean of |edit| / |what it edits| over the own tokens of the removed set's prompts, at the site where it is largest.
    """

    dose: float
    removed: float
    kept: float
    null_removed: tuple[float, ...]
    null_kept: tuple[float, ...]


def equal_dose(reading: Reading, treatment: Treatment, n: int, draws: int, seed: int) -> EqualDose | None:
    """The edit beside `draws` rotations of it; None for a treatment without an edit."""
    edit = treatment.edit
    if edit is None:
        return None
    backend, material = reading.study.backend, reading.material
    sites, dosed = sorted(edit.sites), Dosed(edit)
    nulls = rotated_edits(edit, backend.run, backend.d_model, draws, seed)

    def odds(name: str, edit: Edit) -> list[Float[Tensor, " prompt"]]:
        """Of the edit, then of every draw."""
        tokens = reading.template(treatment).encode_all(reading.refused_prompts("report", n)[name])
        rows = backend.prepare(tokens, min(sites[0].layer, backend.n_layers - 1))
        return list(log_odds_of_each(backend, rows, reading.study.refusal_tokens, [edit, *nulls]))

    removed = [fmean((o <= reading.thresholds[material.remove]).tolist()) for o in odds(material.remove, dosed)]
    kept = [fmean((o > reading.thresholds[material.keep]).tolist()) for o in odds(material.keep, edit)]
    dose = torch.stack([d.max() for d in mean_doses(dosed.totals).values()]).max()
    return EqualDose(float(dose), removed[0], kept[0], tuple(removed[1:]), tuple(kept[1:]))
