"""The shift between two checkpoints as a command: states of one, then of the other, spectra, nulls; `analyses/checkpoint_shift.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends import configured_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.batch import Tokens
from rsteer_interp.checkpoint_shift import (
    VARIANTS,
    check_comparable,
    component_cosine,
    mean_shift,
    rank_null,
    shift_spectrum,
    split_overlap,
)
from rsteer_interp.errors import UserError
from rsteer_interp.progress import progress
from rsteer_interp.prompts import load_prompts
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.results import Provenance, save_result
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.study import print_result

if TYPE_CHECKING:
    from analyses.checkpoint_shift import Config

KIND = "checkpoint_shift"
QUESTION = "In how many dimensions do the states of the two checkpoints differ?"
THRESHOLD = 0.9  # share of the shift's energy, for the one effective rank that the finding names
KEPT = 64  # leading eigenvalues that are stored

Pair = tuple[Float[Tensor, "prompt d"], Float[Tensor, "prompt d"]]


def run_shift(config: Config, scripts: Path) -> Path:
    """The whole command; returns the result folder."""
    if config.contrast[0] == config.contrast[1]:
        raise UserError(f"--contrast names '{config.contrast[0]}' twice; give two different prompt sets")
    names = (*config.contrast, *config.others)
    texts = {name: load_prompts(name).sample(config.prompts, config.seed).texts for name in names}
    before = _load(config, config.before)
    rows = before.template().encode_all([text for part in texts.values() for text in part])
    sites = sorted({Site(max(1, round(depth * before.n_layers))) for depth in config.depths})
    about = {
        "name": config.before,
        "n_layers": before.n_layers,
        "d_model": before.d_model,
        "fingerprint": before.fingerprint,
    }
    record = Provenance.collect(before, config=config, seeds=config.seed, template=before.template())
    size, tokens = (before.n_layers, before.d_model), len(before.tokenizer)
    first = _states(before, rows, sites, "before")
    del before  # two large models may not fit
    after = _load(config, config.after)
    check_comparable(size, tokens, (after.n_layers, after.d_model), len(after.tokenizer))
    second = _states(after, rows, sites, "after")
    n = [len(part) for part in texts.values()][:2]
    with progress("spectra and nulls", len(sites)) as advance:
        found = []
        for site in sites:
            found.append({"site": str(site), "layer": site.layer, **shift_at((first[site], second[site]), n, config)})
            advance(1)
    data: dict[str, Any] = {
        "applicable": True,
        "question": QUESTION,
        "sites": found,
        "n": len(rows),
        "sets": {name: len(part) for name, part in texts.items()},
        "contrast": list(config.contrast),
        "model": about,
        "after": {"name": config.after, "fingerprint": after.fingerprint},
    }
    data["finding"] = finding(data)
    result = save_result(config.out, KIND, data, provenance=record)
    draw_figures(config.out, config.out / "figures", scripts)
    print_result(result.data, tables(result.data))
    return config.out


def _load(config: Config, model: str) -> Backend:
    return configured_backend(config, model, "hooks")


def _states(backend: Backend, rows: list[Tokens], sites: list[Site], which: str) -> Mapping[Site, Tensor]:
    with progress(f"reading states, {which}", len(rows)) as advance:
        return last_states(backend, rows, sites, on_batch=advance)


def shift_at(pair: Pair, n: list[int], config: Config) -> dict[str, Any]:
    """Everything about the shift at one site; the first n[0] prompts are of the contrast's first set, the next n[1] of its second."""
    x, y = pair
    moved = ((y - x).double().norm(dim=1) / x.double().norm(dim=1)).tolist()
    if not max(moved) > 1e-6:
        return {"moved": asdict(Estimate.of(moved)), "shift": None}
    labels: Bool[Tensor, " prompt"] = torch.arange(n[0] + n[1]) < n[0]
    difference = x[: n[0]].double().mean(0) - x[n[0] : n[0] + n[1]].double().mean(0)
    identity = shift_spectrum(x, y).oriented(difference)
    spectra, missing = {}, {}
    for variant in VARIANTS:
        try:
            spectrum = shift_spectrum(x, y, variant)
        except UserError as reason:  # too few prompts for a fit
            missing[variant] = str(reason)
            continue
        total = float(spectrum.values.sum())
        spectra[variant] = {
            "shares": (spectrum.values[:KEPT] / total).tolist(),
            "effective_ranks": {str(t): r for t, r in spectrum.effective_ranks.items()},
        }
    nulls = {
        kind: {
            str(t): asdict(band) for t, band in rank_null(x, y, kind, n_draws=config.draws, seed=config.seed).items()
        }
        for kind in ("isotropic", "pairing")
    }
    return {
        "moved": asdict(Estimate.of(moved, seed=config.seed)),
        "shift": {
            "spectra": spectra,
            "not_fitted": missing,
            "rank_null": nulls,
            "mean_shift": asdict(mean_shift(x, y, seed=config.seed)),
            "overlap": asdict(split_overlap(x, y, seed=config.seed)),
            "cosine": asdict(component_cosine(identity.components[0], x[: n[0] + n[1]], labels, seed=config.seed)),
        },
    }


def finding(data: Mapping[str, Any]) -> str:
    shifted = [one for one in data["sites"] if one["shift"] is not None]
    if not shifted:
        return (
            f"The two checkpoints have the same states (n = {data['n']} prompts, {len(data['sites'])} depths; relative shift 0 to 1e-6), so "
            "there is nothing to compare with a null."
        )
    one = shifted[-1]
    shift, moved, threshold = one["shift"], one["moved"], str(THRESHOLD)
    rank, band = shift["rank_null"]["isotropic"][threshold], shift["rank_null"]["pairing"][threshold]
    mean, cosine, (first, second) = shift["mean_shift"], shift["cosine"], data["contrast"]
    return (
        f"Entering {'the final norm' if one['layer'] == data['model']['n_layers'] else 'block ' + str(one['layer'])}, states differ by "
        f"{moved['value']:.2f} ({moved['low']:.2f} to {moved['high']:.2f}) of their length (n = {data['n']} prompts). "
        f"{THRESHOLD:.0%} of the shift's energy lie in {rank['rank']} dimensions; shifts as large in random directions need "
        f"{rank['low']:.0f} to {rank['high']:.0f} (p = {rank['p']:.2g}), differences to another prompt's states {band['low']:.0f} to {band['high']:.0f}. "
        f"A shift that all prompts share has {mean['share']:.0%} of the energy (swapped labels: 95 % below {mean['null_high']:.0%}, "
        f"p = {mean['p']:.2g}). The first component's cosine with the mean state of '{first}' prompts minus that of '{second}' prompts is "
        f"{cosine['random']['cosine']:+.2f} (permuted labels: 95 % below {cosine['label_high']:.2f}, p = {cosine['label_p']:.2g})."
    )


def tables(data: Mapping[str, Any]) -> list[Table]:
    """One row per depth."""
    table = Table(title=f"Shift between checkpoints, {THRESHOLD:.0%} of the energy, n = {data['n']}")
    columns = (
        "layer",
        "|shift| / |state|",
        "rank",
        "random",
        "other prompts",
        "matrix",
        "map",
        "shared",
        "halves",
        "cosine",
    )
    for column in columns:
        table.add_column(column)
    threshold = str(THRESHOLD)
    for one in data["sites"]:
        moved, shift = one["moved"], one["shift"]
        if shift is None:
            table.add_row(str(one["layer"]), f"{moved['value']:.1e}", *["the same states"], *[""] * (len(columns) - 3))
            continue
        bands = [shift["rank_null"][kind][threshold] for kind in ("isotropic", "pairing")]
        fitted = [
            str(shift["spectra"][v]["effective_ranks"][threshold]) if v in shift["spectra"] else "too few prompts"
            for v in ("matrix", "map")
        ]
        table.add_row(
            str(one["layer"]),
            f"{moved['value']:.2f}",
            str(bands[0]["rank"]),
            *(f"{band['low']:.0f} to {band['high']:.0f}" for band in bands),
            *fitted,
            f"{shift['mean_shift']['share']:.0%}",
            f"{shift['overlap']['overlap']:.2f}",
            f"{shift['cosine']['random']['cosine']:+.2f}",
        )
    return [table]
