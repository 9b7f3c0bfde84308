"""Study: whether political refusal, safety refusal and over-refusal are one thing; `analyses/refusal_geometry.py` is its command line.

Directions are mean differences from the fit split; the layer of the detailed comparison, the steered layers and the matched
doses come from select, every number on steering from report.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.nulls import false_discovery
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.reproduction.vectors import States
from rsteer_interp.studies.direction_atlas import Groups, atlas, coefficients, subspace_cosines
from rsteer_interp.studies.geometry_words import finding
from rsteer_interp.studies.independence import shifts, summary
from rsteer_interp.studies.reader_checks import checks_table
from rsteer_interp.studies.refusal_kinds import SETS, Kind, counts, members, weights, with_a_direction
from rsteer_interp.studies.refusal_steering import LEAST, Prompts, Transfer, random_directions, windows
from rsteer_interp.studies.study import NotApplicable, Study, interval
from rsteer_interp.studies.transfer import auc

if TYPE_CHECKING:
    from analyses.refusal_geometry import Config

KIND = "refusal_geometry"
QUESTION = "Are political refusal, safety refusal and over-refusal the same thing?"
_SPLITS: tuple[Split, ...] = ("fit", "select", "report")
_INDEPENDENT = 3  # kinds whose independence is measured: the cost grows with their number


def compute(study: Study, config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if config.random < 4:
        raise UserError(f"--random is {config.random}; the null needs at least 4 directions")
    if config.dose <= 0 or config.dimensions < 1 or min(config.refusing, config.probe) < LEAST:
        raise UserError(f"--dose and --dimensions are positive, --refusing and --probe at least {LEAST}")
    study.check_applicable()
    scored = {s: study.scored(s, *SETS) for s in _SPLITS}
    kinds = with_a_direction(scored["fit"])
    columns = steered_columns(kinds, scored)
    if len(columns) < 2 or columns[0].name != "political":
        names = ", ".join(k.label for k in columns) or "none"
        raise NotApplicable(
            f"not applicable: too few kinds of refusal to compare (there are refusals enough for: {names})"
        )
    states = {s: study.states(s, *SETS) for s in _SPLITS}
    vectors = directions(kinds, scored["fit"], states["fit"])
    units = {site: v / v.norm(dim=1, keepdim=True) for site, v in vectors.items()}
    by_layer = _atlas(study, config, kinds, scored["fit"], states["fit"])
    curve = [read_out(kinds, units[s], states["select"][s], scored["select"]) for s in study.sites]
    means = [_mean_auc(kinds, aucs) for aucs in curve]
    chosen = max(range(len(means)), key=lambda i: means[i])
    site = study.sites[chosen]
    answered = members(kinds, scored["fit"])[1].any(0)
    seen = {s: x[answered] for s, x in states["fit"].items()}
    rows = [k for k in kinds if k in columns or k.name in ("political_inside", "safety_inside")]
    turns = max(2, -(-config.random // len(rows)))
    random = random_directions(seen, max(config.random, turns * len(rows)), config.seed)
    prompts = {s: Prompts.refused(scored[s], columns, config.refusing) for s in ("select", "report")}
    order = {k.name: i for i, k in enumerate(kinds)}
    own = {k.name: {s: units[s][order[k.name]].float() for s in study.sites} for k in rows}
    key = {**prompts, "directions": own, "random": random, "tokens": study.refusal_tokens}
    transfer = Transfer(
        study,
        own,
        random,
        turns,
        prompts["select"],
        prompts["report"],
        config.dose,
        key,
    )
    main = [order[k.name] for k in _independent(columns)]
    data = {
        "base_rates": study.rates("report", *SETS),
        "counts": {s: counts(found) for s, found in scored.items()},
        "refusal_tokens": [study.backend.tokenizer.decode([t]) for t in study.refusal_tokens],
        "kinds": [{"name": k.name, "label": k.label, "inside": k.inside, "main": k.main} for k in kinds],
        "columns": [k.name for k in columns],
        "layers": [s.layer for s in study.sites],
        "chosen": {"layer": site.layer, "auc": means, "rule": "largest mean AUC inside subjects, select split"},
        "atlas": by_layer[chosen],
        "pairs": _curves(kinds, columns, by_layer),
        "readout": read_out(kinds, units[site], states["report"][site], scored["report"]),
        "subspaces": {
            "kinds": [k.name for k in kinds if k.main],
            **_subspaces(kinds, scored["fit"], states["fit"][site], config),
        },
        "window": transfer.window,
        "dose": config.dose,
        "n": {c: prompts["report"].columns.count(c) for c in [k.name for k in columns]},
        "transfer": transfer.equal_dose(),
        "matched": transfer.matched(),
        "read_out": transfer.judged(),
        "independence": _independence(study, config, _independent(columns), main, units, vectors, random, transfer),
    }
    return {**data, "finding": finding(data, study.n_layers)}, {
        "directions": torch.stack([v.float() for v in vectors.values()])
    }


def steered_columns(kinds: tuple[Kind, ...], scored: dict[Split, Scored]) -> list[Kind]:
    """Main kinds with enough refused prompts to tune and to measure steering on."""

    def enough(kind: Kind) -> bool:
        return all(
            sum(scored[s].sets[i] == kind.refused for i in scored[s].refusing) >= LEAST for s in ("select", "report")
        )

    return [k for k in kinds if k.main and enough(k)]


def _independent(columns: list[Kind]) -> list[Kind]:
    """Political refusal, safety refusal and political over-refusal where they are, else the first main kinds."""
    first = {"political": 0, "safety": 1, "over_matched": 2}
    return sorted(columns, key=lambda k: first.get(k.name, 3))[:_INDEPENDENT]


def directions(kinds: tuple[Kind, ...], fit: Scored, states: States) -> dict[Site, Float[Tensor, "kind d"]]:
    """Mean differences of every kind at every site, in float64."""
    c = coefficients(*weights(kinds, fit), torch.ones(len(fit.texts), dtype=torch.float64))
    return {site: c @ x.double() for site, x in states.items()}


def _atlas(study: Study, config: Config, kinds: tuple[Kind, ...], fit: Scored, states: States) -> list[dict[str, Any]]:
    groups, sides = Groups.of(fit.sets, fit.subjects), weights(kinds, fit)

    def compute() -> tuple[dict[str, Any], None]:
        found = []
        with progress("comparing directions, layer by layer", len(states)) as advance:
            for x in states.values():
                found.append(atlas(x, *sides, groups, config.seed))
                advance(1)
        return {"layers": found}, None

    key = {"fit": fit, "kinds": kinds, "seed": config.seed}
    layers: list[dict[str, Any]] = study.stage("1_atlas", key, compute).data["layers"]
    return layers


def _subspaces(kinds: tuple[Kind, ...], fit: Scored, x: Tensor, config: Config) -> dict[str, Any]:
    refused, answered = members(tuple(k for k in kinds if k.main), fit)
    return subspace_cosines(x, refused, answered, Groups.of(fit.sets, fit.subjects), config.dimensions, config.seed)


def read_out(
    kinds: tuple[Kind, ...], units: Float[Tensor, "kind d"], states: Float[Tensor, "n d"], scored: Scored
) -> list[list[dict[str, float] | None]]:
    """AUC of the projection on direction i between refused and answered prompts of kind j, of a kind inside its subjects between
    prompts of one subject; with q over all cells; None where either has fewer than LEAST."""
    p = (states.double() @ units.T).T
    refused, answered = members(kinds, scored)

    def read(scores: Tensor, j: int) -> dict[str, float] | None:
        if min(int(refused[j].sum()), int(answered[j].sum())) < LEAST:
            return None
        index = (refused[j] | answered[j]).nonzero()[:, 0].tolist()
        return auc(scores[index], refused[j][index], [scored.groups[i] for i in index], within=kinds[j].inside)

    table = [[read(scores, j) for j in range(len(kinds))] for scores in p]
    there = [cell for line in table for cell in line if cell]
    for cell, q in zip(there, false_discovery([c["p"] for c in there]), strict=True) if there else ():
        cell["q"] = q
    return table


def _mean_auc(kinds: tuple[Kind, ...], table: list[list[dict[str, float] | None]]) -> float:
    """Mean AUC of the kinds' own directions inside subjects, where topic cannot help; of all kinds where there is none."""
    own = {k: table[i][i] for i, k in enumerate(kinds)}
    inside = [cell["value"] for k, cell in own.items() if cell and k.inside]
    values = inside or [cell["value"] for cell in own.values() if cell]
    return sum(values) / len(values) if values else 0.0


def _curves(kinds: tuple[Kind, ...], columns: list[Kind], by_layer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cosine of the first column's direction with each other main one, and of the same inside subjects, by layer."""
    index = {k.name: i for i, k in enumerate(kinds)}
    pairs = [(columns[0].name, k.name) for k in columns[1:]]
    pairs += [("political_inside", "safety_inside")] if {"political_inside", "safety_inside"} <= set(index) else []
    return [
        {
            "pair": [a, b],
            **{
                name: [found[name][index[a]][index[b]] for found in by_layer]
                for name in ("raw", "disattenuated", "p", "within_subject_p")
            },
            "null_q95": [found["null_q95"] for found in by_layer],
        }
        for a, b in pairs
    ]


def _independence(
    study: Study,
    config: Config,
    chosen: list[Kind],
    index: list[int],
    units: dict[Site, Tensor],
    vectors: dict[Site, Tensor],
    random: dict[Site, Tensor],
    transfer: Transfer,
) -> dict[str, Any]:
    names = [k.name for k in chosen]
    kept = [i for c in names for i in [j for j, d in enumerate(transfer.report.columns) if d == c][: config.probe]]
    probed = transfer.report.at(kept)
    some = {s: u[index].float() for s, u in units.items()}
    gaps = {s: v[index].norm(dim=1) for s, v in vectors.items()}
    sources = [layers[0] for layers in windows(study.n_layers)]
    rows = study.template.encode_all(probed.texts)

    def ablated(source: Site) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, shifts(study.backend, rows, source, some, gaps, random[source][: config.random])

    found = []
    with progress("ablating, and reading later layers", len(sources)) as advance:
        for layer in sources:
            key = {**transfer.key, "names": names, "prompts": probed.texts, "units": some, "gaps": gaps}
            found.append(study.stage(f"5_source_{layer:02d}", key, partial(ablated, Site(layer))).tensors)
            advance(1)
    later = [list(range(layer + 1, study.n_layers + 1)) for layer in sources]
    return {
        "kinds": names,
        "n": len(probed.texts),
        "sources": sources,
        "later": later,
        "downstream": summary([x["downstream"] for x in found], names, probed.subjects),
        "total": summary([x["total"] for x in found], names, probed.subjects),
    }


def tables(data: dict[str, Any]) -> list[Table]:
    """Cosines at the chosen layer; what each direction removes of each kind."""
    kinds, atlas_ = data["kinds"], data["atlas"]
    label = {k["name"]: k["label"] for k in kinds}
    cosines = Table(
        title=f"Cosine without estimation noise (95 %), layer {data['chosen']['layer']}; on the diagonal the reliability"
    )
    cosines.add_column("")
    for k in kinds:
        cosines.add_column(k["label"])
    for i, k in enumerate(kinds):
        cells = [interval(c) if (c := atlas_["disattenuated"][i][j]) else "-" for j in range(len(kinds))]
        cells[i] = f"{atlas_['reliability'][i]:.2f}"
        cosines.add_row(k["label"], *cells)
    read = Table(
        title=f"AUC of the projection on the row's direction, refused against answered report prompts, layer {data['chosen']['layer']}"
    )
    read.add_column("")
    for k in kinds:
        read.add_column(k["label"])
    for k, line in zip(kinds, data["readout"], strict=True):
        read.add_row(k["label"], *(interval(c) if c else "-" for c in line))
    return [cosines, read, *(_transfer(data, label, *which) for which in _SHOWN), checks_table(data["read_out"])]


_SHOWN = (
    ("transfer", "add", "adding minus"),
    ("transfer", "ablate", "ablating"),
    ("matched", "add", "adding, at matched removal of its own kind, minus"),
)


def _transfer(data: dict[str, Any], label: dict[str, str], part: str, edit: str, words: str) -> Table:
    found = data[part][edit]
    table = Table(
        title=f"Refusal log-odds removed by {words} the row's direction, nats (95 %); * beyond random, q <= 0.05"
    )
    table.add_column("")
    for name in found["columns"] if found else ():
        table.add_column(f"{label[name]}, n = {data['n'][name]}")
    for name, line in zip(data[part]["rows"], found["cells"] if found else [], strict=True):
        table.add_row(label[name], *(interval(c) + (" *" if c["q"] <= 0.05 else "") for c in line))
    return table
