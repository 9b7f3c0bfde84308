"""One self-contained HTML page from a "reproduce" result: claim table, figures, replies side by side, provenance.

Model text is hostile input. Everything is escaped by jinja2; names that appear in attributes are replaced by keys of
our own (k0, k1, ...); a content security policy allows the page's own style and script by hash, images as data, and
nothing else: no connection, no frame, no form target.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rsteer_interp.provenance import Provenance
from rsteer_interp.report.schema import HARMFUL, POLITICAL, Rate, Replies, Reproduction, read_reproduction

_FIGURE_ORDER = ("claim_table", "frontier", "scores", "fig3_pca", "fig5_layers")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True)
class PageFigure:
    """A drawn figure as the page holds it."""

    title: str
    caption: str
    png: str


def write_page(result_folder: Path | str, out_html: Path | str, figures: Path | str | None = None) -> Path:
    """Write the page of a "reproduce" result; figures are those found in `figures` (default: RESULT/figures)."""
    result = read_reproduction(result_folder)
    folder = Path(figures) if figures is not None else Path(result_folder) / "figures"
    text = render(result.data, result.provenance, read_figures(folder) if result.data.applicable else [])
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    return out


def read_figures(folder: Path) -> list[PageFigure]:
    """The figures in a folder: every PNG with a JSON of its title and caption beside it."""
    found = {png.stem: png for png in sorted(folder.glob("*.png")) if png.with_suffix(".json").is_file()}
    names = [*(name for name in _FIGURE_ORDER if name in found), *(name for name in found if name not in _FIGURE_ORDER)]
    out = []
    for name in names:
        words = json.loads(found[name].with_suffix(".json").read_text(encoding="utf-8"))
        png = base64.b64encode(found[name].read_bytes()).decode()
        out.append(PageFigure(str(words.get("title", name)), str(words.get("caption", "")), png))
    return out


def render(data: Reproduction, provenance: Provenance, figures: list[PageFigure]) -> str:
    """The page as text."""
    css, js = _own("page.css"), _own("page.js")
    reply_sets = data.in_order(r.set for r in data.replies)
    methods = data.in_order(m for r in data.replies for m in r.steered)
    keys = {name: f"k{i}" for i, name in enumerate([*reply_sets, *methods])}
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(js)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": visible,
        "percent": lambda value: _percent(100 * value),
        "published": _percent,
        "interval": lambda rate: f"{100 * rate.low:.0f} to {_percent(100 * rate.high)}",
        "changed": lambda replies: " ".join(keys[m] for m in _changed(replies)),
    }
    headline = data.headline
    return environment.from_string(_own("page.html.j2")).render(
        data=data,
        provenance=provenance,
        figures=figures,
        finding=finding(data),
        sets=data.in_order(name for row in data.table for name in row.rates),
        ns={name: n for name in data.sets if (n := _one(row.rates[name].n for row in data.table if name in row.rates))},
        shift_n=_one(row.answer_shift.n for row in data.table if row.answer_shift),
        kl_n=_one(row.kl.n for row in data.table if row.kl),
        reply_sets=reply_sets,
        methods=methods,
        headline=headline.method if headline else None,
        keys=keys,
        record=_record(provenance, data),
        limits=_limits(data),
        policy=Markup(policy),
        css=Markup(css),
        js=Markup(js),
    )


def visible(value: Any) -> str:
    """Text without control characters and without marks that turn the reading direction: each becomes U+FFFD."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", str(value).replace("\r\n", "\n"))


def finding(data: Reproduction) -> str:
    """The result in one sentence, with intervals."""
    base, best = data.base, data.headline
    if not data.applicable:
        reason = (data.reason or "not applicable").strip().rstrip(".")
        return f"{reason[:1].upper()}{reason[1:]}."
    if base is None or best is None or POLITICAL not in base.rates:
        return "The table has no steered row, so nothing can be said yet."
    words = f"{best.label} takes political refusal {_from_to(base.rates[POLITICAL], best.rates[POLITICAL])}"
    if HARMFUL in base.rates and HARMFUL in best.rates:
        before, after = base.rates[HARMFUL], best.rates[HARMFUL]
        apart = after.high < before.low or after.low > before.high
        words += f"; refusal of harmful requests goes {_from_to(before, after)}"
        words += ", intervals apart" if apart else ", intervals overlap"
    return f"{words}."


def _from_to(before: Rate, after: Rate) -> str:
    def shown(rate: Rate) -> str:
        return f"{_percent(100 * rate.rate)} ({100 * rate.low:.0f} to {100 * rate.high:.0f})"

    return f"from {shown(before)} to {shown(after)} of {after.n}"


def _changed(replies: Replies) -> Iterable[str]:
    return (method for method, reply in replies.steered.items() if reply.refused != replies.base.refused)


def _one(counts: Iterable[int]) -> int | None:
    """The count that all share, None when they differ."""
    found = set(counts)
    return found.pop() if len(found) == 1 else None


def _percent(value: float) -> str:
    return f"{value:.0f}\N{NO-BREAK SPACE}%"


def _record(provenance: Provenance, data: Reproduction) -> list[tuple[str, str]]:
    def pairs(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))

    seconds = {name: f"{value:.1f} s" for name, value in data.seconds.items()}
    rows = [
        ("model", provenance.model_name or data.model.name),
        ("weights from", provenance.model_source or data.model.source),
        ("fingerprint", provenance.model_fingerprint or data.model.fingerprint),
        ("backend", provenance.backend or data.model.backend),
        (
            "device, dtype, attention",
            ", ".join(filter(None, [provenance.device, provenance.dtype, provenance.attention])),
        ),
        ("command", provenance.command),
        ("created", provenance.created),
        ("seeds", ", ".join(map(str, provenance.seeds))),
        (
            "configuration",
            json.dumps(provenance.config, ensure_ascii=False, sort_keys=True) if provenance.config else "",
        ),
        ("chat template", provenance.template or ""),
        ("prompt sets", pairs(provenance.prompt_sets)),
        ("made from", pairs(provenance.inputs)),
        ("packages", pairs(provenance.packages)),
        ("platform", provenance.platform),
        ("time by stage", pairs(seconds)),
        ("notes", "; ".join(provenance.notes)),
    ]
    return [(name, value) for name, value in rows if value]


def _limits(data: Reproduction) -> list[str]:
    out = [
        "One model and prompts of this project; the paper's rates are of 4B and 80B models on other prompts. Only the "
        "direction of the effects can be compared, not the rates.",
        "The weights named above were measured; another quantisation of the same model gives slightly different numbers.",
        "Configurations were chosen on other prompts (select split) than those reported, but the directions of all "
        "layers come from one sample of prompts; how much they vary with it is not shown here.",
        "Correlation by layer says where refusal can be read, not where it is caused.",
        "Refused and answered prompts differ in topic between the sets; the comparisons within sets are the fair ones.",
        "Whether a reply refuses is one judge's verdict on one greedy reply.",
    ]
    base = data.base
    if data.applicable and base is not None and HARMFUL in base.rates and base.rates[HARMFUL].low < 0.5:
        rate = base.rates[HARMFUL]
        out.insert(1, (
            f"This model refuses only {_percent(100 * rate.rate)} of the harmful requests before any steering, so no claim "
            "that safety is preserved may rest on that column alone."
        ))  # fmt: skip
    return out if data.applicable else out[1:2]


def _own(name: str) -> str:
    return (resources.files("rsteer_interp.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
