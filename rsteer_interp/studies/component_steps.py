"""The long steps of the study of components, each a stage: taking the stream apart, ablating heads, reading attention."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends import load_backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.backends.transformerlens import TransformerLensBackend
from rsteer_interp.errors import UserError
from rsteer_interp.heads import Head, SetHeads, ablated_log_odds, last_heads
from rsteer_interp.progress import progress
from rsteer_interp.refusal_scores import NEUTRAL_BAND
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.component_shares import SPANS, against_random, mass_by_span
from rsteer_interp.studies.reader_checks import judged_subsample
from rsteer_interp.studies.study import Study

_ROWS = 16  # prompts at once whose components are held


class Reader:
    """The TransformerLens backend of the study's model, loaded when first used."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.backend = cache(self._load)

    def _load(self) -> TransformerLensBackend:
        own, config = self._study.backend, self._study.config
        if isinstance(own, TransformerLensBackend):
            return own
        if config.device_map is not None:
            raise UserError("single heads are read through TransformerLens, which takes no device_map; leave it out")
        loaded = load_backend(
            own.checkpoint if own.checkpoint is not None else config.model,
            "transformerlens",
            device=config.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            batch_size=config.batch_size,
        )
        return cast(TransformerLensBackend, loaded)


def indices(scored: Scored, sign: int) -> list[int]:
    return [i for i, c in enumerate(scored.confidence.tolist()) if sign * c > NEUTRAL_BAND]


def take_apart(
    study: Study, reader: Reader, split: str, scored: Scored, layer: int, v: Tensor
) -> tuple[Float[Tensor, "prompt component"], list[str]]:
    """What every component before the layer writes along v at the last token of every prompt, and the components' names."""

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        backend, rows = reader.backend(), study.template.encode_all(scored.texts)
        out: dict[int, Tensor] = {}
        names: list[str] = []
        with progress(f"taking apart the stream, {split}", len(rows)) as advance:
            for group, found in backend.batches(rows, lambda batch: backend.decompose(batch, layer, v), _ROWS):
                parts, names = found
                out |= dict(zip(group, parts, strict=True))
                advance(len(group))
        return {"names": names}, {"parts": torch.stack([out[i] for i in range(len(rows))])}

    key = {"prompts": scored.texts, "layer": layer, "direction": v}
    found = study.stage(f"2_parts_{split}", key, compute)
    return found.tensors["parts"].double(), found.data["names"]


def ablation(
    study: Study,
    reader: Reader,
    fit: Scored,
    asked: dict[str, Scored],
    chosen: list[Head],
    draws: list[list[Head]],
    tokens: tuple[int, ...],
) -> dict[str, Any]:
    """Refusal log-odds removed by setting heads at the last token to their mean over fit prompts, both classes alike."""
    sites = [Site(layer, "z") for layer in sorted({layer for layer, _ in chosen})]
    shared = {"fit": fit, "chosen": chosen}

    def mean() -> tuple[dict[str, Any], dict[str, Tensor]]:
        states = last_heads(reader.backend(), study.template.encode_all(fit.texts), sites)
        classes = [indices(fit, 1), indices(fit, -1)]
        return {}, {
            str(s): torch.stack([z[c].double().mean(0) for c in classes]).mean(0).float() for s, z in states.items()
        }

    found = study.stage("3_means", shared, mean).tensors
    means = {site: found[str(site)] for site in sites}
    out: dict[str, Any] = {}
    for name, scored in asked.items():

        def compute(name: str = name, prompts: list[str] = scored.texts) -> tuple[dict[str, Any], dict[str, Tensor]]:
            odds = []
            with progress(f"ablating heads, {name}", len(prompts)) as advance:
                for row in study.template.encode_all(prompts):
                    odds.append(ablated_log_odds(reader.backend(), row, [[], chosen, *draws], means, tokens))
                    advance(1)
            return {}, {"log_odds": torch.stack(odds)}

        key = {**shared, "prompts": scored.texts, "draws": draws, "tokens": tokens}
        odds = study.stage(f"3_ablate_{name}", key, compute).tensors["log_odds"].double()
        removed = odds[:, :1] - odds[:, 1:]
        base = Estimate.of(odds[:, 0].tolist(), clusters=scored.subjects)
        out[name] = against_random(removed[:, 0], removed[:, 1:], scored.subjects) | {"base": asdict(base)}
    texts, subjects = ([x for scored in asked.values() for x in getattr(scored, k)] for k in ("texts", "subjects"))
    every = {site: torch.zeros(len(texts), len(mean), dtype=torch.bool) for site, mean in means.items()}
    for layer, head in chosen:
        every[Site(layer, "z")][:, head] = True
    kinds: dict[str, list[Edit | None]] = {"heads at their mean": [SetHeads(means, every)]}
    out["read_out"] = judged_subsample(study, "3_judged", shared, kinds, texts, subjects, reader.backend)
    return out


def attention(
    study: Study,
    reader: Reader,
    example: str,
    asked: Scored,
    chosen: list[Head],
    draws: list[list[Head]],
    n_heads: dict[int, int],
) -> dict[str, Any]:
    """Share of the chosen heads' attention by span, refused report prompts, beside random sets; one example token by token."""
    pool = [(layer, head) for layer in sorted({i for i, _ in chosen}) for head in range(n_heads[layer])]
    shown = study.template.encode(example)

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        masses = []
        with progress("reading attention", len(asked.texts)) as advance:
            for row in study.template.encode_all(asked.texts):
                masses.append(mass_by_span(reader.backend().attention(row, pool), (row.prefix, row.instruction)))
                advance(1)
        return {}, {"mass": torch.stack(masses), "example": reader.backend().attention(shown, chosen)}

    found = study.stage(
        "4_attention", {"prompts": asked.texts, "heads": chosen, "example": list(shown.ids)}, compute
    ).tensors
    mass = found["mass"].double()

    def of(heads: list[Head], span: int) -> Float[Tensor, " prompt"]:
        return mass[:, [pool.index(head) for head in heads], span].mean(1)

    spans = {
        name: against_random(of(chosen, i), torch.stack([of(draw, i) for draw in draws], 1), asked.subjects)
        for i, name in enumerate(SPANS)
    }
    return {
        "spans": spans,
        "order": list(SPANS),
        "heads": [mass[:, pool.index(head)].mean(0).tolist() for head in chosen],
        "tokens": [study.backend.tokenizer.decode([t]) for t in shown.ids],
        "ends": [shown.prefix, shown.instruction],
        "pattern": found["example"].tolist(),
        "n": len(asked.texts),
    }
