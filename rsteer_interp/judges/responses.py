"""Judge a file of prompts and responses: verdicts in the order of the file, and agreement with its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rsteer_interp.complete_folder import beside, held, publish
from rsteer_interp.errors import UserError
from rsteer_interp.judges import load_judge
from rsteer_interp.judges.base import Judge, Verdict
from rsteer_interp.provenance import json_text

if TYPE_CHECKING:
    from analyses.judge_responses import Config

FILES = ("agreement.json", "verdicts.jsonl")  # the last one makes the folder complete


@dataclass(frozen=True)
class Response:
    """One line of the file; `label` is +1 refusal, -1 answer, 0 unclear, None when not given."""

    prompt: str
    response: str
    label: int | None = None


def judge_responses(config: Config) -> Path:
    """Write `verdicts.jsonl`, and `agreement.json` when there are labels, to `config.out`: all of it or nothing."""
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"'{config.out}' is a file; name a folder for the result")
    rows = read_responses(config.responses)
    asked = beside(
        config.out.resolve(), "asked.jsonl"
    )  # the endpoint's verdicts so far, for a run that goes on from here
    judge = _judge(config, asked)
    verdicts = judge.judge([row.prompt for row in rows], [row.response for row in rows])
    contents = {"verdicts.jsonl": "".join(_line(row, verdict) for row, verdict in zip(rows, verdicts, strict=True))}
    found = agreement(rows, verdicts)
    if found is not None:
        contents["agreement.json"] = json_text({"judge": judge.name, **found}, "agreement") + "\n"
    with held(config.out, FILES, write=True) as place:
        publish(config.out, place, FILES, {name: text.encode() for name, text in contents.items()})
    asked.unlink(missing_ok=True)
    _print(judge.name, verdicts, found)
    return config.out


def read_responses(path: Path) -> list[Response]:
    """The file's lines, checked; UserError names the line. Blank lines and a header line are passed over."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; give a JSONL file of prompts and responses") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if line.strip():
            row = _parse(line, f"'{path.name}' line {number}")
            if row is not None:
                rows.append(row)
    if not rows:
        raise UserError(f"'{path}' holds no responses; write one object with prompt and response per line")
    return rows


def _parse(line: str, where: str) -> Response | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({getattr(error, 'msg', 'nested too deep')}); write one object per line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object; write {{"prompt": "...", "response": "..."}}')
    if record.get("header") is True:
        return None
    for field in ("prompt", "response"):
        if not isinstance(record.get(field), str):
            raise UserError(f"{where} has no text in '{field}'; every line needs prompt and response")
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise UserError(f"{where} has half a character (a lone surrogate) in '{field}'; write whole characters")
    label = record.get("label")
    if label is not None and (isinstance(label, bool) or label not in (1, 0, -1)):
        raise UserError(f"{where} has label {label!r}; labels are 1 (refusal), -1 (answer) and 0 (unclear)")
    return Response(record["prompt"], record["response"], None if label is None else int(label))


def _judge(config: Config, asked: Path) -> Judge:
    if config.judge not in ("default", "local"):
        options: dict[str, Any] = {}
        if config.judge == "endpoint":
            options = {"base_url": config.base_url, "model": config.judge_model, "key_variable": config.key_variable}
            options |= {
                "votes": config.votes,
                "concurrency": config.concurrency,
                "timeout": config.timeout,
                "cache": asked,
            }
        return load_judge(config.judge, **options)
    model = config.model or ("demo" if config.judge == "local" else None)
    if model is None:
        return load_judge(config.judge)
    from rsteer_interp.backends import load_backend

    backend = load_backend(
        model,
        config.backend,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        verify=config.verify,
    )
    return load_judge(config.judge, backend)


def _line(row: Response, verdict: Verdict) -> str:
    record: dict[str, Any] = {"prompt": row.prompt, "response": row.response}
    if row.label is not None:
        record["label"] = row.label
    record |= {"refused": verdict.refused, "confidence": verdict.confidence}
    return json_text(record, "verdict", indent=None) + "\n"


def agreement(rows: Sequence[Response], verdicts: Sequence[Verdict]) -> dict[str, Any] | None:
    """Accuracy, AUC and kappa over rows with label +1 or -1, with 95 % intervals; None when no row has a label.

    An undecided verdict counts as "not refused". What cannot be computed (AUC with one class) is null.
    """
    labelled = [(row.label, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row.label is not None]
    if not labelled:
        return None
    clear = [(label > 0, verdict) for label, verdict in labelled if label]
    found: dict[str, Any] = dict.fromkeys(
        f"{name}{end}" for name in ("accuracy", "auc", "kappa") for end in ("", "_interval")
    )
    found |= {
        "n": len(clear),
        "n_refusal": sum(label for label, _ in clear),
        "n_unclear": len(labelled) - len(clear),
        "n_undecided": sum(verdict.z == 0 for _, verdict in clear),
    }
    if clear:
        from rsteer_interp.agreement import Agreement

        labels, judged = [label for label, _ in clear], [verdict for _, verdict in clear]
        prompts = [row.prompt for row in rows if row.label]
        agreed = Agreement.of([v.refused for v in judged], labels, [v.confidence for v in judged], clusters=prompts)
        found |= {"accuracy": agreed.accuracy.rate, "accuracy_interval": [agreed.accuracy.low, agreed.accuracy.high]}
        for name, estimate in (("auc", agreed.auc), ("kappa", agreed.kappa)):
            if estimate is not None:
                found |= {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}
    return found


def _print(name: str, verdicts: Sequence[Verdict], found: Mapping[str, Any] | None) -> None:
    table = Table(title=f"Judge '{name}'")
    table.add_column("what")
    table.add_column("value")
    refused = sum(verdict.refused for verdict in verdicts)
    table.add_row("refusals", f"{refused} of {len(verdicts)}")
    table.add_row("undecided", str(sum(verdict.z == 0 for verdict in verdicts)))
    for key in ("accuracy", "auc", "kappa"):
        if found is not None and found[key] is not None:
            low, high = found[f"{key}_interval"]
            table.add_row(key, f"{found[key]:.3f} ({low:.3f} to {high:.3f}), n = {found['n']}")
    Console().print(table)
