"""Log-odds against judged replies in a study: a judged subsample per kind of edit, its table, and what the finding must say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.each import Each
from rsteer_interp.backends.edits import Edit
from rsteer_interp.progress import progress
from rsteer_interp.reader import validation_of
from rsteer_interp.refusal_scores import replies_of_each, reply_and_judge
from rsteer_interp.studies.study import Study, interval

Checks = Mapping[str, Mapping[str, Any]]  # by kind of edit: a Validation's data


def judged_subsample(
    study: Study,
    stage: str,
    key: Mapping[str, Any],
    kinds: Mapping[str, Sequence[Edit | None]],
    prompts: Sequence[str],
    subjects: Sequence[str],
    backend: Callable[[], Backend] | None = None,
    paired: bool = False,
) -> dict[str, dict[str, Any]]:
    """Judged greedy replies to the prompts under every edit of every kind, beside the log-odds of the same prompt passes: a
    Validation's data per kind, and `flags`, whether refused, by edit and prompt.

    `key` is what the edits depend on, for the stage that keeps the outcome. `backend` gives the one that makes the edits, where
    it is not the study's. `paired`: edit i is for prompt i alone. Costs a reply per prompt and edit.
    """
    owner = backend or (lambda: study.backend)

    def compute() -> tuple[dict[str, Any], None]:
        checks, rows = {}, study.template.encode_all(prompts)
        options: dict[str, Any] = {"max_new_tokens": study.config.tokens, "refusal_tokens": study.refusal_tokens}
        n = sum(map(len, kinds.values()))
        with progress("judging a subsample under edits", n if paired else n * len(prompts)) as advance:
            for kind, edits in kinds.items():
                if paired:
                    own = [replace(row, setting=i) for i, row in enumerate(rows)]
                    each = Each(tuple(edits))
                    groups = reply_and_judge(owner(), own, prompts, study.judge, edit=each, on_batch=advance, **options)
                    replies = [[group[0]] for group in groups]
                else:
                    replies = replies_of_each(owner(), rows, prompts, study.judge, edits, on_batch=advance, **options)
                every = [reply for of_edit in replies for reply in of_edit]
                checks[kind] = validation_of(kind, every, list(subjects) * (len(every) // len(subjects))).data()
                checks[kind]["flags"] = [[r.verdict.refused for r in of_edit] for of_edit in replies]
        return {"checks": checks}, None

    whole = {**key, "judged": list(prompts), "kinds": {kind: len(edits) for kind, edits in kinds.items()}}
    whole |= {"longest": study.config.tokens, "judge": study.judge, "openings": study.refusal_tokens}
    checks: dict[str, dict[str, Any]] = study.stage(stage, whole, compute).data["checks"]
    return checks


def checks_table(checks: Checks) -> Table:
    """One row per kind of edit."""
    table = Table(title="First-token log-odds against judged replies, by kind of edit")
    for column in ("edit", "n", "refused, judged", "ROC area", "misread", "log-odds tell refusals"):
        table.add_column(column)
    for kind, check in checks.items():
        refused, misread = check["refused"], check["misread"]
        cells = (
            ["one verdict only", "", "cannot be said"]
            if misread is None
            else [interval(check["area"]), interval(misread), "yes" if check["valid"] else "no"]
        )
        table.add_row(kind, str(refused["n"]), interval(refused), *cells)
    return table


def checks_words(checks: Checks) -> str:
    """For a finding in nats: under which kinds of edit log-odds were seen to tell judged refusals, and under which not."""
    valid = [f"{kind} (ROC area {interval(check['area'])})" for kind, check in checks.items() if check["valid"]]
    failed = [f"{kind} ({check['words']})" for kind, check in checks.items() if not check["valid"]]
    said = []
    if valid:
        said.append(f"Log-odds tell judged refusals under {', '.join(valid)}.")
    if failed:
        subject = "They" if valid else "Log-odds"
        said.append(
            f"{subject} are not validated as a measure of refusal, and are nats alone, under {', '.join(failed)}."
        )
    return " ".join(said)
