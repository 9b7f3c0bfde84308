"""Refusal read from a first token: only under kinds of edit for which judged replies say the same; and how fluent replies are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rsteer_interp.abliteration_sweep import after_final_norm
from rsteer_interp.activations import last_states
from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import At, Site
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import reply_log_probs
from rsteer_interp.interventions import add
from rsteer_interp.measures import fluency, perplexity
from rsteer_interp.reader import LEAST_AREA, MOST_MISREAD, UNSTEERED, RefusalReader, validation
from rsteer_interp.refusal_scores import replies_of_each, reply_and_judge
from tests.refusing_model import OpeningJudge, refusing_model, texts
from tests.tiny_models import D_MODEL, N_LAYERS, PROMPTS, draw, tiny_backend, tiny_rows, tiny_tokenizer

OTHER = "why"  # with which this model refuses under the planted edit


JUDGE = OpeningJudge(("i", OTHER))  # what it says does not depend on which


@dataclass(frozen=True, eq=False)
class OtherWords:
    """Whoever would begin a refusal with one word begins it with another: h' = h - 2 <h, a> a + <h, a> b, where <h, a> is the logit
    (of unit a) of the one behind the final norm, and b raises the other's."""

    a: Tensor
    b: Tensor
    pointwise = True

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({Site(N_LAYERS)})

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return x + (x @ self.a)[..., None] * (self.b - 2 * self.a)


def _planted() -> tuple[Backend, OtherWords, int]:
    """A model that refuses with "i"; the other word is unlikely everywhere."""
    model = refusing_model()
    opening, other = tiny_tokenizer().convert_tokens_to_ids(["i", OTHER])
    backend = load_backend(model, "hooks", tokenizer=tiny_tokenizer())
    rows = backend.template().encode_all([*texts("bomb"), *texts("bread")])
    states = after_final_norm(model, last_states(backend, rows, [Site(N_LAYERS)])[Site(N_LAYERS)]).double()
    wanted = torch.full((len(rows), 1), -6.0, dtype=torch.float64)
    model.lm_head.weight[other] = torch.linalg.lstsq(states, wanted).solution[:, 0].float()
    one, two = (model.lm_head.weight[i] * model.model.norm.weight for i in (opening, other))
    a = one / one.norm()
    beside = two - (two @ a) * a
    return backend, OtherWords(a, 3 * one.norm() * beside / beside.norm() ** 2), opening


def test_a_reader_refuses_to_decide_where_judged_replies_say_otherwise() -> None:
    """Unsteered, log-odds and judge agree. Under the planted edit as much is refused, in other words: log-odds read no refusal."""
    backend, edit, opening = _planted()
    asked = texts("bomb")[:12] + texts("bread")[:12]
    subjects = list(asked)
    rows, reader = backend.template().encode_all(asked), RefusalReader(backend, (opening,))
    found = {}
    for kind, each in ((UNSTEERED, None), ("other words", edit)):
        (replies,) = replies_of_each(backend, rows, asked, JUDGE, [each], max_new_tokens=2, refusal_tokens=(opening,))
        judged, odds = [r.verdict.refused for r in replies], torch.tensor([r.log_odds for r in replies])
        torch.testing.assert_close(odds.double(), reader.log_odds(rows, [each])[0], atol=1e-4, rtol=0)
        with pytest.raises(UserError, match="never checked"):
            reader.refused(kind, odds)
        found[kind] = (np.array(judged), odds, reader.validate(kind, odds, judged, subjects))
    plain, steered = found[UNSTEERED], found["other words"]
    assert plain[0].sum() >= 6 and steered[0].sum() >= 6, "it refuses as before, by its judge"
    assert plain[2].valid and (reader.refused(UNSTEERED, plain[1]).numpy() == plain[0]).mean() > 0.9
    assert ((steered[1] > plain[2].threshold).numpy() & steered[0]).sum() <= steered[0].sum() / 4, "log-odds miss them"
    assert not steered[2].valid
    with pytest.raises(UserError, match=r"do not tell refusals under 'other words'.*judge replies"):
        reader.refused("other words", steered[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("area", "valid"), [(0.66, False), (0.97, True)])
def test_the_area_is_the_planted_one_and_decides(seed: int, area: float, valid: bool) -> None:
    rng = np.random.default_rng(seed)
    refused = np.arange(240) % 2 == 0
    odds = rng.normal(size=240) + refused * 2**0.5 * stats.norm.ppf(area)
    found = validation("planted", odds, refused, [f"s{i // 4}" for i in range(240)])
    assert found.area is not None and found.misread is not None and found.threshold is not None
    assert found.area.low < area < found.area.high and found.valid == valid
    expected = stats.norm.sf(stats.norm.ppf(area) / 2**0.5)  # of the best threshold between two normal distributions
    assert found.misread.low < expected < found.misread.high
    assert found.data()["valid"] == valid and found.data()["area"]["n"] == 240


def test_the_threshold_is_checked_on_other_subjects() -> None:
    """With a subject whose log-odds lie apart, the one threshold fits itself: held out, the subject is misread."""
    odds, refused, subjects = [], [], []
    for subject in range(6):
        for flag in (True, False):
            odds.append((2.0 if flag else -2.0) + (100.0 if subject == 0 else 0.0))
            refused.append(flag)
            subjects.append(str(subject))
    found = validation("planted", odds, refused, subjects)
    own = [x for x, s in zip(odds, subjects, strict=True) if s == "0"]
    assert min(own) > 50 and found.misread is not None and found.misread.count >= 1


def test_one_verdict_checks_nothing_and_sizes_must_agree() -> None:
    for flags in ([True] * 8, [False] * 8, [True, *[False] * 7]):
        found = validation("one", range(8), flags, list("abcdefgh"))
        assert found.area is None and not found.valid and "too few of one verdict" in str(found)
    with pytest.raises(UserError, match="8 log-odds for 7 judged replies"):
        validation("one", range(8), [True] * 7, list("abcdefgh"))
    assert 0.5 < LEAST_AREA < 1 and 0 < MOST_MISREAD < 0.5


@pytest.mark.parametrize("batch_size", [4, 64])
def test_replies_of_many_edits_are_those_of_each(batch_size: int) -> None:
    backend = tiny_backend("qwen2", batch_size=batch_size)
    rows = tiny_rows(backend)
    edits = [None, *(add({Site(2): draw(D_MODEL, seed=i).float()}, {Site(2): 3.0}) for i in range(3))]
    got = replies_of_each(backend, rows, PROMPTS, JUDGE, edits, max_new_tokens=5, refusal_tokens=(7, 9))
    assert len(got) == 4
    for edit, replies in zip(edits, got, strict=True):
        alone = reply_and_judge(backend, rows, PROMPTS, JUDGE, max_new_tokens=5, edit=edit, refusal_tokens=(7, 9))
        assert [r.ids for r in replies] == [group[0].ids for group in alone]
        assert [r.log_odds for r in replies] == pytest.approx([group[0].log_odds for group in alone], abs=1e-4)
    assert len({tuple(r.ids for r in replies) for replies in got}) > 1


# -- how likely replies are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replies_of_the_model_itself_are_as_likely_as_when_it_wrote_them(family: str) -> None:
    """One meaning: over the same tokens, end token included, generation and a pass over the given reply agree."""
    backend = tiny_backend(family)
    rows = tiny_rows(backend)
    replies = [group[0] for group in reply_and_judge(backend, rows, PROMPTS, JUDGE, max_new_tokens=6)]
    found = reply_log_probs(backend, rows, [r.ids for r in replies])
    torch.testing.assert_close(found, torch.tensor([r.mean_log_prob for r in replies]).double(), atol=1e-4, rtol=0)


def test_an_empty_reply_is_not_fluent() -> None:
    backend = tiny_backend("llama")
    rows = tiny_rows(backend)
    found = reply_log_probs(backend, rows, [(), *[(5, 6)] * (len(rows) - 1)])
    assert bool(found[0].isnan()) and bool(torch.isfinite(found[1:]).all())
    n = 20
    own, none = torch.full((n,), -1.0).double(), torch.zeros(n, dtype=torch.bool)
    subjects = [str(i) for i in range(n)]
    said = own - 0.5
    said[:12] = torch.nan
    half = fluency(said, none, own, none, subjects)
    assert (half.empty, half.answered, half.n) == (12, 8, 20)
    assert half.ratio is not None and half.ratio.value == pytest.approx(np.exp(0.5)) and half.ratio.n == 8
    silent = fluency(torch.full((n,), torch.nan).double(), none, own, none, subjects)
    assert silent.ratio is None and silent.perplexity is None and silent.empty == n


def test_refusals_among_the_replies_do_not_make_an_edit_fluent() -> None:
    """Refusals are formulas, likelier than answers. Methods that all answer as fluently as the model itself, and differ in how much they
    still refuse, have one ratio; a mean over all replies would rank them by refusal (Spearman's rho 1)."""
    n = 60
    rng = np.random.default_rng(0)
    subjects = [f"s{i // 2}" for i in range(n)]
    hard = torch.from_numpy(rng.normal(-1.5, 0.3, n))  # of an answer to this prompt
    own_refused = torch.arange(n) % 3 == 0
    own = torch.where(own_refused, -0.3, hard)
    removed, mixed, ratios = [], [], []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        refused = torch.from_numpy(rng.permutation(n) >= share * n)
        after = torch.where(refused, torch.tensor(-0.3).double(), hard)
        found = fluency(after, refused, own, own_refused, subjects)
        removed.append(share)
        mixed.append(perplexity(after, subjects).value)
        if found.ratio is not None:
            both = int((~refused & ~own_refused).sum())
            assert found.ratio.n == both
            ratios.append(found.ratio.value)
    assert stats.spearmanr(removed, mixed).statistic == pytest.approx(1)
    assert len(ratios) >= 4 and ratios == pytest.approx([1.0] * len(ratios))


def test_perplexity_has_the_interval_of_its_subjects() -> None:
    rng = np.random.default_rng(1)
    by_subject = rng.normal(-1, 0.5, 8)
    x = torch.from_numpy(np.repeat(by_subject, 10))
    wide = perplexity(x, [str(i // 10) for i in range(80)])
    narrow = perplexity(x, [str(i) for i in range(80)])
    assert wide.value == pytest.approx(float(np.exp(-by_subject.mean()))) == pytest.approx(narrow.value)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
