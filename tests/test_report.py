"""The page: it says what the result says, hostile text in it stays inert, and it works in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsteer_interp.errors import UserError
from rsteer_interp.report.page import visible, write_page
from rsteer_interp.report.schema import Reproduction, read_reproduction
from rsteer_interp.report.words import finding
from rsteer_interp.results import plain, save_result
from tests.browser import CHROMIUM, Browser
from tests.page_reading import Reading, add_figure, check_own_markup_only
from tests.reproduce_fixture import (
    HOSTILE,
    METHODS,
    SETS,
    provenance,
    reproduction,
    write_not_applicable,
    write_reproduction,
)


def page_of(folder: Path, *, hostile: bool = False, applicable: bool = True) -> Path:
    (write_reproduction if applicable else write_not_applicable)(folder / "result", hostile=hostile)
    for name in ("frontier", "another"):
        add_figure(folder / "result", name, HOSTILE[3] if hostile else f"caption of {name}")
    return write_page(folder / "result", folder / "page.html")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for name, hostile, applicable in (("plain", False, True), ("hostile", True, True), ("none", False, False),
                                      ("hostile none", True, False)):  # fmt: skip
        out[name] = page_of(tmp_path_factory.mktemp("page"), hostile=hostile, applicable=applicable)
    return out


def test_the_page_says_what_the_result_says(pages: dict[str, Path]) -> None:
    text = Reading(pages["plain"].read_text()).text.replace("\u00a0", " ")
    assert "WMD takes political refusal from 86 % (78 to 91) to 14 % (9 to 22) of 104" in text
    assert "refusal of harmful requests goes from 40 % (30 to 50) to 22 % (15 to 31) of 96, intervals overlap" in text
    for words in ("n = 104", "paper, 4B WRMD", "33 %", "0.033 to 0.049", "14, 15, 16, 18", "missed", "caption of frontier",
                  "fingerprint a1b2c3d4e5f60718", "pypi-archives", "accuracy 98 % (94 to 99 %, n = 150)", "Dual use",
                  "refuses only 40 % of the harmful requests", "c = +0.93 · log-odds"):  # fmt: skip
        assert words in text, words
    # How far every direction can be trusted, beside what topic alone gives; the rule by which one is drawn; and why some are not there.
    for words in ("0.9996", "14.2", "0.79 (0.69 to 0.87)", "0.47 (0.32 to 0.63)", "0.970", "0.41 (p 0.002)", "WRMD LOSO",
                  "not applicable: 2 subjects have both", "The figures draw WMD: the most repeatable.",
                  "95 % of random pairs lie within ±0.07", "n = 58"):  # fmt: skip
        assert words in text, words
    assert text.index("caption of frontier") < text.index("caption of another")  # ours in order, then any other


def test_the_same_result_gives_the_same_page(pages: dict[str, Path], tmp_path: Path) -> None:
    again = write_page(pages["plain"].parent / "result", tmp_path / "deep" / "again.html")
    assert again.read_bytes() == pages["plain"].read_bytes()


@pytest.mark.parametrize("name", ["plain", "hostile", "none", "hostile none"])
def test_nothing_but_our_own_markup_is_in_the_page(pages: dict[str, Path], name: str) -> None:
    page = pages[name].read_text()
    reading = Reading(page)
    check_own_markup_only(reading)
    assert sum(tag == "script" for tag, _ in reading.tags) == ("none" not in name)
    assert "{{" not in reading.text.replace(HOSTILE[2], "") and "{%" not in reading.text.replace(HOSTILE[2], "")


def test_hostile_text_is_shown_as_it_is(pages: dict[str, Path]) -> None:
    text = Reading(pages["hostile"].read_text()).text
    for attack in HOSTILE:
        assert visible(attack) in text
    assert "49" not in text.split("{{7*7}}")[1][:20]
    assert not re.search("[\u202a-\u202e\x00-\x08\x1b]", text)


def test_a_model_that_does_not_refuse_has_a_plain_page(pages: dict[str, Path]) -> None:
    reading = Reading(pages["none"].read_text())
    text = reading.text.replace("\u00a0", " ")
    assert "Not applicable: base refusal 2 % of 104 sensitive prompts" in text and "1 to 7 %, n = 104" in text
    assert "L_g" not in text and not any(tag in ("img", "article", "script", "form") for tag, _ in reading.tags)


def test_the_sentence_is_careful() -> None:
    data, _ = reproduction()
    whole = Reproduction.model_validate(plain(data))
    assert "can be said" in finding(whole.model_copy(update={"table": whole.table[:1]}))
    without = [row for row in whole.table if row.method != "wrmd"]
    assert finding(whole.model_copy(update={"table": without})).startswith("WMD takes")


def test_a_result_that_is_not_one_is_refused_in_one_line(tmp_path: Path) -> None:
    data, tensors = reproduction()
    data["table"][1]["rates"]["harmful"].pop("low")
    save_result(tmp_path / "one", "reproduce", data, tensors, provenance=provenance())
    with pytest.raises(
        UserError, match=r"table\.1\.rates\.harmful\.low: Field required; run analyses/reproduce.py again"
    ):
        read_reproduction(tmp_path / "one")
    with pytest.raises(UserError, match="has no tensor 'pca'"):
        good, _ = reproduction()
        save_result(tmp_path / "two", "reproduce", good, provenance=provenance())
        read_reproduction(tmp_path / "two")
    assert not (tmp_path / "page.html").exists()


def test_the_page_needs_no_model_and_no_matplotlib() -> None:
    code = "import sys, rsteer_interp.report.page; assert not {'transformers', 'transformer_lens', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with Browser() as opened:
        yield opened


def quiet(browser: Browser) -> None:
    assert browser.errors == [] and browser.dialogs == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


SHOWN = "[...document.querySelectorAll('article')].filter(a => a.offsetHeight > 0).length"
REPLIES = "[...document.querySelectorAll('.reply')].filter(a => a.offsetHeight > 0).length"


def choose(browser: Browser, name: str, value: str) -> None:
    target = f"document.getElementById('filter').elements.{name}"
    change = f"{target}.checked = {value}" if name == "changed" else f"{target}.value = {value}"
    browser.eval(f"{change}; {target}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_the_filter_works(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"])
    everything = 3 * len(SETS)
    assert browser.eval(SHOWN) == everything and browser.eval(REPLIES) == 2 * everything  # base and WRMD
    choose(browser, "changed", "true")
    assert browser.eval(SHOWN) == 9  # all but the general ones, which were answered before
    assert browser.eval("document.getElementById('count').textContent") == f"9 of {everything} prompts"
    choose(browser, "method", "[...document.querySelectorAll('[name=method] option')].find(o => o.text === 'MD').value")
    assert browser.eval(SHOWN) == 5  # MD changed the third prompt of each set, and refuses two general ones
    choose(browser, "method", "''")
    assert browser.eval(REPLIES) == browser.eval(SHOWN) * (1 + len(METHODS))
    choose(browser, "set", "[...document.querySelectorAll('[name=set] option')].find(o => o.text === 'harmful').value")
    assert browser.eval(SHOWN) == 3
    choose(browser, "words", "'SUBJECT 1 of'")
    assert browser.eval(SHOWN) == 1
    choose(browser, "words", "'<script>'")
    assert browser.eval(SHOWN) == 0
    quiet(browser)


def test_hostile_text_does_nothing_in_a_browser(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("hostile", "hostile none"):
        browser.open(pages[name])
        assert (
            browser.eval("document.querySelectorAll('svg, base, a, iframe, object, [onerror], [onmouseover]').length")
            == 0
        )
        assert browser.eval("document.querySelectorAll('script').length") == (name == "hostile")
        assert browser.eval("document.querySelectorAll('img').length") == (2 if name == "hostile" else 0)
    quiet(browser)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (320, True)])
def test_it_fits_the_screen_in_light_and_dark(browser: Browser, pages: dict[str, Path], width: int, dark: bool) -> None:
    for name in ("plain", "hostile", "none"):
        browser.open(pages[name], width=width, dark=dark)
        assert browser.eval("document.documentElement.scrollWidth") <= width
        light = browser.eval("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(x => x > 200)")
        assert light is not dark
        assert browser.eval("getComputedStyle(document.querySelector('.finding')).fontSize") != "16px", "no style"
    quiet(browser)


def test_it_reads_without_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"], script=False)
    assert browser.eval(SHOWN) == 3 * len(SETS) and browser.eval(REPLIES) == 3 * len(SETS) * (1 + len(METHODS))
    assert browser.eval("document.getElementById('filter').offsetHeight") == 0
    quiet(browser)
