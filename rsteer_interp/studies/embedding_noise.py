"""Study: dose-response of a model to noise on its embeddings; `analyses/embedding_noise.py` is its command line.

After SEP (arXiv 2509.06338), descriptive: see `embedding_integrity` for the measures, the regimes and the checks.
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
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.statistics.paired import paired_permutation
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
    pairs = list(product(config.sets, KINDS))
    with progress("noise on embeddings", len(pairs)) as advance:
        for name, kind in pairs:
            texts = [p.prompt for p in study.prompts("report", name, config.prompts)]
            key = {"prompts": texts, "tokens": tokens, "doses": config.doses, "directions": config.directions}
            run = partial(_response, study, config, texts, kind)
            found[name][kind] = study.stage(
                f"2_{place(name)}_{kind}", {**key, "kind": kind, "seed": config.seed}, run
            ).data
            advance(1)
    every = study.template.encode_all(
        [p.prompt for name in config.sets for p in study.prompts("report", name, config.prompts)]
    )
    radius = blind_radius(study.backend, instruction_embeddings(study.backend, every)[0])
    data = {
        "doses": sorted(config.doses),
        "sets": found,
        "null": NULL,
        "regimes": dict(REGIMES),
        "blind_radius": {
            "median": float(radius.median()), "low": float(radius.quantile(0.025)), "high": float(radius.quantile(0.975)),
            "n": len(radius),
        },
        "embedding_digest": embedding_digest(study.backend),
    }  # fmt: skip
    return {**data, "finding": finding(data)}, None


def _response(study: Study, config: Config, texts: list[str], kind: Noise) -> tuple[dict[str, Any], None]:
    directions = noise_directions(config.directions, study.backend.d_model, config.seed, kind)
    rows = study.template.encode_all(texts)
    return _plain(
        embedding_response(study.backend, rows, study.refusal_tokens, directions, config.doses), config.seed
    ), None


def _plain(response: Response, seed: int) -> dict[str, Any]:
    """Per dose: median KL with its bootstrap interval over prompts, mean change of the log-odds, the identity test."""

    def median(values: np.ndarray) -> dict[str, float | int]:
        rng = np.random.default_rng(seed)
        draws = np.median(values[rng.integers(len(values), size=(2000, len(values)))], axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return asdict(Estimate(float(np.median(values)), float(low), float(high), len(values)))

    return {
        "kl": [median(row.numpy()) for row in response.kl],
        "kl_by_prompt": response.kl.tolist(),
        "log_odds": [asdict(Estimate.of(row.tolist(), seed=seed)) for row in response.log_odds],
        "distance": list(response.distance),
        "own_token": [asdict(rate) for rate in response.own_token],
        "regimes": response.regimes(),
        "n": response.kl.shape[1],
    }


def finding(data: dict[str, Any]) -> str:
    doses, parts = data["doses"], []
    for name, kinds in data["sets"].items():
        axis, sphere = kinds["axis"], kinds[NULL]
        begins = axis["regimes"]["noticeable"]
        at = doses.index(begins) if begins is not None else len(doses) - 1
        kl, own = axis["kl"][at], axis["own_token"][at]
        p = paired_permutation(axis["kl_by_prompt"][at], sphere["kl_by_prompt"][at])
        starts = (
            f"from {begins:g} of an embedding's norm on" if begins is not None else f"at no dose up to {doses[-1]:g}"
        )
        parts.append(
            f"on {name.replace('_', ' ')} prompts noise along single coordinates changes the next token noticeably {starts} (median KL "
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
