"""When to steer: the condition on a prompt, its layer and threshold chosen on select, its ROC and leakage on report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from rsteer_interp.activations import instruction_means, last_states
from rsteer_interp.backends.edits import Site
from rsteer_interp.gates import Gate, balanced_threshold, discriminant, roc
from rsteer_interp.moments import Moments
from rsteer_interp.pooling import POOLINGS, Pooling
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split, load_prompts
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.studies.study import Study, place

FITTED = 256  # most fit prompts of a set for a condition
LEAST_DEPTH, MOST_DEPTH = (
    0.15,
    0.45,
)  # of the layers at which a condition is looked for: after the first, before the edits


def find_condition(
    study: Study, inside: str, outside: Sequence[str], watched: Sequence[str]
) -> tuple[Gate, dict[str, Any]]:
    """The gate that holds for prompts like `inside` and not like those of the sets `outside`.

    Per layer and pooling one discriminant from fit; the one with the largest ROC area on select (the first of equals), and
    there the threshold with the smallest worst expected error. On report: the ROC, areas by layer (also of CAST's cosine
    condition), and the share of every set, `watched` ones too, for which the gate holds.
    """
    sets = [inside, *outside]
    free: dict[tuple[str, Pooling, int], Gate] = {
        (kind, pooling, site.layer): gate
        for pooling in POOLINGS
        for site in _sites(study)
        for kind, gate in _gates(study, site, pooling, inside, outside).items()
    }
    areas = {split: {key: _area(study, split, gate, inside, outside) for key, gate in free.items()} for split in SPLITS}
    for key in free:  # a cosine may be small or large inside, which select tells
        if key[0] == "cosine" and areas["select"][key] < 0.5:
            areas = {split: {**found, key: 1 - found[key]} for split, found in areas.items()}
    best = max((key for key in free if key[0] == "discriminant"), key=lambda key: (areas["select"][key], -key[2]))
    on_select = {name: scores(study, "select", free[best], name) for name in sets}
    threshold = balanced_threshold(on_select[inside], {n: on_select[n] for n in outside})
    gate = replace(free[best], threshold=threshold)
    on_report = {name: scores(study, "report", gate, name) for name in dict.fromkeys([*sets, *watched])}
    subjects = {split: {n: [p.subject for p in study.prompts(split, n)] for n in on_report} for split in SPLITS}
    of_all = [(n, s) for n in sets for s in subjects["report"][n]]
    others = torch.cat([on_report[n] for n in outside])
    curve = roc(on_report[inside], others, clusters=of_all, seed=study.config.seed)

    def held(split: Split, found: Mapping[str, Float[Tensor, " prompt"]]) -> dict[str, Any]:
        flags = {n: (v > gate.threshold).tolist() for n, v in found.items()}
        return {n: asdict(Rate.of(f, clusters=subjects[split][n])) for n, f in flags.items()}

    layers = [site.layer for site in _sites(study)]
    return gate, {
        "inside": inside,
        "outside": list(outside),
        "site": str(gate.site),
        "layer": gate.site.layer,
        "pooling": gate.pooling,
        "threshold": gate.threshold,
        "layers": layers,
        "areas": [
            {"split": split, "kind": kind, "pooling": pooling, "area": [areas[split][kind, pooling, x] for x in layers]}
            for split in SPLITS
            for kind in KINDS
            for pooling in POOLINGS
        ],
        "roc": asdict(curve),
        "holds": held("report", on_report),
        "holds_select": held("select", on_select),
    }


SPLITS: tuple[Split, ...] = ("select", "report")
KINDS = ("discriminant", "cosine")


def prompt_states(
    study: Study, split: Split, name: str, pooling: Pooling, n: int | None = None
) -> Mapping[Site, Float[Tensor, "prompt d"]]:
    """What a condition reads of a set's prompts, at every layer where one is looked for. Nothing needs to be judged for it, so
    on fit it takes more prompts than directions do."""
    chosen = study.prompts(split, name)
    if split == "fit":
        chosen = list(load_prompts(name).split("fit").sample(FITTED, study.config.seed))
        study.apart.check("fit", chosen)
    texts = [p.prompt for p in chosen]

    def compute() -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        rows, sites = study.template.encode_all(texts), _sites(study)
        with progress(f"reading prompts, {split} {name}", len(texts)) as advance:
            found = {"instruction": instruction_means(study.backend, rows, sites, advance)}
            found["last"] = last_states(study.backend, rows, sites)
        return {}, {f"{key}.{site}": value for key, states in found.items() for site, value in states.items()}

    tensors = study.stage(f"1_prompts_{split}_{place(name)}", {"prompts": texts}, compute).tensors
    return {site: tensors[f"{pooling}.{site}"][:n] for site in _sites(study)}


def holds(study: Study, gate: Gate, split: Split, name: str, n: int | None = None) -> Bool[Tensor, " prompt"]:
    return gate.holds(prompt_states(study, split, name, gate.pooling, n)[gate.site])


def scores(study: Study, split: Split, gate: Gate, name: str) -> Float[Tensor, " prompt"]:
    return gate.scores(prompt_states(study, split, name, gate.pooling)[gate.site])


def _sites(study: Study) -> list[Site]:
    return [Site(x) for x in range(1, study.n_layers) if LEAST_DEPTH <= x / study.n_layers <= MOST_DEPTH]


def _gates(study: Study, site: Site, pooling: Pooling, inside: str, outside: Sequence[str]) -> dict[str, Gate]:
    moments = {n: Moments.of(prompt_states(study, "fit", n, pooling)[site]) for n in (inside, *outside)}
    w = discriminant([moments[inside]], [moments[n] for n in outside])
    delta = moments[inside].mean - torch.stack([moments[n].mean for n in outside]).mean(0)
    return {
        "discriminant": Gate(site, w, 0.0, "projection", pooling),
        "cosine": Gate(site, delta / delta.norm(), 0.0, "cosine", pooling),
    }


def _area(study: Study, split: Split, gate: Gate, inside: str, outside: Sequence[str]) -> float:
    a = scores(study, split, gate, inside)
    b = torch.cat([scores(study, split, gate, name) for name in outside])
    labels = torch.cat([torch.ones(len(a)), torch.zeros(len(b))])
    return float(roc_auc_score(labels.numpy(), torch.cat([a, b]).numpy()))
