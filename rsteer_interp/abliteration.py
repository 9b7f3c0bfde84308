"""Take one direction out of a model's weights: fit, sweep, edit, save, measure; `analyses/abliterate.py` is the command line.

The sweep measures the activation edit that equals the weight edit (`weight_edit.writer_ablation`), so that no weight is touched
before a direction is chosen; the checkpoint is then loaded from disk and measured like any other model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rsteer_interp.abliteration_sweep import (
    Candidate,
    Effects,
    Prompts,
    at_edge,
    choose,
    effects,
    equal_dose_null,
    fit_candidates,
    judged_replies,
    mean_change,
)
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_log_probs, log_odds
from rsteer_interp.judges import load_judge
from rsteer_interp.nulls import cosine, random_unit_vectors
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split, load_prompts
from rsteer_interp.reader import validation_of
from rsteer_interp.refusal_scores import Reply
from rsteer_interp.results import Provenance, save_result
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.vector_controls import opening_token_ids
from rsteer_interp.vector_formats import load_vectors
from rsteer_interp.weight_edit import (
    chosen,
    orthogonalise,
    save_checkpoint,
    stream_component,
    writer_ablation,
    writer_sites,
)
from rsteer_interp.weight_writers import find_writers

if TYPE_CHECKING:
    from analyses.abliterate import Config

KIND = "abliteration"
LEAST = 8  # prompts of each kind on which a direction is fitted


def abliterate(config: Config) -> Path:
    """The whole command; returns the result folder."""
    checkpoint = config.out / "checkpoint"
    if checkpoint.exists() and not config.sweep_only:
        raise UserError(f"'{checkpoint}' exists already; name another folder with --out, or delete it")
    if config.random < 2:
        raise UserError(f"{config.random} random directions make no null; give two or more with --random")
    options: dict[str, Any] = {"device": config.device, "batch_size": config.batch_size}
    options["trust_remote_code"] = config.trust_remote_code
    backend = load_backend(config.model, "hooks", dtype=config.dtype, verify=config.verify, **options)
    # Before anything that takes long: weights that cannot be edited are said to be so at once.
    writers = () if config.sweep_only else chosen(find_writers(backend.model), config.writers)
    token_ids = opening_token_ids(backend.tokenizer, config.refusal_words)
    candidates = _candidates(config, backend, token_ids)
    data, best = _sweep(config, backend, candidates, _prompts(config, backend, "select", config.select, token_ids))
    tensors = {c.name: c.vector.float() for c in candidates}
    record = Provenance.collect(backend, config=config, template=backend.template())
    save_result(config.out, KIND, data, tensors, provenance=record)
    if config.sweep_only:
        return config.out
    if best is None:
        raise UserError(
            f"no direction of the sweep keeps the KL within {config.kl_limit:g} nats; see the table, then give --fraction, "
            "or raise --kl-limit"
        )
    measured = _prompts(config, backend, "report", config.report, token_ids)
    log_probs = answer_log_probs(backend, measured.benign)
    judge = load_judge(config.judge)  # without a backend: the model is edited, and is not to judge itself
    before = judged_replies(backend, measured, judge, config.tokens)
    orthogonalise(backend.model, best.vector, config.scale, writers)
    about = {"direction": best.name, "layer": best.layer, "scale": config.scale, "of": backend.fingerprint}
    about |= {"writers": [writer.name for writer in writers], "vector": best.vector, "provenance": record}
    dtype = backend.model.dtype
    save_checkpoint(backend.model, backend.tokenizer, checkpoint, about)
    del backend  # two copies of a large model may not fit
    saved = load_backend(checkpoint, "hooks", dtype=dtype, **options)
    after = judged_replies(saved, measured, judge, config.tokens)
    data["checkpoint"] = _measured(config, saved, measured, log_probs, best, {"before": before, "after": after})
    save_result(config.out, KIND, data, tensors, provenance=record)
    _console().print(_checkpoint_table(data["checkpoint"]))
    return config.out


def _sweep(
    config: Config, backend: Backend, candidates: Sequence[Candidate], prompts: Prompts
) -> tuple[dict[str, Any], Candidate | None]:
    """Effects of every candidate, the two nulls, and the choice."""
    sites = writer_sites(backend.n_layers, config.writers)
    found: dict[str, Effects] = {}
    with progress("sweep", len(candidates)) as advance:
        for c in candidates:
            found[c.name] = effects(backend, writer_ablation(c.vector, sites, config.scale), prompts, config.seed)
            advance(1)
    randoms = random_unit_vectors(config.random, backend.d_model, config.seed)
    with progress("random directions", len(randoms)) as advance:
        plain = []
        for u in randoms:
            plain.append(mean_change(backend, writer_ablation(u, sites, config.scale), prompts, config.refused))
            advance(1)
    _console().print(sweep_table(config, candidates, found, plain))
    data: dict[str, Any] = {
        "refused": config.refused,
        "writers": config.writers,
        "scale": config.scale,
        "base_above_zero": {name: asdict(rate) for name, rate in prompts.above_zero(prompts.base).items()},
        "sweep": [_entry(c, found[c.name], candidates) for c in candidates],
        "null_random_directions": plain,
    }
    best = choose(candidates, found, config.refused, config.kl_limit, backend.n_layers)
    if best is not None:
        equal = equal_dose_null(backend, best.vector, sites, config.scale, randoms, prompts, config.refused)
        data |= {"chosen": best.name, "edge": at_edge(best, candidates), "null_equal_dose": equal}
        edge = " It is at the edge of the depths that were read." if data["edge"] else ""
        _console().print(_against_null(best, found[best.name].change[config.refused], equal) + edge, markup=False)
    return data, best


def _candidates(config: Config, backend: Backend, token_ids: Sequence[int]) -> list[Candidate]:
    if config.direction is not None:
        return [_from_file(config.direction, config.layer, backend)]
    template = backend.template()
    rows: list[Tokens] = []
    labels: list[float] = []
    for name, label in ((config.refused, 1.0), (config.answered, -1.0)):
        own = template.encode_all(load_prompts(name).split("fit").sample(config.fit, config.seed).texts)
        if config.filtered:
            odds = log_odds(backend, own, token_ids)
            own = [row for row, value in zip(own, odds.tolist(), strict=True) if value * label > 0]
        if len(own) < LEAST:
            raise UserError(
                f"this model {'refuses' if label > 0 else 'answers'} {len(own)} prompts of '{name}' by first-token "
                f"log-odds, and a direction needs {LEAST}; give another set, more prompts, or --no-filtered"
            )
        rows += own
        labels += [label] * len(own)
    fractions = config.fractions if config.fraction is None else (config.fraction,)
    return fit_candidates(
        backend,
        rows,
        torch.tensor(labels, dtype=torch.float64),
        fractions,
        final_norm=None if config.fraction is None else config.final_norm,
    )


def _from_file(path: Path, layer: int | None, backend: Backend) -> Candidate:
    steering = load_vectors(path, backend=backend, layer=layer)
    found = {
        site: v for site, v in zip(steering.sites, steering.directions, strict=True) if layer in (None, site.layer)
    }
    if len(found) != 1:
        layers = ", ".join(str(site.layer) for site in steering.sites)
        raise UserError(f"'{path}' has directions at layers {layers}; name one of them with --layer")
    ((site, vector),) = found.items()
    return Candidate(path.name, vector, site.layer)


def _prompts(config: Config, backend: Backend, split: Split, n: int, token_ids: tuple[int, ...]) -> Prompts:
    template = backend.template()
    names = dict.fromkeys((config.refused, config.kept, config.answered))
    asked = {k: list(load_prompts(k).split(split).sample(n, config.seed)) for k in names}
    rows = {k: template.encode_all([prompt.prompt for prompt in own]) for k, own in asked.items()}
    talks = load_prompts("conversations").unsplit.split(split).sample(config.conversations, config.seed)
    base = {name: log_odds(backend, own, token_ids) for name, own in rows.items()}
    benign = [template.encode(p.prompt, p.answer) for p in talks]
    return Prompts(asked, rows, base, benign, token_ids, [p.subject for p in talks])


def _measured(
    config: Config,
    saved: Backend,
    prompts: Prompts,
    log_probs: Tensor,
    best: Candidate,
    replies: Mapping[str, Mapping[str, list[Reply]]],
) -> dict[str, Any]:
    """The checkpoint as loaded from disk, beside the unedited model's log-odds and answer log-probabilities (`log_probs`); judged
    replies of both, of which rates are kept."""
    subjects = {name: prompts.subjects(name) for name in prompts.asked}

    def refused(side: str) -> dict[str, Any]:
        flags = {name: [reply.verdict.refused for reply in found] for name, found in replies[side].items()}
        return {name: asdict(Rate.of(flags[name], clusters=subjects[name])) for name in flags}

    def read_out(side: str) -> dict[str, Any]:
        every = [reply for found in replies[side].values() for reply in found]
        return validation_of(side, every, [f"{name} {s}" for name in replies[side] for s in subjects[name]]).data()

    after = {name: log_odds(saved, rows, prompts.token_ids) for name, rows in prompts.rows.items()}
    component = stream_component(saved, prompts.rows[config.refused], best.vector)
    shift = (answer_log_probs(saved, prompts.benign) - log_probs).abs()
    return {
        "folder": "checkpoint",
        "answer_shift": asdict(Estimate.of(shift.numpy(), clusters=prompts.benign_subjects, seed=config.seed)),
        "fingerprint": saved.fingerprint,
        "change": {name: asdict(e) for name, e in prompts.changes(after, config.seed).items()},
        "refused_before": refused("before"),
        "refused_after": refused("after"),
        "empty": sum(reply.empty for found in replies["after"].values() for reply in found),
        "read_out": {side: read_out(side) for side in replies},
        "component": {str(site): value for site, value in component.items()},
    }


def _entry(c: Candidate, e: Effects, candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "name": c.name,
        "fraction": c.fraction,
        "layer": c.layer,
        "final_norm": c.final_norm,
        "length": float(c.vector.double().norm()),
        "cosines": {other.name: cosine(c.vector, other.vector) for other in candidates},
        **asdict(e),
    }


def sweep_table(
    config: Config, candidates: Sequence[Candidate], found: Mapping[str, Effects], plain: Sequence[float]
) -> Table:
    """Depth by depth: change of the refusal log-odds of each set, the share above 0, and the KL."""
    low, high = min(plain), max(plain)
    table = Table(
        title=f"Ablation of one direction at all writers ({config.writers}, scale {config.scale:g}); change of refusal "
        f"log-odds in nats.\n{len(plain)} random directions change '{config.refused}' by {low:.2f} to {high:.2f}"
    )
    sets = list(next(iter(found.values())).change)
    for column in ("read at", "layer", *sets, f"log-odds above 0, {config.refused}", "KL (nats per token)"):
        table.add_column(column)
    for c in candidates:
        e = found[c.name]
        table.add_row(
            c.name,
            str(c.layer),
            *(_cell(e.change[name]) for name in sets),
            str(e.above_zero[config.refused]),
            _cell(e.kl),
        )
    return table


def _cell(e: Estimate) -> str:
    return f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})"


def _against_null(best: Candidate, effect: Estimate, equal: Sequence[float]) -> str:
    beside = Beside.of(effect.value, equal)
    low, high = beside.band
    return (
        f"Chosen: {best.name} (layer {best.layer}). Change {effect}; the same dose along {len(equal)} random directions: "
        f"{low:.2f} to {high:.2f} (z = {beside.z:.1f}, p = {beside.p():.2g}, at least {beside.least_p:.2g})."
    )


def _checkpoint_table(measured: Mapping[str, Any]) -> Table:
    left = max(measured["component"].values())
    table = Table(
        title=f"The saved checkpoint, loaded again; largest part of the stream along the direction: {left:.2g}\n"
        f"log-odds against its judged replies: {measured['read_out']['after']['words']}"
        f"{'' if measured['read_out']['after']['valid'] else ' (not validated)'}; {measured['empty']} replies are empty"
    )
    for column in ("set", "n", "refused before, judged", "after", "change of log-odds (nats)"):
        table.add_column(column)
    for name, change in measured["change"].items():
        before, after = measured["refused_before"][name], measured["refused_after"][name]
        cells = [f"{100 * r['rate']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})" for r in (before, after)]
        table.add_row(
            name, str(change["n"]), *cells, f"{change['value']:.2f} ({change['low']:.2f} to {change['high']:.2f})"
        )
    return table


def _console() -> Console:
    """Wide where the output is no terminal, so that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
