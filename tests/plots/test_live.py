"""The live face, driven from Python: one figure, one message a move, nothing left behind."""

import asyncio
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import demo
import numpy as np
import psutil
import pytest
from plotly.graph_objects import FigureWidget

from workbench.plots import display, live
from workbench.plots.explorer import Axis, Bars, Explorer, Line, Panel, Slider


@pytest.fixture
def messages(monkeypatch):
    """The update messages that figures send to the browser."""
    sent = []
    original = FigureWidget._send_update_msg

    def send(self, *args, **kwargs):
        sent.append((args, kwargs))
        return original(self, *args, **kwargs)

    for name in ("_send_restyle_msg", "_send_relayout_msg", "_send_addTraces_msg"):
        old = getattr(FigureWidget, name)

        def other(self, *args, old=old, name=name, **kwargs):
            sent.append((name, args))
            return old(self, *args, **kwargs)

        monkeypatch.setattr(FigureWidget, name, other)
    monkeypatch.setattr(FigureWidget, "_send_update_msg", send)
    return sent


def test_a_move_changes_traces_readouts_and_titles_in_one_message(messages):
    explorer = demo.softmax()
    face = explorer.face()
    face.controls["temperature"].value = 10.0
    assert len(messages) == 1
    assert explorer.state["temperature"] == 10.0
    p = explorer.result()["p"]
    assert face.figure.data[0].y.dtype == np.float32 and np.allclose(face.figure.data[0].y, p)
    assert face.figure.layout.shapes[1].x0 == 10.0
    assert f"{p.max():.1%}" in face.figure.layout.annotations[0].text
    assert f"{p.max():.3f}" in face.readouts.value


def test_traces_are_never_added(messages):
    face = demo.gallery().face()
    before = [id(trace) for trace in face.figure.data]
    for bins in (5, 20, 10):
        face.controls["bins"].value = bins
    assert [id(trace) for trace in face.figure.data] == before
    assert "_send_addTraces_msg" not in [m[0] for m in messages] and len(messages) == 3


def test_a_move_is_answered_within_fifty_milliseconds():
    for explorer in (demo.softmax(), demo.gallery()):
        face = explorer.face()
        slider = next(iter(face.controls.values()))
        seconds = []
        for i in range(12):
            slider.value = slider.max if i % 2 else slider.min
            start = time.process_time()
            face.update()
            seconds.append(time.process_time() - start)
        assert np.median(seconds) < 0.05, explorer.name


def test_setting_the_state_from_python_redraws_once(messages):
    explorer = demo.softmax()
    face = explorer.face()
    explorer.set(temperature=3.0, sample=2, guide=False)
    assert len(messages) == 1
    assert face.controls["sample"].value == 2 and face.controls["temperature"].value == 3.0
    assert face.figure.layout.shapes[0].visible is False  # the guide is NaN


def test_log_sliders_give_clean_values_within_their_bounds():
    explorer = demo.softmax()
    slider = explorer.face().controls["temperature"]
    slider.value = 10**0.6
    assert explorer.state["temperature"] == 3.98107
    slider.value = slider.base**slider.max
    assert explorer.state["temperature"] == 10.0


def broken(a):
    if a > 5:
        raise ValueError(f"no <b>{a}</b> here")
    return {"x": np.arange(3.0), "y": a * np.arange(3.0)}


def slope(compute=broken, **changes):
    return Explorer(
        "t", "t", [Slider("a", "A", 0, 10, value=2)], compute,
        [Panel("p", Axis("x"), Axis("y"), [Line("x", "y")])], **changes,
    )  # fmt: skip


def test_an_error_is_shown_and_the_last_good_figure_stays():
    face = slope().face()
    face.controls["a"].value = 9
    assert "no &lt;b&gt;9&lt;/b&gt; here" in face.message.value
    assert face.figure.data[0].y.tolist() == [0, 2, 4]
    face.controls["a"].value = 3
    assert face.message.value == "" and face.figure.data[0].y.tolist() == [0, 3, 6]


def test_dear_moves_are_answered_once_with_the_newest_value():
    calls = []

    def dear(a):
        calls.append(a)
        time.sleep(0.03)
        return {"x": np.arange(2.0), "y": np.array([0.0, a])}

    face = slope(dear).face()
    calls.clear()

    async def drag():
        for value in (3, 4, 5, 6, 7):
            face.controls["a"].value = value
        await asyncio.sleep(0.2)

    # In a thread of its own: a browser test of the same worker may have left a running loop.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, drag()).result()
    assert calls == [7] and face.figure.data[0].y.tolist() == [0, 7]


def test_slow_sliders_wait_until_they_are_let_go():
    explorer = slope()
    face = explorer.face()
    assert face.controls["a"].continuous_update
    explorer._seconds = 1.0
    face._pace()
    assert not face.controls["a"].continuous_update


def test_a_click_moves_its_control():
    explorer = demo.gallery()
    face = explorer.face()
    trace = next(t for t in face.figure.data if t.meta and "click" in t.meta)

    class Clicked:
        point_inds = [2]

    face._clicked(dict(trace.meta), trace, Clicked, None)
    assert explorer.state["bins"] == 20 and face.controls["bins"].value == 20
    Clicked.point_inds = [7]  # there is no eighth position
    face._clicked(dict(trace.meta), trace, Clicked, None)
    assert explorer.state["bins"] == 20 and not face.message.value


def test_the_line_to_share_follows_the_state():
    explorer = demo.softmax()
    face = explorer.face()
    assert face.line.layout.display == "none"
    face.share.value = True
    explorer.set(sample=3)
    assert "sample=3" in face.line.value and face.line.layout.display == ""


def test_user_strings_are_escaped_wherever_they_meet_html():
    explorer = demo.softmax(classes=(demo.NASTY, "a", "b", "c"))
    explorer.title = explorer.about = demo.NASTY
    face = explorer.face()
    face.share.value = True
    html = " ".join(w.value for w in (face.widget.children[0], face.readouts, face.line))
    assert "<img" not in html and "&lt;img" in html
    figure = face.figure.to_json()
    assert "<img" not in figure


def test_the_figure_is_opaque_with_an_explicit_height():
    lay = demo.gallery().face().figure.layout
    assert lay.height == 3 * 380 and lay.autosize
    assert lay.template.layout.paper_bgcolor == lay.template.layout.plot_bgcolor == "#FFFFFF"


# ---- life and death


@pytest.fixture
def shown(monkeypatch):
    """A kernel that runs cells: `shown(cell, explorer)`."""
    place = []
    monkeypatch.setattr(display, "_place", lambda: place[-1])
    monkeypatch.setattr(display, "attached", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: None)

    def show(cell, explorer):
        place.append((cell, f"run {len(place)}"))
        explorer.show()
        return explorer._faces[-1]

    return show


def test_the_same_cell_closes_its_predecessor(shown):
    first = shown("cell 1", demo.softmax())
    other = shown("cell 2", demo.softmax())
    second = shown("cell 1", demo.softmax())
    assert first.closed and not other.closed and not second.closed
    assert first.widget.comm is None


def test_two_explorers_of_one_cell_live_together(monkeypatch, shown):
    first = shown("cell 1", demo.softmax())
    monkeypatch.setattr(display, "_place", lambda: ("cell 1", "run 0"))
    second = demo.softmax()
    second.show()
    assert not first.closed and not second._faces[0].closed


def test_an_explorer_shown_again_is_drawn_anew(shown):
    explorer = demo.softmax()
    first, second = shown("cell 1", explorer), shown("cell 1", explorer)
    assert first.closed and first.figure is not second.figure
    assert explorer._faces == [second]


def test_faces_of_one_explorer_move_together(shown):
    explorer = demo.softmax()
    first, second = shown("cell 1", explorer), shown("cell 2", explorer)
    first.controls["sample"].value = 4
    assert second.controls["sample"].value == 4
    assert second.readouts.value == first.readouts.value
    explorer.close()
    assert first.closed and second.closed and explorer._faces == []


def test_opening_fifty_times_costs_little_memory(shown):
    process = psutil.Process()
    for _ in range(5):
        shown("cell 1", demo.softmax())
    gc.collect()
    before = process.memory_info().rss
    widgets = len(live.widgets.widget._instances)
    for _ in range(50):
        face = shown("cell 1", demo.softmax())
    gc.collect()
    assert process.memory_info().rss - before < 25e6
    assert len(live.widgets.widget._instances) <= widgets
    assert not face.closed


def test_empty_bins_send_no_nan_as_json():
    """Bars without a base, as of empty bins: the widget's state must be JSON."""
    explorer = Explorer(
        name="t.bars",
        title="bars",
        controls=[Slider("a", "A", 0, 1, step=0.5, value=0.0)],
        compute=lambda a: {
            "x": np.arange(3.0),
            "y": np.array([1.0, np.nan, 2.0]) + a,
            "low": np.array([0.5, np.nan, 0.0]),
        },
        panels=[Panel("p", x=Axis("x"), y=Axis("y"), draws=[Bars("x", "y", base="low")])],
    )
    face = explorer.face()
    face.controls["a"].value = 1.0
    base = face.figure.data[0].base
    assert np.isfinite(np.asarray(base, float)).all()
    assert np.isnan(face.figure.data[0].y[1]), "the empty bin itself stays empty"
