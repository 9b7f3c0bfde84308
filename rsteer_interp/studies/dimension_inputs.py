"""What the steps of the dimensionality study share: judged prompts, nested bases at every site, controls, and the read-out layer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import Evidence
from rsteer_interp.prompts import load_prompts
from rsteer_interp.reproduction.presets import MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored
from rsteer_interp.studies.dimension_runs import Bases, Bench, reach
from rsteer_interp.studies.layer_curves import correlations
from rsteer_interp.studies.study import NotApplicable, Study
from rsteer_interp.studies.subspaces import FAMILIES, Groups, families, random_basis, topics

if TYPE_CHECKING:
    from analyses.dimensionality import Config

SETS = (POLITICAL, MATCHED)
LEAST = 4  # fewest refusing prompts of select and of report, and fewest answered ones of report
_ISOTROPIC = 100  # seeds of isotropic draws come after those of the others


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
        self.refused = [self.report.texts[i] for i in self.report.refusing[: config.refusing]]
        self.answered = [self.report.texts[i] for i in answered[: config.answered]]
        self.pushed = [self.select.texts[i] for i in self.select.refusing[: config.refusing]]
        fewest = min(len(self.refused), len(self.answered), len(self.pushed))
        if fewest < LEAST:
            raise NotApplicable(
                f"not applicable: of the report prompts {len(self.report.refusing)} are refused and {len(answered)} answered, of "
                f"select {len(self.select.refusing)} are refused; removal is measured on {LEAST} of each or more"
            )

    @cached_property
    def families(self) -> dict[str, Bases]:
        """Bases by family, of those that have vectors at every site."""
        found = {s: families(self.states[s], self.groups, max(self.ks)) for s in self.sites}
        every: dict[str, Bases] = {name: {s: found[s][name] for s in self.sites} for name in FAMILIES}
        kept = {name: bases for name, bases in every.items() if reach(bases, self.ks)}
        if not kept:
            raise NotApplicable(
                "not applicable: 0 subjects have both prompts that are refused and prompts that are answered"
            )
        return kept

    @cached_property
    def controls(self) -> dict[str, list[Bases]]:
        """Draws of subspaces that should not carry refusal: topics (one), and the answered prompts' covariance (several)."""
        topic = {s: topics(self.states[s], self.groups, max(self.ks)) for s in self.sites}
        like = {s: self.evidence[s].complying for s in self.sites}
        drawn: list[Bases] = [
            {s: random_basis(max(self.ks), self.d_model, self._seed(i), like[s]) for s in self.sites}
            for i in range(self.config.random)
        ]
        every: dict[str, list[Bases]] = {"topics": [topic], "covariance": drawn}
        return {name: draws for name, draws in every.items() if all(reach(bases, self.ks) for bases in draws)}

    @cached_property
    def isotropic(self) -> list[Float[Tensor, "k d"]]:
        """Uniformly random bases, each the same at every site: `random` for each family in turn."""
        most, n = min(max(self.ks), self.d_model), self.config.random * len(self.families)
        return [random_basis(most, self.d_model, self._seed(_ISOTROPIC + i)) for i in range(n)]

    def isotropic_of(self, family: str) -> list[Float[Tensor, "k d"]]:
        """This family's own random bases, so that those of all families are independent draws."""
        place = list(self.families).index(family) * self.config.random
        return self.isotropic[place : place + self.config.random]

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
        rows = self.study.template.encode_all([*self.refused, *self.answered])
        return Bench.of(self.study.backend, rows, self.study.refusal_tokens, layer)

    @cached_property
    def base(self) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " answered"]]:
        """Refusal log-odds without an edit, of the refused report prompts and of the answered ones."""

        def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {}, {"log_odds": self.bench(1).measure(None)[0]}

        found = self.study.stage("3_base", self.key(), compute).tensors["log_odds"].double()
        return found[: len(self.refused)], found[len(self.refused) :]

    def key(self, *more: Any) -> dict[str, Any]:
        """What the outcome of every step depends on, and what one step adds."""
        return {
            "prompts": [self.refused, self.answered],
            "fit": self.fit,
            "tokens": self.study.refusal_tokens,
            "settings": [max(self.ks), self.config.random, self.config.seed, *more],
        }


def groups_of(scored: Scored) -> Groups:
    """What was done with each prompt, with its subject and pair: subject i of the sensitive set goes with i of the matched."""
    place = {name: list(dict.fromkeys(p.subject for p in load_prompts(name))) for name in SETS}
    pair = torch.tensor([place[name].index(s) for name, s in zip(scored.sets, scored.subjects, strict=True)])
    sensitive = torch.tensor([name == POLITICAL for name in scored.sets])
    return Groups(scored.confidence.sign().long(), sensitive, 2 * pair + sensitive.long(), pair)
