"""The audit as a command: load, audit, write result and page, print one table and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rsteer_interp.backends import configured_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.errors import UserError
from rsteer_interp.judges import load_judge
from rsteer_interp.report.audit_page import KIND, comparison_rows, write_audit_page
from rsteer_interp.results import Provenance, save_result
from rsteer_interp.safety_audit import Audit, audit
from rsteer_interp.safety_audit.plan import Plan
from rsteer_interp.steering import load_steering

if TYPE_CHECKING:
    from analyses.safety_audit import Config

QUESTION = "Does the model still refuse what it refused for safety?"


def run_audit(config: Config) -> Audit:
    """Write OUT/result.json, OUT/index.html and the steps; the page says what the exit code says."""
    if (config.steering is None) == (config.base is None):
        raise UserError(
            "give one change to audit: --steering FOLDER, a configuration for --model, or --base BASE, of which --model is an "
            "edited copy"
        )
    plan = Plan.of(config)
    before = _load(config, config.base or config.model)
    if config.steering is not None:
        found = _audit(config, plan, before, load_steering(config.steering, before, other_model=config.other_model))
    else:
        found = _audit(config, plan, before, _load(config, config.model))
    checkpoint = before.checkpoint
    data = found.data | {
        "question": QUESTION,
        "applicable": True,
        "finding": " ".join([found.verdict.sentence, *found.verdict.caveats]),
        "strict": config.strict,
        "exit_code": found.verdict.exit_code(config.strict),
        "model": {
            "name": getattr(checkpoint, "name", "in memory"),
            "n_layers": before.n_layers,
            "d_model": before.d_model,
            "fingerprint": before.fingerprint,
        },
    }
    record = Provenance.collect(before, config=config, seeds=config.seed, template=before.template())
    result = save_result(config.out, KIND, data, provenance=record)
    page = write_audit_page(config.out, config.out / "index.html")
    _print(result.data, page)
    return found


def _audit(config: Config, plan: Plan, before: Backend, change: Any) -> Audit:
    return audit(before, change, load_judge(config.judge, before), plan, config.out)


def _load(config: Config, model: str) -> Backend:
    return configured_backend(config, model, config.backend)


def _print(data: dict[str, Any], page: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=f"Safety audit of {data['subject']} on {data['model']['name']}")
    for column in ("measure", "n", "before", "after", "change, 95 % interval"):
        table.add_column(column)
    for row in comparison_rows(data):
        table.add_row(*row)
    console.print(table)
    for sentence in (data["verdict"]["sentence"], *data["verdict"]["caveats"], *data["notes"], f"page: {page}"):
        console.print(sentence, markup=False, soft_wrap=True)
