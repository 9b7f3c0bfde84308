"""Study: where the difference between a refused and an answered prompt sits; `analyses/patch_effects.py` is its command line.

Pairs have as many tokens in every span, so that every position has its counterpart and nothing needs to be averaged. The
template prefix is left out: attention is causal, so its states are the same in all prompts and patching it does nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends.edits import Edit, Point, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.patching import Cell, PatchLast, all_states, patched_log_odds
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import NEUTRAL_BAND
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.patch_map import Pair, control, hand_over, held_out_best, make_pairs, patch_map
from rsteer_interp.studies.reader_checks import checks_table, checks_words, judged_subsample
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.patch_effects import Config

KIND = "patch_effects"
QUESTION = "Where does the difference between a refused and an answered prompt sit, and which blocks write it there?"
LEAST = 4  # fewest pairs
JUDGED_LAYERS = 4  # layers, at most, at which replies under patches of the last token are judged
_POINTS: tuple[Point, ...] = ("resid_pre", "attn_out", "mlp_out")
INTO = ("refused", "answered")  # the class of the prompt that is patched


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if config.every < 1 or config.pairs < LEAST:
        raise UserError(f"--every is {config.every} (1 or more) and --pairs {config.pairs} ({LEAST} or more)")
    study.check_applicable()
    tokens = study.refusal_tokens
    report = study.scored("report", POLITICAL, MATCHED)
    rows = study.template.encode_all(report.texts)
    pairs = _pairs(report, rows, config)
    layers = list(range((study.n_layers - 1) % config.every, study.n_layers, config.every))
    sites = [Site(i, point) for point in _POINTS for i in layers if Site(i, point) in study.backend.sites]
    spans = span_labels(study.backend.tokenizer, rows[pairs[0].refused])
    found = []
    with progress("patching pairs", len(pairs)) as advance:
        for number, pair in enumerate(pairs):

            def compute(pair: Pair = pair) -> tuple[dict[str, Any], dict[str, Tensor]]:
                return {}, patch_pair(study, rows, pair, sites, tokens)

            texts = [report.texts[i] for i in asdict(pair).values()]
            key = {"prompts": texts, "sites": sites, "tokens": tokens}
            found.append(study.stage(f"3_pair_{number:02d}", key, compute).tensors)
            advance(1)
    base = torch.stack([t["base"] for t in found]).double()  # pair, (refused, answered)
    change = torch.stack([t["patched"] for t in found]).double() - base[:, :, None, None]
    gaps = [base[:, 1] - base[:, 0], base[:, 0] - base[:, 1]]
    subjects = [report.subjects[pair.refused] for pair in pairs]
    gap = Estimate.of(gaps[1].tolist(), clusters=subjects)
    if gap.low <= 0:
        raise NotApplicable(
            f"not applicable: refused prompts do not have higher refusal log-odds than answered ones of equal length "
            f"(difference {gap.value:.2g} nats, {gap.low:.2g} to {gap.high:.2g}, n = {gap.n} pairs)"
        )
    maps = [patch_map(change[:, i], gaps[i], config.seed, subjects=subjects) for i in range(len(INTO))]
    control(maps)
    cells = [(site, span) for site in sites for span in range(len(spans))]
    for i, into in enumerate(maps):
        into["best_writes"] = _best_writes(change[:, i, 0], gaps[i], cells, len(spans) - 1, subjects)
        early, late = (
            change[:, i, 0][:, [cells.index((Site(layer), span)) for layer in layers]] for span in (0, len(spans) - 1)
        )
        into["hand_over"] = hand_over(early, late, gaps[i], layers, config.seed, subjects=subjects)
    data = {
        "read_out": _judged(study, report, rows, pairs, layers),
        "base_rates": study.rates("report", POLITICAL, MATCHED),
        "refusal_tokens": [study.backend.tokenizer.decode([t]) for t in tokens],
        "layers": layers,
        "spans": spans,
        "cells": [{"layer": site.layer, "point": site.point, "span": span} for site, span in cells],
        "n": len(pairs),
        "lengths": [rows[pair.refused].instruction - rows[pair.refused].prefix for pair in pairs],
        "into": dict(zip(INTO, maps, strict=True)),
    }
    return {**data, "finding": finding(data)}, None


def _pairs(report: Scored, rows: list[Tokens], config: Config) -> list[Pair]:
    c = report.confidence.tolist()
    refused = [i for i, name in enumerate(report.sets) if name == POLITICAL and c[i] > NEUTRAL_BAND]
    answered = [i for i, name in enumerate(report.sets) if name == MATCHED and c[i] < -NEUTRAL_BAND]
    pairs = make_pairs(rows, refused, answered, report.subjects, config.pairs, config.seed)
    if len(pairs) < LEAST:
        raise NotApplicable(
            f"not applicable: {len(refused)} refused sensitive and {len(answered)} answered ordinary report prompts give "
            f"{len(pairs)} pairs of equal length, with another of each class; {LEAST} are needed"
        )
    return pairs


def span_labels(tokenizer: Any, row: Tokens) -> list[str]:
    """`instruction`, then each template token after it."""
    return ["instruction", *(tokenizer.decode([t]) for t in row.ids[row.instruction : row.prompt])]


def span_cells(row: Tokens, sites: list[Site]) -> list[Cell]:
    """Every site with the whole instruction, then with each template token after it."""
    spans = [(row.prefix, row.instruction), *((p, p + 1) for p in range(row.instruction, row.prompt))]
    return [Cell(site, first, stop) for site in sites for first, stop in spans]


def patch_pair(
    study: Study, rows: list[Tokens], pair: Pair, sites: list[Site], tokens: tuple[int, ...]
) -> dict[str, Tensor]:
    """base: (refused, answered) log-odds. patched: (into, donor, cell); the donors are of the other class, of the same."""
    four = [rows[i] for i in (pair.refused, pair.answered, pair.other_refused, pair.other_answered)]
    states, cells = all_states(study.backend, four, sites), span_cells(four[0], sites)

    def into(recipient: int, donors: list[int]) -> Tensor:
        given = {site: value[donors] for site, value in states.items()}
        return patched_log_odds(study.backend, four[recipient], given, cells, tokens)

    return {
        "base": log_odds(study.backend, four[:2], tokens),
        "patched": torch.stack([into(0, [1, 2]), into(1, [0, 3])]),
    }


def _judged(
    study: Study, report: Scored, rows: list[Tokens], pairs: list[Pair], layers: list[int]
) -> dict[str, dict[str, Any]]:
    """Log-odds against judged replies where the other prompt's state is put in at the last token, at some layers."""
    sites = [Site(layer) for layer in layers[:: -(-len(layers) // JUDGED_LAYERS)]]
    found: dict[str, dict[str, Any]] = {}
    for into, other in zip(INTO, reversed(INTO), strict=True):
        recipients, donors = ([getattr(pair, name) for pair in pairs] for name in (into, other))
        asked = [i for _ in sites for i in recipients]
        key = {"sites": list(map(str, sites)), "donors": [report.texts[i] for i in donors]}
        states = last_states(study.backend, [rows[i] for i in donors], sites)
        patches: list[Edit | None] = [PatchLast(site, v) for site in sites for v in states[site]]
        kinds = {f"patches into {into} prompts": patches}
        texts, subjects = ([each[i] for i in asked] for each in (report.texts, report.subjects))
        found |= judged_subsample(study, f"3_judged_{into}", key, kinds, texts, subjects, paired=True)
    return found


def _best_writes(
    change: Float[Tensor, "pair cell"],
    gap: Float[Tensor, " pair"],
    cells: list[tuple[Site, int]],
    last: int,
    subjects: list[str],
) -> list[dict[str, Any]]:
    """For attention and for MLPs, the block whose output at the last token carries most, with its held-out share."""
    out = []
    for point in _POINTS[1:]:
        chosen = [i for i, (site, span) in enumerate(cells) if site.point == point and span == last]
        if chosen:
            best, share = held_out_best(change[:, chosen], gap, subjects)
            out.append({"point": point, "layer": cells[chosen[best]][0].layer, "cell": chosen[best], **asdict(share)})
    return out


def finding(data: dict[str, Any]) -> str:
    """The answer in one paragraph; what is not distinguishable from same-class donors is said to be so, with its p."""
    parts = [
        f"{data['n']} pairs of a refused and an answered prompt of equal length, "
        f"{interval(data['into']['answered']['gap'])} nats of refusal log-odds apart (n = {data['n']})."
    ]
    for into, other in zip(INTO, reversed(INTO), strict=True):
        found = data["into"][into]
        hits = found["beyond_null"]
        words = f"{other.capitalize()} states put into {into} prompts: "
        if not hits:
            parts.append(
                f"{words}not distinguishable from donors of the same class at any of {len(found['q'])} places "
                f"(smallest p = {min(found['p']):.2g}, q = {min(found['q']):.2g})."
            )
            continue
        turn = found["hand_over"]
        words += (
            "the last token never carries more than the instruction"
            if turn is None
            else f"up to layer {turn['value']:.0f} ({turn['low']:.0f} to {turn['high']:.0f}) the instruction carries the "
            "difference, from there on the last token"
        )
        for best in found["best_writes"]:
            null, q = found["null"]["value"][best["cell"]], found["q"][best["cell"]]
            verdict = "" if q <= 0.05 else "not distinguishable from them, "
            words += (
                f"; the {'attention' if best['point'] == 'attn_out' else 'MLP'} that writes most of it at the last token is "
                f"block {best['layer']}'s, {100 * best['value']:.0f} % of the gap ({100 * best['low']:.0f} to {100 * best['high']:.0f}, "
                f"held out; same-class donors {100 * null:.0f} %, {verdict}q = {q:.2g})"
            )
        parts.append(
            f"{words}. {len(hits)} of {len(found['q'])} places carry more than donors of the same class (q <= 0.05)."
        )
    return " ".join([*parts, checks_words(data["read_out"])])


def tables(data: dict[str, Any]) -> list[Table]:
    """Share of the gap that the residual stream carries, by span and layer, in both directions."""
    out = []
    for into in INTO:
        found = data["into"][into]
        table = Table(
            title=f"Share of the gap carried into {into} prompts, resid_pre, n = {found['n']} pairs (* beyond null)"
        )
        for column in ("layer", *(repr(span)[1:-1] for span in data["spans"])):
            table.add_column(column)
        for layer in data["layers"]:
            here = [i for i, c in enumerate(data["cells"]) if c["point"] == "resid_pre" and c["layer"] == layer]
            table.add_row(
                str(layer),
                *(f"{found['share']['value'][i]:.2f}{'*' if i in found['beyond_null'] else ''}" for i in here),
            )
        out.append(table)
    return [*out, checks_table(data["read_out"])]
