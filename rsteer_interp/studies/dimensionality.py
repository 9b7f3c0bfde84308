"""Study: how many dimensions carry refusal; `analyses/dimensionality.py` is its command line.

Subspaces come from the fit split, layers and pushes from select, every number from report; the subjects of the three are
disjoint, so each report prompt is of a subject that no subspace has seen.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rsteer_interp.errors import UserError
from rsteer_interp.studies.dimension_inputs import SETS, Inputs, groups_of
from rsteer_interp.studies.dimension_judged import check
from rsteer_interp.studies.dimension_results import Ablations, Dimensions, dimensions_of
from rsteer_interp.studies.dimension_steps import ablation, addition, union
from rsteer_interp.studies.dimension_variance import variance
from rsteer_interp.studies.dimension_words import WORDS, causal_finding, causal_tables
from rsteer_interp.studies.study import Study, interval

if TYPE_CHECKING:
    from analyses.dimensionality import Config

KIND = "dimensionality"
QUESTION = "How many dimensions carry refusal?"


def compute(study: Study, config: Config) -> tuple[dict[str, Any], None]:
    if not config.ks or min(config.ks) != 1 or config.random < 2 or not 0 < config.share <= 1:
        raise UserError("--ks begins with 1, --random is at least 2, --share above 0 and at most 1")
    study.check_applicable()
    inputs = Inputs(study, config)
    spread = _variance(inputs)
    found = Dimensions(
        lead=inputs.lead,
        read_layer=inputs.read_site.layer,
        shared_layer=inputs.shared_site.layer,
        share=config.share,
        ablation=Ablations(
            all=ablation(inputs, "all", inputs.sites, inputs.shared),
            one=ablation(inputs, "one", [inputs.read_site], {}),
        ),
        addition=addition(inputs),
        union=union(inputs),
        check=check(inputs),
    )
    data = {"base_rates": study.rates("report", *SETS), "variance": spread, **asdict(found)}
    return {**data, "finding": finding(found, spread)}, None


def _variance(inputs: Inputs) -> dict[str, Any]:
    study, config, site, report = inputs.study, inputs.config, inputs.read_site, inputs.report
    states, groups = study.states("report", *SETS)[site], groups_of(report)

    def compute() -> tuple[dict[str, Any], None]:
        sizes = (config.shuffles, config.splits, config.seed)
        return variance(states, groups, inputs.states[site], inputs.groups, inputs.ks, *sizes), None

    key = inputs.key(config.shuffles, config.splits, site.layer, inputs.ks)
    found = study.stage("2_variance", key | {"report": report}, compute).data
    return {name: value for name, value in found.items() if name != "seconds"}


def finding(found: Dimensions, variance: dict[str, Any]) -> str:
    """The answer in one paragraph; what is not distinguishable from random is said to be so, with its q."""
    parts = causal_finding(found)
    for name, contrast in variance["contrasts"].items():
        parts.append(
            f"At layer {found.read_layer}, the {WORDS[name]} exceed those of labels shuffled inside subjects in {contrast['beyond']} leading "
            f"dimension{'' if contrast['beyond'] == 1 else 's'} (n = {contrast['n']} subjects, p of the first = {contrast['p_first']:.2g}, at "
            f"least {1 / (1 + contrast['n_shuffles']):.2g})."
        )
    return " ".join(parts)


def tables(data: dict[str, Any]) -> list[Table]:
    """The causal side, then the variance side."""
    spread = Table(title=f"Variance at layer {data['read_layer']}, report split")
    for column in ("states", "n", "participation ratio", "eigenvalues over the noise edge"):
        spread.add_column(column)
    for name, found in data["variance"]["classes"].items():
        spread.add_row(name, str(found["n"]), interval(found["participation"], 1), str(found["over_edge"]))
    return [*causal_tables(dimensions_of(data)), spread]
