"""How much to steer, where and when: candidates judged on the select split, and the choice among them.

A candidate is a band of layers, a relative dose and whether decoding steps are edited. Bands are ranked by the refusal
log-odds that one dose removes; in the best of them doses rise until the aim is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.edits import Site
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import add
from rsteer_interp.progress import progress
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.steering import Steering, make_steering
from rsteer_interp.studies.selective_steering.directions import Directions
from rsteer_interp.studies.selective_steering.replies import outcomes_of_each, perplexity
from rsteer_interp.studies.study import Study

if TYPE_CHECKING:
    from analyses.steer import Config

CENTRES, WIDTH = (0.42, 0.5, 0.58, 0.67, 0.75), 0.17  # bands of block inputs, as shares of the depth
SCREENED = 16  # refusing select prompts on which bands are ranked
KEPT_BANDS = 2


@dataclass(frozen=True)
class Candidate:
    layers: tuple[int, ...]
    dose: float
    while_decoding: bool


@dataclass(frozen=True)
class Judged:
    candidate: Candidate
    refused: Rate
    perplexity_ratio: float


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
    candidates: Mapping[tuple[tuple[int, ...], bool], Sequence[float]],
    base_perplexity: float,
    met: Callable[[Rate], bool],
) -> tuple[Candidate, bool, list[dict[str, Any]]]:
    """Judged replies to the set's select prompts, doses rising in each (band, phase) until the aim is met; of those that
    meet it the one with the smallest perplexity under the unsteered model, else the one that comes closest."""

    def compute() -> tuple[dict[str, Any], None]:
        trials: dict[Any, list[Judged]] = {place: [] for place in candidates}
        rising = {place: iter(doses) for place, doses in candidates.items()}
        with progress(f"searching doses, {name}", len(candidates)) as advance:
            while rising:  # a round is the next dose of every (band, phase) that goes on
                chosen = {place: dose for place, doses in rising.items() if (dose := next(doses, None)) is not None}
                trying = [Candidate(layers, dose, decoding) for (layers, decoding), dose in chosen.items()]
                got = outcomes_of_each(study, "select", name, [steering_of(each) for each in trying])
                for place, candidate, after in zip(chosen, trying, got, strict=True):
                    ratio = perplexity(after.log_prob_after).value / base_perplexity
                    trials[place].append(Judged(candidate, Rate.of(after.after.tolist()), ratio))
                before = len(rising)
                rising = {place: rising[place] for place in chosen if not met(trials[place][-1].refused)}
                advance(before - len(rising))
        return {"trials": [asdict(t) for each in trials.values() for t in each]}, None

    key = {
        "prompts": study.prompts("select", name),
        "steerings": [
            [steering_of(Candidate(layers, dose, decoding)) for dose in doses]
            for (layers, decoding), doses in candidates.items()
        ],
        "base": base_perplexity,
        "tokens": config.tokens,
        "judge": study.judge,
        "aim": config.aim,
    }
    trials = study.stage(stage, key, compute).data["trials"]
    reached = [t for t in trials if met(Rate(**t["refused"]))]
    if reached:
        best = min(reached, key=lambda t: t["perplexity_ratio"])
    else:
        aim_high = met(Rate.from_count(1, 1))
        best = (max if aim_high else min)(trials, key=lambda t: t["refused"]["rate"])
    chosen = best["candidate"]
    return Candidate(tuple(chosen["layers"]), chosen["dose"], chosen["while_decoding"]), bool(reached), trials


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
