"""How much to steer, where and when: candidates judged on the select split, and the choice among them.

A candidate is a band of layers, a relative dose and whether decoding steps are edited. Bands are ranked by the refusal
log-odds that one dose removes; in the best of them doses rise until the aim is met, beyond the given ones if need be, and
fall below them where the first meets it, so that the chosen dose is the smallest that was seen to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import add
from rsteer_interp.measures import Fluency
from rsteer_interp.progress import progress
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.steering import Steering, make_steering
from rsteer_interp.studies.selective_steering.directions import Directions
from rsteer_interp.studies.selective_steering.replies import outcomes_of_each
from rsteer_interp.studies.study import Study

if TYPE_CHECKING:
    from analyses.steer import Config

CENTRES, WIDTH = (0.42, 0.5, 0.58, 0.67, 0.75), 0.17  # bands of block inputs, as shares of the depth
SCREENED = 16  # refusing select prompts on which bands are ranked
KEPT_BANDS = 2
WIDENED = 3  # doses beyond either end of the given ones, in the ratio of the last two there
MOST_EMPTY = 0.05  # share of empty replies with which a candidate is no candidate: silence is no answer


Place = tuple[tuple[int, ...], bool]  # a band of layers, and whether decoding steps are edited


@dataclass(frozen=True)
class Candidate:
    layers: tuple[int, ...]
    dose: float
    while_decoding: bool


@dataclass(frozen=True)
class Judged:
    candidate: Candidate
    refused: Rate
    fluency: Fluency  # of the edited prompts' replies of the wanted kind


@dataclass(frozen=True)
class Found:
    """The choice: whether it meets the aim on select, and whether it is at the edge of what was tried (no dose meets the aim, or
    the smallest still does)."""

    chosen: Candidate
    met: bool
    edge: bool
    trials: list[Judged]


def bands(n_layers: int, first: int) -> list[tuple[int, ...]]:
    """Bands of layers, none before `first` (where the condition is read) nor the last layer."""
    half = WIDTH * n_layers / 2
    found = {
        tuple(x for x in range(round(c * n_layers - half), round(c * n_layers + half) + 1) if first <= x < n_layers - 1)
        for c in CENTRES
    }
    return sorted(band for band in found if band)


def norms(study: Study, texts: Sequence[str]) -> dict[Site, float]:
    """Mean |resid| of the prompts' own tokens by block input: the unit of the dose."""
    sites = [site for site in study.sites if site.layer < study.n_layers]

    def compute() -> tuple[dict[str, Any], None]:
        found = mean_norms(study.backend, study.template.encode_all(texts), sites)
        return {"norms": [found[site] for site in sites]}, None

    return dict(zip(sites, study.stage("2_norms", {"prompts": list(texts)}, compute).data["norms"], strict=True))


def best_bands(
    study: Study,
    stage: str,
    directions: Directions,
    unit: Mapping[Site, float],
    texts: Sequence[str],
    first: int,
    dose: float,
) -> tuple[list[tuple[int, ...]], list[dict[str, Any]]]:
    """The bands in which this dose, spread over the band's layers, moves the log-odds most; and what each does."""
    backend, tokens = study.backend, study.refusal_tokens
    all_bands = bands(study.n_layers, first)

    def compute() -> tuple[dict[str, Any], None]:
        rows = backend.prepare(study.template.encode_all(texts), min(band[0] for band in all_bands))
        sites = [[Site(x) for x in band] for band in all_bands]
        edits = [add({s: directions[s] for s in band}, {s: dose * unit[s] for s in band}) for band in sites]
        with progress("ranking bands of layers", len(rows)) as advance:
            base, *moved = log_odds_of_each(backend, rows, tokens, [None, *edits], advance).mean(1).tolist()
        return {"shift": [odds - base for odds in moved]}, None

    key = {"prompts": list(texts), "tokens": tokens, "dose": dose, "bands": all_bands}
    key |= {"directions": directions, "unit": unit}
    shifts = study.stage(stage, key, compute).data["shift"]
    table = [{"layers": list(b), "shift": s, "n": len(texts)} for b, s in zip(all_bands, shifts, strict=True)]
    order = sorted(range(len(all_bands)), key=lambda i: -abs(shifts[i]) * (shifts[i] * dose > 0))
    return [all_bands[i] for i in order[:KEPT_BANDS]], table


def search(
    study: Study,
    config: Config,
    stage: str,
    steering_of: Callable[[Candidate], Steering],
    name: str,
    places: Sequence[Place],
    aim: Callable[[Rate], bool],
    *,
    refusing: bool = False,
) -> Found:
    """Judged replies to the set's select prompts at the doses of every (band, phase) until its smallest dose that meets the aim on
    the refusal rate is known; of those the one with the most fluent answers (or refusals, if those are wanted); if none meets it,
    the one that comes closest."""

    def compute() -> tuple[dict[str, Any], None]:
        trials: dict[Place, list[Judged]] = {place: [] for place in places}
        with progress(f"searching doses, {name}", len(places)) as advance:
            going = list(places)
            while going:  # a round is the next dose of every (band, phase) that goes on
                doses = {
                    p: next_dose(config.doses, [(t.candidate.dose, met(t, aim)) for t in trials[p]]) for p in going
                }
                advance(sum(dose is None for dose in doses.values()))
                going = [place for place, dose in doses.items() if dose is not None]
                trying = [Candidate(p[0], dose, p[1]) for p in going if (dose := doses[p]) is not None]
                got = outcomes_of_each(study, "select", name, [steering_of(each) for each in trying]) if trying else []
                for place, candidate, after in zip(going, trying, got, strict=True):
                    said = after.fluency(refusing=refusing)
                    trials[place].append(
                        Judged(candidate, Rate.of(after.after.tolist(), clusters=after.subjects), said)
                    )
        return {"trials": [asdict(t) for each in trials.values() for t in each]}, None

    key = {
        "prompts": study.prompts("select", name),
        "steerings": [
            steering_of(Candidate(layers, dose, decoding)) for layers, decoding in places for dose in config.doses
        ],
        "search": [WIDENED, MOST_EMPTY, refusing],
        "tokens": config.tokens,
        "judge": study.judge,
        "aim": config.aim,
    }
    trials = [judged(t) for t in study.stage(stage, key, compute).data["trials"]]
    reached = [t for t in trials if met(t, aim)]
    if reached:
        best = most_fluent(reached)
    else:
        best = (max if aim(Rate.from_count(1, 1)) else min)(trials, key=lambda t: t.refused.rate)
    chosen = best.candidate
    doses = [t.candidate.dose for t in trials if replace(t.candidate, dose=chosen.dose) == chosen]
    return Found(chosen, bool(reached), not reached or chosen.dose == min(doses), trials)


def met(trial: Judged, aim: Callable[[Rate], bool]) -> bool:
    """Whether the refusal rate is as wanted, and not by silence."""
    return aim(trial.refused) and trial.fluency.empty <= MOST_EMPTY * trial.fluency.n


def next_dose(given: Sequence[float], tried: Sequence[tuple[float, bool]]) -> float | None:
    """The dose to try after those that were, each with whether it met the aim: upwards until one does, from there down until one
    does not, at most `WIDENED` steps beyond the given doses; None when the smallest that does is known."""
    doses = sorted(given)
    reached = [dose for dose, good in tried if good]
    if reached:
        lowest = min(dose for dose, _ in tried)
        ratio = doses[1] / doses[0] if len(doses) > 1 else 2.0
        below = min(reached) / ratio
        return below if min(reached) == lowest and below >= doses[0] / ratio ** (WIDENED + 0.5) else None
    if len(tried) < len(doses):
        return doses[len(tried)]
    ratio = doses[-1] / doses[-2] if len(doses) > 1 else 2.0
    above = tried[-1][0] * ratio
    return above if above <= doses[-1] * ratio ** (WIDENED + 0.5) else None


def most_fluent(trials: Sequence[Judged]) -> Judged:
    """The trial whose replies the unsteered model finds likeliest, beside its own of the kind to the same prompts; where one of the
    trials has too few of those, by their perplexity. Of equals the smallest dose."""
    paired = all(trial.fluency.ratio is not None for trial in trials)

    def cost(trial: Judged) -> tuple[float, float]:
        found = trial.fluency.ratio if paired else trial.fluency.perplexity
        return found.value if found is not None else math.inf, trial.candidate.dose

    return min(trials, key=cost)


def judged(data: Mapping[str, Any]) -> Judged:
    """A trial from its stored form."""
    said: dict[str, Any] = {k: Estimate(**v) if isinstance(v, dict) else v for k, v in data["fluency"].items()}
    found = data["candidate"]
    candidate = Candidate(tuple(found["layers"]), found["dose"], found["while_decoding"])
    return Judged(candidate, Rate(**data["refused"]), Fluency(**said))


def steering_for(
    study: Study,
    label: str,
    directions: Directions,
    references: Directions,
    unit: Mapping[Site, float],
    candidate: Candidate,
    sign: float,
    gate: Gate | None,
) -> Steering:
    """Addition of sign * dose * |resid| along each layer's own direction; scales are the mean norms, alpha the signed dose."""
    return make_steering(
        label,
        directions,
        references,
        {site: (value, value) for site, value in unit.items()},
        [Site(x) for x in candidate.layers],
        alpha=sign * candidate.dose,
        reposition=False,
        refusal_tokens=study.refusal_tokens,
        fingerprint=study.backend.fingerprint,
        gate=gate,
        while_decoding=candidate.while_decoding,
    )
