"""One self-contained HTML page of what is known about a model: the claim, every study, replies side by side, provenance.

Model text is hostile input. Everything is escaped by jinja2; names that appear in attributes are replaced by keys of
our own (k0, k1, ...); a content security policy allows the page's own style and script by hash, images as data, and
nothing else: no connection, no frame, no form target.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rsteer_interp.processes import is_first
from rsteer_interp.report.collection import Collection, collect, collect_reproduction
from rsteer_interp.report.directions import DIRECTION_COLUMNS, direction_cells, direction_note
from rsteer_interp.report.schema import Replies, Reproduction
from rsteer_interp.report.words import lead, limits, percent, reproduction_record, study_record
from rsteer_interp.style import method_label

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True)
class Head:
    """The model as the page's head names it."""

    name: str
    source: str
    fingerprint: str
    n_layers: int
    d_model: int
    backend: str
    created: str
    preset: str = ""


def write_page(result_folder: Path | str, out_html: Path | str) -> Path:
    """Write the page of a "reproduce" result alone; its figures are those in RESULT/figures."""
    return _write(lambda: collect_reproduction(result_folder), Path(out_html))


def write_overview(results: Path | str, out_html: Path | str, fingerprint: str | None = None) -> Path:
    """Write the page of everything in the folder `results` that belongs to one model (see `collect`)."""
    return _write(lambda: collect(results, fingerprint), Path(out_html))


def _write(read: Callable[[], Collection], out: Path) -> Path:
    if not is_first():
        return out
    text = render(read())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    return out


def render(found: Collection) -> str:
    """The page as text."""
    css, js = _own("page.css"), _own("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(js)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_own),
    )
    data = found.reproduction.data if found.reproduction is not None else None
    keys = {} if data is None else _keys(data)
    filters: dict[str, Any] = {
        "visible": visible,
        "percent": lambda value: percent(100 * value),
        "published": percent,
        "interval": lambda rate: f"{100 * rate.low:.0f} to {percent(100 * rate.high)}",
        "changed": lambda replies: " ".join(keys[m] for m in _changed(replies)),
        "record": study_record,
        "method": method_label,
        "direction": lambda row: direction_cells(row.model_dump()),
    }
    environment.filters.update(filters)
    return environment.get_template("page.html.j2").render(
        head=_head(found),
        lead=lead(found),
        studies=found.studies,
        repeated={kind for kind, count in Counter(s.kind for s in found.studies).items() if count > 1},
        left_out=found.left_out,
        limits=limits(data),
        data=data,
        keys=keys,
        policy=Markup(policy),
        css=Markup(css),
        js=Markup(js),
        **_claim(found),
    )


def visible(value: Any) -> str:
    """Text without control characters and without marks that turn the reading direction: each becomes U+FFFD."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", str(value).replace("\r\n", "\n"))


def _head(found: Collection) -> Head:
    if found.reproduction is not None:
        data, record = found.reproduction.data, found.reproduction.provenance
        m = data.model
        return Head(m.name, m.source, m.fingerprint, m.n_layers, m.d_model, m.backend, record.created, data.preset)
    study = found.studies[0]
    record, model = study.provenance, study.data.model
    known = (record.model_source or "unknown", record.model_fingerprint or "unknown")
    created = max(s.provenance.created for s in found.studies)
    return Head(model.name, *known, model.n_layers, model.d_model, record.backend or "unknown", created)


def _claim(found: Collection) -> dict[str, Any]:
    """What the reproduction's own sections need."""
    if found.reproduction is None:
        return {}
    data, headline = found.reproduction.data, found.reproduction.data.headline
    return {
        "figures": found.reproduction_figures,
        "sets": data.in_order(name for row in data.table for name in row.rates),
        "ns": {name: n for name in data.sets if (n := _one(r.rates[name].n for r in data.table if name in r.rates))},
        "shift_n": _one(row.answer_shift.n for row in data.table if row.answer_shift),
        "kl_n": _one(row.kl.n for row in data.table if row.kl),
        "reply_sets": _reply_sets(data),
        "methods": _methods(data),
        "headline": headline.method if headline else None,
        "record": reproduction_record(found.reproduction.provenance, data),
        "direction_columns": DIRECTION_COLUMNS,
        "direction_note": direction_note(row.model_dump() for row in data.directions.values())
        if data.directions
        else "",
    }


def _reply_sets(data: Reproduction) -> list[str]:
    return data.in_order(r.set for r in data.replies)


def _methods(data: Reproduction) -> list[str]:
    return data.in_order(m for r in data.replies for m in r.steered)


def _keys(data: Reproduction) -> dict[str, str]:
    return {name: f"k{i}" for i, name in enumerate([*_reply_sets(data), *_methods(data)])}


def _changed(replies: Replies) -> Iterable[str]:
    return (method for method, reply in replies.steered.items() if reply.refused != replies.base.refused)


def _one(counts: Iterable[int]) -> int | None:
    """The count that all share, None when they differ."""
    found = set(counts)
    return found.pop() if len(found) == 1 else None


def _own(name: str) -> str:
    return (resources.files("rsteer_interp.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
