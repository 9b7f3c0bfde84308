"""The controls of a steering configuration, wherever it comes from: its dose, its effect beside random edits, its side effects.

effect = mean change of the first-token refusal log-odds of prompts, in nats; refused = share by judged replies
null   = the same for the edit turned by one random rotation for all sites (see `equal_norm`)
dose   = |edit| / |resid|;  side effect = KL(base || steered) per token of benign answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.equal_norm import rotated_edits
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import answer_effects, log_odds_of_each
from rsteer_interp.judges.base import Judge
from rsteer_interp.prompts import Prompt
from rsteer_interp.reader import Validation, validation_of
from rsteer_interp.refusal_scores import replies_of_each
from rsteer_interp.statistics.draws import Beside
from rsteer_interp.statistics.intervals import Estimate, Rate
from rsteer_interp.steering import Steering


@dataclass(frozen=True)
class Controls:
    """What stands beside a steering configuration. Log-odds in nats; z and two-sided p of the effect among its null's (`beside`).

    `as_stated`: whether the effect has the sign that the configuration's amounts state (towards refusal up, away from it down);
    None where the amounts have both signs. `refused` before and after is by judged replies, and `read_out` says how well log-odds
    tell those under this configuration.
    """

    dose: float
    base: Estimate
    effect: Estimate
    null: tuple[float, ...]
    kl: Estimate
    refused: tuple[Rate, Rate]
    read_out: Validation
    towards_refusal: bool | None = None

    @property
    def beside(self) -> Beside:
        return Beside.of(self.effect.value, self.null)

    @property
    def as_stated(self) -> bool | None:
        return None if self.towards_refusal is None else (self.effect.value > 0) == self.towards_refusal

    def record(self) -> dict[str, Any]:
        """Everything as plain values."""
        beside = self.beside
        plain = {"z": beside.z, "p": beside.p(), "least_p": beside.least_p, "as_stated": self.as_stated}
        return asdict(self) | plain | {"read_out": self.read_out.data()}

    def table(self) -> Table:
        beside = self.beside
        low, high = beside.band
        said = {True: "yes", False: "NO: its sign is the other way", None: "the amounts have both signs"}[
            self.as_stated
        ]
        table = Table(title="Controls")
        for column in ("what", "value"):
            table.add_column(column)
        table.add_row("dose, |edit| / |resid|", f"{self.dose:.3g}")
        table.add_row("refusal log-odds before (nats)", str(self.base))
        table.add_row("change of refusal log-odds (nats)", str(self.effect))
        table.add_row(f"the same, {len(self.null)} random rotations of the edit", f"{low:.3g} to {high:.3g}")
        table.add_row("z, two-sided p", f"{beside.z:.2f}, {beside.p():.3f} (at least {beside.least_p:.3f})")
        table.add_row("effect has the stated sign", said)
        table.add_row("refused before, after (judged)", f"{self.refused[0]}, {self.refused[1]}")
        valid = "" if self.read_out.valid else "; not validated as a measure of refusal"
        table.add_row("log-odds against judged replies, steered", f"{self.read_out}{valid}")
        table.add_row("KL on benign answers (nats per token)", str(self.kl))
        return table


def controls(
    backend: Backend,
    steering: Steering,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    token_ids: Sequence[int],
    judge: Judge,
    *,
    n_random: int = 20,
    tokens: int = 24,
    seed: int = 0,
) -> Controls:
    """Controls on prompts that the model refuses and benign conversations, with `n_random` rotations of the edit and judged replies
    of up to `tokens` tokens."""
    edit = steering.edit()
    if edit is None:
        raise UserError("this configuration adds nothing (alpha is 0), so there is nothing to check")
    if n_random < 2:
        raise UserError(f"{n_random} random rotations make no null; give two or more")
    texts, subjects = [prompt.prompt for prompt in prompts], [prompt.subject for prompt in prompts]
    refused = backend.template().encode_all(texts)
    states = last_states(backend, refused, list(steering.sites))
    nulls = rotated_edits(edit, backend.run, backend.d_model, n_random, seed)
    base, *moved = log_odds_of_each(backend, refused, token_ids, [None, edit, *nulls])
    effect, *null = (odds - base for odds in moved)
    before, after = replies_of_each(
        backend, refused, texts, judge, [None, edit], max_new_tokens=tokens, refusal_tokens=token_ids
    )
    rates = [Rate.of([r.verdict.refused for r in replies], clusters=subjects) for replies in (before, after)]
    talks = [backend.template().encode(p.prompt, p.answer) for p in benign]
    kl = answer_effects(backend, talks, edit).kl
    signs = {amount > 0 for amount in steering.amounts.values()}
    return Controls(
        dose=steering.dose(states),
        base=Estimate.of(base.numpy(), clusters=subjects),
        effect=Estimate.of(effect.numpy(), clusters=subjects, seed=seed),
        null=tuple(float(change.mean()) for change in null),
        kl=Estimate.of(kl.numpy(), clusters=[p.subject for p in benign], seed=seed),
        refused=(rates[0], rates[1]),
        read_out=validation_of(steering.method, after, subjects),
        towards_refusal=signs.pop() if len(signs) == 1 else None,
    )


def opening_token_ids(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    """The first token of each word that opens refusals, as it stands at the start of a reply (Arditi et al., section 2.4)."""
    found: list[int] = []
    for word in words:
        ids = list(tokenizer(word, add_special_tokens=False)["input_ids"])
        if not ids or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise UserError(
                f"this model's tokenizer has no token for '{word}'; give other words that open its refusals"
            )
        found.append(int(ids[0]))
    return tuple(dict.fromkeys(found))
