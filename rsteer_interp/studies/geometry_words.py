"""The answer of the study of refusal geometry, in one paragraph made from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsteer_interp.studies.reader_checks import checks_words


def finding(data: Mapping[str, Any], n_layers: int) -> str:
    """The answer for the first two kinds, then its evidence: geometry, steering, selectivity, independence."""
    label = {k["name"]: k["label"] for k in data["kinds"]}
    first, second, *others = data["columns"]
    over = next((c for c in others if c.startswith("over")), None)
    layers, transfer = data["window"]["layers"], data["transfer"]
    parts = [
        f"{label[first].capitalize()} and {label[second]} refusal are {_verdict(data, first, second)}, and steering "
        f"{_apart(data, second)}.",
        f"Cosine of their directions at layer {data['chosen']['layer']} of {n_layers} (chosen on select): {_cosine(data, first, second)}.",
    ]
    inside = (f"{first}_inside", f"{second}_inside")
    if set(inside) <= set(label):
        p = _matrix_cell(data, "within_subject_p", *inside)
        raw = _matrix_cell(data, "raw", *inside)
        parts.append(
            f"Of refused and answered prompts on the same subject, where topic cannot help, it is {raw['value']:.2f} "
            f"({raw['low']:.2f} to {raw['high']:.2f}; labels permuted within subjects p = {p:.2g})."
        )
    if over:
        parts.append(f"{label[first].capitalize()} with {label[over]}: {_cosine(data, first, over)}.")
    parts.append(
        f"Adding -{data['dose']:g} |resid| at layers {layers[0]} to {layers[-1]}: "
        + "; ".join(_removes(transfer["add"], transfer["rows"], row, label, (first, second)) for row in (first, second))
        + "."
    )
    for part, words in (("matched", "at matched doses"), ("transfer", "under ablation")):
        if second in data[part]["dissociation"]:
            s = data[part]["dissociation"][second]["selectivity"]
            parts.append(
                f"Own minus the other's removal, mean of both kinds, {words}: {s['value']:.2f} nats "
                f"({s['low']:.2f} to {s['high']:.2f}, n = {s['n']}), {_random(s['p'])}."
            )
    pairs = [p for p in data["independence"]["downstream"] if {p["ablated"], p["read"]} == {first, second}]
    parts += [_independence(pair, label) for pair in pairs]
    return " ".join([*parts, checks_words(data["read_out"])])


def _verdict(data: Mapping[str, Any], a: str, b: str) -> str:
    _, clean, p = _entry(data, a, b)
    if p > 0.05:
        return "not distinguishable from unrelated directions"
    if clean is None:
        return "related, but their directions are too unreliable to say how closely"
    return "not distinguishable from one direction" if clean["high"] >= 1 else "related, not the same"


def _apart(data: Mapping[str, Any], second: str) -> str:
    """Whether own directions remove more of their own kind, in the matched doses and under ablation."""
    found = [data[part]["dissociation"].get(second) for part in ("matched", "transfer")]
    hits = [e["selectivity"]["low"] > 0 and e["selectivity"]["p"] <= 0.05 for e in found if e]
    if not hits:
        return "could not be matched"
    return (
        "tells them apart"
        if all(hits)
        else "tells them apart in part"
        if any(hits)
        else "tells them apart no more than random directions do"
    )


def _entry(data: Mapping[str, Any], a: str, b: str) -> tuple[dict[str, float], dict[str, float] | None, float]:
    raw, clean, p = (_matrix_cell(data, name, a, b) for name in ("raw", "disattenuated", "p"))
    return raw, clean, p


def _matrix_cell(data: Mapping[str, Any], matrix: str, a: str, b: str) -> Any:
    names = [k["name"] for k in data["kinds"]]
    return data["atlas"][matrix][names.index(a)][names.index(b)]


def _cosine(data: Mapping[str, Any], a: str, b: str) -> str:
    (raw, clean, p), count = _entry(data, a, b), data["counts"]["fit"]
    n = f"n = {sum(count[a].values())} and {sum(count[b].values())}"
    tail = "too unreliable to correct for noise" if clean is None else (
        f"without estimation noise {clean['value']:.2f} ({clean['low']:.2f} to {clean['high']:.2f})"
    )  # fmt: skip
    return f"{raw['value']:.2f} ({raw['low']:.2f} to {raw['high']:.2f}, {n}), {tail}, {_random(p)}"


def _random(p: float) -> str:
    return f"random pairs p = {p:.2g}" if p <= 0.05 else f"not distinguishable from random, p = {p:.2g}"


def _removes(
    found: Mapping[str, Any], rows: list[str], row: str, label: Mapping[str, str], columns: tuple[str, str]
) -> str:
    line = dict(zip(found["columns"], found["cells"][rows.index(row)], strict=True))

    def cell(name: str) -> str:
        c = line[name]
        beyond = f"q = {c['q']:.2g}" if c["q"] <= 0.05 else f"not distinguishable from random, q = {c['q']:.2g}"
        return f"{c['value']:.2f} nats of {label[name]} refusal ({c['low']:.2f} to {c['high']:.2f}, n = {c['n']}; {beyond})"

    return f"the {label[row]} direction removes " + " and ".join(cell(c) for c in columns)


def _independence(pair: Mapping[str, Any], label: Mapping[str, str]) -> str:
    size = pair["size"]
    beyond = f"{pair['beyond']} of {pair['pairs']} layer pairs beyond random" if pair["beyond"] else (
        f"not distinguishable from random in any of {pair['pairs']} layer pairs, smallest q = {min(pair['q']):.2g}"
    )  # fmt: skip
    return (
        f"Ablating {label[pair['ablated']]} makes later blocks move the {label[pair['read']]} projection by {100 * size['value']:.0f} % of its "
        f"gap ({100 * size['low']:.0f} to {100 * size['high']:.0f}, n = {size['n']}; random {100 * pair['random_size']:.0f} %; {beyond})."
    )
