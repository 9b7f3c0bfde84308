"""Judges by checkpoints: how many replies of each model each judge calls refusals, and how far the judges agree.

methods.md 1.6: the same answers are 31, 35 or 48 refusals of 50 for three judges, so two judges and their agreement belong
beside every rate. Every reply is counted: a reply that a judge cannot decide is no refusal, and its number stands beside
(1.14); confusion tables and Cohen's kappa are over the replies that both judges decided, with their n.
`analyses/judge_table.py` is the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from sklearn.metrics import confusion_matrix

from rsteer_interp.agreement import Agreement
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.judges import load_judge
from rsteer_interp.judges.base import Judge, Verdict
from rsteer_interp.judges.local import sigmoid
from rsteer_interp.judges.responses import Response, read_responses
from rsteer_interp.results import Provenance, save_result
from rsteer_interp.statistics.intervals import Rate
from rsteer_interp.vector_controls import opening_token_ids

if TYPE_CHECKING:
    from analyses.judge_table import Config

KIND = "judge_table"
LABEL, LOG_ODDS = "label", "log_odds"


@dataclass(frozen=True)
class Pair:
    """Two judges on the same replies. confusion[i][j]: replies that the first calls i and the second j, 0 answer, 1 refusal."""

    first: str
    second: str
    confusion: tuple[tuple[int, int], tuple[int, int]]
    agreement: Agreement | None  # None: no reply that both decided
    n_left_out: int  # replies that one of the two did not decide


@dataclass(frozen=True)
class JudgeTable:
    """z of every reply (+1 refusal, -1 answer, 0 undecided) by checkpoint and judge, in the order of the replies."""

    verdicts: Mapping[str, Mapping[str, tuple[int, ...]]]
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The prompts replied to, by checkpoint: replies to one prompt are not independent. Without them each reply is its own."""

    def __post_init__(self) -> None:
        for checkpoint, judged in self.verdicts.items():
            if len({len(z) for z in judged.values()}) != 1:
                raise UserError(f"the judges of '{checkpoint}' saw different replies; give all of them the same")

    @property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(judge for judged in self.verdicts.values() for judge in judged))

    def count(self, checkpoint: str, judge: str) -> tuple[Rate, int]:
        """Refusals of all replies with their Wilson interval, and how many replies the judge did not decide."""
        z = self.verdicts[checkpoint][judge]
        return Rate.of([v > 0 for v in z], clusters=self.prompts.get(checkpoint)), sum(v == 0 for v in z)

    def pairs(self, checkpoint: str | None = None, *, seed: int = 0) -> list[Pair]:
        """Every pair of judges on one checkpoint's replies, or on those of all checkpoints together (None)."""
        names = list(self.verdicts) if checkpoint is None else [checkpoint]
        out = []
        for first, second in combinations(self.judges, 2):
            both = [n for n in names if first in self.verdicts[n] and second in self.verdicts[n]]
            replies = [
                zs
                for n in both
                for zs in zip(self.verdicts[n][first], self.verdicts[n][second], self._clusters(n), strict=True)
            ]
            decided = [(a > 0, b > 0, prompt) for a, b, prompt in replies if a and b]
            if not replies:
                continue
            x, y = [a for a, _, _ in decided], [b for _, b, _ in decided]
            prompts = [prompt for _, _, prompt in decided]
            cells = confusion_matrix(x, y, labels=[False, True]).tolist() if decided else [[0, 0], [0, 0]]
            agreed = Agreement.of(x, y, clusters=prompts, seed=seed) if decided else None
            confusion = (tuple(cells[0]), tuple(cells[1]))
            out.append(Pair(first, second, confusion, agreed, len(replies) - len(decided)))
        return out

    def _clusters(self, checkpoint: str) -> Sequence[Hashable]:
        n = len(next(iter(self.verdicts[checkpoint].values())))
        return self.prompts.get(checkpoint) or [(checkpoint, i) for i in range(n)]

    def record(self, seed: int = 0) -> dict[str, Any]:
        """Everything as plain values."""
        counts = {
            checkpoint: {
                judge: asdict(self.count(checkpoint, judge)[0]) | {"undecided": self.count(checkpoint, judge)[1]}
                for judge in judged
            }
            for checkpoint, judged in self.verdicts.items()
        }
        pairs = {checkpoint: [asdict(p) for p in self.pairs(checkpoint, seed=seed)] for checkpoint in self.verdicts}
        return {"counts": counts, "pairs": pairs, "pooled": [asdict(p) for p in self.pairs(seed=seed)]}

    def tables(self, seed: int = 0) -> list[Table]:
        """Refusals by checkpoint and judge; agreement of every pair of judges over all checkpoints."""
        counts = Table(title="Replies called refusals, % (95 % Wilson interval); undecided replies are no refusals")
        for column in ("checkpoint", "n", *self.judges):
            counts.add_column(column)
        for checkpoint, judged in self.verdicts.items():
            cells = [self._cell(checkpoint, judge) if judge in judged else "" for judge in self.judges]
            counts.add_row(checkpoint, str(len(next(iter(judged.values())))), *cells)
        pairs = Table(title="Pairs of judges, replies of all checkpoints that both decided")
        for column in ("judges (a, b)", "n", "both", "a only", "b only", "neither", "agree %", "kappa"):
            pairs.add_column(column)
        for pair in self.pairs(seed=seed):
            (neither, b_only), (a_only, both) = pair.confusion
            row = [f"{pair.first}, {pair.second}", str(neither + b_only + a_only + both)]
            row += [str(cell) for cell in (both, a_only, b_only, neither)]
            agreed = pair.agreement
            row.append("" if agreed is None else f"{100 * agreed.accuracy.rate:.0f}")
            kappa = None if agreed is None else agreed.kappa
            row.append("undefined" if kappa is None else f"{kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f})")
            pairs.add_row(*row)
        return [counts, pairs]

    def _cell(self, checkpoint: str, judge: str) -> str:
        rate, undecided = self.count(checkpoint, judge)
        said = f"{rate.count}: {100 * rate.rate:.0f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"
        return f"{said}, {undecided} undecided" if undecided else said


@dataclass(frozen=True, eq=False)
class LogOddsJudge:
    """A prompt is refused where the model's first-token refusal log-odds are above 0; the reply is not read."""

    backend: Backend
    token_ids: tuple[int, ...]

    name = LOG_ODDS

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        distinct = list(dict.fromkeys(prompts))
        rows = self.backend.template().encode_all(distinct)
        odds = dict(zip(distinct, log_odds(self.backend, rows, self.token_ids).tolist(), strict=True))
        return [Verdict.of(sigmoid(odds[prompt])) for prompt in prompts]


def judge_table(
    replies: Mapping[str, Sequence[Response]],
    judges: Mapping[str, Judge],
    own: Mapping[str, Mapping[str, Sequence[Verdict]]] | None = None,
) -> JudgeTable:
    """Every judge on every checkpoint's replies; `own` are verdicts by checkpoint and judge that are there already.

    Labels of the replies, where a file has them, stand as the judge "label" (0 and missing ones undecided).
    """
    verdicts: dict[str, dict[str, tuple[int, ...]]] = {}
    for checkpoint, rows in replies.items():
        prompts, texts = [row.prompt for row in rows], [row.response for row in rows]
        judged = {name: tuple(v.z for v in judge.judge(prompts, texts)) for name, judge in judges.items()}
        judged |= {name: tuple(v.z for v in given) for name, given in ((own or {}).get(checkpoint) or {}).items()}
        if any(row.label is not None for row in rows):
            judged[LABEL] = tuple(row.label or 0 for row in rows)
        verdicts[checkpoint] = judged
    return JudgeTable(verdicts, {name: tuple(row.prompt for row in rows) for name, rows in replies.items()})


def recorded_log_odds(path: Path) -> list[Verdict] | None:
    """Verdicts of the `log_odds` that every line of a responses file holds (nats, above 0 refuses); None where none does."""
    text = path.read_text(encoding="utf-8-sig")
    records = [json.loads(line) for line in text.split("\n") if line.strip()]
    found = [record.get(LOG_ODDS) for record in records if record.get("header") is not True]
    if all(value is None for value in found):
        return None
    for number, value in enumerate(found, 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"'{path}' response {number} has log_odds {value!r}; give a number in every line, or in none"
            )
    return [Verdict.of(sigmoid(float(value))) for value in found]


def run_judge_table(config: Config) -> Path:
    """Read, judge, print, save; returns the result folder."""
    files = _named(config.responses)
    replies = {name: read_responses(path) for name, path in files.items()}
    recorded = {name: recorded_log_odds(path) for name, path in files.items()}
    own = {name: {LOG_ODDS: verdicts} for name, verdicts in recorded.items() if verdicts is not None}
    asked = None if config.model is None else load_backend(config.model, device=config.device, dtype=config.dtype)
    judges = {name: load_judge(name, asked) for name in dict.fromkeys(config.judges)}
    if config.checkpoints:
        if len(config.checkpoints) != len(files):
            raise UserError(
                f"{len(config.checkpoints)} checkpoints for {len(files)} files; give one for each, in order"
            )
        for (name, rows), checkpoint in zip(replies.items(), config.checkpoints, strict=True):
            backend = load_backend(checkpoint, device=config.device, dtype=config.dtype)
            judge = LogOddsJudge(backend, opening_token_ids(backend.tokenizer, config.refusal_words))
            own[name] = {LOG_ODDS: judge.judge([r.prompt for r in rows], [r.response for r in rows])}
    if not judges and not own:
        raise UserError("no judges; name one or more with --judges")
    table = judge_table(replies, judges, own)
    for printed in table.tables(config.seed):
        Console().print(printed)
    save_result(config.out, KIND, table.record(config.seed), provenance=Provenance.collect(asked, config=config))
    return config.out


def _named(responses: Sequence[str]) -> dict[str, Path]:
    """Files by checkpoint name: `NAME=FILE`, or a file that is called after its folder (after itself where it stands alone)."""
    out: dict[str, Path] = {}
    for text in responses:
        name, equals, rest = text.partition("=")
        path = Path(rest if equals else text)
        name = name if equals else (path.parent.name if path.stem == "responses" else path.stem) or path.stem
        if not name or name in out:
            raise UserError(f"two files are called '{name}' or one has no name; write them as NAME=FILE")
        out[name] = path
    return out
