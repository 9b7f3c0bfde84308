"""What to steer with: the paper's four vectors, retain-constrained ones and an opposite-sign pair, all from the fit split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, Evidence, fit_directions
from rsteer_interp.directions.evidence import MIN_NEUTRAL
from rsteer_interp.directions.retain import null_space, opposite_pair, retain_ridge
from rsteer_interp.moments import Moments
from rsteer_interp.studies.study import NotApplicable, Study

if TYPE_CHECKING:
    from analyses.steer import Config

Directions = Mapping[Site, Float[Tensor, " d"]]
PAPER = ("md", "wmd", "rmd", "wrmd")
LABELS = {
    "null_space": "MD, harm direction projected out",
    "retain_ridge": "retain-constrained ridge",
    "pair": "opposite-sign pair",
} | {name: name.upper() for name in PAPER}
PAIR_RATIO = 1.0


def families(study: Study, config: Config) -> tuple[dict[str, Directions], Mapping[Site, Float[Tensor, " d"]]]:
    """Unit directions by family and site, complying to refusing; and the neutral offsets, for reposition.

    Kept refusal is that of the first set in `keep`: refused prompts of it against answered ones of the other kept sets.
    """
    states, graded = (
        study.states("fit", config.remove, config.contrast),
        study.graded("fit", config.remove, config.contrast),
    )
    evidence = {site: Evidence(states[site], graded.confidence, site=site) for site in study.sites}
    if min(next(iter(evidence.values())).counts[g] for g in ("refusing", "complying")) < MIN_NEUTRAL:
        raise NotApplicable(
            f"not applicable: {next(iter(evidence.values())).counts} fit prompts are too few for a direction"
        )
    out: dict[str, Directions] = {
        name: {site: d.unit for site, d in fit_directions(ESTIMATORS[name](), evidence).items()} for name in PAPER
    }
    harm = kept_refusal(study, config)
    complying = {site: e.complying for site, e in evidence.items()}
    out["null_space"] = {
        s: unit(null_space(out["md"][s], [kept.mean - answered.mean])) for s, (kept, answered) in harm.items()
    }
    out["retain_ridge"] = {
        s: unit(retain_ridge(evidence[s].refusing.mean - complying[s].mean, complying[s], kept))
        for s, (kept, _) in harm.items()
    }
    out["pair"] = {
        s: unit(opposite_pair(out["md"][s], kept.mean - answered.mean, PAIR_RATIO))
        for s, (kept, answered) in harm.items()
    }
    return out, {site: e.offset for site, e in evidence.items()}


def kept_refusal(study: Study, config: Config) -> dict[Site, tuple[Moments, Moments]]:
    """Moments by site of the refused prompts of the set whose refusals are kept, and of the answered ones of the others."""
    first, *others = config.keep
    refused = study.scored("fit", first).confidence > 0
    answered = study.scored("fit", *others).confidence < 0
    if int(refused.sum()) < MIN_NEUTRAL or int(answered.sum()) < MIN_NEUTRAL:
        raise NotApplicable(
            f"not applicable: {int(refused.sum())} of {len(refused)} fit prompts of '{first}' are refused; too few to keep"
        )
    a, b = study.states("fit", first), study.states("fit", *others)
    return {site: (Moments.of(a[site][refused]), Moments.of(b[site][answered])) for site in study.sites}


def unit(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    scaled: Tensor = v / v.norm()
    return scaled
