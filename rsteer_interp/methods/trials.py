"""Trials: what each candidate does on the select split, measured once for every selector that asks.

Selectors differ in what they read from a run with a candidate; here all of it is kept. A first grid has every position and every
`stride`-th layer; a selector then tries layers between around its best (`chosen_among`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.activations import RecordLast, suffix_states
from rsteer_interp.backends.batching import Rows
from rsteer_interp.backends.edits import Edit, Site, compose
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.methods.base import Examples, Material
from rsteer_interp.methods.candidates import (
    Candidate,
    Operator,
    Place,
    Search,
    addition,
    evaluation_layers,
    mean_differences,
    removal,
)


class Scored(Protocol):
    """What a selector makes of a candidate's effects: its place, how far it misses the filters (0: passes; infinite: it must not be
    chosen while there is another), and how good it is."""

    @property
    def position(self) -> int: ...

    @property
    def layer(self) -> int: ...

    @property
    def violation(self) -> float: ...

    @property
    def merit(self) -> float: ...


S = TypeVar("S", bound=Scored)


@dataclass(frozen=True, eq=False)
class Selected(Generic[S]):
    """The chosen candidate and the scores of all that were tried.

    With `filters_met` False no candidate passes all filters, where the papers' code stops: the choice is then the candidate of
    the smallest violation (of equal ones the highest merit).
    """

    chosen: Candidate
    filters_met: bool
    scores: tuple[S, ...]

    @property
    def score(self) -> S:
        """The chosen candidate's."""
        return next(s for s in self.scores if (s.position, s.layer) == (self.chosen.position, self.chosen.layer))


@dataclass(frozen=True, eq=False)
class Effects:
    """What a candidate does on the select prompts. Log-odds and KL in nats, a value per prompt; states are means over prompts
    of the last token's at the evaluation layers."""

    removed: Float[Tensor, " refusing"]  # refusal log-odds of refusing prompts, candidate taken out
    added: Float[Tensor, " complying"]  # refusal log-odds of complying prompts, candidate put in
    kl: Float[Tensor, " ordinary"]  # KL(base || candidate taken out) of the next token on ordinary prompts
    removed_states: Float[Tensor, "layer d"]
    added_states: Float[Tensor, "layer d"]


class Trials:
    """The candidates of a material, fitted on its fit split, and their effects on its select split, each measured once.

    Refusing prompts are the refused ones of the sets `remove` and `contrast`, complying ones those that were answered;
    candidates are their difference. KL is measured on answered prompts of the `ordinary` sets. UserError for an empty class.
    """

    def __init__(self, material: Material, search: Search) -> None:
        self.search, self.backend, self.tokens = search, material.backend, material.refusal_tokens
        self._account = material.account
        names = (material.remove, material.contrast)
        layers = search.layers(self.backend.n_layers)
        if not layers:
            raise UserError(
                f"no layer to choose among {self.backend.n_layers} blocks at depth {search.depth}; raise it"
            )
        fit, select = material.fit, material.select
        encode = material.template.encode_all
        refused, answered = _texts("fit", fit, names, True), _texts("fit", fit, names, False)
        sites = [Site(layer) for layer in layers]
        states = suffix_states(self.backend, encode(refused + answered), sites)
        n = len(refused)
        self.candidates = mean_differences(
            {site: x[:n] for site, x in states.items()}, {site: x[n:] for site, x in states.items()}
        )
        if search.positions is not None:
            self.candidates = {place: c for place, c in self.candidates.items() if place[0] in search.positions}
        if not self.candidates:
            raise UserError(f"no candidate at positions {search.positions}; choose among the template's last tokens")
        self.evaluation = evaluation_layers(fit, names, self.backend.n_layers, search.evaluation)

        def sample(sets: Sequence[str], refused: bool) -> list[Tokens]:
            texts = _texts("select", select, sets, refused)
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(material.seed))
            return encode([texts[i] for i in order[: search.n_prompts].tolist()])

        self.refusing, self.complying = sample(names, True), sample(names, False)
        self.ordinary = sample(material.ordinary, False)
        self._ordinary_logits, _ = self._run(self.ordinary, None)
        self.base = self._both(None, None, self.refusing + self.ordinary, self.complying)  # of the unedited model
        self._effects: dict[tuple[Operator, Place], Effects] = {}

    def effects(self, places: Iterable[Place], operator: Operator) -> dict[Place, Effects]:
        """Effects of the candidates at these places; those that were measured before are not run again."""
        places = [place for place in dict.fromkeys(places) if place in self.candidates]
        missing = [place for place in places if (operator, place) not in self._effects]
        with self._account.run([(self.search, operator, place) for place in missing]):
            fresh = self.measure([self.candidates[place] for place in missing], operator)
        self._account.use((self.search, operator, place) for place in places)
        self._effects |= {(operator, place): e for place, e in zip(missing, fresh, strict=True)}
        return {place: self._effects[operator, place] for place in places}

    def measure(self, candidates: Sequence[Candidate], operator: Operator) -> list[Effects]:
        """Effects of any candidates (random ones, for a null), in their order: three runs each, the addition from its layer on."""
        out: dict[int, Effects] = {}
        for layer in sorted({candidate.layer for candidate in candidates}):
            both: Rows = self.refusing + self.ordinary
            if operator == "affine":  # ablation everywhere begins at the embedding: no block can be left out
                both = self.backend.prepare(self.refusing + self.ordinary, layer)
            complying = self.backend.prepare(self.complying, layer)
            for i, candidate in enumerate(candidates):
                if candidate.layer == layer:
                    taken, put = removal(self.backend, candidate, operator), addition(candidate, operator)
                    out[i] = self._both(taken, put, both, complying)
        return [out[i] for i in range(len(candidates))]

    def _both(self, taken: Edit | None, put: Edit | None, both: Rows, complying: Rows) -> Effects:
        n = len(self.refusing)
        logits, states = self._run(both, taken)
        added, added_states = self._run(complying, put)
        return Effects(
            refusal_log_odds(logits[:n], self.tokens),
            refusal_log_odds(added, self.tokens),
            kl_divergence(self._ordinary_logits[:, None], logits[n:, None])[:, 0],
            states[:n].double().mean(0).float(),
            added_states.double().mean(0).float(),
        )

    def _run(
        self, rows: Rows, edit: Edit | None
    ) -> tuple[Float[Tensor, "prompt vocab"], Float[Tensor, "prompt layer d"]]:
        """Next-token logits, and last-token states at the evaluation layers, of one pass."""

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            record = RecordLast(frozenset(self.evaluation))
            logits = self.backend.logits(batch, compose(edit, record))[:, -1]
            return logits.float().cpu(), torch.stack([record.states[site] for site in self.evaluation], 1)

        results = list(self.backend.batches(rows, run))
        order = torch.tensor([i for group, _ in results for i in group]).argsort()
        return torch.cat([logits for _, (logits, _) in results])[order], torch.cat([x for _, (_, x) in results])[order]


_TRIALS: WeakKeyDictionary[Material, dict[Search, Trials]] = WeakKeyDictionary()


def trials(material: Material, search: Search) -> Trials:
    """The trials of this material, made when first asked for: all selectors that are given it share them."""
    kept = _TRIALS.setdefault(material, {})
    if search not in kept:
        with material.account.run([search]):
            kept[search] = Trials(material, search)
    material.account.use([search])
    return kept[search]


def chosen_among(
    found: Trials, operator: Operator, score: Callable[[Mapping[Place, Effects]], Mapping[Place, S]]
) -> tuple[dict[Place, S], Place]:
    """Scores of all that were tried, and the choice: of the smallest violation, the highest merit.

    After the grid, steps are halved around two candidates: the choice so far, and the highest merit of those that miss a filter
    by a finite amount, since a layer further on they may meet it.
    """
    grid = found.search.grid(found.backend.n_layers)
    seen = found.effects([place for place in found.candidates if place[1] in grid], operator)
    if not seen:
        raise UserError("refusing and complying prompts do not differ at any place; check the labels of the prompts")
    step = found.search.stride // 2
    while step:
        scores = score(seen)
        within = [at for at, one in scores.items() if one.violation < float("inf")] or list(scores)
        centres = (_choice(scores), max(within, key=lambda at: scores[at].merit))
        seen |= found.effects([(p, layer + by) for p, layer in centres for by in (-step, step)], operator)
        step //= 2
    scores = score(seen)
    return dict(scores), _choice(scores)


def _choice(scores: Mapping[Place, S]) -> Place:
    return min(scores, key=lambda at: (scores[at].violation, -scores[at].merit))


def shortfall(value: float, least: float, scale: float) -> float:
    """How far a value stays under what a filter asks of it, in units of `scale`; 0 for one that passes, infinite for NaN."""
    return 0.0 if value >= least else (least - value) / scale if value < least else float("inf")


def _texts(split: str, examples: Mapping[str, Examples], names: Sequence[str], refused: bool) -> list[str]:
    """Prompts of these sets that were refused, or answered."""
    wanted = [examples[name].where(examples[name].refused if refused else examples[name].answered) for name in names]
    texts = [text for one in wanted for text in one.texts]
    if not texts:
        word = "refused" if refused else "answered"
        raise UserError(
            f"no {word} prompt of {' or '.join(names)} in the {split} split; add prompts that the model {word}"
        )
    return texts
