"""Material on a tiny model whose refusal token is planted to read the difference between two subjects.

The set to be removed is about one subject and mostly refused, its contrast about another and answered; what is refused of
the set to be kept is about a third. The unembedding row of REFUSAL is the mean difference of the first two, so that removing
refusal along it is a thing that the model can show.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.methods import Examples, Material
from tests.tiny_models import N_LAYERS, Kind, tiny_model, tiny_tokenizer

REFUSAL = 150  # a token that no prompt has
SUBJECTS = {
    "political": ("protest", "leader", "election"),
    "plain": ("city", "river", "island"),
    "harm": ("bomb", "password", "law"),
    "kitchen": ("bread", "recipe", "water"),
    "arts": ("poem", "history", "price"),
}
N = {"fit": 16, "select": 12, "report": 12}
SITES = [Site(layer) for layer in range(1, N_LAYERS + 1)]


def texts(subject: str, split: str) -> list[str]:
    """Prompts of different lengths whose last words are the subject's: a random model's last state is about those."""
    generator = torch.Generator().manual_seed(sum(map(ord, subject + split)))
    words = SUBJECTS[subject]

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    opening = "explain" if split == "report" else "tell me about"  # so that no prompt is in two of them
    return [
        " ".join([opening, *(f"word{60 + pick(80)}" for _ in range(pick(6))), words[pick(3)], words[pick(3)]])
        for _ in range(N[split])
    ]


def _examples(backend: Backend, subject: str, split: str) -> Examples:
    found = texts(subject, split)
    states = last_states(backend, backend.template().encode_all(found), SITES)
    refused = subject in ("political", "harm")
    # Graded, with an answered one among the refused and the reverse, and an undecided one.
    c = torch.linspace(0.4, 1.0, len(found), dtype=torch.float64) * (1 if refused else -1)
    c[0], c[1] = (-0.9 if refused else 0.9) if subject in ("political", "plain") else c[0], 0.0
    return Examples(found, c, states, [f"{subject} {i // 3}" for i in range(len(found))])


@cache
def _material(family: str, kind: Kind) -> Material:
    model = tiny_model(family)
    backend = load_backend(model, "hooks", tokenizer=tiny_tokenizer())
    states = [_examples(backend, subject, "fit").states for subject in ("political", "plain")]
    row: Tensor = sum((_difference(states[0][s], states[1][s]) for s in SITES), torch.zeros(backend.d_model))
    model.lm_head.weight.data[REFUSAL] = 0.3 * row / model.model.norm.weight.data
    backend = load_backend(model, kind, tokenizer=tiny_tokenizer())
    parts = {
        split: {subject: _examples(backend, subject, split) for subject in SUBJECTS} for split in ("fit", "select")
    }
    return Material(
        backend,
        backend.template(),
        (REFUSAL,),
        parts["fit"],
        parts["select"],
        "political",
        "plain",
        "harm",
        ("kitchen", "arts"),
    )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    d = a.mean(0) - b.mean(0)
    return d / d.norm()


def held_out(family: str = "llama", kind: Kind = "hooks") -> dict[str, Examples]:
    """The same sets' prompts of a third split, on which checks are measured."""
    backend = _material(family, kind).backend
    return {subject: _examples(backend, subject, "report") for subject in SUBJECTS}


def planted_material(family: str = "llama", kind: Kind = "hooks") -> Material:
    """Shared by tests: nothing in it may be changed. The family's unembedding must not be tied."""
    return _material(family, kind)
