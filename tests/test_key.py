"""The key: equal for equal content, different where anything differs that a result depends on, an error for what hides it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsteer_interp.backends.edits import Site
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate
from rsteer_interp.interventions import Affine, add
from rsteer_interp.key import digest, parts
from rsteer_interp.methods import Treatment
from rsteer_interp.prompts import load_prompts
from rsteer_interp.steering import make_steering

V = torch.randn(32, generator=torch.Generator().manual_seed(0))


def distinct(*values: Any) -> bool:
    return len({digest(value) for value in values}) == len(values)


# -- what differs, and what does not -------------------------------------------------------------------------------


def test_a_tensor_is_its_dtype_shape_and_bytes() -> None:
    assert distinct(V, -V, V.double(), V.bfloat16(), V.view(4, 8), V.flip(0), V + 1e-7, V[:-1], V.numpy(), V.tolist())
    assert digest(V) == digest(V.clone()) == digest(V.view(8, 4).T.T.reshape(-1)) == digest(V.clone().requires_grad_())
    assert digest(torch.zeros(())) != digest(torch.zeros(1)) != digest(torch.zeros(0, 3))
    assert digest(np.arange(3)) != digest(np.arange(3.0)) and digest(np.float64(0.5)) == digest(0.5)


class Two(Enum):
    A = 1
    B = 2


def test_plain_values_differ_by_type_and_by_where_they_stand() -> None:
    assert distinct(
        None, True, 1, 1.0, "1", b"1", [1], [[1]], {1}, {"1": 1}, {1: 1}, Two.A, Two.B, torch.float32, 0.0, -0.0
    )
    assert distinct(["ab", "c"], ["a", "bc"], ["abc"], [["ab"], "c"], "abc", [], [[]], {}, set(), "")
    assert digest((1, 2)) == digest([1, 2]) and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"b", "a", "c"}) == digest(frozenset("cba"))
    assert digest({Site(1): 2, Site(2): 1}) != digest({Site(1): 1, Site(2): 2})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_two_values_have_one_digest_only_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (repr(one) == repr(other) or _same(one, other))


def _same(one: Any, other: Any) -> bool:
    """Equal, types included; dicts whatever their order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other and repr(one) == repr(other)


@dataclass(frozen=True, eq=False)
class Probe:
    layer: int
    weight: torch.Tensor
    _bias: float = 0.0
    _cache: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, eq=False)
class Probe2(Probe):
    pass


def test_a_dataclass_is_its_class_and_all_fields_but_those_that_do_not_compare() -> None:
    one = Probe(1, V)
    assert digest(one) == digest(Probe(1, V.clone(), _cache={"seen": 1}))
    assert distinct(one, Probe2(1, V), replace(one, layer=2), replace(one, weight=-V), replace(one, _bias=0.5))


def test_edits_are_told_apart_and_their_caches_overlooked() -> None:
    one, same = Affine(Site(1), V, amount=1.0), Affine(Site(1), V.clone(), amount=1.0)
    one(torch.zeros(1, 1, 32), None)  # type: ignore[arg-type]  # fills its cache
    assert one._copies and not same._copies and digest(one) == digest(same)
    others = [
        replace(one, site=Site(2)),
        replace(one, amount=2.0),
        replace(one, direction=V + 1e-6),
        replace(one, kappa=1.0),
    ]
    assert distinct(one, *others, replace(one, direction=-V), replace(one, reference=V))
    assert distinct(add({Site(1): V}, {Site(1): 1.0}), add({Site(1): V}, {Site(1): -1.0}))
    assert distinct(Treatment(one), Treatment(one, "system"), Treatment(), Treatment(others[0]))


def test_a_steering_is_known_by_each_of_its_parts() -> None:
    sites = [Site(1), Site(2)]
    v, o = {s: V + s.layer for s in sites}, dict.fromkeys(sites, V)
    made = {"alpha": -1.0, "reposition": False}
    one = make_steering("md", v, o, dict.fromkeys(sites, (1.0, 2.0)), sites, **made)
    others = [
        replace(one, directions=one.directions.flip(0)),  # the sum over sites is the same
        replace(one, references=-one.references),
        replace(one, scales=(2.0, 1.0)),
        replace(one, alpha=1.0),
        replace(one, reposition=True),
        replace(one, while_decoding=False),
        replace(one, gate=Gate(Site(1), V, 0.0)),
        replace(one, gate=Gate(Site(1), -V, 0.0)),
        replace(one, gate=Gate(Site(1), V, 0.1)),
    ]
    assert distinct(one, *others)


def test_prompts_are_known_by_text_subject_and_order() -> None:
    prompts = load_prompts("harmful").prompts[:3]
    other = prompts[0].model_copy(update={"subject": "another"})
    assert distinct(prompts, prompts[::-1], prompts[:2], [other, *prompts[1:]])


# -- classes that no version stands for ----------------------------------------------------------------------------


def test_a_class_of_the_users_own_is_known_by_its_code() -> None:
    def made(source: str) -> Any:
        names: dict[str, Any] = {"__name__": "mine"}
        exec(source, names)
        return names["Mine"]()

    source = "class Mine:\n  floor = 0.5\n  def judge(self, x):\n    return [y > self.floor for y in x if y != 3]\n"
    same = made("# a comment\n" + source)
    assert digest(made(source)) == digest(same)
    changed = [("0.5", "0.6"), (">", "<"), ("!= 3", "!= 4"), ("judge", "says")]
    assert distinct(made(source), *(made(source.replace(*change)) for change in changed))


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        functools.partial(print, 1),
        object(),
        re.compile("a"),
        Path("prompts.jsonl"),
        iter([1]),
        torch.empty(3, device="meta"),
        torch.eye(2).to_sparse(),
        np.array([object()]),
        {"edit": [lambda x: x]},
        type("Holds", (), {"__init__": lambda self: setattr(self, "v", V)})(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_show_its_content_is_an_error(value: Any) -> None:
    with pytest.raises(UserError, match="does not show what it holds"):
        digest(value)


def test_parts_name_the_entries_of_entries() -> None:
    key = {"settings": {"dose": 1.0, "seed": 0}, "probe": Probe(1, V), "prompts": ["a"], "vectors": {Site(1): V}}
    assert set(parts(key)) == {
        "settings.dose",
        "settings.seed",
        "probe.layer",
        "probe.weight",
        "probe._bias",
        "prompts",
        "vectors",
    }
    moved = parts(key | {"settings": {"dose": 2.0, "seed": 0}})
    assert [name for name, part in parts(key).items() if moved[name] != part] == ["settings.dose"]
