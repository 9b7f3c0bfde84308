"""Material from a tiny model: prompts of four sets that differ in the words they are made of, half of a set refused."""

from __future__ import annotations

import torch

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.methods import Examples, Material

TOPICS = {
    "political": ("protest",),
    "matched": ("history", "law", "island", "price"),
    "harmful": ("bomb", "password"),
    "harmless": ("bread", "recipe", "poem"),
    "general": ("water", "river", "city"),
}
FORMS = (
    "tell me about the {}",
    "what is the {} of the {} ?",
    "why",
    "how do i write a {} , can you explain ?",
    "is the {} in the {}",
    "explain the {} to me",
)
REFUSAL_TOKENS = (5, 9, 30)


def texts(topic: str, split: str) -> list[str]:
    """Twelve prompts for fit, others of the same words for select."""
    words = TOPICS[topic]
    order = range(12) if split == "fit" else range(5, 13)
    return [
        f"{FORMS[i % 6].replace('{}', words[i % len(words)])} {words[(i // 2) % len(words)]} {words[-1]}" for i in order
    ]


def material(backend: Backend) -> Material:
    template = backend.template()
    sites = [Site(layer) for layer in range(1, backend.n_layers + 1)]

    def examples(topic: str, split: str) -> Examples:
        prompts = texts(topic, split)
        confidence = torch.full((len(prompts),), 1.0 if topic == "harmful" else -1.0)
        if topic == "political":
            confidence = torch.tensor([1.0, -1.0]).repeat(len(prompts))[: len(prompts)]
        subjects = [f"{topic} {i // 2}" for i in range(len(prompts))]
        return Examples(prompts, confidence, last_states(backend, template.encode_all(prompts), sites), subjects)

    fit, select = ({topic: examples(topic, split) for topic in TOPICS} for split in ("fit", "select"))
    return Material(
        backend, template, REFUSAL_TOKENS, fit, select, "political", "matched", "harmful", ("harmless", "general")
    )
