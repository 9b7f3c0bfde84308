"""Study: dose-response of a model to noise on its embeddings; `analyses/embedding_noise.py` is its command line.

After SEP (arXiv 2509.06338), descriptive: see `embedding_integrity` for the measures, the regimes and the checks. The dose at which a
regime begins is found on select prompts, what happens at it on report prompts.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rsteer_interp.embedding_integrity import REGIMES, Response, blind_radius, embedding_digest, embedding_response
from rsteer_interp.embedding_noise import Noise, instruction_embeddings, noise_directions
from rsteer_interp.errors import UserError
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.statistics.draws import percentiles
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.paired import paired_permutation
from rsteer_interp.statistics.resampling import bootstrap_counts
from rsteer_interp.studies.study import Study, place

if TYPE_CHECKING:
    from analyses.embedding_noise import Config

KIND = "embedding_noise"
QUESTION = "From what size on does noise on the embeddings of benign prompts change replies, and would a check of tokens notice it?"
KINDS: tuple[Noise, ...] = ("axis", "sphere")
NULL: Noise = "sphere"


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if not config.sets or not any(dose > 0 for dose in config.doses):
        raise UserError("name at least one prompt set with --sets and one dose above 0 with --doses")
    study.check_applicable()
    tokens = study.refusal_tokens
    found: dict[str, dict[str, Any]] = {name: {} for name in config.sets}
    begins: dict[str, dict[str, Any]] = {}
    runs: list[tuple[Split, str, Noise]] = [("select", name, "axis") for name in config.sets]
    runs += [("report", name, kind) for name, kind in product(config.sets, KINDS)]
    with progress("noise on embeddings", len(runs)) as advance:
        for split, name, kind in runs:
            prompts = study.prompts(split, name, config.prompts)
            texts, subjects = [p.prompt for p in prompts], [p.subject for p in prompts]
            key = {"prompts": texts, "tokens": tokens, "doses": config.doses, "directions": config.directions}
            key |= {"kind": kind, "subjects": subjects, "seed": config.seed}
            run = partial(_response, study, config, texts, subjects, kind)
            data = study.stage(f"2_{split}_{place(name)}_{kind}", key, run).data
            if split == "report":
                found[name][kind] = data
            else:
                begins[name] = {"regimes": data["regimes"], "n": data["n"]}
            advance(1)
    every = study.template.encode_all(
        [p.prompt for name in config.sets for p in study.prompts("report", name, config.prompts)]
    )
    radius = blind_radius(study.backend, instruction_embeddings(study.backend, every)[0])
    low, high = percentiles(radius)
    data = {
        "doses": sorted(config.doses),
        "sets": found,
        "begins": begins,
        "null": NULL,
        "regimes": dict(REGIMES),
        "blind_radius": {
            "median": float(radius.median()), "low": float(low), "high": float(high), "n": len(radius),
        },
        "embedding_digest": embedding_digest(study.backend),
    }  # fmt: skip
    return {**data, "finding": finding(data)}, None


def _response(
    study: Study, config: Config, texts: list[str], subjects: list[str], kind: Noise
) -> tuple[dict[str, Any], None]:
    directions = noise_directions(config.directions, study.backend.d_model, config.seed, kind)
    rows = study.template.encode_all(texts)
    tokens, doses = study.refusal_tokens, config.doses
    found = embedding_response(study.backend, rows, tokens, directions, doses, subjects=subjects)
    return _plain(found, subjects, config.seed), None


def _plain(response: Response, subjects: list[str], seed: int) -> dict[str, Any]:
    """Per dose: median KL and mean change of the log-odds with their intervals over subjects, the identity test."""
    counts = bootstrap_counts(len(subjects), 2000, seed, clusters=subjects)

    def median(values: np.ndarray) -> dict[str, float | int]:
        draws = [np.median(values.repeat(row)) for row in counts]
        return asdict(Estimate.of_draws(float(np.median(values)), draws, len(values)))

    return {
        "kl": [median(row.numpy()) for row in response.kl],
        "kl_by_prompt": response.kl.tolist(),
        "subjects": subjects,
        "log_odds": [asdict(Estimate.of(row.tolist(), clusters=subjects, seed=seed)) for row in response.log_odds],
        "distance": list(response.distance),
        "own_token": [asdict(rate) for rate in response.own_token],
        "regimes": response.regimes(),
        "n": response.kl.shape[1],
    }


def finding(data: dict[str, Any]) -> str:
    doses, parts = data["doses"], []
    for name, kinds in data["sets"].items():
        axis, sphere = kinds["axis"], kinds[NULL]
        begins = data["begins"][name]["regimes"]["noticeable"]
        at = doses.index(begins) if begins is not None else len(doses) - 1
        kl, own = axis["kl"][at], axis["own_token"][at]
        both = axis["kl_by_prompt"][at], sphere["kl_by_prompt"][at]
        p = paired_permutation(*both, clusters=axis["subjects"])
        starts = (
            f"from {begins:g} of an embedding's norm on" if begins is not None else f"at no dose up to {doses[-1]:g}"
        )
        parts.append(
            f"on {name.replace('_', ' ')} prompts noise along single coordinates changes the next token noticeably {starts} (a dose found "
            f"on select prompts; on report prompts its median KL is "
            f"{kl['value']:.2f}, {kl['low']:.2f} to {kl['high']:.2f} nats, n = {kl['n']}; random directions of equal norm "
            f"{sphere['kl'][at]['value']:.2f}, p = {p:.2g}), where {own['rate']:.0%} of the perturbed tokens still map to themselves"
        )
    radius = data["blind_radius"]
    text = "; ".join(parts)
    return (
        f"{text[0].upper()}{text[1:]}. Below {radius['median']:.2f} (95 % of tokens {radius['low']:.2f} to {radius['high']:.2f}) a check of "
        "nearest tokens can notice no noise at all; a check that each vector is its own row notices any."
    )


def tables(data: dict[str, Any]) -> list[Table]:
    """One row per dose; both kinds of noise side by side, for every set."""
    shown = []
    for name, kinds in data["sets"].items():
        table = Table(title=f"Noise on embeddings, {name} (median KL of the next token, nats)")
        for column in (
            "|noise| / |embedding|",
            *(f"{kind}: {what}" for kind in kinds for what in ("KL", "log-odds", "own token")),
        ):
            table.add_column(column)
        for i, dose in enumerate(data["doses"]):
            cells = [
                text
                for found in kinds.values()
                for text in (
                    f"{found['kl'][i]['value']:.3f}", f"{found['log_odds'][i]['value']:+.2f}", f"{found['own_token'][i]['rate']:.0%}"
                )
            ]  # fmt: skip
            table.add_row(f"{dose:g}", *cells)
        shown.append(table)
    return shown
