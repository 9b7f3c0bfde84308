"""Each: many settings as rows of one batch, every row under the edit of its own setting.

A step of decoding reads all weights for however few rows, and an accelerator is idle under a small prompt pass: settings that
share a pass share that cost. What a row gets is what its edit alone would give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.edits import At, Edit, Site, decide_ahead, leaves_prefix, rowwise
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.errors import UserError


@dataclass(frozen=True, eq=False)
class Each:
    """Rows of setting s (`Tokens.setting`) under edits[s]; None edits nothing. See `repeated` for such rows.

    An edit sees the rows of its own setting as a batch by themselves, with a memory of its own. All edits must be `rowwise`, or
    running them together would not be running them apart: UserError else.
    """

    edits: tuple[Edit | None, ...]

    rowwise = True

    def __post_init__(self) -> None:
        for edit in self.edits:
            if edit is not None and not rowwise(edit):
                raise UserError(f"{type(edit).__name__} depends on other rows of a batch; run it by itself")

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset().union(*(edit.sites for edit in self.edits if edit is not None))

    @property
    def pointwise(self) -> bool:
        """Of rows of one setting: a backend runs a shared prefix once per setting."""
        return all(edit.pointwise for edit in self.edits if edit is not None)

    @property
    def leaves_prefix(self) -> bool:
        return all(edit.pointwise or leaves_prefix(edit) for edit in self.edits if edit is not None)

    def decide_ahead(self, batch: Batch, memory: dict[Any, Any]) -> None:
        for setting, (own, part) in batch.by_setting.items():
            mine: dict[Any, Any] = {}
            decide_ahead(self.edits[setting], part, mine)
            _keep(memory, setting, mine, own, len(batch))

    def __call__(self, x: Float[Tensor, "row pos d"], at: At) -> Float[Tensor, "row pos d"]:
        out, current = x.clone(), at.rows.cpu()
        for setting, (own, part) in at.batch.by_setting.items():
            edit, here = self.edits[setting], torch.isin(current, own)
            if edit is None or at.site not in edit.sites or not bool(here.any()):
                continue
            chosen = here.nonzero()[:, 0].to(x.device)
            rows = torch.searchsorted(own, current[here]).to(x.device)
            known = {key: value[own.to(value.device)] for (s, key), value in at.memory.items() if s == setting}
            memory = dict(known)
            spot = At(at.site, at.phase, at.step, at.positions[chosen], at.mask[chosen], rows, part, memory)
            out[chosen] = edit(x[chosen], spot).to(x.dtype)
            new = {key: value for key, value in memory.items() if value is not known.get(key)}
            _keep(at.memory, setting, new, own, len(at.batch))
        return out


def _keep(
    memory: dict[Any, Any], setting: int, new: Mapping[Any, Tensor], own: Int[Tensor, " row"], n_rows: int
) -> None:
    """Write what one setting decided about its rows into tensors with an entry for every row, as `rowwise` promises."""
    for key, value in new.items():
        whole = value.new_zeros(n_rows, *value.shape[1:])
        whole[own.to(value.device)] = value
        memory[setting, key] = whole


def together(edits: Sequence[Edit | None], n: int) -> Iterator[tuple[Edit | None, ...]]:
    """The edits in order, at most n at once, and those alone that depend on other rows."""
    part: list[Edit | None] = []
    for edit in edits:
        if part and (len(part) >= n or not all(each is None or rowwise(each) for each in (part[-1], edit))):
            yield tuple(part)
            part = []
        part.append(edit)
    if part:
        yield tuple(part)


def repeated(rows: Sequence[Tokens], n: int) -> list[Tokens]:
    """The rows once per setting 0, ..., n - 1, setting after setting."""
    return [replace(row, setting=setting) for setting in range(n) for row in rows]


def stacked(batch: Batch, n: int) -> Batch:
    """`repeated` of a batch that is made already, its Start included."""
    start = batch.start
    if start is not None:
        start = replace(start, states=start.states.repeat(n, 1, 1))
    return Batch(
        batch.ids.repeat(n, 1),
        batch.mask.repeat(n, 1),
        batch.positions.repeat(n, 1),
        tuple(repeated(batch.rows, n)),
        batch.shared_prefix,
        start,
    )
