"""Points to drag: which sliders follow, in each face, and redrawing from another thread."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import demo
import js
import numpy as np
import pytest

from workbench.plots import export
from workbench.plots.explorer import Axis, Choice, Explorer, Handle, Line, Panel, Slider

START, END, RADIUS = 2, 3, 4  # shapes: two rules stand before the handles


def test_a_handle_moves_its_two_sliders_to_their_nearest_positions():
    explorer = demo.bowl()
    start, end, _ = explorer.handles
    explorer.drag(start, 0.1013, -0.2987)
    assert (explorer.state["x"], explorer.state["y"]) == (0.1, -0.3)
    explorer.drag(end, 3.0, -7.0)
    assert (explorer.state["end"], explorer.state["high"]) == (1.0, -1.0)


def test_a_knob_on_the_rim_moves_the_radius_alone():
    explorer = demo.bowl()
    explorer.drag(explorer.handles[2], -0.4, -1.0)
    assert explorer.state == {"x": -0.5, "y": -0.5, "end": 0.5, "high": 0.5, "r": 0.5}
    explorer.drag(explorer.handles[2], -0.5, -0.5)
    assert explorer.state["r"] == 0.1


def test_handles_move_sliders_only():
    plane = Axis("x"), Axis("y")
    for control, error in ((Choice("b", "B", [1, 2]), TypeError), (Slider("c", "C", 0, 1), None)):
        with pytest.raises(error or ValueError, match="'b'"):
            Explorer(
                "t", "t", [Slider("a", "A", 0, 1), control], lambda a, b: {},
                [Panel("p", *plane, [Handle("a", "b")])],
            )  # fmt: skip


# ---- live


def test_dragging_redraws_the_live_figure_once():
    explorer = demo.bowl()
    face = explorer.face()
    before = face.updates
    face.handles.moved = [0, 0.2, 0.4, 17.5]
    assert face.updates == before + 1
    assert face.controls["x"].value == 0.2 and face.controls["y"].value == 0.4
    shape = face.figure.layout.shapes[START]
    assert (shape.xanchor, shape.yanchor) == (0.2, 0.4)
    assert face.figure.data[1].x[0] == np.float32(0.2)
    assert face.figure.layout.shapes[0].x0 == 0.5, "the rule before it stays"


def test_the_rims_knob_stands_on_the_side_with_room():
    face = demo.bowl().face()
    anchor = face.figure.layout.shapes
    assert anchor[RADIUS].xanchor == pytest.approx(-0.2)
    face.controls["x"].value = 0.6
    assert face.figure.layout.shapes[RADIUS].xanchor == pytest.approx(0.3)


def test_a_slider_moves_the_handle_and_no_message_comes_back():
    face = demo.bowl().face()
    face.controls["end"].value = -0.2
    assert face.figure.layout.shapes[END].xanchor == -0.2
    assert face.handles.moved == []


@pytest.mark.parametrize("sent", [[9, 0.0, 0.0, 1], [0, None, 0.0, 1], [0, "x", 0.0, 1], [0]])
def test_nonsense_from_the_browser_is_answered_with_a_message(sent):
    face = demo.bowl().face()
    state = face.explorer.state
    face.handles.moved = sent
    assert face.message.value and face.explorer.state == state


def test_explorers_without_handles_carry_no_script_for_them():
    assert demo.softmax().face().handles is None
    assert "meta" not in demo.softmax().export()["faces"]["wide"]["layout"]


# ---- exported and static


def test_the_exported_formula_and_figure_are_pythons():
    explorer = demo.bowl()
    rng = np.random.default_rng(0)
    states = [
        {c.name: c.values[rng.integers(len(c.values))] for c in explorer.controls}
        for _ in range(20)
    ]
    assert js.check_formula(explorer, states) == 20
    for x in (-0.5, 0.6):
        exported = explorer.export(x=x)
        spec = {k: v for k, v in exported.items() if k != "formula"}
        figure = js.run(
            f"const s = {json.dumps(spec)}; answer(workbench.core.filled(s.faces.wide, "
            "Object.assign({}, s.state, s.result)));"
        )
        shapes = figure["layout"]["shapes"]
        assert shapes[START]["xanchor"] == x
        assert shapes[RADIUS]["xanchor"] == pytest.approx(x + (0.3 if x < 0 else -0.3))
        assert figure["data"][0]["colorbar"]["title"]["text"] == "height at 0.5"
        label = figure["layout"]["yaxis2"]["title"]["text"]
        assert label == f"height, {x**2 + 0.75:.1f} at 0"
        assert explorer.figure(x=x).axes[-1].get_ylabel() == label


def test_both_languages_move_the_same_sliders():
    explorer = demo.bowl()
    handles = explorer.export()["faces"]["wide"]["layout"]["meta"]["handles"]
    assert [h["shape"] for h in handles] == [START, END, RADIUS]
    moves = js.run(
        f"answer({json.dumps(handles)}.map(h => workbench.core.wanted(h, 0.3, -0.9, "
        f"{json.dumps(explorer.state)})));"
    )
    assert moves == [h.moves(0.3, -0.9, explorer.state) for h in explorer.handles]


def test_the_static_twin_marks_the_places():
    axes = demo.bowl().figure(x=0.6).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    assert [tuple(m.get_xydata()[0]) for m in marks] == [(0.6, -0.5), (0.5, 0.5), (0.3, -0.5)]
    assert {"start", "end", "radius"} <= {t.get_text() for t in axes.get_legend().get_texts()}


def test_grids_export_handles_too():
    small = demo.bowl(script=None, data=None, grid={"x": [-0.5, 0.5], "y": [-0.5, 0.5]})
    assert len(export.dumps(small.export())) < 60_000


# ---- numbers that arrive later


def later():
    """An explorer whose line is multiplied by what a thread finds."""
    found = {"times": 1.0}

    def compute(a):
        if found["times"] < 0:
            raise ArithmeticError("no <b>line</b>")
        return {"x": np.arange(3.0), "y": found["times"] * a * np.arange(3.0)}

    explorer = Explorer(
        "t", "t", [Slider("a", "A", 0, 10, value=2)], compute,
        [Panel("p", Axis("x"), Axis("y"), [Line("x", "y")])],
    )  # fmt: skip
    return explorer, found


def on_a_loop(run):
    """Run a coroutine in a thread with an event loop of its own, as a kernel's main thread has."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run).result()


def test_refresh_from_a_thread_redraws_on_the_event_loop_once():
    explorer, found = later()

    async def kernel():
        face, where = explorer.face(), []
        original = face.update
        face.update = lambda: (where.append(threading.current_thread()), original())
        found["times"] = 5.0
        worker = threading.Thread(target=lambda: [explorer.refresh() for _ in range(4)])
        worker.start()
        worker.join()  # the loop is busy here: all four wait
        assert not where
        await asyncio.sleep(0.05)
        assert where == [threading.current_thread()]
        assert face.figure.data[0].y.tolist() == [0, 10, 20]
        explorer.refresh()
        await asyncio.sleep(0.05)
        assert len(where) == 2

    on_a_loop(kernel())


def test_errors_of_the_background_are_shown_until_the_next_redraw():
    explorer, found = later()

    async def kernel():
        face = explorer.face()
        explorer.refresh(ValueError("ran <b>out</b>"))
        await asyncio.sleep(0.05)
        assert "ran &lt;b&gt;out&lt;/b&gt;" in face.message.value
        face.controls["a"].value = 3
        assert face.message.value == "" and face.figure.data[0].y.tolist() == [0, 3, 6]
        found["times"] = -1.0
        explorer.refresh()
        await asyncio.sleep(0.05)
        assert "no &lt;b&gt;line" in face.message.value
        assert face.figure.data[0].y.tolist() == [0, 3, 6]

    on_a_loop(kernel())


def test_closed_faces_and_ended_loops_are_left_alone():
    explorer, _ = later()

    async def kernel():
        first = explorer.face()
        explorer.refresh()
        explorer.close()  # before its turn comes
        await asyncio.sleep(0.05)
        assert first.updates == 0
        return explorer.face()

    second = on_a_loop(kernel())
    explorer.refresh()  # its loop has ended
    assert second.updates == 0
    second.close()


def test_outside_a_kernel_a_redraw_happens_at_once():
    explorer, _ = later()

    def script():
        face = explorer.face()
        explorer.refresh()
        return face.updates

    # In a thread of its own: a browser test of the same worker may have left a running loop.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(script).result() == 1
