"""A safety audit on one self-contained HTML page, and the rows that page and terminal share. Model text is hostile: see `page`."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rsteer_interp.report.page import visible
from rsteer_interp.results import Result, load_result

KIND = "safety_audit"
_STYLE = """
.fail { color: var(--refused); } .pass { color: var(--answered); }
.audit td:first-child { min-width: 14rem; }
"""
Row = tuple[str, str, str, str, str]


def write_audit_page(folder: Path | str, out: Path | str) -> Path:
    """Write the page of the audit in a result folder."""
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(render_audit(load_result(folder, kind=KIND)), encoding="utf-8")
    partial.replace(out)
    return out


def render_audit(result: Result) -> str:
    """The page as text; the same result gives the same page."""
    css = _own("page.css") + _STYLE
    style = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_own),
    )
    environment.filters["visible"] = visible
    data, record = result.data, result.provenance
    return environment.get_template("audit.html.j2").render(
        data=data,
        record=record,
        comparison=comparison_rows(data),
        states=state_rows(data["states"]),
        policy=Markup(policy),
        css=Markup(css),
    )


def comparison_rows(data: dict[str, Any]) -> list[Row]:
    """Measure, n, before, after, change with its 95 % interval: refusals, log-odds, coherence, random pushes."""
    rows: list[Row] = []
    for role in ("harmful", "borderline", "general"):
        one = data["sets"][role]
        rows.append((
            f"{role}: refused", str(one["before"]["n"]), _rate(one["before"]), _rate(one["after"]),
            f"{_points(one['difference'])} points; {one['only_before']} lost, {one['only_after']} new, p = {_p(one['p'])}",
        ))  # fmt: skip
        if one["log_odds"] is not None:
            change = one["log_odds"]["change"]
            rows.append((
                f"{role}: refusal log-odds", str(change["n"]), "", "", f"{_number(change)} nats, p = {_p(one['log_odds']['p'])}"
            ))  # fmt: skip
    if data["read_out"] is not None:
        old, new = (data["read_out"][side] for side in ("before", "after"))
        n = str(new["refused"]["n"])
        rows.append(("log-odds against judged replies: ROC area", n, _area(old), _area(new), ""))
    answers = data["answers"]
    rows.append(("benign answers: KL per token", str(answers["kl"]["n"]), "0", "", f"{_number(answers['kl'])} nats"))
    before, after, ratio = (answers[f"perplexity_{k}"] for k in ("before", "after", "ratio"))
    rows.append(
        ("benign answers: perplexity", str(ratio["n"]), _number(before), _number(after), f"times {_number(ratio)}")
    )
    replies = answers["replies"]
    if replies["ratio"] is not None:
        rows.append((
            "own answers: perplexity under the unchanged model, same prompts", str(replies["ratio"]["n"]), "1", "",
            f"times {_number(replies['ratio'])}; {replies['empty']} empty",
        ))  # fmt: skip
    pushes = data["random"]
    if pushes["measured"]:
        what = f"random pushes, layer {pushes['layer']}, dose {pushes['dose']:g}"
        n = f"{pushes['n_vectors']} vectors x {pushes['n_prompts']} prompts"
        rows.append((
            f"{what}: fall of log-odds", n, _number(pushes["fall_before"]), _number(pushes["fall_after"]),
            f"{_number(pushes['difference'])} nats",
        ))  # fmt: skip
        flips = [_rate(pushes[f"flipped_{side}"]) for side in ("before", "after")]
        rows.append((f"{what}: no longer refused, judged", n, flips[0], flips[1], ""))
    return rows


def _area(check: dict[str, Any]) -> str:
    if check["area"] is None:
        return "one verdict"
    return _number(check["area"]) + ("" if check["valid"] else ", not valid")


def state_rows(sites: list[dict[str, Any]]) -> list[Row]:
    """Site, relative size, effective ranks with their null, share of the mean shift, cosine with the refusal direction."""
    rows: list[Row] = []
    for one in sites:
        if not one["moved"]:
            rows.append((one["site"], "does not move", "", "", ""))
            continue
        ranks = "; ".join(
            f"{float(t):.0%}: {band['rank']} (null {band['low']:g} to {band['high']:g})"
            for t, band in one["ranks"].items()
        )
        mean, cosine = one["mean"], one["cosine"]
        rows.append((
            one["site"], f"{one['relative_size']:.2g}", ranks, f"{mean['share']:.0%} (null to {mean['null_high']:.0%})",
            "" if cosine is None else f"{cosine['random']['cosine']:.2f} (permuted labels to {cosine['label_high']:.2f})",
        ))  # fmt: skip
    return rows


def _rate(rate: dict[str, Any]) -> str:
    return f"{100 * rate['rate']:.0f} % ({100 * rate['low']:.0f} to {100 * rate['high']:.0f})"


def _points(e: dict[str, Any]) -> str:
    return f"{100 * e['value']:+.1f} ({100 * e['low']:+.1f} to {100 * e['high']:+.1f})"


def _number(e: dict[str, Any]) -> str:
    return f"{e['value']:.3g} ({e['low']:.3g} to {e['high']:.3g})"


def _p(p: float) -> str:
    return f"{p:.2g}"


def _own(name: str) -> str:
    return (resources.files("rsteer_interp.report") / name).read_text(encoding="utf-8")
