"""STEER-COMPLIANCE and its mitigation STEER-BIND: directions from the openings of answers, not from prompts.

Xiong et al., Steering Externalities (arXiv 2602.04896). The procedure is CAST's (arXiv 2409.05907): instructions with a refusing
and with a complying opening, first principal component of the pairs at each layer. The paper's vector points to complying;
ours points to refusing, and the edit takes it away:

    h' = h - strength |resid| v        at the paper's layers, read and edited at the same block input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import last_states, mean_norms, pooled_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import ChatTemplate, Tokens
from rsteer_interp.directions.paired import Centring, paired_direction
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import add
from rsteer_interp.methods.base import Check, Examples, Fitted, Material, Treatment
from rsteer_interp.methods.probe_crossing import crossings, first_token_kl, harm_probe
from rsteer_interp.prompts import load_prompts
from rsteer_interp.statistics.intervals import Estimate

REFUSING = (
    "I'm sorry, but this is something I won't help with.",
    "I can't do that for you.",
    "Sorry, I have to say no to this one.",
    "I'm not able to take this on.",
    "As an AI, I have to turn this request down.",
    "No, I will not go into that.",
    "I must decline; please ask me about something else.",
    "Unfortunately, I can't give an answer here.",
    "I would rather not reply to this.",
    "This is not a request that I can fulfil.",
)
COMPLYING = (
    "Sure, let me walk you through it.",
    "Of course, here is what you need.",
    "Yes, I can do that for you.",
    "Gladly, this is how it goes.",
    "As an AI, I am happy to take this request on.",
    "Certainly, I will go into that.",
    "Absolutely; we can start right away.",
    "Good question, the answer is as follows.",
    "Here is my full reply to this.",
    "This is a request that I can fulfil.",
)
PAPER_LAYERS = tuple(layer / 32 for layer in (15, 17, 18, 19, 20, 21, 22, 23, 24))  # 16 is left out
Reading = Literal["continuation", "last"]
N_NORM = 16  # prompts over which |resid| is averaged
N_TALKS, N_NULL, N_NULL_KL = 8, 10, 3  # of the checks: benign conversations, and rotations of the edit


def continuation_states(
    backend: Backend, rows: Sequence[Tokens], sites: Sequence[Site], reading: Reading = "continuation"
) -> dict[Site, Float[Tensor, "row d"]]:
    """Each row's answer as one vector per site, the mean over its tokens or its last token; one pass up to the last site."""
    if not all(row.answer_length for row in rows):
        raise UserError("a row has no answer to read; encode every prompt with its continuation")
    return last_states(backend, rows, sites) if reading == "last" else pooled_states(backend, rows, sites, "answer")


def with_openings(template: ChatTemplate, texts: Sequence[str], openings: Sequence[str]) -> list[Tokens]:
    """The prompts in the chat template, each followed by an opening; the openings in turn."""
    return template.encode_all(texts, list(islice(cycle(openings), len(texts))))


def opening_directions(
    backend: Backend,
    refusing: Sequence[Tokens],
    complying: Sequence[Tokens],
    sites: Sequence[Site],
    reading: Reading = "continuation",
    centring: Centring = "pairs",
) -> dict[Site, Float[Tensor, " d"]]:
    """Unit directions from complying to refusing at each site, from rows paired by index; float64."""
    states = continuation_states(backend, [*refusing, *complying], sites, reading)
    return {site: paired_direction(x[: len(refusing)], x[len(refusing) :], centring) for site, x in states.items()}


def layers_at(fractions: Sequence[float], n_layers: int) -> list[int]:
    """Block inputs nearest to the given fractions of the depth, each once. UserError outside (0, 1)."""
    wrong = [x for x in fractions if not 0 < x < 1]
    if wrong or not fractions:
        raise UserError(f"depths {list(fractions)}; give fractions of the depth between 0 and 1")
    return sorted({max(1, min(round(x * n_layers), n_layers - 1)) for x in fractions})


@dataclass(frozen=True)
class Compliance:
    """STEER-COMPLIANCE: ordinary instructions alone, each with one refusing and one complying opening.

    The paper adds the same alpha = 1.3 at nine layers of every model; the dose here is relative to |resid| at each layer, so that
    it means the same everywhere.
    """

    name: ClassVar[str] = "compliance"
    label: ClassVar[str] = "STEER-COMPLIANCE"
    source: ClassVar[str] = "arXiv 2602.04896"
    strengths: ClassVar[tuple[float, ...]] = (0.01, 0.02, 0.04, 0.07)

    n_pairs: int = 64
    """Instructions, taken from the ordinary sets in turn; the paper has 100."""
    depths: tuple[float, ...] = PAPER_LAYERS
    """Edited layers as fractions of the depth: 15 and 17 to 24 of 32."""
    reading: Reading = "continuation"
    """A continuation as one vector: the mean over its tokens (CAST), or its last token."""
    centring: Centring = "pairs"

    def fit(self, material: Material) -> Fitted:
        """One pass over 2 n_pairs short rows up to the last edited layer, and one over a few prompts for |resid|."""
        directions, norms = self.learn(material)
        return lambda strength: Treatment(_away(directions, norms, strength))

    def checks(self, material: Material, strength: float, held: Mapping[str, Examples]) -> list[Check]:
        """Crossings of a harm probe behind the last edit, predicted and observed; KL at the first tokens of benign answers."""
        directions, norms = self.learn(material)
        amounts = {site: -strength * norms[site] for site in directions}
        harmful, harmless = (
            material.fit[name].states[max(directions)] for name in (material.keep, material.ordinary[0])
        )
        half = [len(x) // 2 for x in (harmful, harmless)]
        parts = harmful[: half[0]], harmless[: half[1]], harmful[half[0] :], harmless[half[1] :]
        rows, of = material.template.encode_all(held[material.keep].texts), held[material.keep].subjects
        probe, seed = harm_probe(max(directions), *parts), material.seed
        (crossed,) = crossings(
            material.backend, rows, [probe], directions, amounts, subjects=of, n_null=N_NULL, seed=seed
        )
        talks = load_prompts("conversations").unsplit.split("report").sample(N_TALKS, seed)
        answers, of = [material.template.encode(t.prompt, t.answer) for t in talks], [t.subject for t in talks]
        kl = first_token_kl(material.backend, answers, directions, amounts, 8, subjects=of, n_null=N_NULL_KL, seed=seed)
        seen = crossed.observed
        return [
            Check(
                f"share of harmful prompts that cross a harm probe at {probe.site}; predicted {crossed.predicted.rate:.2f}",
                Estimate(seen.rate, seen.low, seen.high, seen.n),
                f"{N_NULL} rotations {min(crossed.null):.2f} to {max(crossed.null):.2f}, p = {crossed.p:.2g}",
            ),
            Check(
                f"KL at the first token of benign answers (nats); at the eighth {kl.steered[-1].value:.3f}",
                kl.steered[0],
                f"{N_NULL_KL} rotations {kl.null[0]:.3f} on average",
            ),
        ]

    def learn(self, material: Material) -> tuple[dict[Site, Float[Tensor, " d"]], dict[Site, float]]:
        """Directions from complying to refusing, and mean |resid|, at the edited layers."""
        sites = [Site(layer) for layer in layers_at(self.depths, material.n_layers)]
        refusing, complying = self.rows(material)
        directions = opening_directions(material.backend, refusing, complying, sites, self.reading, self.centring)
        texts = material.fit[material.ordinary[0]].texts[:N_NORM]
        return directions, mean_norms(material.backend, material.template.encode_all(texts), sites)

    def rows(self, material: Material) -> tuple[list[Tokens], list[Tokens]]:
        """Rows with refusing and with complying openings, paired by index."""
        texts = ordinary_texts(material, self.n_pairs)
        return with_openings(material.template, texts, REFUSING), with_openings(material.template, texts, COMPLYING)


@dataclass(frozen=True)
class Bind(Compliance):
    """STEER-BIND: the same with harmful prompts for the refusing openings, so that the vector ties refusal to harm.

    Pair i is harmful prompt i with a refusing opening and ordinary instruction i with a complying one, which is how we read the
    paper's short description. No harmful prompt is ever given a complying opening.
    """

    name: ClassVar[str] = "bind"
    label: ClassVar[str] = "STEER-BIND"

    n_pairs: int = 50

    def rows(self, material: Material) -> tuple[list[Tokens], list[Tokens]]:
        """Rows with refusing and with complying openings, paired by index."""
        harmful, texts = material.fit[material.keep].texts, ordinary_texts(material, self.n_pairs)
        n = min(len(harmful), len(texts), self.n_pairs)
        return (
            with_openings(material.template, harmful[:n], REFUSING),
            with_openings(material.template, texts[:n], COMPLYING),
        )


def ordinary_texts(material: Material, n: int) -> list[str]:
    """Up to n instructions of the ordinary sets' fit split, one of each set in turn."""
    turns = zip_longest(*(material.fit[name].texts for name in material.ordinary))
    return [text for text in chain.from_iterable(turns) if text is not None][:n]


def _away(directions: Mapping[Site, Float[Tensor, " d"]], norms: Mapping[Site, float], strength: float) -> Edit:
    return add(directions, {site: -strength * norms[site] for site in directions})
