"""What an edit adds to every state, seen from outside it; and whether another edit's pushes are of equal dose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Around, At, Edit, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.evaluation import log_odds

Pushes = dict[Site, Tensor]


@dataclass(frozen=True, eq=False)
class Spy(Around):
    """Keeps what an edit adds, by the row's tokens, the site and the position, however the pass was cut."""

    seen: dict[tuple[tuple[int, ...], Site, int], Tensor] = field(default_factory=dict)
    decoded: list[tuple[Site, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        out = self.edit(x, at)
        delta = out.double() - x.double()
        if at.phase == "decode":
            self.decoded.append((at.site, delta[:, 0]))
            return out
        for i, row in enumerate(at.rows.tolist()):
            of = range(len(at.batch)) if at.phase == "prefix" else [row]
            for j, position in enumerate(at.positions[i].tolist()):
                if bool(at.mask[i, j]):
                    self.seen.update({(at.batch.rows[k].ids, at.site, position): delta[i, j] for k in of})
        return out

    def pushes(self, rows: Sequence[Tokens]) -> Pushes:
        """[token of all rows, d] by site, positions of the template prefix included."""
        sites = sorted(self.sites)
        return {s: torch.stack([self.seen[r.ids, s, p] for r in rows for p in range(len(r.ids))]) for s in sites}


def pushes(backend: Backend, rows: Sequence[Tokens], *edits: Edit) -> list[Pushes]:
    """Of every edit, each by itself."""
    found = []
    for edit in edits:
        spy = Spy(edit)
        log_odds(backend, rows, (5,), spy)
        found.append(spy.pushes(rows))
    return found


def equal_dose(own: Pushes, null: Pushes, tolerance: float = 2e-5) -> bool:
    """Whether every state is moved as far, at each site, at every angle between sites, and in the sum of all."""
    a, b = torch.stack(list(own.values()), 1), torch.stack(list(null.values()), 1)  # token, site, d
    scale = float((a @ a.mT).abs().max())
    assert scale > 1e-3
    grams = (a @ a.mT - b @ b.mT).abs().max() / scale
    sums = (a.sum(1).norm(dim=-1) - b.sum(1).norm(dim=-1)).abs().max() / scale**0.5
    return bool(grams < tolerance) and bool(sums < tolerance)
