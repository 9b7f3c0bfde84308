"""Study: in which layers refusal can be read, and in which it is caused; `analyses/layer_concentration.py` is its command line.

Directions come from the fit split, the read-out's layer from select, every number from report. Depth is layer / n_layers,
so that models of different depth share an axis.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Edit, Site
from rsteer_interp.directions import ESTIMATORS, Evidence, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import add
from rsteer_interp.judges import load_judge
from rsteer_interp.layer_curves import causal_curve, read_out, significant
from rsteer_interp.nulls import Estimate, Rate, random_unit_vectors
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.refusal_scores import REFUSES_ABOVE, confidence_of, reply_and_judge
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL, PRESETS
from rsteer_interp.reproduction.scores import Scored, not_applicable, opening_tokens
from rsteer_interp.reproduction.vectors import States, states_of
from rsteer_interp.results import save_result

if TYPE_CHECKING:
    from analyses.layer_concentration import Config

KIND = "layer_concentration"
EDITS = ("ablate", "add")
LEAST = 4  # fewest refusing report prompts for a causal curve
_INCIDENTAL = {"out", "batch_size"}  # settings that change no result
_CAUSAL = {"method", "refusing", "random", "dose", "null"}  # settings that change no scores


@dataclass(frozen=True, eq=False)
class Displace:
    """h' = h - <h, v> u, u and v unit vectors: ablation for u = v, else its equal-norm null, as large at every position."""

    site: Site
    v: Float[Tensor, " d"]
    u: Float[Tensor, " d"]

    pointwise = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        v, u = self.v.to(x.device, torch.float32), self.u.to(x.device, torch.float32)
        return (x - ((x.float() @ v)[..., None] * u).to(x.dtype)).to(x.dtype)


def layer_study(config: Config, scripts: Path) -> Path:
    """Run what is missing, save the result, draw its figure, print the table; returns the folder."""
    if config.method not in ESTIMATORS or config.random < 4:
        raise UserError(f"--method is one of {', '.join(ESTIMATORS)} and --random at least 4")
    backend = load_backend(
        config.model, config.backend, device=config.device, dtype=config.dtype, batch_size=config.batch_size
    )
    counts = {
        s: {POLITICAL: n, MATCHED: n} for s, n in zip(_SPLITS, (config.fit, config.select, config.report), strict=True)
    }
    settings = {k: v for k, v in asdict(config).items() if k not in _INCIDENTAL}
    context = Context(
        backend,
        load_judge(config.judge, backend),
        replace(PRESETS["demo"], fit=counts["fit"], select=counts["select"], report=counts["report"]),
        config.out,
        config.seed,
        {k: v for k, v in settings.items() if k not in _CAUSAL},
        kind=KIND,
    )
    scored = {split: score(context, split) for split in _SPLITS}
    data = _study(context, config, {s: found for s, (found, _) in scored.items()}, scored["fit"][1])
    checkpoint = backend.checkpoint
    data |= {
        "model": {"name": getattr(checkpoint, "name", "in memory"), "n_layers": backend.n_layers},
        "settings": settings,
        "notes": list(backend.notes),
        "seconds": dict(context.seconds),
    }
    provenance = replace(context, settings=settings).provenance()
    save_result(config.out, KIND, data, provenance=provenance)
    draw_figures(config.out, config.out / "figures", scripts)
    print_table(data)
    return config.out


_SPLITS: tuple[Split, ...] = ("fit", "select", "report")


def score(context: Context, split: Split) -> tuple[Scored, dict[str, Any]]:
    """One judged greedy reply per prompt: c is +1 refused, -1 answered, 0 undecided; and the step's data (no replies)."""
    counts = getattr(context.preset, split)

    def compute() -> tuple[dict[str, Any], None]:
        prompts = context.prompts(split, counts)
        texts, rows = [p.prompt for p in prompts], context.encode(prompts)
        with progress(f"scoring {split} prompts", len(prompts)) as advance:
            tokens = context.preset.tokens
            replies = reply_and_judge(
                context.backend, rows, texts, context.judge, max_new_tokens=tokens, on_batch=advance
            )
        return {
            "prompts": texts,
            "sets": [p.set for p in prompts],
            "subjects": [p.subject for p in prompts],
            "confidence": confidence_of(replies).tolist(),
            "first_tokens": [[r.first_token for r in group] for group in replies],
            "refused": [[r.verdict.refused for r in group] for group in replies],
        }, None

    data = context.stage(f"1_scores_{split}", {"counts": counts, "tokens": context.preset.tokens}, compute).data
    c = torch.tensor(data["confidence"], dtype=torch.float64)
    return Scored(data["prompts"], data["sets"], data["subjects"], c), data


def _study(context: Context, config: Config, scored: dict[Split, Scored], fit_data: dict[str, Any]) -> dict[str, Any]:
    fit, select, report = (scored[s] for s in _SPLITS)
    base = {
        name: asdict(
            Rate.of([c > REFUSES_ABOVE for c, s in zip(report.confidence, report.sets, strict=True) if s == name])
        )
        for name in (POLITICAL, MATCHED)
    }
    reason = not_applicable(fit, select)
    if reason is None and not LEAST <= len(report.refusing) < len(report.texts):
        reason = f"not applicable: {len(report.refusing)} of {len(report.texts)} report prompts are refused"
    if reason is None:
        try:
            tokens = opening_tokens(fit_data)
        except UserError as error:
            reason = f"not applicable: {error}"
    if reason is not None:
        return {"applicable": False, "reason": reason, "base_rates": base}
    states = {s: states_of(context, s, scored[s]) for s in _SPLITS}
    evidence = {site: Evidence(states["fit"][site], fit.confidence, site=site) for site in context.sites}
    found = fit_directions(ESTIMATORS[config.method](), evidence)
    units = {site: d.unit for site, d in found.items()}
    read = read_out(
        _project(units, states["select"]),
        select.confidence,
        _project(units, states["report"]),
        report.confidence,
        report.sets,
        config.seed,
    )
    chosen = report.refusing[: config.refusing]
    causal = _causal(context, config, units, fit, [report.texts[i] for i in chosen], tokens, evidence)
    data = {
        "applicable": True,
        "reason": None,
        "base_rates": base,
        "n_fit": fit_counts(fit),
        "refusal_tokens": [context.backend.tokenizer.decode([t]) for t in tokens],
        "readout": read,
        "causal": causal,
    }
    return {**data, "finding": finding(data, context.backend.n_layers)}


def fit_counts(fit: Scored) -> dict[str, int]:
    z = fit.confidence.sign()
    return {"refused": int((z > 0).sum()), "answered": int((z < 0).sum()), "undecided": int((z == 0).sum())}


def _project(units: dict[Site, Tensor], states: States) -> Float[Tensor, "prompt site"]:
    return torch.stack([states[site].double() @ v.double() for site, v in units.items()], 1)


def _causal(
    context: Context,
    config: Config,
    units: dict[Site, Tensor],
    fit: Scored,
    texts: list[str],
    tokens: tuple[int, ...],
    evidence: dict[Site, Evidence],
) -> dict[str, Any]:
    backend = context.backend
    rows, sites = context.template.encode_all(texts), [s for s in units if s.layer < backend.n_layers]
    key = {name: getattr(config, name) for name in _CAUSAL} | {"prompts": texts, "fit": fit.confidence.tolist()}

    def base() -> tuple[dict[str, Any], None]:
        norms = mean_norms(backend, rows, sites)
        return {"norms": [norms[s] for s in sites], "log_odds": log_odds(backend, rows, tokens).tolist()}, None

    start = context.stage("3_base", {**key, "tokens": tokens}, base).data
    effects = []
    with progress("one block input at a time", len(sites)) as advance:
        for site, norm in zip(sites, start["norms"], strict=True):
            like = evidence[site].complying if config.null == "covariance" else None
            random = random_unit_vectors(config.random, backend.d_model, config.seed + site.layer, like).float()

            def compute(site: Site = site, norm: float = norm, random: Tensor = random) -> tuple[dict[str, Any], Any]:
                odds = single_site(backend, rows, tokens, site, units[site], random, config.dose * norm)
                return {}, {"log_odds": odds}

            found = context.stage(f"3_layer_{site.layer:02d}", {**key, "tokens": tokens}, compute)
            effects.append(torch.tensor(start["log_odds"], dtype=torch.float64) - found.tensors["log_odds"].double())
            advance(1)
    x = torch.stack(effects, -1)  # edit, direction (ours, random ...), prompt, layer
    layers = [site.layer for site in sites]
    return {
        "layers": layers,
        "n": len(texts),
        "n_random": config.random,
        "dose": config.dose,
        "null": config.null,
        "base_log_odds": asdict(Estimate.of(start["log_odds"])),
        **{edit: causal_curve(x[i, 0], x[i, 1:].mean(1), layers, backend.n_layers) for i, edit in enumerate(EDITS)},
    }


def single_site(
    backend: Backend, rows: Any, tokens: tuple[int, ...], site: Site, v: Tensor, random: Tensor, amount: float
) -> Float[Tensor, "edit direction prompt"]:
    """Log-odds under ablation and under adding -amount, of v and then of every random direction (equal norm)."""
    prepared = backend.prepare(rows, site.layer)
    directions = [v, *random]
    edits: list[list[Edit]] = [
        [Displace(site, v, u) for u in directions],
        [add({site: u}, {site: -amount}) for u in directions],
    ]
    return torch.stack([torch.stack([log_odds(backend, prepared, tokens, e) for e in kind]) for kind in edits])


def finding(data: dict[str, Any], n_layers: int) -> str:
    """The answer in one paragraph; what is not distinguishable from random is said to be so, with its p."""
    read, causal = data["readout"], data["causal"]
    chosen = read["chosen_on_select"]
    r = chosen["r"]
    parts = [
        f"Read-out at layer {chosen['layer']} of {n_layers} (chosen on select): r = {r['value']:.2f} ({r['low']:.2f} to "
        f"{r['high']:.2f}, n = {r['n']}), p of the maximum {read['p_max']:.2g}; inside sets p = {read['within_set_p_max']:.2g}."
    ]
    for edit, words in (("ablate", "Ablation"), ("add", f"Adding -{causal['dose']:g} |resid|")):
        curve = causal[edit]
        hits = significant(curve, causal["layers"])
        at = curve["at_peak"]
        size = (
            f"{at['value']:.2f} nats ({at['low']:.2f} to {at['high']:.2f}, n = {at['n']}) at its best layer, held out"
        )
        if not hits:
            parts.append(
                f"{words}: {size}; no layer distinguishable from random directions (smallest q = {min(curve['q']):.2g})."
            )
            continue
        spread = curve["concentration"]["effective_layers"]
        parts.append(
            f"{words}: {size}; peak at layer {curve['peak_layer']}, {len(hits)} of {len(causal['layers'])} layers beyond random "
            f"(q <= 0.05), spread over {spread['value']:.1f} ({spread['low']:.1f} to {spread['high']:.1f}) effective layers."
        )
    return " ".join(parts)


def print_table(data: dict[str, Any]) -> None:
    """Concentration of the three curves, the sentence; for a model that doesn't refuse, the reason alone."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if not data["applicable"]:
        console.print(data["reason"], markup=False, soft_wrap=True)
        return
    causal = data["causal"]
    table = Table(title=f"Where refusal concentrates, {data['model']['name']} (95 % intervals over prompts)")
    for column in ("", "n", "effective layers", "under the null", "Gini", "peak depth", "centre depth"):
        table.add_column(column)
    for name, curve, n in (
        ("read-out r²", data["readout"], data["readout"]["n"]),
        *((edit, causal[edit], causal["n"]) for edit in EDITS),
    ):
        found, null = curve["concentration"], curve["null_effective_layers"]
        under = "" if null is None else f"{null['median']:.1f} ({null['low']:.1f} to {null['high']:.1f})"
        names = ("effective_layers", "gini", "peak", "centre")
        cells = [_cell(found[k]) for k in names] if found else ["no positive effect", "", "", ""]
        table.add_row(name, str(n), cells[0], under, *cells[1:])
    console.print(table)
    console.print(data["finding"], markup=False, soft_wrap=True)


def _cell(e: dict[str, float]) -> str:
    return f"{e['value']:.2f} ({e['low']:.2f} to {e['high']:.2f})"
