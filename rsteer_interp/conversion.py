"""Convert a steering vector between formats, and run its controls; `analyses/convert_direction.py` is the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rsteer_interp.backends import configured_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.judges import load_judge
from rsteer_interp.prompts import Prompt, load_prompts
from rsteer_interp.results import Provenance, save_result
from rsteer_interp.steering import Steering
from rsteer_interp.vector_controls import Controls, controls, opening_token_ids
from rsteer_interp.vector_formats import Sign, load_vectors, save_vectors

if TYPE_CHECKING:
    from analyses.convert_direction import Config

KIND = "controls"
LEAST_REFUSED = 4  # prompts on which an effect is measured
_SIGNS: dict[str, Sign | None] = {"stated": None, "refusing": 1, "complying": -1}


def convert(config: Config) -> Path | None:
    """Read `config.source`, write `config.out` and run the controls where asked for; returns `config.out`."""
    if config.check and config.model is None:
        raise UserError("the controls need a model; give it with --model, or leave out --check")
    backend = None if config.model is None else _backend(config, config.model)
    steering = load_vectors(
        config.source,
        format=config.source_format,
        backend=backend,
        other_model=config.other_model,
        layer=config.layer,
        at=config.at,
        sign=_SIGNS[config.points_to],
        strength=config.strength,
    )
    Console().print(_summary(steering))
    if config.out is not None:  # before the controls, which take a while: a format may not be able to say all of it
        _write(config, config.out, steering, backend)
    if config.check and backend is not None:
        found = run_controls(config, backend, steering)
        Console().print(found.table())
        if config.out is not None:
            record = Provenance.collect(backend, config=config)
            save_result(config.out.with_name(f"{config.out.name}.controls"), KIND, found.record(), provenance=record)
    return config.out


def run_controls(config: Config, backend: Backend, steering: Steering) -> Controls:
    """The controls on the select split's prompts that the model refuses, by first-token log-odds above 0."""
    tokens = steering.refusal_tokens or opening_token_ids(backend.tokenizer, config.refusal_words)
    refused = refused_prompts(backend, config.refused, config.prompts, tokens, config.seed)
    talks = load_prompts("conversations").sample(config.conversations, config.seed)
    judge = load_judge(config.judge, backend)
    return controls(backend, steering, refused, list(talks), tokens, judge, n_random=config.random, seed=config.seed)


def refused_prompts(backend: Backend, name: str, n: int, tokens: Sequence[int], seed: int) -> list[Prompt]:
    """Up to n prompts of the set's select split with refusal log-odds above 0; UserError for too few."""
    prompts = list(load_prompts(name).split("select").sample(n, seed))
    odds = log_odds(backend, backend.template().encode_all([p.prompt for p in prompts]), tokens)
    refused = [prompt for prompt, value in zip(prompts, odds.tolist(), strict=True) if value > 0]
    if len(refused) < LEAST_REFUSED:
        raise UserError(
            f"this model refuses {len(refused)} of {len(prompts)} prompts of '{name}' by first-token log-odds, too few to see "
            "an effect on; give a set that it refuses, or other words that open its refusals"
        )
    return refused


def _backend(config: Config, model: str) -> Backend:
    return configured_backend(config, model, config.backend)


def _write(config: Config, out: Path, steering: Steering, backend: Backend | None) -> None:
    if config.to == "steering":
        steering.save(out, Provenance.collect(backend, config=config))
        return
    hint = config.model_hint
    if hint is None:
        hint = "unknown" if backend is None else str(backend.model.config.model_type)
    n_layers = None if backend is None else backend.n_layers
    save_vectors(out, steering, config.to, n_layers=n_layers, model_hint=hint)


def _summary(steering: Steering) -> Table:
    way = "towards refusal" if steering.alpha > 0 else "away from refusal"
    edit = "repositions along" if steering.reposition else "adds"
    table = Table(
        title=f"{steering.method}: {edit} {steering.k} vectors of width {steering.directions.shape[1]}, {way}"
    )
    for column in ("site", "amount"):
        table.add_column(column)
    for site, amount in steering.amounts.items():
        table.add_row(str(site), f"{amount:.4g}")
    return table
