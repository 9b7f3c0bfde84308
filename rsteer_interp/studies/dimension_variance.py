"""The variance side of the dimensionality study, from states alone: spectra, differences against shuffled labels, halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.moments import Moments
from rsteer_interp.spectrum import energy_shares
from rsteer_interp.studies.subspaces import FAMILIES, Groups, contrasts, distinct, families, half_overlaps, shuffled
from rsteer_interp.studies.variance_spectrum import class_spectrum, parallel_analysis, without

TOP = 32  # eigenvalues that are kept
LEAST = 3  # fewest rows or groups of which a spectrum is taken


def variance(
    states: Float[Tensor, "n d"],
    groups: Groups,
    fit_states: Float[Tensor, "m d"],
    fit_groups: Groups,
    ks: Sequence[int],
    n_shuffles: int,
    n_splits: int,
    seed: int,
) -> dict[str, Any]:
    """Spectra of the classes and of refused minus answered prompts of the same subject (report), and how far subspaces from two
    halves of fit agree. What prompts did is shuffled inside subjects alone: what differs between subjects is in the null too, and
    differences of a sensitive and a matched subject, which hold it, have no spectrum here."""
    x = states.double()
    energy = energy_shares(Moments.of(x))
    classes: dict[str, Any] = {}
    for name, sign in (("refused", 1), ("answered", -1)):
        mine = groups.role == sign
        if len(distinct(groups.subject[mine])) >= LEAST:
            classes[name] = class_spectrum(x[mine], groups.subject[mine], TOP)
            rest = without(x[mine], energy.coordinates)
            classes[f"{name}, without massive coordinates"] = class_spectrum(rest, groups.subject[mine], TOP)
    found: dict[str, Any] = {}
    if len(contrasts(x, groups.role, groups.subject, each=False)) >= LEAST:

        def contrast(role: Int[Tensor, " n"]) -> Float[Tensor, "m d"]:
            return contrasts(x, role, groups.subject, each=False)

        found["subjects"] = parallel_analysis(contrast, groups.role, groups.subject, n_shuffles, seed, TOP)
    halves = {
        name: half_overlaps(
            partial(_family, fit_states, fit_groups, max(ks), name),
            fit_groups.pair,
            ks,
            n_splits,
            seed,
        )
        for name in FAMILIES
    }
    massive = {"coordinates": list(energy.coordinates), "share": energy.top, "mean_share": energy.mean}
    return {"classes": classes, "contrasts": found, "halves": halves, "massive": massive}


def _family(
    states: Float[Tensor, "n d"],
    groups: Groups,
    k: int,
    name: str,
    index: Int[Tensor, " half"],
    seed: int | None,
) -> Float[Tensor, "r d"]:
    """A family's basis from some of the prompts; with a seed, from labels shuffled inside subjects."""
    part = groups.subset(index)
    if seed is not None:
        part = replace(part, role=shuffled(part.role, part.subject, seed))
    return families(states[index], part, k)[name]
