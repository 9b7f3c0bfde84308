"""What stands beside every direction, and the one that the figures draw."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import ESTIMATORS, Evidence
from rsteer_interp.directions.diagnosis import diagnose
from rsteer_interp.progress import progress
from rsteer_interp.reproduction.context import Context
from rsteer_interp.reproduction.vectors import Vectors, best_layer

RULE = "of the steered methods, the one whose halves agree best (split-half cosine over subjects, fit split)"


def reliability_report(
    context: Context, evidence: Mapping[Site, Evidence], vectors: Mapping[str, Vectors], scores: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each method's diagnosis at the layer that reads confidence best on select, and how well it reads it inside subjects.

    `scores` are the methods' layer reports. p is of the largest |r| over layers.
    """
    layers = {method: best_layer(v, context.backend.n_layers) for method, v in vectors.items()}

    def compute() -> tuple[dict[str, Any], None]:
        rows = {}
        with progress("halves of the subjects", len(vectors)) as advance:
            for method, v in vectors.items():
                site = Site(layers[method])
                rows[method] = asdict(diagnose(ESTIMATORS[method](), evidence[site], v.fitted[site], seed=context.seed))
                advance(1)
        return {"rows": rows}, None

    seen = next(iter(evidence.values()))
    key = {
        "confidence": seen.scores,
        "subjects": seen.subjects,
        "vectors": {m: [ESTIMATORS[m](), v.fitted[Site(layers[m])]] for m, v in vectors.items()},
    }
    rows = context.stage("2_reliability", key, compute).data["rows"]
    return {
        method: {"layer": layers[method], **rows[method], **_inside(scores[method], layers[method])}
        for method in vectors
    }


def _inside(scores: Mapping[str, Any], layer: int) -> dict[str, Any]:
    r = scores["within_subject_r"][scores["layers"].index(layer)]
    return {"within_subject": {"r": r, "p_max": scores["within_subject_p_max"], "n": scores["within_subject_n"]}}


def headline(rows: Mapping[str, Mapping[str, Any]], steered: Collection[str]) -> str:
    """The method by RULE; the first of those that tie, or where no halves could be fitted."""

    def agreement(method: str) -> float:
        found = rows[method]["split_half"]
        return -1.0 if found is None else float(found["value"])

    return max(steered, key=agreement)
