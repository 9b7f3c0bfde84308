"""Study: directions trained to mediate refusal, cones of them, and whether they are independent.

`analyses/refusal_cones.py` is its command line. Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rsteer_interp.backends.edits import Edit
from rsteer_interp.methods.cones import Effects, bypass_effects, fit_cones, sample_test
from rsteer_interp.methods.independence import dependence, independent_direction
from rsteer_interp.methods.rdo import RDO, RefusalLoss, ablation
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.progress import progress
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate
from rsteer_interp.studies.material import material_of
from rsteer_interp.studies.reader_checks import checks_table, checks_words, judged_subsample
from rsteer_interp.studies.study import NotApplicable, Study, interval

if TYPE_CHECKING:
    from analyses.refusal_cones import Config

KIND = "refusal_cones"
QUESTION = "How many directions mediate refusal when they are trained for it, and are they independent of each other?"
LABELS = {"dim": "Difference of means", "rdo": "Trained (RDO)", "independent": "Trained, independent of RDO"}
LEAST = 4  # fewest refused report prompts


@dataclass(frozen=True)
class Ablated:
    """Fall of the refusal log-odds (nats) when a direction is ablated everywhere, on refused prompts of the removed and of the
    kept set, and mean falls of random edits of equal size on the removed set's."""

    name: str
    removed: Estimate
    kept: Estimate
    null: tuple[float, ...]
    p: float


def compute(study: Study, config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    study.check_applicable()
    texts = {name: _refused(study, name, config.prompts) for name in (config.remove, config.keep)}
    fewest = min(texts, key=lambda name: len(texts[name]))
    if len(texts[fewest]) < LEAST:
        raise NotApplicable(
            f"not applicable: {len(texts[fewest])} report prompts of '{fewest}' are refused; effects are measured on {LEAST} or more"
        )
    found = _directions(study, config)
    every = {name: v for name, v in found.items() if name != "cone"}
    cone = found["cone"]
    every |= {f"cone {i + 1}": v for i, v in enumerate(cone)}
    subjects = _subjects(study, texts)
    key = {
        "prompts": texts,
        "subjects": subjects,
        "tokens": study.refusal_tokens,
        "directions": found,
        "seed": config.seed,
    }

    def effects() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with progress("ablating trained directions", len(every) + 1) as advance:
            rows = [_ablated(study, config, name, v, texts, subjects, advance) for name, v in every.items()]
            test = sample_test(cone, _effects(study, texts[config.remove]), config.drawn, config.seed)
            advance(1)
        return {"directions": [asdict(row) for row in rows], "cone": asdict(test)}, {}

    measured = study.stage("2_effects", {**key, "drawn": config.drawn, "random": config.random}, effects).data
    pairs = [("dim", "rdo"), ("rdo", "independent")]
    pairs += [(f"cone {i + 1}", f"cone {j + 1}") for i, j in combinations(range(len(cone)), 2)]
    rows = study.template.encode_all(texts[config.remove])

    def independence() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with progress("representational independence", len(pairs)) as advance:
            out = []
            for a, b in pairs:
                one = dependence(study.backend, rows, every[a], every[b], n_random=config.random, seed=config.seed)
                out.append({"first": a, "second": b, **asdict(one)})
                advance(1)
        return {"pairs": out}, {}

    related = study.stage("3_independence", {**key, "pairs": pairs, "random": config.random}, independence).data
    subjects = _subjects(study, texts)
    prompts, of = ([x for name in texts for x in part[name]] for part in (texts, subjects))
    ablations: list[Edit | None] = [ablation(study.backend, v.float()) for v in every.values()]
    judged = judged_subsample(study, "4_judged", key, {"ablation everywhere": ablations}, prompts, of)
    data = {
        "read_out": judged,
        "directions": measured["directions"],
        "cone": {**measured["cone"], "dimension": len(cone)},
        "pairs": related["pairs"],
        "n": {name: len(part) for name, part in texts.items()},
        "n_random": config.random,
        "names": {"removed": config.remove, "kept": config.keep},
        "label": {name: _label(name) for name in every},
    }
    return {**data, "finding": finding(data)}, found


def _directions(study: Study, config: Config) -> dict[str, Tensor]:
    """Unit directions by name, and the cone's basis; trained once and kept."""
    sets = (config.remove, config.contrast, config.keep, config.ordinary)
    material = material_of(study, *sets)
    method = RDO(n_prompts=config.trained, steps=config.steps)

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        loss, dim = method.loss(material)
        with progress("training directions", config.dimension + 1) as advance:
            trained = fit_cones(dim, loss, config.dimension, method.descent, samples=1, seed=config.seed)
            advance(config.dimension)
            (rdo,) = trained[0].value
            other = _independent(study, loss, rdo, dim, method, material.seed)
            advance(1)
        return {"losses": [list(one.losses) for one in trained]}, {
            "dim": (dim / dim.norm()).float(),
            "rdo": rdo.float(),
            "independent": other.float(),
            "cone": trained[-1].value.float(),
        }

    prompts = [[(name, x.texts, x.confidence) for name, x in part.items()] for part in (material.fit, material.select)]
    key = {"sets": sets, "prompts": prompts, "method": method, "dimension": config.dimension, "seed": config.seed}
    return dict(study.stage("1_directions", {**key, "tokens": study.refusal_tokens}, compute).tensors)


def _independent(
    study: Study, loss: RefusalLoss, rdo: Float[Tensor, " d"], dim: Float[Tensor, " d"], method: RDO, seed: int
) -> Float[Tensor, " d"]:
    """Trained from the part of the difference of means that the first left, with a random part where that is small."""
    noise = random_unit_vectors(1, len(dim), seed)[0]
    start = dim / dim.norm() + 0.5 * noise
    rows = [row for batch in loss.refused for row in batch.rows][: method.n_prompts]
    return independent_direction(study.backend, [rdo], start, loss, rows, method.descent).value[0]


def _effects(study: Study, texts: Sequence[str]) -> Effects:
    return bypass_effects(study.backend, study.template.encode_all(texts), study.refusal_tokens)


def _ablated(
    study: Study,
    config: Config,
    name: str,
    v: Float[Tensor, " d"],
    texts: Mapping[str, list[str]],
    subjects: Mapping[str, list[str]],
    advance: Any,
) -> Ablated:
    random = random_unit_vectors(config.random, len(v), config.seed + 1).float()
    own, *null = _effects(study, texts[config.remove])(v, random)
    (kept,) = _effects(study, texts[config.keep])(v, random[:0])
    beside = Beside.of(float(own.mean()), [float(x.mean()) for x in null])
    advance(1)
    return Ablated(
        name,
        Estimate.of(own.numpy(), clusters=subjects[config.remove], seed=config.seed),
        Estimate.of(kept.numpy(), clusters=subjects[config.keep], seed=config.seed),
        beside.draws,
        beside.p("greater"),
    )


def _refused(study: Study, name: str, n: int) -> list[str]:
    base = study.replies("report", name)
    return [text for text, refused in zip(base.texts, base.refused.tolist(), strict=True) if refused][:n]


def _subjects(study: Study, texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    found = {}
    for name, chosen in texts.items():
        scored = study.scored("report", name)
        subject = dict(zip(scored.texts, scored.subjects, strict=True))
        found[name] = [subject[text] for text in chosen]
    return found


def _label(name: str) -> str:
    return LABELS.get(name, f"Cone, basis vector {name.removeprefix('cone ')}")


def finding(data: Mapping[str, Any]) -> str:
    by_name, cone = {row["name"]: row for row in data["directions"]}, data["cone"]
    rdo, dim, other = (by_name[name] for name in ("rdo", "dim", "independent"))
    pair = next(p for p in data["pairs"] if (p["first"], p["second"]) == ("rdo", "independent"))
    mean = sum(cone["cone"]) / len(cone["cone"])
    return (
        f"Ablated everywhere, the trained direction takes {interval(rdo['removed'])} nats of refusal log-odds (n = {rdo['removed']['n']} "
        f"refused {data['names']['removed']} prompts; {len(rdo['null'])} random edits of its size {min(rdo['null']):.2f} to "
        f"{max(rdo['null']):.2f}, p = {rdo['p']:.2g}), the difference of means {interval(dim['removed'])}; of refused "
        f"{data['names']['kept']} prompts the trained one takes {interval(rdo['kept'])}. {len(cone['cone'])} directions drawn from a cone of "
        f"{cone['dimension']} dimensions take {mean:.2f} on average ({min(cone['cone']):.2f} to {max(cone['cone']):.2f}), random edits of "
        f"their size {min(cone['random']):.2f} to {max(cone['random']):.2f} (Mann-Whitney p = {cone['p']:.2g}). A direction trained to be "
        f"independent of the first takes {interval(other['removed'])}; their cosine is {pair['cosine']:.2f}, their RepInd {pair['value']:.2g} "
        f"(random directions {min(pair['null']):.2g} to {max(pair['null']):.2g}, p = {pair['p']:.2g}). {checks_words(data['read_out'])}"
    )


def tables(data: dict[str, Any]) -> list[Table]:
    """Effects by direction, and independence by pair."""
    effects = Table(
        title=f"Fall of the refusal log-odds when ablated everywhere, nats (beside {data['n_random']} random edits of equal size)"
    )
    for column in ("direction", data["names"]["removed"], data["names"]["kept"], "random", "p"):
        effects.add_column(column)
    for row in data["directions"]:
        effects.add_row(
            data["label"][row["name"]], interval(row["removed"]), interval(row["kept"]),
            f"{min(row['null']):.2f} to {max(row['null']):.2f}", f"{row['p']:.2g}",
        )  # fmt: skip
    pairs = Table(title="Representational independence (RepInd; 0: independent)")
    for column in ("pair", "cosine", "RepInd", "random", "p (as dependent)"):
        pairs.add_column(column)
    for row in data["pairs"]:
        pairs.add_row(
            f"{data['label'][row['first']]} / {data['label'][row['second']]}", f"{row['cosine']:.2f}", f"{row['value']:.2g}",
            f"{min(row['null']):.2g} to {max(row['null']):.2g}", f"{row['p']:.2g}",
        )  # fmt: skip
    return [effects, pairs, checks_table(data["read_out"])]
