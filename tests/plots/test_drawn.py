"""The matplotlib faces: twins of explorers, primitives, and the bundle a notebook stores."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import demo
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from workbench import plots
from workbench.plots import display, export, mpl, static


@pytest.fixture(autouse=True)
def closed():
    before = plt.get_fignums()
    yield
    for number in set(plt.get_fignums()) - set(before):
        plt.close(number)


def texts(figure):
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


# ---- twins


def test_the_twin_draws_the_numbers_of_the_state():
    figure = demo.softmax().figure(temperature=10.0, guide=False)
    bars, curve = figure.axes
    p = demo.softmax().result(temperature=10.0)["p"]
    assert np.allclose([b.get_height() for b in bars.patches], p)
    assert bars.get_title(loc="left") == f"The top class gets {p.max():.1%}"
    assert [t.get_text() for t in bars.get_xticklabels()] == ["cat", "dog", "fox", "owl"]
    assert not bars.lines  # the guide is off: NaN draws nothing
    assert curve.get_xscale() == "log" and curve.lines[1].get_xdata()[0] == 10.0


def test_the_twin_says_numbers_and_state():
    said = " ".join(texts(demo.gallery().figure(bins=20)))
    for word in ("Spread: 0.067 [0.040, 0.143]", "Bins: 20", "Every kind of mark", "perfect"):
        assert word in said


def test_twins_leave_nothing_open_and_are_white():
    before = plt.get_fignums()
    picture = static.png(demo.softmax(), demo.softmax().state)
    assert plt.get_fignums() == before
    pixels = plt.imread(io.BytesIO(picture))
    assert pixels.shape[1] > 850 and np.allclose(pixels[0, 0], 1)


def test_user_strings_stay_text():
    figure = demo.softmax(classes=(demo.NASTY, "$a$", "b_1", "c")).figure()
    figure.canvas.draw()  # would fail on broken TeX
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels[1] == r"\$a\$"


# ---- the stored bundle


def test_headless_display_is_picture_text_and_json_only(monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    bundle = display.bundle(demo.softmax().set(temperature=2.0))
    assert set(bundle) == {"image/png", "text/plain", export.MIME}
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "Confidence" in bundle["text/plain"] and "Temperature: 2" in bundle["text/plain"]
    assert bundle[export.MIME]["state"]["temperature"] == pytest.approx(2, rel=0.03)
    assert len(json.dumps(bundle)) < 300_000


def test_what_is_too_large_is_named_or_written_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(display, "MAX_STORED", 1000)
    monkeypatch.delenv("WORKBENCH_EXPORTS", raising=False)
    assert "too much to store" in display.bundle(demo.softmax())[export.MIME]["omitted"]
    monkeypatch.setenv("WORKBENCH_EXPORTS", str(tmp_path))
    stored = display.bundle(demo.softmax())[export.MIME]
    content = (tmp_path / stored["file"]).read_text()
    assert json.loads(content)["name"] == "demo.softmax"
    assert "controls" not in stored


def test_an_export_above_the_caps_leaves_the_picture():
    bundle = display.bundle(demo.gallery(grid={"noise_level": [0] * 51}))
    assert "51 values" in bundle[export.MIME]["omitted"]
    assert bundle["image/png"]


def test_without_a_kernel_show_prints(capsys, monkeypatch):
    monkeypatch.setattr(display, "_shell", lambda: None)
    demo.softmax().show()
    assert capsys.readouterr().out.startswith("Temperature and confidence\nConfidence: 0.523")


def test_live_needs_a_kernel_and_no_headless_run(monkeypatch):
    monkeypatch.setattr(display, "_shell", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    assert not display.attached()
    monkeypatch.setenv("WORKBENCH_HEADLESS", "0")
    assert display.attached()
    monkeypatch.setattr(display, "_shell", lambda: SimpleNamespace())
    assert not display.attached()


# ---- primitives


def bins():
    return SimpleNamespace(
        edges=np.array([0, 0.5, 0.8, 1.0]),
        size=np.array([0, 40, 60]),
        accuracy=np.array([np.nan, 0.5, 0.8]),
        confidence=np.array([np.nan, 0.7, 0.9]),
    )


def test_reliability_draws_gaps_from_confidence_to_accuracy():
    ax = plots.reliability(bins(), title="Overconfident")
    gaps = [(b.get_y(), b.get_y() + b.get_height()) for b in ax.patches]
    assert np.allclose(gaps, [(0.7, 0.5), (0.9, 0.8)])
    assert ax.get_title(loc="left") == "Overconfident" and ax.get_ylabel() == "accuracy"
    (strip,) = ax.child_axes
    assert [b.get_height() for b in strip.patches] == [0, 40, 60]
    assert strip.get_xlabel() == "confidence"
    plain = plots.reliability(bins(), counts=False)
    assert not plain.child_axes and plain.get_xlabel() == "confidence"


def test_wilson_interval_is_scipys():
    low, high = mpl.wilson([0, 7, 10], [10, 10, 10])
    for i, right in enumerate((0, 7, 10)):
        peer = stats.binomtest(right, 10).proportion_ci(0.95, method="wilson")
        assert np.allclose((low[i], high[i]), (peer.low, peer.high))
    assert np.isnan(mpl.wilson([0], [0])).all()


def test_t_interval_is_scipys_and_skips_missing_seeds():
    values = np.random.default_rng(0).normal(size=(9, 3))
    mean, low, high = mpl.interval(values)
    for i in range(3):
        column = values[:, i]
        peer = stats.t.interval(0.95, 8, loc=column.mean(), scale=stats.sem(column))
        assert np.allclose((mean[i], low[i], high[i]), (column.mean(), *peer))
    values[0, 0] = np.nan
    assert np.allclose(mpl.interval(values)[0][0], values[1:, 0].mean())
    assert np.isnan(mpl.interval([[1.0]])[1]).all()


def test_compare_joins_the_seeds():
    frame = pd.DataFrame({"seed": range(4), "ours": [1, 2, 3, 4], "base": [2, 3, 4, 6]})
    ax = plots.compare(frame, title="Ours is lower", ylabel="loss (nats)")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["ours", "base"]
    joined = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == 2]
    assert [1, 2] in joined and [4, 6] in joined
    assert "4 seeds" in ax.get_xlabel()


def test_line_band_takes_runs_or_edges():
    runs = np.random.default_rng(0).normal(size=(5, 7))
    ax = plots.line_band(range(7), runs, label="ours", xlabel="epoch", ylabel="loss")
    assert np.allclose(ax.lines[0].get_ydata(), runs.mean(0)) and ax.collections
    again = plots.line_band(range(7), np.ones(7), ax=ax, label="base")
    assert again is ax and len(ax.lines) == 2
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    assert {"ours", "base"} <= {t.get_text() for t in ax.texts}


def test_heatmap_lists_a_frames_names_from_the_top():
    frame = pd.DataFrame([[1.0, 2.0], [3.0, np.nan]], index=["a", "b"], columns=[5, 50])
    ax = plots.heatmap(frame, cells=".1f", label="tau")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert sorted(t.get_text() for t in ax.texts) == ["1.0", "2.0", "3.0"]


def test_surface_and_strip_label_their_axes():
    grid = np.linspace(-1, 1, 9)
    ax = plots.surface(grid[:, None] ** 2 + grid, grid, grid, xlabel="a", ylabel="b", label="loss")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    ax = plots.strip({"before": [1, 2, 3], "$after$": [2, np.nan]}, xlabel="ECE")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["before", r"\$after\$"]


def test_style_holds_in_its_block_or_until_changed():
    before = matplotlib.rcParams["axes.spines.top"]
    with plots.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
        assert matplotlib.rcParams["figure.facecolor"] == "#FFFFFF"
    assert matplotlib.rcParams["axes.spines.top"] == before


def test_the_palette_is_told_apart_in_grey():
    lightness = [
        np.dot([int(c[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114])
        for c in plots.palette().values()
    ]
    assert len(set(plots.palette().values())) == 8 and max(lightness) < 190


def test_a_headless_run_stores_a_picture_and_no_widget(monkeypatch, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    path = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[i]) for i in (0, 2)]!r}"
    cells = [path, "import demo\ndemo.softmax()", "demo.gallery().show()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    for cell in notebook.cells[1:]:
        (output,) = cell.outputs
        assert output.output_type == "display_data"
        assert set(output.data) == {"image/png", "text/plain", export.MIME}
        assert output.data["text/plain"] in output.metadata["image/png"]["alt"]
    assert len(nbformat.writes(notebook)) < 800_000
