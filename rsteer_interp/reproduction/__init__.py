"""The main paper's experiment, step by step; `analyses/reproduce.py` is its command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsteer_interp.backends import configured_backend
from rsteer_interp.directions import checked_methods
from rsteer_interp.errors import UserError
from rsteer_interp.judges import load_judge
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.report.page import write_page
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.finder import chosen_setting, find, random_cloud, refusing, steering_for
from rsteer_interp.reproduction.matched import at_matched_removal
from rsteer_interp.reproduction.presets import PRESETS
from rsteer_interp.reproduction.reliability import RULE, headline, reliability_report
from rsteer_interp.reproduction.report_split import answers, evaluate
from rsteer_interp.reproduction.scores import Scored, not_applicable, opening_tokens, score
from rsteer_interp.reproduction.summary import print_table, summary
from rsteer_interp.reproduction.vectors import (
    best_layer,
    density_report,
    evidence_of,
    fit_vectors,
    layer_report,
    pca_report,
    states_of,
)
from rsteer_interp.results import save_result
from rsteer_interp.steering import Steering

if TYPE_CHECKING:
    from analyses.reproduce import Config

KIND = "reproduce"


def reproduce(config: Config, scripts: Path) -> Path:
    """Run what is missing of the experiment, draw the figures of the folder `scripts`; returns the page's path."""
    methods = checked_methods(config.methods)
    context = _context(config)
    fit, fit_data = score(context, "fit")
    select, _ = score(context, "select")
    reason = not_applicable(fit, select)
    tensors: dict[str, Any] = {}
    if reason is not None:
        data = summary(context, reason=reason)
    else:
        data, tensors = _experiment(context, fit, select, opening_tokens(fit_data), config.target, methods)
    save_result(config.out, KIND, data, tensors, provenance=context.provenance())
    draw_figures(config.out, config.out / "figures", scripts)
    page = write_page(config.out, config.out / "index.html")
    print_table(data, page)
    return page


def _context(config: Config) -> Context:
    backend = configured_backend(config, config.model, config.backend)
    settings = {k: v for k, v in asdict(config).items() if k != "out"}
    judge = load_judge(config.judge, backend)
    return Context(backend, judge, PRESETS[config.preset], config.out, config.seed, settings)


def _experiment(
    context: Context, fit: Scored, select: Scored, tokens: tuple[int, ...], target: float, methods: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    fit_states, select_states = states_of(context, "fit", fit), states_of(context, "select", select)
    evidence = evidence_of(context, fit, fit_states)
    every, left_out = fit_vectors(context, fit, evidence, select, select_states)
    vectors = {m: every[m] for m in methods if m in every}
    if not vectors:
        raise UserError(f"none of --methods can be fitted here: {next(iter(left_out.values()))}")
    layer_scores = {m: layer_report(context, v, select, select_states) for m, v in every.items()}
    directions = reliability_report(context, evidence, every, layer_scores)
    head = headline(directions, vectors)
    prompts = refusing(context, select)
    found = {m: find(context, v, prompts, tokens, target) for m, v in vectors.items()}
    steerings = {m: steering_for(context, v, chosen_setting(found[m]), tokens) for m, v in vectors.items()}
    _save_steerings(context, steerings)
    matched = at_matched_removal(context, vectors, found, tokens, target)
    cloud = random_cloud(context, steerings[head])
    base = evaluate(context, "base", None, tokens)
    steered = {m: evaluate(context, m, s, tokens) for m, s in steerings.items()}
    ordinary = answers(context, steerings)
    layer = best_layer(vectors[head], context.backend.n_layers)
    density, vector = density_report(context, vectors[head], layer)
    pca, points = pca_report(fit, fit_states, layer)
    data = summary(
        context,
        base={**base, "answer_shift": None, "kl": None},
        steered={m: {**evaluated, **ordinary[m]} for m, evaluated in steered.items()},
        steerings=steerings,
        doses={m: s.dose(select_states) for m, s in steerings.items()},
        finder={"target": target, "unsteered": prompts.report(), "methods": found},
        matched=matched,
        cloud=cloud,
        layer_scores={
            m: {**r, "chosen": [site.layer for site in steerings[m].sites] if m in steerings else []}
            for m, r in layer_scores.items()
        },
        directions=directions,
        left_out=left_out,
        drawn={"method": head, "rule": RULE},
        density=density,
        pca=pca,
        tokens=tokens,
    )
    return data, {"density_vector": vector, "pca": points}


def _save_steerings(context: Context, steerings: dict[str, Steering]) -> None:
    for method, steering in steerings.items():
        steering.save(context.folder / "steering" / method, context.provenance(), {"judge": context.judge.name})


__all__ = ["KIND", "reproduce"]
