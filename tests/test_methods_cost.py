"""What a method costs, as if it were alone: shared work is charged to each that uses it, and once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from rsteer_interp.methods import Arditi, Cosmic, Method
from rsteer_interp.methods.cost import Account
from tests.planted_material import planted_material
from tests.tiny_models import tiny_backend, tiny_rows


def test_shared_work_is_charged_to_every_user_once() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    n, account, before = len(rows), Account(backend), backend.prompts_run

    def ours(keys: list[str]) -> None:
        missing = [key for key in keys if key not in account.costs]
        with account.run(missing):
            for _ in missing:
                backend.logits(backend.batch(rows))
        account.use(keys)
        account.use(keys)  # asked for again: nothing more

    def alone() -> str:
        ours(["a", "b"])
        backend.logits(backend.batch(rows))
        return "found"

    result, first = account.charged(alone)
    _, second = account.charged(alone)
    assert result == "found"
    assert first.prompts == 3 * n and second.prompts == pytest.approx(
        3 * n
    )  # it ran n prompts, and uses 2 n of the first's
    _, part = account.charged(lambda: ours(["b"]))
    assert part.prompts == pytest.approx(n) and 0 < part.seconds < first.seconds + second.seconds
    _, none = account.charged(lambda: None)
    assert none.prompts == 0
    assert backend.prompts_run - before == 4 * n


def test_selectors_that_share_candidates_cost_what_each_costs_alone() -> None:
    def cost(*methods: type[Method]) -> float:
        material = replace(planted_material())  # none of its candidates has been tried
        charged = [material.account.charged(partial(method().fit, material))[1] for method in methods]
        return charged[-1].prompts

    assert cost(Arditi, Cosmic) == pytest.approx(cost(Cosmic))
    assert cost(Cosmic, Arditi) == pytest.approx(cost(Arditi))
    assert cost(Cosmic) > 100
