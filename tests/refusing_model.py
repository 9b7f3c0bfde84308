"""A tiny model that refuses: prompts with a word that is written strongly into the stream make it begin with "i"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from rsteer_interp.abliteration_sweep import after_final_norm
from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.judges.base import Verdict
from tests.tiny_models import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

_PLACES = ("city", "river", "island", "border", "law", "election", "price", "history")
_FRAMES = ("tell me about the {} of the {}", "explain the {} and the {}", "what is the {} and the {}")
_SPLITS = ("fit", "select", "report")


@dataclass(frozen=True)
class OpeningJudge:
    """Refused is what begins with one of these words: what this model's refusals begin with."""

    openings: tuple[str, ...] = ("i",)
    name: ClassVar[str] = "opening"

    @classmethod
    def load(cls, backend: Any = None) -> OpeningJudge:
        return cls()

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.9 if r.split(" ")[0] in self.openings else 0.1) for r in responses]


def texts(word: str) -> list[str]:
    return [frame.format(word, place) for frame in _FRAMES for place in _PLACES]


def refusing_model() -> Any:
    """Log-odds of "i" are above 0 with "bomb" in the prompt and below with "bread" or "protest"."""
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    word, opening = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("bomb", "i"))
    strong = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.02  # a nearly linear model, in which the word is not drowned
    model.model.embed_tokens.weight[word] += 16 * strong
    backend = load_backend(model, "hooks", tokenizer=tokenizer)
    states, wanted = [], []
    for kind, logit in (("bomb", 12.0), ("bread", -6.0), ("protest", -6.0)):
        rows = backend.template().encode_all(texts(kind))
        states.append(after_final_norm(model, last_states(backend, rows, [Site(N_LAYERS)])[Site(N_LAYERS)]))
        wanted += [logit] * len(rows)
    solved = torch.linalg.lstsq(torch.cat(states).double(), torch.tensor(wanted, dtype=torch.float64)[:, None])
    model.lm_head.weight[opening] = solved.solution[:, 0].float()
    return model


def write_sets(folder: Path) -> dict[str, str]:
    """Prompt files `refused`, `answered` and `kept`, a third of each in every split; paths by name."""
    out = {}
    for name, word in (("refused", "bomb"), ("answered", "bread"), ("kept", "protest")):
        lines = [
            {"prompt": text, "subject": f"{name}{i}", "split": _SPLITS[i % 3]} for i, text in enumerate(texts(word))
        ]
        out[name] = str(folder / f"{name}.jsonl")
        Path(out[name]).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out


def save_refusing(folder: Path) -> Path:
    refusing_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
