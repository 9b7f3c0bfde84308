"""What lies in a results folder about one model: its reproduction and its studies, each with its figures.

A study is any result whose data has a `question`, with a `finding` or the reason why there is none; nothing here knows
the studies by name, except for the order in which known ones are shown.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rsteer_interp.errors import UserError
from rsteer_interp.report.schema import KIND, Reproduced, read_reproduction

if TYPE_CHECKING:
    from rsteer_interp.provenance import Provenance
    from rsteer_interp.results import Result

_FIGURES = ("claim_table", "frontier", "scores", "fig3_pca", "fig5_layers")
_STUDIES = (
    "layer_concentration",
    "dimensionality",
    "patch_effects",
    "component_attribution",
    "refusal_geometry",
    "refusal_cones",
    "steer",
    "random_audit",
    "embedding_noise",
    "compare_methods",
    "checkpoint_shift",
)


class StudyModel(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    n_layers: int
    d_model: int


class StudyData(BaseModel):
    """What every study's result holds, whatever else is in it."""

    model_config = ConfigDict(frozen=True)

    applicable: bool
    question: str
    finding: str | None = None
    reason: str | None = None
    model: StudyModel
    seconds: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> StudyData:
        if not (self.finding if self.applicable else self.reason):
            raise ValueError("has neither a finding nor a reason for having none")
        return self


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as it was saved: PNG in base64, title and caption."""

    title: str
    caption: str
    png: str = field(repr=False)


@dataclass(frozen=True)
class FoundStudy:
    name: str  # of its folder
    kind: str
    data: StudyData
    counts: dict[str, int]
    provenance: Provenance
    figures: list[DrawnFigure]


@dataclass(frozen=True)
class Collection:
    """Everything about one model. `left_out` says in a line each what else lies there and is not shown."""

    reproduction: Reproduced | None = None
    reproduction_figures: list[DrawnFigure] = field(default_factory=list)
    studies: list[FoundStudy] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_figures(folder: Path) -> list[DrawnFigure]:
    """The figures in a folder: every PNG with a JSON of its title and caption beside it."""
    found = {png.stem: png for png in sorted(folder.glob("*.png")) if png.with_suffix(".json").is_file()}
    out = []
    for name in _known_first(list(found), _FIGURES):
        words = json.loads(found[name].with_suffix(".json").read_text(encoding="utf-8"))
        png = base64.b64encode(found[name].read_bytes()).decode()
        out.append(DrawnFigure(str(words.get("title", name)), str(words.get("caption", "")), png))
    return out


def collect_reproduction(folder: Path | str) -> Collection:
    """A "reproduce" result and its figures, alone."""
    result = read_reproduction(folder)
    return Collection(result, read_figures(Path(folder) / "figures") if result.data.applicable else [])


def collect(root: Path | str, fingerprint: str | None = None) -> Collection:
    """The results in the folders of `root` that belong to one model.

    That is the model with this fingerprint; else that of ROOT/reproduce; else the one with the most results.
    """
    root = Path(root)
    found, left_out = _results(root)
    model = fingerprint or _model(found)
    if not any(_of(r) == model for r in found):
        if fingerprint is not None and found:
            there = ", ".join(sorted({f"{_of(r)} ({r.provenance.model_name})" for r in found}))
            raise UserError(f"'{root}' holds no result of the model with fingerprint {fingerprint}; it holds {there}")
        raise UserError(f"'{root}' holds no study and no reproduction; run make demo or make studies first")
    reproduction, figures, studies = None, [], []
    for result in found:
        name = result.folder.name
        if _of(result) != model:
            left_out.append(f"{name}: of another model, {result.provenance.model_name} (fingerprint {_of(result)})")
        elif result.kind != KIND:
            try:
                studies.append(_study(result))
            except ValidationError as error:
                left_out.append(f"{name}: {error.errors()[0]['msg']}")
        elif reproduction is not None:
            left_out.append(f"{name}: another reproduction on this model")
        else:
            alone = collect_reproduction(result.folder)
            reproduction, figures = alone.reproduction, alone.reproduction_figures
    order = _known_first([s.kind for s in studies], _STUDIES)
    studies.sort(key=lambda study: order.index(study.kind))
    return Collection(reproduction, figures, studies, left_out)


def _results(root: Path) -> tuple[list[Result], list[str]]:
    """Reproductions and studies in the folders of `root`, ROOT/reproduce first; and what could not be read."""
    from rsteer_interp.results import load_result

    found, damaged = [], []
    folders = sorted(path.parent for path in root.glob("*/result.json"))
    for folder in sorted(folders, key=lambda folder: folder.name != KIND):
        try:
            result = load_result(folder)
        except UserError:
            damaged.append(f"{folder.name}: cannot be read")
            continue
        if result.kind == KIND or "question" in result.data:
            found.append(result)
    return found, damaged


def _model(found: list[Result]) -> str | None:
    first = next((_of(r) for r in found if r.folder.name == KIND and r.kind == KIND), None)
    counted = Counter(_of(r) for r in found).most_common(1)
    return first or (counted[0][0] if counted else None)


def _of(result: Result) -> str | None:
    return result.provenance.model_fingerprint


def _study(result: Result) -> FoundStudy:
    data = StudyData.model_validate(result.data)
    figures = read_figures(result.folder / "figures") if data.applicable else []
    return FoundStudy(result.folder.name, result.kind, data, _counts(result.data), result.provenance, figures)


def _counts(data: dict[str, Any]) -> dict[str, int]:
    """Numbers of prompts that the result states: the n of its base rates, and every whole number or table named n or n_..."""
    rates = data.get("base_rates")
    found = {name: rate["n"] for name, rate in (rates if isinstance(rates, dict) else {}).items()}
    for name, value in data.items():
        if name == "n" or name.startswith("n_"):
            table = value if isinstance(value, dict) else {"": value}
            found |= {f"{name} {key}".strip(): n for key, n in table.items()}
    return {name: n for name, n in found.items() if isinstance(n, int)}


def _known_first(names: list[str], known: tuple[str, ...]) -> list[str]:
    return [*(name for name in known if name in names), *(name for name in names if name not in known)]
