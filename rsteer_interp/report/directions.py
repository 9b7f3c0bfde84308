"""How far a direction can be trusted, as cells of a table: the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from rsteer_interp.style import method_label

DIRECTION_COLUMNS = (
    "layer",
    "refused, answered",
    "null space",
    "effective rank",
    "penalty",
    "halves",
    "topic alone",
    "cos MD",
    "equal weights",
    "r inside subjects",
)


def direction_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of DIRECTION_COLUMNS from a diagnosis' plain data; a dash where a number does not exist."""
    counts, inside = row["counts"], row["within_subject"]
    return [
        str(row["layer"]),
        f"{counts['refusing']}, {counts['complying']}",
        f"{row['null_space_share']:.4f}",
        _number(row["effective_rank"], ".1f"),
        _number(row["relative_penalty"], ".2g"),
        _band(row["split_half"]),
        _band(row["split_half_topic"]),
        f"{row['cosine_md']:.2f}",
        _number(row["cosine_unweighted"], ".3f"),
        f"{inside['r']:.2f} (p {inside['p_max']:.2g})",
    ]


def direction_note(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the columns are, with the numbers that all rows share."""
    first = next(iter(rows))
    return (
        f"In {first['d']} dimensions. Null space: share of |v|^2 where the answered prompts' states have no variance, so that nothing "
        "but chance speaks for it. Effective rank: tr(A)^2 / tr(A^2) of the covariance that is inverted, penalty included. Penalty: in "
        f"mean eigenvalues of that covariance. Halves: cosine of fits to two halves of the subjects, mean and central 95 % of "
        f"{first['n_splits']} splits. Topic alone: the same with scores permuted inside subjects. Cos MD: cosine with the mean "
        f"difference; 95 % of random pairs lie within ±{first['cosine_null']:.2f}. Equal weights: cosine with the unweighted fit. "
        f"r inside subjects: of projection and score on prompts that nothing was fitted on (n = {first['within_subject']['n']} of "
        "subjects with both verdicts), p of the largest over layers."
    )


def directions_table(data: Mapping[str, Any], title: str) -> Table:
    """A result's `directions` and, below them, why those `left_out` have none."""
    reasons = [f"{method_label(m)} is not applicable: {reason}." for m, reason in data["left_out"].items()]
    notes = [direction_note(data["directions"].values())] if data["directions"] else []
    table = Table(title=title, caption=" ".join([*reasons, *notes]), caption_justify="left")
    for column in ("", *DIRECTION_COLUMNS):
        table.add_column(column)
    for method, row in data["directions"].items():
        table.add_row(method_label(method), *direction_cells(row))
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _band(band: Mapping[str, float] | None) -> str:
    return "–" if band is None else f"{band['value']:.2f} ({band['low']:.2f} to {band['high']:.2f})"
