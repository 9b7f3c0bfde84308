"""Every script in figures/: draws from a result folder alone, shows its null, and gives the same bytes when drawn again."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes

from rsteer_interp.errors import UserError
from rsteer_interp.report.drawing import draw_figures
from rsteer_interp.report.schema import read_reproduction
from rsteer_interp.results import save_result
from rsteer_interp.style import COLOURS, DOUBLE, SINGLE, colour, marker, save_figure, style

sys.path.insert(0, str(Path(__file__).parent))
from reproduce_fixture import provenance, reproduction, write_not_applicable, write_reproduction

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "figures").glob("*.py") if not path.stem.startswith("_"))
# A script that reads another kind of result says so in KIND, and is tested beside the study that writes it.
FIGURES = [name for name in SCRIPTS if not hasattr(importlib.import_module(f"figures.{name}"), "KIND")]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reproduction(tmp_path_factory.mktemp("result") / "one").folder


def test_there_are_figures() -> None:
    assert {"claim_table", "fig3_pca", "fig5_layers", "frontier", "scores"} <= set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_twice_the_same(
    name: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"figures.{name}")
    before = dict(matplotlib.rcParams)
    for out in ("a", "b"):
        assert module.main(["--result", str(result), "--out", str(tmp_path / out)]) == 0
    assert dict(matplotlib.rcParams) == before
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{name}.json", f"{name}.pdf", f"{name}.png"]
    assert capsys.readouterr().out.count(name) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    shown = json.loads((tmp_path / "a" / f"{name}.json").read_text())
    assert shown["title"] and len(shown["caption"]) > 80
    text = json.dumps(shown["data"])
    assert '"null' in text and '"n"' in text, "a figure shows its null and its n"
    assert b"CreationDate" not in (tmp_path / "a" / f"{name}.pdf").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
def test_texts_in_a_figure_do_not_overlap(name: str, result: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    drawn = importlib.import_module(f"figures.{name}").draw(read_reproduction(result)).figure
    assert drawn.get_figwidth() in (SINGLE, DOUBLE)
    with style():
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        hidden = _hidden_labels(drawn)
        texts = [t for t in drawn.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in hidden]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    assert len(boxes) > 10
    for i, (first, a) in enumerate(boxes):
        assert a.x0 > -1 and a.x1 < drawn.bbox.x1 + 1 and a.y0 > -1 and a.y1 < drawn.bbox.y1 + 1, (
            f"'{first}' is cut off"
        )
        for second, b in boxes[i + 1 :]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            down = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across < 1 or down < 1, f"'{first}' overlaps '{second}'"


def _hidden_labels(figure: Any) -> set[int]:
    """Labels of ticks outside the limits, which exist but are not drawn."""
    out = set()
    for axis in (axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)):
        shown = {id(tick) for tick in axis._update_ticks()}
        for tick in (*axis.majorTicks, *axis.minorTicks):
            out |= {id(tick.label1), id(tick.label2)} if id(tick) not in shown else set()
    return out


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
    data["frontier"] = [c for c in data["frontier"] if not c["null"] and c["method"] == "md"]
    for point in data["frontier"]:
        del point["meets_target"]
    data["layer_scores"] = {"wrmd": data["layer_scores"]["wrmd"] | {"within_set_r": []}}
    data["confidence_measure"] = "confidence"
    data["confidence"] = {"harmful": {"before": [1.0, -1.0], "after": {"probe 7": [1.0, 1.0]}}}
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
    save_result(tmp_path / "one", "reproduce", data | {"frontier": []}, tensors, provenance=provenance())
    written = draw_figures(tmp_path / "one", tmp_path / "one" / "figures", ROOT / "figures")
    assert sorted({path.stem for path in written}) == sorted(set(FIGURES) - {"frontier"})
    assert capsys.readouterr().err.startswith("figure frontier: ")


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
