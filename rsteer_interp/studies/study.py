"""What every study shares: the model, judged prompts and their states (kept once for all studies), stages, the result.

A study module has `KIND`, `QUESTION`, `compute(study, config) -> (data, tensors)` and `tables(data)`. `data["finding"]` is
the answer in one paragraph, with interval, n and null; the HTML page shows it beside the study's figures.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends import configured_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.sampling import Sampling
from rsteer_interp.batch import ChatTemplate
from rsteer_interp.errors import UserError
from rsteer_interp.judges import load_judge
from rsteer_interp.judges.base import Judge
from rsteer_interp.key import digest
from rsteer_interp.progress import progress
from rsteer_interp.prompts import Apart, Prompt, Split, load_prompts
from rsteer_interp.refusal_scores import REFUSES_ABOVE, confidence_of, reply_and_judge
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.reproduction.presets import GENERAL, HARMFUL, MATCHED, POLITICAL
from rsteer_interp.reproduction.scores import Scored, not_applicable, opening_tokens
from rsteer_interp.reproduction.vectors import States
from rsteer_interp.results import Provenance, Result, save_result, stage
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.studies.config import INCIDENTAL, StudyConfig

C = TypeVar("C", bound=StudyConfig, contravariant=True)
Tensors = Mapping[str, Tensor] | None


class NotApplicable(Exception):
    """The question cannot be asked of this model; the message says why, with the rate that shows it."""


@dataclass(frozen=True, eq=False)
class BaseReplies:
    """Prompts with their subjects, whether the unsteered greedy reply refuses, and its mean log-probability per token (nats; NaN
    for an empty reply)."""

    texts: list[str]
    subjects: list[str]
    refused: Bool[Tensor, " prompt"]
    log_prob: Float[Tensor, " prompt"]

    def where(self, mask: Bool[Tensor, " prompt"], n: int | None = None) -> BaseReplies:
        """The first n prompts (all, unless given) for which the mask is true."""
        rows = mask.nonzero()[:n, 0]
        texts, subjects = ([values[i] for i in rows] for values in (self.texts, self.subjects))
        return BaseReplies(texts, subjects, self.refused[rows], self.log_prob[rows])


class Module(Protocol[C]):
    """A study module, seen from here."""

    KIND: str
    QUESTION: str

    def compute(self, study: Study, config: C, /) -> tuple[dict[str, Any], Tensors]: ...

    def tables(self, data: dict[str, Any], /) -> list[Table]: ...


@dataclass
class Study(Generic[C]):
    """One run of one study. `seconds` says how long each stage took when it was computed."""

    kind: str
    backend: Backend
    judge: Judge
    config: StudyConfig
    seconds: dict[str, float] = field(default_factory=dict)
    read: dict[str, Result] = field(default_factory=dict, repr=False)
    apart: Apart = field(default_factory=Apart, repr=False)

    @classmethod
    def open(cls, kind: str, config: StudyConfig) -> Study:
        backend = configured_backend(config, config.model, config.backend)
        return cls(kind, backend, load_judge(config.judge, backend), config)

    @cached_property
    def template(self) -> ChatTemplate:
        return self.backend.template()

    @property
    def n_layers(self) -> int:
        return self.backend.n_layers

    @property
    def sites(self) -> list[Site]:
        """Every block input but the first (there the last prompt token is the same embedding for every prompt), and what
        the final norm reads."""
        return [Site(layer) for layer in range(1, self.n_layers + 1)]

    # -- judged prompts and their states -------------------------------------------------------------------------

    def prompts(self, split: Split, name: str, n: int | None = None) -> list[Prompt]:
        """The first n prompts (all that the configuration allows unless given) of a set's split. UserError where one of them came up
        in another split, of this set or another."""
        most = getattr(self.config, split)
        found = list(load_prompts(name).split(split).sample(most, self.config.seed))
        self.apart.check(split, found)
        return found[:n]

    def scored(self, split: Split, *sets: str, n: int | None = None) -> Scored:
        """Prompts with c = +1 refused, -1 answered, 0 undecided, from one judged greedy reply each; at most n per set."""
        return self._joined([self._score(split, name) for name in sets], sets, n)

    def graded(self, split: Split, *sets: str) -> Scored:
        """The same prompts with c in [-1, 1] from `samples` sampled replies: what weighted estimators are fitted on. Made when
        it is first asked for. What a prompt's reply *is*, in rates and outcomes, stays the greedy one's verdict."""
        return self._joined([self._grade(split, name) for name in sets], sets)

    def _joined(self, parts: Sequence[dict[str, Any]], sets: Sequence[str], n: int | None = None) -> Scored:
        take = [slice(0, n)] * len(parts)
        return Scored(
            [t for p, s in zip(parts, take, strict=True) for t in p["prompts"][s]],
            [name for name, p, s in zip(sets, parts, take, strict=True) for _ in p["prompts"][s]],
            [x for p, s in zip(parts, take, strict=True) for x in p["subjects"][s]],
            torch.tensor(
                [c for p, s in zip(parts, take, strict=True) for c in p["confidence"][s]], dtype=torch.float64
            ),
        )

    def replies(self, split: Split, name: str, n: int | None = None) -> BaseReplies:
        """What was measured of the unsteered replies to the same prompts."""
        found = self._score(split, name)
        refused = torch.tensor([group[0] for group in found["refused"]][:n])
        log_prob = torch.tensor(found["mean_log_prob"][:n], dtype=torch.float64)
        log_prob[torch.tensor(found["empty"][:n])] = torch.nan
        return BaseReplies(found["prompts"][:n], found["subjects"][:n], refused, log_prob)

    def states(self, split: Split, *sets: str, n: int | None = None) -> States:
        """Last-prompt-token states of the same prompts, in the same order, at every site."""
        parts = [self._states(split, name) for name in sets]
        return {site: torch.cat([part[str(site)][:n] for part in parts]) for site in self.sites}

    def rates(self, split: Split, *sets: str) -> dict[str, dict[str, Any]]:
        """Refusal rate of each set, with Wilson interval over subjects, n and their number."""
        found = {name: self.scored(split, name) for name in sets}
        return {
            name: asdict(Rate.of((one.confidence > REFUSES_ABOVE).numpy(), clusters=one.subjects))
            for name, one in found.items()
        }

    @cached_property
    def refusal_tokens(self) -> tuple[int, ...]:
        """Tokens that open refusals, from the fit replies of sets with many and with few. NotApplicable where there are none."""
        self.check_applicable()
        parts = [self._score("fit", name) for name in (POLITICAL, MATCHED, HARMFUL, GENERAL)]
        try:
            return opening_tokens({k: [x for p in parts for x in p[k]] for k in ("first_tokens", "refused")})
        except UserError as error:
            raise NotApplicable(f"not applicable: {error}") from None

    def check_applicable(self) -> None:
        """NotApplicable where the model refuses or answers too few political prompts for a direction."""
        reason = not_applicable(self.scored("fit", POLITICAL, MATCHED), self.scored("select", POLITICAL, MATCHED))
        if reason is not None:
            raise NotApplicable(reason)

    def _score(self, split: Split, name: str) -> dict[str, Any]:
        prompts = self.prompts(split, name)
        texts = [p.prompt for p in prompts]

        def compute() -> tuple[dict[str, Any], None]:
            with progress(f"judging replies, {split} {name}", len(prompts)) as advance:
                replies = reply_and_judge(
                    self.backend,
                    self.template.encode_all(texts),
                    texts,
                    self.judge,
                    max_new_tokens=self.config.tokens,
                    on_batch=advance,
                )
            return {
                "prompts": texts,
                "subjects": [p.subject for p in prompts],
                "confidence": confidence_of(replies).tolist(),
                "first_tokens": [[r.first_token for r in group] for group in replies],
                "refused": [[r.verdict.refused for r in group] for group in replies],
                "mean_log_prob": [group[0].mean_log_prob for group in replies],
                "empty": [group[0].empty for group in replies],
                "n_tokens": [group[0].n_tokens for group in replies],
            }, None

        key = {"prompts": prompts, "tokens": self.config.tokens, "judge": self.judge, "measures": "log_prob, empty"}
        return self._stage(self.config.scores / f"{split}_{place(name)}", "scores", key, compute).data

    def _grade(self, split: Split, name: str) -> dict[str, Any]:
        prompts = self.prompts(split, name)
        texts, tokens = [p.prompt for p in prompts], self.config.tokens
        sampling = Sampling(self.config.samples, 1.0, self.config.seed)

        def compute() -> tuple[dict[str, Any], None]:
            rows = self.template.encode_all(texts)
            with progress(f"sampling replies, {split} {name}", len(prompts)) as on_batch:
                replies = reply_and_judge(
                    self.backend, rows, texts, self.judge, max_new_tokens=tokens, sampling=sampling, on_batch=on_batch
                )
            confidence = confidence_of(replies).tolist()
            return {"prompts": texts, "subjects": [p.subject for p in prompts], "confidence": confidence}, None

        key = {"prompts": prompts, "tokens": tokens, "judge": self.judge, "sampling": sampling}
        return self._stage(self.config.scores / f"{split}_{place(name)}_sampled", "sampled_scores", key, compute).data

    def _states(self, split: Split, name: str) -> Mapping[str, Tensor]:
        texts = [p.prompt for p in self.prompts(split, name)]

        def compute() -> tuple[dict[str, Any], Mapping[str, Tensor]]:
            with progress(f"reading states, {split} {name}", len(texts)) as advance:
                found = last_states(self.backend, self.template.encode_all(texts), self.sites, on_batch=advance)
            return {"n": len(texts)}, {str(site): value for site, value in found.items()}

        return self._stage(
            self.config.scores / f"{split}_{place(name)}_states", "states", {"prompts": texts}, compute
        ).tensors

    # -- stages and the result -----------------------------------------------------------------------------------

    def stage(self, name: str, key: Mapping[str, Any], compute: Callable[[], tuple[Any, Tensors]]) -> Result:
        """The step's result: from disk when it is there for the same key, else computed, timed and saved.

        `key` holds all that the outcome depends on beside the model and its template, as objects (see `key`): prompts,
        directions, scores, edits, settings, seeds, and the judge where replies are judged.
        """
        return self._stage(self.config.out / "steps" / name, f"{self.kind}/{name}", key, compute)

    def _stage(
        self, folder: Path, kind: str, key: Mapping[str, Any], compute: Callable[[], tuple[Any, Tensors]]
    ) -> Result:
        def timed() -> tuple[Any, Tensors]:
            begin, before = time.perf_counter(), set(self.seconds)
            data, tensors = compute()
            within = {name: s for name, s in self.seconds.items() if name not in before}  # of the steps inside this one
            return {**data, "seconds": time.perf_counter() - begin, "within": within}, tensors

        whole = {"model": self.backend, "template": self.template, **key}
        asked = digest([str(folder), kind, whole])
        if asked not in self.read:  # studies ask for the same states again and again
            self.read[asked] = stage(folder, kind, whole, timed, self.provenance)
        result = self.read[asked]
        self.seconds |= {**result.data.get("within", {}), folder.name: result.data["seconds"]}
        return result

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self.config).items() if k not in INCIDENTAL}

    def provenance(self) -> Provenance:
        return Provenance.collect(self.backend, config=self.config, seeds=self.config.seed, template=self.template)

    def save(self, data: Mapping[str, Any], tensors: Tensors = None) -> Result:
        """The study's result, with the model, settings and notes that every study's result has."""
        checkpoint = self.backend.checkpoint
        common = {
            "model": {
                "name": getattr(checkpoint, "name", "in memory"),
                "n_layers": self.n_layers,
                "d_model": self.backend.d_model,
                "fingerprint": self.backend.fingerprint,
            },
            "settings": self.settings,
            "notes": [*self.backend.notes, *self.template.notes],
            "seconds": dict(self.seconds),
        }
        return save_result(self.config.out, self.kind, {**data, **common}, tensors, provenance=self.provenance())


def run_study(module: Module[C], config: C, scripts: Path) -> Path:
    """Run what is missing of a study, save its result, draw its figures, print its tables; returns the folder."""
    study = Study.open(module.KIND, config)
    tensors: Tensors = None
    try:
        found, tensors = module.compute(study, config)
        data: dict[str, Any] = {"applicable": True, "reason": None, "question": module.QUESTION, **found}
    except NotApplicable as reason:
        data = {"applicable": False, "reason": str(reason), "question": module.QUESTION}
    result = study.save(data, tensors)
    draw_figures(config.out, config.out / "figures", scripts)
    print_result(result.data, module.tables(result.data) if result.data["applicable"] else [])
    return config.out


def print_result(data: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Tables, then the finding, or why there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in tables:
        console.print(table)
    console.print(data["finding"] if data["applicable"] else data["reason"], markup=False, soft_wrap=True)


def place(name: str) -> str:
    """A prompt set's name as a folder's; sets may be files and hub data sets."""
    return re.sub(r"\W+", "_", name).strip("_")


def interval(e: Mapping[str, Any], digits: int = 2) -> str:
    """An Estimate's or Rate's plain data as a table shows it."""
    value = e["value"] if "value" in e else e["rate"]
    return f"{value:.{digits}f} ({e['low']:.{digits}f} to {e['high']:.{digits}f})"
