"""What the steps of the dimensionality study share: judged prompts, nested bases at every site, controls, and two layers.

Bases come from the fit split. Layers come from select: the read-out layer, and the one whose basis is ablated at all sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import Evidence
from rsteer_interp.evaluation import log_odds_of_each
from rsteer_interp.interventions import ablate
from rsteer_interp.progress import progress
from rsteer_interp.prompts import load_prompts
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.statistics.rotation import draw_seeds, random_frame
from rsteer_interp.studies.dimension_results import Basis
from rsteer_interp.studies.dimension_runs import Bases, Bench, reach
from rsteer_interp.studies.dimension_sweep import Base
from rsteer_interp.studies.layer_curves import correlations
from rsteer_interp.studies.study import NotApplicable, Study
from rsteer_interp.studies.subspace_union import leading
from rsteer_interp.studies.subspaces import FAMILIES, Groups, families, like_states, topics

if TYPE_CHECKING:
    from analyses.dimensionality import Config

SETS = (POLITICAL, MATCHED)
LEAST = 4  # fewest refusing prompts of select and of report, and fewest answered ones of report
_FRAMES = 100  # seeds of these come after those of other draws


class Inputs:
    """One run's inputs; what is costly is made when it is asked for, and kept."""

    def __init__(self, study: Study, config: Config) -> None:
        self.study, self.config = study, config
        self.ks = tuple(sorted(set(config.ks)))
        self.fit, self.select, self.report = (study.scored(s, *SETS) for s in ("fit", "select", "report"))
        self.groups = groups_of(self.fit)
        self.states = study.states("fit", *SETS)
        self.sites = [s for s in study.sites if s.layer < study.n_layers]
        self.evidence = {s: Evidence(self.states[s], self.fit.confidence, site=s) for s in self.sites}
        answered = [i for i, c in enumerate(self.report.confidence.tolist()) if c < 0]
        refused, answered = (over_subjects(self.report, found) for found in (self.report.refusing, answered))
        self.refused = part(self.report, refused[: config.refusing])
        self.answered = part(self.report, answered[: config.answered])
        self.judged = part(self.report, refused[: config.judged]), part(self.report, answered[: config.judged])
        self.pushed = part(self.select, self.select.refusing[: config.refusing]).texts
        fewest = min(len(self.refused.texts), len(self.answered.texts), len(self.pushed))
        if fewest < LEAST or min(len(set(each.subjects)) for each in (self.refused, self.answered)) < 2:
            raise NotApplicable(
                f"not applicable: of the report prompts {len(refused)} are refused and {len(answered)} answered, of "
                f"select {len(self.select.refusing)} are refused; removal is measured on {LEAST} of each or more, of two subjects"
            )

    @cached_property
    def families(self) -> dict[str, Bases]:
        """Each site's own bases by family, of those that have vectors at every site."""
        found = {s: families(self.states[s], self.groups, max(self.ks)) for s in self.sites}
        every: dict[str, Bases] = {name: {s: found[s][name] for s in self.sites} for name in FAMILIES}
        kept = {name: bases for name, bases in every.items() if reach(bases, self.ks)}
        if not kept:
            raise NotApplicable(
                "not applicable: 0 subjects have both prompts that are refused and prompts that are answered"
            )
        return kept

    @property
    def lead(self) -> str:
        """The family that is compared with one basis for all sites."""
        return next(iter(self.families))

    @cached_property
    def shared_site(self) -> Site:
        """Whose first row, ablated at all sites, removes most refusal from the select prompts (Arditi et al., section 2.3)."""
        directions = {s: self.families[self.lead][s][0] for s in self.sites}
        backend, rows = self.study.backend, self.study.template.encode_all(self.pushed)

        def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
            edits = [ablate(dict.fromkeys(self.sites, v)) for v in directions.values()]
            with progress("one layer's direction at all sites", len(rows)) as advance:
                found = log_odds_of_each(backend, backend.prepare(rows, 1), self.study.refusal_tokens, edits, advance)
            return {}, {"log_odds": found}

        key = self.key(self.lead) | {"select": self.pushed}
        found = self.study.stage("3_layer", key, compute).tensors["log_odds"]
        return self.sites[int(found.mean(1).argmin())]

    @cached_property
    def shared(self) -> dict[Basis, Bases]:
        """The leading family as one basis for all sites: that of one layer, and the leading rows of all."""
        own = self.families[self.lead]
        return {
            "layer": dict.fromkeys(self.sites, own[self.shared_site]),
            "global": dict.fromkeys(self.sites, leading(own)),
        }

    @cached_property
    def controls(self) -> dict[str, list[Bases]]:
        """Draws of subspaces that should not carry refusal: topics (one), and the answered prompts' covariance (several)."""
        topic = {s: topics(self.states[s], self.groups, max(self.ks)) for s in self.sites}
        like = {s: self.evidence[s].complying for s in self.sites}
        drawn: list[Bases] = [
            {s: like_states(max(self.ks), self._seed(i), like[s]) for s in self.sites}
            for i in range(self.config.controls)
        ]
        every: dict[str, list[Bases]] = {"topics": [topic], "covariance": drawn}
        return {name: draws for name, draws in every.items() if all(reach(bases, self.ks) for bases in draws)}

    @cached_property
    def rotations(self) -> list[Float[Tensor, "d d"]]:
        """Random rotations of the stream, the same for every ablation: each null is then of the same draws."""
        seeds = draw_seeds(self.config.random, self._seed(_FRAMES))
        return [random_frame(self.d_model, self.d_model, seed).float() for seed in seeds]

    @cached_property
    def frames(self) -> list[Float[Tensor, "k d"]]:
        """Random bases at one site: the null of the push, which knows the span alone."""
        most = min(max(self.ks), self.d_model)
        return [random_frame(most, self.d_model, self._seed(_FRAMES + i)) for i in range(self.config.random)]

    @property
    def d_model(self) -> int:
        return self.study.backend.d_model

    def _seed(self, i: int) -> int:
        return 1000 * self.config.seed + i

    def gap(self, site: Site) -> Float[Tensor, " d"]:
        """The unit mean difference of the fit split."""
        evidence = self.evidence[site]
        gap: Tensor = evidence.refusing.mean - evidence.complying.mean
        return gap.div(gap.norm())

    @cached_property
    def read_site(self) -> Site:
        """Where the mean difference correlates best with the verdicts of the select split."""
        states = self.study.states("select", *SETS)
        p = torch.stack([states[s].double() @ self.gap(s) for s in self.sites], 1)
        return self.sites[int(correlations(p[None], self.select.confidence[None])[0].argmax())]

    def bench(self, layer: int) -> Bench:
        """The report prompts, refused ones first, for edits at or after a layer."""
        rows = self.study.template.encode_all([*self.refused.texts, *self.answered.texts])
        return Bench.of(self.study.backend, rows, self.study.refusal_tokens, layer)

    @cached_property
    def base(self) -> Base:
        """Refusal log-odds without an edit, of the refused report prompts and of the answered ones."""

        def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {}, {"log_odds": self.bench(1).measure(None)[0]}

        found = self.study.stage("3_base", self.key(), compute).tensors["log_odds"].double()
        n = len(self.refused.texts)
        return Base(found[:n], found[n:], self.refused.subjects, self.answered.subjects)

    def key(self, *more: Any) -> dict[str, Any]:
        """What the outcome of every step depends on, and what one step adds."""
        return {
            "prompts": [self.refused.texts, self.answered.texts],
            "fit": self.fit,
            "tokens": self.study.refusal_tokens,
            "settings": [max(self.ks), self.config.random, self.config.controls, self.config.seed, *more],
        }


def part(scored: Scored, index: Sequence[int]) -> Scored:
    """Some of the prompts."""
    texts, sets, subjects = ([each[i] for i in index] for each in (scored.texts, scored.sets, scored.subjects))
    return Scored(texts, sets, subjects, scored.confidence[list(index)])


def over_subjects(scored: Scored, index: Sequence[int]) -> list[int]:
    """The prompts in the order first of each subject, second of each, ...: the first few are of as many subjects as can be."""
    seen: Counter[str] = Counter()
    turns = []
    for i in index:
        turns.append((seen[scored.subjects[i]], i))
        seen[scored.subjects[i]] += 1
    return [i for _, i in sorted(turns)]


def groups_of(scored: Scored) -> Groups:
    """What was done with each prompt, with its subject and pair: subject i of the sensitive set goes with i of the matched."""
    place = {name: list(dict.fromkeys(p.subject for p in load_prompts(name))) for name in SETS}
    pair = torch.tensor([place[name].index(s) for name, s in zip(scored.sets, scored.subjects, strict=True)])
    sensitive = torch.tensor([name == POLITICAL for name in scored.sets])
    return Groups(scored.confidence.sign().long(), sensitive, 2 * pair + sensitive.long(), pair)
