"""The page of a results folder: one model's reproduction and studies, found by what they hold, hostile text kept inert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analyses.page import Config, run
from rsteer_interp.command_line import run as run_command
from rsteer_interp.errors import UserError
from rsteer_interp.report.collection import collect
from rsteer_interp.report.page import visible, write_overview
from rsteer_interp.results import save_result
from tests.browser import CHROMIUM, Browser
from tests.page_reading import Reading, add_figure, check_own_markup_only
from tests.reproduce_fixture import HOSTILE, provenance, write_not_applicable, write_reproduction

OURS = "a1b2c3d4e5f60718"


def write_study(folder: Path, kind: str = "counting", *, fingerprint: str = OURS, **data: Any) -> Path:
    """A study's result with one figure."""
    model = {"name": "Qwen2.5-Coder-0.5B-Instruct", "n_layers": 24, "d_model": 896, "fingerprint": fingerprint}
    found = {
        "applicable": True, "reason": None, "question": f"What does {kind} say?", "finding": f"{kind} says 0.5 (n = 9).",
        "model": model, "settings": {}, "seconds": {"one": 1.25, "two": 2.5}, "n_fit": {"refused": 31},
        "base_rates": {"harmful": {"count": 3, "n": 96, "rate": 0.03, "low": 0.0, "high": 0.1}},
    }  # fmt: skip
    record = provenance().model_copy(update={"model_fingerprint": fingerprint})
    save_result(folder, kind, {**found, **data}, provenance=record)
    add_figure(folder, kind, f"caption of {kind}")
    return folder


def read(page: Path) -> Reading:
    reading = Reading(page.read_text(encoding="utf-8"))
    check_own_markup_only(reading)
    return reading


def images(reading: Reading) -> int:
    return sum(tag == "img" for tag, _ in reading.tags)


def test_everything_of_one_model_is_on_one_page(tmp_path: Path) -> None:
    root = tmp_path / "results"
    write_reproduction(root / "reproduce")
    write_study(root / "a_new_one")
    write_study(root / "layers", "layer_concentration")
    write_study(root / "layers_again", "layer_concentration")
    reason = "not applicable: base refusal 2 %"
    write_study(root / "steer", "steer", applicable=False, reason=reason, finding=None)
    write_study(root / "theirs", fingerprint="ffff")
    save_result(root / "parity", "parity", {"applicable": True}, provenance=provenance())
    write_study(root / "empty", "empty", finding="")
    write_study(root / "damaged")
    (root / "damaged" / "result.json").write_text("{", encoding="utf-8")
    (root / "scores" / "fit").mkdir(parents=True)
    reading = read(write_overview(root, tmp_path / "index.html"))
    text = reading.text.replace("\u00a0", " ")
    for words in ("WMD takes political refusal from 86 %", "caption of layer_concentration", reason, "harmful 96, n_fit refused 31",
                  "one 1.2 s, two 2.5 s", "Provenance of the paper's experiment", "damaged: cannot be read",
                  "theirs: of another model, Qwen2.5-Coder-0.5B-Instruct (fingerprint ffff)",
                  "empty: Value error, has neither a finding", "Record of a_new_one"):  # fmt: skip
        assert words in text, words
    assert "parity" not in text and "caption of steer" not in text and str(tmp_path) not in text
    order = [
        "Refusals before and after steering",
        "layer_concentration says",
        reason,
        "counting says",
        "Replies before and after\n",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert "What does layer_concentration say? (layers_again)" in text and "say? (a_new_one)" not in text
    assert images(reading) == 3
    assert [a["href"] for tag, a in reading.tags if tag == "a"] == ["#claim", "#s0", "#s1", "#s2", "#s3", "#replies"]
    again = write_overview(root, tmp_path / "again.html")
    assert again.read_bytes() == (tmp_path / "index.html").read_bytes()


def test_studies_alone_and_a_reproduction_alone_have_a_page(tmp_path: Path) -> None:
    write_study(tmp_path / "studies" / "one")
    text = read(write_overview(tmp_path / "studies", tmp_path / "index.html")).text
    assert "1 study of how this model refuses. The paper's experiment has not been run on it." in text
    assert (
        "counting says 0.5 (n = 9)." in text and "Replies before" not in text and "fingerprint a1b2c3d4e5f60718" in text
    )
    write_reproduction(tmp_path / "claim" / "reproduce")
    alone = read(write_overview(tmp_path / "claim", tmp_path / "index.html"))
    assert "On this page" not in alone.text and "Replies before and after" in alone.text
    write_not_applicable(tmp_path / "none" / "reproduce")
    write_study(tmp_path / "none" / "one")
    text = read(write_overview(tmp_path / "none", tmp_path / "index.html")).text
    assert "Not applicable" in text and "counting says" in text


def test_the_page_is_of_the_reproductions_model_unless_told_otherwise(tmp_path: Path) -> None:
    for name in ("b", "c"):
        write_study(tmp_path / name, fingerprint="ffff")
    write_study(tmp_path / "d")
    assert [s.name for s in collect(tmp_path).studies] == ["b", "c"]  # the most results
    write_reproduction(tmp_path / "reproduce")
    write_reproduction(tmp_path / "reproduce_again")
    ours = collect(tmp_path)
    assert [s.name for s in ours.studies] == ["d"] and ours.reproduction is not None
    assert ours.reproduction.folder.name == "reproduce"
    assert "reproduce_again: another reproduction on this model" in ours.left_out
    theirs = collect(tmp_path, "ffff")
    assert [s.name for s in theirs.studies] == ["b", "c"] and theirs.reproduction is None
    with pytest.raises(
        UserError, match=r"no result of the model with fingerprint 0000; it holds a1b2c3d4e5f60718 \(Qwen"
    ):
        collect(tmp_path, "0000")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "index.html")]
    assert run_command(Config, run, arguments) == 2
    error = capsys.readouterr().err
    assert "holds no study and no reproduction; run make demo or make studies first" in error and error.count("\n") == 1
    write_study(tmp_path / "one")
    assert run_command(Config, run, arguments) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'index.html'}\n"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    write_reproduction(root / "reproduce", hostile=True)
    for i, attack in enumerate(HOSTILE):
        folder = write_study(root / f"s{i}", question=attack, finding=attack, seconds={attack: 1.0}, n_fit={attack: 1})
        add_figure(folder, "<b>", attack)
        (folder / "figures" / "<b>.json").write_text(json.dumps({"title": attack, "caption": attack}), encoding="utf-8")
    write_study(root / "no", applicable=False, reason=HOSTILE[4], finding=None)
    return write_overview(root, root / "index.html")


def test_hostile_text_in_a_study_is_shown_as_it_is(hostile: Path) -> None:
    reading = read(hostile)
    for attack in HOSTILE:
        assert reading.text.count(visible(attack)) >= 4
    assert sum(tag == "script" for tag, _ in reading.tags) == 1
    assert images(reading) == 2 * len(HOSTILE)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (320, True)])
def test_it_is_inert_and_fits_in_a_browser(hostile: Path, width: int, dark: bool) -> None:
    with Browser() as browser:
        browser.open(hostile, width=width, dark=dark)
        assert browser.eval("document.documentElement.scrollWidth") <= width
        assert (
            browser.eval("document.querySelectorAll('svg, base, iframe, object, b, [onerror], [onmouseover]').length")
            == 0
        )
        browser.eval("document.querySelector('nav a[href=\"#s3\"]').click()")
        assert browser.eval("location.hash") == "#s3"
        browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.eval("document.documentElement.scrollWidth") <= width
        assert browser.errors == [] and browser.dialogs == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
