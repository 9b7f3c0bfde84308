"""The runs of the transfer matrix: where and how much to steer (select split), what each kind's direction removes (report split).

A row is a kind whose directions are used, a column a main kind whose refused prompts are measured. The null of a row is its own
edit, turned towards random directions: combinations of answered prompts' states, the same at every layer, which lie where the
states vary. Its lengths and the angles between its layers are kept, and so its dose at each layer and in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median_high
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import mean_norms
from rsteer_interp.backends.batching import Prepared
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.equal_norm import turned_edits
from rsteer_interp.evaluation import log_odds, log_odds_of_each
from rsteer_interp.interventions import ablate, add
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Split
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.statistics.rotation import nearest_turn
from rsteer_interp.studies.doses import Dosed, mean_doses
from rsteer_interp.studies.reader_checks import judged_subsample
from rsteer_interp.studies.refusal_kinds import Kind
from rsteer_interp.studies.study import Study
from rsteer_interp.studies.transfer import cells, dissociation, dose_for

GRID = (0.5, 1.0, 2.0, 4.0)  # doses tried for a matched removal, as multiples of the dose
LEAST = 4  # fewest refused prompts of a column


@dataclass(frozen=True)
class Prompts:
    """Refused prompts of several columns, in one list, with their subjects."""

    texts: list[str]
    columns: list[str]
    subjects: list[str]

    @classmethod
    def refused(cls, scored: Scored, kinds: Sequence[Kind], n: int) -> Prompts:
        """The first n refused prompts of each main kind's set."""
        found = {k.name: [i for i in scored.refusing if scored.sets[i] == k.refused][:n] for k in kinds}
        index = [i for of_kind in found.values() for i in of_kind]
        return cls(
            [scored.texts[i] for i in index],
            [name for name, of_kind in found.items() for _ in of_kind],
            [scored.subjects[i] for i in index],
        )

    def at(self, index: Sequence[int]) -> Prompts:
        texts, columns, subjects = ([each[i] for i in index] for each in (self.texts, self.columns, self.subjects))
        return Prompts(texts, columns, subjects)

    def only(self, names: Sequence[str]) -> Prompts:
        return self.at([i for i, c in enumerate(self.columns) if c in names])


def windows(n_layers: int) -> list[list[int]]:
    """Three stretches of a fifth of the blocks each, starting at a quarter, at half and at 0.7 of the depth."""
    width = max(1, round(0.2 * n_layers))
    starts = (max(1, round(share * n_layers)) for share in (0.25, 0.5, 0.7))
    return [[layer for layer in range(s, s + width) if layer < n_layers] for s in starts]


def random_directions(
    answered: dict[Site, Float[Tensor, "n d"]], n_draws: int, seed: int
) -> dict[Site, Float[Tensor, "draw d"]]:
    """Unit vectors with the covariance of the answered states: z @ (states - mean), z normal and the same at every site."""
    n = len(next(iter(answered.values())))
    z = torch.randn(n_draws, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = {}
    for site, states in answered.items():
        x = z @ (states.double() - states.double().mean(0))
        out[site] = (x / x.norm(dim=1, keepdim=True)).float()
    return out


@dataclass(eq=False)
class Transfer:
    """Everything that the runs share; `units[name]` are a kind's unit directions, `key` what every step depends on.

    `random` holds `turns` random directions for each kind, kind after kind.
    """

    study: Study
    units: dict[str, dict[Site, Float[Tensor, " d"]]]
    random: dict[Site, Float[Tensor, "draw d"]]
    turns: int
    select: Prompts
    report: Prompts
    dose: float
    key: dict[str, Any]

    @cached_property
    def scale(self) -> dict[str, Any]:
        """Mean |resid| per layer, and unedited log-odds of the select and report prompts."""
        sites = [Site(layer) for layer in range(1, self.study.n_layers)]

        def compute() -> tuple[dict[str, Any], None]:
            backend, tokens = self.study.backend, self.study.refusal_tokens
            norms = mean_norms(backend, self._rows(self.select), sites)
            base = {s: log_odds(backend, self._rows(p), tokens).tolist() for s, p in self._prompts.items()}
            return {"norms": {str(s.layer): norms[s] for s in sites}, "base": base}, None

        return self.study.stage("2_scale", {**self.key, "tokens": self.study.refusal_tokens}, compute).data

    @property
    def _prompts(self) -> dict[Split, Prompts]:
        return {"select": self.select, "report": self.report}

    def _rows(self, prompts: Prompts) -> Any:
        return self.study.template.encode_all(prompts.texts)

    def push(self, layers: Sequence[int], units: dict[Site, Tensor], dose: float) -> Edit:
        """Adds minus `dose` times the mean residual norm along the direction of each layer."""
        norms = self.scale["norms"]
        return add(
            {Site(n): units[Site(n)] for n in layers}, {Site(n): -dose * norms[str(n)] for n in layers}
        )  # fmt: skip

    def _removed(self, split: Split, names: Sequence[str] | None, start: int) -> Callable[[Sequence[Edit]], Tensor]:
        """A function of edits at or after `start`: refusal log-odds removed on the columns' prompts (None: on all)."""
        prompts = self._prompts[split]
        kept = [i for i, c in enumerate(prompts.columns) if names is None or c in names]
        base = torch.tensor([self.scale["base"][split][i] for i in kept], dtype=torch.float64)
        tokens, prepared = self.study.refusal_tokens, list[Prepared]()

        def run(edits: Sequence[Edit]) -> Float[Tensor, "edit prompt"]:
            if not prepared:  # made when the first run is not on disk
                rows = self._rows(prompts if names is None else prompts.only(names))
                prepared.append(self.study.backend.prepare(rows, start))
            return base - log_odds_of_each(self.study.backend, prepared[0], tokens, edits)

        return run

    @cached_property
    def window(self) -> dict[str, Any]:
        """The stretch of layers where the first two columns' own directions remove most from their own select prompts."""
        options, names = windows(self.study.n_layers), list(dict.fromkeys(self.select.columns))[:2]

        def compute() -> tuple[dict[str, Any], None]:
            found = []
            for layers in options:
                own = [
                    self._removed("select", [name], layers[0])([self.push(layers, self.units[name], self.dose)]).mean()
                    for name in names
                ]
                found.append(torch.stack(own).tolist())
            return {"removed": found}, None

        removed = self.study.stage("2_window", {**self.key, "windows": options, "dose": self.dose}, compute).data[
            "removed"
        ]
        best = max(range(len(options)), key=lambda i: sum(removed[i]))
        return {"layers": options[best], "options": options, "removed": removed, "columns": names}

    @cached_property
    def summed(self) -> dict[str, float]:
        """|sum over the window of mean |resid| times the unit direction|, by row: what a dose of 1 adds in the sum."""
        norms, layers = self.scale["norms"], self.window["layers"]
        sums = {name: sum(norms[str(n)] * v[Site(n)].double() for n in layers) for name, v in self.units.items()}
        return {name: float(torch.as_tensor(x).norm()) for name, x in sums.items()}

    @cached_property
    def rows(self) -> dict[str, tuple[Float[Tensor, "way edit prompt"], list[float]]]:
        """Removed on all report prompts by row: adding (way 0) and ablating (1), by the row itself (edit 0) and its nulls; and both
        ways' sizes, the same for all edits of a row: in the sum for adding, and mean |edit| / |resid| for ablating."""
        layers = self.window["layers"]
        sites, backend = [Site(n) for n in layers], self.study.backend
        key = {**self.key, "layers": layers, "dose": self.dose, "turns": self.turns}
        run = self._removed("report", None, layers[0])

        def row(name: str, first: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
            v = torch.stack([self.units[name][s] for s in sites])
            targets = [torch.stack([self.random[s][i] for s in sites]) for i in range(first, first + self.turns)]
            turned = [v.double() @ basis.T @ images for basis, images in (nearest_turn(v, u) for u in targets)]
            families = [dict(zip(sites, each.float(), strict=True)) for each in (v, *turned)]
            ablation = Dosed(ablate(families[0]))
            nulls = turned_edits(ablation.edit, backend.run, v, targets)
            removed = run([*(self.push(layers, each, self.dose) for each in families), ablation, *nulls])
            size = float(torch.stack([t[0] for t in mean_doses(ablation.totals).values()]).mean())
            return {"ablation": size}, {"removed": removed.view(2, len(families), -1)}

        found = {}
        with progress("steering with every kind's direction", len(self.units)) as advance:
            for index, name in enumerate(self.units):
                whole = {**key, "row": name, "first": index * self.turns}
                kept = self.study.stage(f"3_row_{name}", whole, partial(row, name, index * self.turns))
                sizes = [self.dose * self.summed[name], kept.data["ablation"]]
                found[name] = kept.tensors["removed"].double(), sizes
                advance(1)
        return found

    def _null(self, way: int) -> tuple[Float[Tensor, "draw prompt"], list[float]]:
        """Removed by the nulls of all rows, which are few of each, and their sizes."""
        removed = [x[way, 1:] for x, _ in self.rows.values()]
        return torch.cat(removed), [size[way] for _, size in self.rows.values() for _ in range(self.turns)]

    def equal_dose(self) -> dict[str, Any]:
        """Every row by addition at one dose and by ablation, on all report prompts, as cells against random directions."""
        columns, of = self.report.columns, (self.report.columns, self.report.subjects)
        base = torch.tensor(self.scale["base"]["report"])
        (added, pushes), (ablated, sizes) = (
            (torch.stack([x[way, 0] for x, _ in self.rows.values()]), [size[way] for _, size in self.rows.values()])
            for way in (0, 1)
        )
        return {
            "rows": list(self.units),
            "base": {c: float(base[[c == d for d in columns]].mean()) for c in dict.fromkeys(columns)},
            "add": cells(added, pushes, *self._null(0), *of),
            "ablate": cells(ablated, sizes, *self._null(1), *of),
            "ablation_sizes": sizes,
            "dissociation": self._pairs(dict(zip(self.units, ablated, strict=True)), sizes, *self._null(1)),
        }

    def judged(self) -> dict[str, dict[str, Any]]:
        """Log-odds against judged replies on the report prompts, under what the columns' own directions add and ablate."""
        layers, report = self.window["layers"], self.report
        names = [name for name in dict.fromkeys(report.columns) if name in self.units]
        kinds: dict[str, list[Edit | None]] = {
            "addition over a window": [self.push(layers, self.units[name], self.dose) for name in names],
            "ablation over a window": [ablate({Site(n): self.units[name][Site(n)] for n in layers}) for name in names],
        }
        subjects = [f"{c} {s}" for c, s in zip(report.columns, report.subjects, strict=True)]
        key = {**self.key, "layers": layers, "dose": self.dose, "rows": names}
        return judged_subsample(self.study, "3_judged", key, kinds, report.texts, subjects)

    def matched(self) -> dict[str, Any]:
        """Rows of main kinds again, each at the dose at which it removes the same from its own select prompts."""
        layers, names = self.window["layers"], list(dict.fromkeys(self.report.columns))
        grid = [m * self.dose for m in GRID]
        key = {**self.key, "layers": layers}

        def sweep(name: str) -> tuple[dict[str, Any], None]:
            edits = [self.push(layers, self.units[name], d) for d in grid]
            return {"removed": self._removed("select", [name], layers[0])(edits).mean(1).tolist()}, None

        curves = {
            name: self.study.stage(f"4_dose_{name}", {**key, "row": name, "grid": grid}, partial(sweep, name)).data["removed"]
            for name in names
        }  # fmt: skip
        target = median_high(max(curve[GRID.index(1.0)], 0.0) for curve in curves.values())
        doses = {name: dose_for(curve, grid, target) if target > 0 else None for name, curve in curves.items()}
        run = self._removed("report", None, layers[0])

        def at(name: str, dose: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {}, {"removed": run([self.push(layers, self.units[name], dose)])[0]}

        removed = {
            name: self.study.stage(f"4_matched_{name}", {**key, "row": name, "dose": dose}, partial(at, name, dose))
            .tensors["removed"]
            .double()
            for name, dose in doses.items()
            if dose is not None
        }
        table, known = None, [dose * self.summed[name] for name, dose in doses.items() if dose is not None]
        null = self._null(0)
        if removed:
            table = cells(torch.stack(list(removed.values())), known, *null, self.report.columns, self.report.subjects)
        return {
            "target": target,
            "doses": doses,
            "rows": list(removed),
            "add": table,
            "dissociation": self._pairs(removed, known, *null),
        }

    def _pairs(
        self, removed: dict[str, Tensor], sizes: Sequence[float], random: Tensor, random_sizes: Sequence[float]
    ) -> dict[str, Any]:
        """Dissociation of the first column's kind from each other one that has a row of its own."""
        size = dict(zip(removed, sizes, strict=True))
        names = [n for n in dict.fromkeys(self.report.columns) if n in removed]
        return {
            n: dissociation(
                torch.stack([removed[names[0]], removed[n]]),
                (size[names[0]] + size[n]) / 2,
                random,
                random_sizes,
                self.report.columns,
                self.report.subjects,
                (names[0], n),
            )
            for n in names[1:]
        }
