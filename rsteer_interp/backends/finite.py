"""Numbers that are not finite, where a pass gives them out: one error, before anybody takes them for an answer.

One reduction per pass over what is read out, none per layer. Padding is not looked at: what stands there is undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsteer_interp.backends.edits import At, Edit, Site
from rsteer_interp.errors import UserError


class NotFinite(UserError):
    """Something that a pass gives out is NaN or infinite."""


class StatesNotFinite(NotFinite):
    """A state of the stream, at a site that the message names."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Changes nothing at some sites, so that they are looked at."""

    sites: frozenset[Site]

    pointwise = True

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        return x


def check_logits(
    logits: Float[Tensor, "row keep vocab"], mask: Bool[Tensor, "row total"], edit: Edit | None, model: str
) -> None:
    """UserError where a real token has a NaN or +inf among its logits, or -inf alone.

    Single entries of -inf are fine: some models put them on the padding of their vocabulary. A maximum is NaN where any
    entry is, so it decides all this in one pass over the logits, where `isfinite` takes ten times as long.
    """
    most = logits.detach().amax(-1)
    bad = ~most.isfinite() & mask[:, -logits.shape[1] :].to(most.device)
    if bool(bad.any()):
        rows = int(bad.any(1).sum())
        raise NotFinite(f"{model} gives logits that are not finite for {rows} of {len(bad)} prompts{_remedy(edit)}")


def check_states(states: Float[Tensor, "row pos *d"], mask: Bool[Tensor, "row pos"], site: Site, model: str) -> None:
    """UserError where the state of a real token is not finite. A sum is finite only if all its terms are."""
    total = states.detach().flatten(2).sum(-1, dtype=torch.float32)
    if bool((~total.isfinite() & mask.to(total.device)).any()):
        raise StatesNotFinite(f"{model}: states at {site} are not finite, as read or edited there{_REMEDY}")


def check_steps(log_probs: Float[Tensor, "reply step"], edit: Edit | None, model: str) -> None:
    """UserError where a generated token has no finite log-probability: its logits held a NaN or +inf, or -inf alone."""
    bad = ~log_probs.isfinite()
    if bool(bad.any()):
        step = int(bad.any(0).int().argmax()) + 1
        raise NotFinite(f"{model} gives logits that are not finite at token {step} of a reply{_remedy(edit)}")


_REMEDY = "; use a wider dtype (bfloat16 or float32), or a smaller edit where there is one"


def _remedy(edit: Edit | None) -> str:
    if edit is None:
        return "; use a wider dtype (bfloat16 or float32), and see that its weights are sound"
    return (
        f" under {type(edit).__name__} at {min(edit.sites, default='no site')}; give a smaller amount, or a wider dtype"
    )
