"""Every script in figures/: draws from a result folder alone, shows its null, and gives the same bytes when drawn again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import draw_figures, redraw
from rsteer_interp.report.schema import KIND, read_reproduction
from rsteer_interp.results import save_result
from rsteer_interp.style import COLOURS, SINGLE, colour, marker, save_figure
from tests.figure_contract import ROOT, check_draws_twice_the_same, check_texts, scripts_of
from tests.reproduce_fixture import provenance, reproduction, write_not_applicable, write_reproduction

FIGURES = scripts_of(KIND)  # a script that reads another kind of result is tested with the study that writes it


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reproduction(tmp_path_factory.mktemp("result") / "one").folder


def test_there_are_figures() -> None:
    assert {"claim_table", "fig3_pca", "fig5_layers", "frontier", "scores"} <= set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_twice_the_same(
    name: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_draws_twice_the_same(name, result, tmp_path)
    assert capsys.readouterr().out.count(name) == 6


@pytest.mark.parametrize("name", FIGURES)
def test_texts_in_a_figure_do_not_overlap(name: str, result: Path) -> None:
    check_texts(importlib.import_module(f"figures.{name}").draw(read_reproduction(result)).figure)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_to_draw_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"figures.{name}")
    write_not_applicable(tmp_path / "none")
    data, _ = reproduction()
    bare = {key: data[key] for key in ("applicable", "model")}
    save_result(tmp_path / "bare", "reproduce", bare, provenance=provenance())
    save_result(tmp_path / "other", "directions", {}, provenance=provenance())
    for folder, words in (
        ("bare", "holds no"),
        ("other", "holds a result of kind 'directions'"),
        ("gone", "no result in"),
    ):
        assert module.main(["--result", str(tmp_path / folder), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    if name != "claim_table":  # which can still show the base rates
        with pytest.raises(UserError, match="not applicable: base refusal 2 %"):
            module.draw(read_reproduction(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_from_little(name: str, tmp_path: Path) -> None:
    """One method, one set left out, no nulls run, no paper rows, names that are markup for matplotlib."""
    data, tensors = reproduction()
    data["model"]["name"] = "$\\frac{1}$_{x"
    data["paper"] = []
    data["table"] = data["table"][:2]
    for row in data["table"]:
        row["rates"].pop("general")
    data["sets"]["harmful"]["label"] = "$harm^{ful"
    data["finder"]["trials"] = [t for t in data["finder"]["trials"] if t["method"] == "md" and not t["complete"]]
    data["matched"], data["null"] = [], None
    data["layer_scores"] = {"wmd": data["layer_scores"]["wmd"] | {"within_subject_r": [], "within_subject_p_max": None}}
    data["confidence_measure"] = "confidence"
    data["confidence"] = {"harmful": {"before": [1.0, -1.0], "after": {"probe 7": [1.0, 1.0]}, "subjects": ["a", "b"]}}
    data["pca"]["label"] = ["refused"] * len(data["pca"]["label"])
    save_result(tmp_path / "one", "reproduce", data, tensors, provenance=provenance())
    module = importlib.import_module(f"figures.{name}")
    assert module.main(["--result", str(tmp_path / "one"), "--out", str(tmp_path)]) == 0


def test_all_scripts_are_drawn_by_one_call(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = draw_figures(result, tmp_path / "figures", ROOT / "figures")
    assert sorted({path.stem for path in written}) == FIGURES and len(written) == 3 * len(FIGURES)
    write_not_applicable(tmp_path / "none")
    assert draw_figures(tmp_path / "none", tmp_path / "none" / "figures", ROOT / "figures") == []
    data, tensors = reproduction()
    save_result(tmp_path / "one", "reproduce", data | {"finder": None}, tensors, provenance=provenance())
    written = draw_figures(tmp_path / "one", tmp_path / "one" / "figures", ROOT / "figures")
    assert sorted({path.stem for path in written}) == sorted(set(FIGURES) - {"frontier"})
    assert capsys.readouterr().err.startswith("figure frontier: ")
    (tmp_path / "no_result").mkdir()
    assert redraw(tmp_path, ROOT / "figures") == written


def test_the_check_of_texts_sees_a_fault() -> None:
    from matplotlib.figure import Figure

    for fault, words in (((0.1, 0.52), "overlaps"), ((0.97, 0.9), "is cut off"), (None, "")):
        figure = Figure(figsize=(SINGLE, 2))
        for i in range(6):
            figure.text(0.1, 0.1 + 0.13 * i, f"text {i}")
        if fault:
            figure.text(*fault, "fault")
            with pytest.raises(AssertionError, match=words):
                check_texts(figure)
        else:
            check_texts(figure)


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom figures.frontier import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'matplotlib', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "Removal against safety" in done.stdout


def test_drawing_leaves_pyplot_alone(result: Path, tmp_path: Path) -> None:
    arguments = ["--result", str(result), "--out", str(tmp_path)]
    code = (
        f"import sys\nfrom figures.scores import main\nmain({arguments})\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_style_names_meanings() -> None:
    assert colour("political_sensitive") == COLOURS["political"] and marker("wrmd") == "v"
    assert colour("my new probe") == colour("my new probe") and marker("my new probe")
    methods = [colour(name) for name in ("base", "md", "wmd", "rmd", "wrmd", "null")]
    assert len(set(methods)) == len(methods)


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with pytest.raises(UserError, match="figure data"):
        save_figure(Figure(), tmp_path / "one", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
