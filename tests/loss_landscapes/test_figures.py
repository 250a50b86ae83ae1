"""The family's explorer: resampling, refinement in the background, real networks, what is saved."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from itertools import pairwise

import js
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench.loss_landscapes import explore
from workbench.loss_landscapes.figures import explore_planes
from workbench.loss_landscapes.figures_field import Slice
from workbench.loss_landscapes.figures_grid import Grid, level, strides
from workbench.loss_landscapes.figures_resample import STEPS, WINDOW, Square
from workbench.plots import export, live

AT = np.random.default_rng(0).uniform(-1, 1, (2, 200))


@pytest.fixture(autouse=True)
def outside_a_kernel(monkeypatch):
    """No event loop, also where a browser test of the same worker has left a running one."""
    monkeypatch.setattr(live, "_running", lambda: None)


def bowl(a, b):
    return 0.5 + a**2 + 3 * b**2 + 0.4 * a * b + 0.2 * np.sin(7 * a)


def makers():
    path = np.stack([np.linspace(-0.8, 0.1, 9), np.linspace(0.6, 0.0, 9) ** 2], 1)
    return {
        "filter 1": lambda: Slice("first draw", bowl),
        "filter 2": lambda: Slice("second draw", lambda a, b: bowl(b, a), (4.0, 0.0, 1.0)),
        "trajectory": lambda: Slice("the path", bowl, path=path),
    }


@pytest.fixture
def explorer():
    """`explorer(makers, ...)`: closed at the end."""
    made = []

    def make(planes=None, **settings):
        made.append(explore_planes(planes or makers(), **({"background": False} | settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not any(one.landscape.busy for one in made)


def settle(explorer, seconds=30):
    """Wait until nothing is left to evaluate of what is looked at."""
    explorer.result()
    end = time.monotonic() + seconds
    while explorer.landscape.busy:
        assert time.monotonic() < end, "the background does not end"
        time.sleep(0.005)
    return explorer.result()


# ---- between the nodes


@pytest.mark.parametrize("n", [3, 5, 25, 26])
def test_resampling_is_exact_on_bilinear_functions(n):
    def plane(a, b):
        return 2 - a + 3 * b + 4 * a * b

    nodes = np.linspace(-2, 2, n)
    square = Square(plane(nodes, nodes[:, None]), 2.0)
    a, b = 2 * AT
    np.testing.assert_allclose(square.at(a, b), plane(a, b), atol=1e-12)
    mesh = square.mesh(a[:7], b[:5])
    np.testing.assert_allclose(mesh, plane(a[:7], b[:5, None]), atol=1e-12)


def test_resampling_reproduces_nodes_and_approaches_smooth_functions():
    errors = []
    for n in (17, 33):
        nodes = np.linspace(-1, 1, n)
        square = Square(bowl(nodes, nodes[:, None]), 1.0)
        np.testing.assert_allclose(square.mesh(nodes, nodes), square.loss, atol=1e-12)
        inner = 0.8 * AT
        errors.append(np.abs(square.at(*inner) - bowl(*inner)).mean())
    assert errors[1] < errors[0] / 4 and errors[1] < 1e-3


def test_a_wall_does_not_ring():
    loss = np.full((9, 9), 1e-3)
    loss[:, 6:] = 1e6
    found = Square(loss, 1.0).mesh(np.linspace(-1, 1, 101), np.linspace(-1, 1, 101))
    assert found.min() >= 1e-3 and found.max() <= 1e6


@pytest.mark.parametrize("n", [5, 6, 25, 30, 49, 51])
def test_levels_are_nested_and_hold_both_ends(n):
    steps = strides(n)
    assert steps[-1] == 1 and len(level(n, 1)) == n
    for coarse, fine in pairwise(steps):
        assert set(level(n, coarse)) <= set(level(n, fine))
        assert {0, n - 1} <= set(level(n, coarse))


@pytest.mark.parametrize("n", [6, 25, 49])
def test_a_grid_is_exact_where_known_and_filled_elsewhere(n):
    nodes = np.linspace(-1, 1, n)
    grid = Grid(nodes, nodes, 7.0)

    def plane(a, b):
        return 1 + 2 * a - b + 0.5 * a * b

    seen = 0
    while not grid.done:
        a, b = grid.points(13)
        complete = grid.put(plane(a, b))
        seen += len(a)
        assert grid.evaluated == seen
        where = grid.known
        np.testing.assert_allclose(grid.shown[where], plane(nodes, nodes[:, None])[where])
        if complete:  # a bilinear function is known everywhere from its coarsest level on
            np.testing.assert_allclose(grid.shown, plane(nodes, nodes[:, None]), atol=1e-9)
    assert seen == n * n


def test_losses_that_are_not_finite_become_the_highest_wall():
    nodes = np.linspace(-1, 1, 9)
    grid = Grid(nodes, nodes, 0.0)
    while not grid.done:
        a, b = grid.points(20)
        grid.put(np.where(a > 0.5, np.inf, np.where(b > 0.5, np.nan, 1 + a**2)))
    assert np.isfinite(grid.shown).all()
    assert grid.shown.max() == 2.0
    assert np.isinf(grid.loss).any()


# ---- what is drawn


def test_numbers_beside_the_figure_are_those_of_the_function(explorer):
    made = explorer(points=65)
    result = made.result(a=0.3, b=-0.2, zoom=0.2, a0=-0.5, b0=-0.2, a1=0.9, b1=-0.2)
    assert result["at_center"] == pytest.approx(bowl(0.3, -0.2), abs=1e-3)
    near = bowl(result["window_a"], result["window_b"][:, None])
    np.testing.assert_allclose(result["window_z"], near, atol=2e-3)
    assert result["lowest"] == pytest.approx(near.min(), abs=2e-3)
    along = bowl(np.linspace(-0.5, 0.9, STEPS), -0.2)
    np.testing.assert_allclose(result["profile"], along, atol=2e-3)
    straight = along[0] + (along[-1] - along[0]) * np.linspace(0, 1, STEPS)
    assert result["barrier"] == pytest.approx(max(0, (along - straight).max()), abs=3e-3)
    assert result["foot"] == pytest.approx(0.8, abs=1e-9)
    assert result["curvature"] == pytest.approx(2 - 9.8 * np.sin(2.1), rel=0.05)


def test_curvature_counts_the_length_of_the_directions(explorer):
    made = explorer(points=65)
    line = {"a0": -0.3, "b0": 0.0, "a1": 0.3, "b1": 0.0}
    first, second = (made.result(draw=d, a=0.0, b=0.0, **line)["curvature"] for d in (1, 2))
    assert first == pytest.approx(2, rel=0.05)  # of a^2; the directions have length 1
    assert second == pytest.approx(6 / 4, rel=0.05)  # of 3 a^2, and the first has length 2


def test_the_parabola_stays_in_the_picture(explorer):
    made = explorer(makers() | {"given": lambda: Slice("g", lambda a, b: np.exp(4 * a))})
    for state in ({}, {"plane": "given", "a": -1.0}, {"plane": "given", "a": 1.0}):
        result = made.result(**state)
        low, high = result["profile"].min(), result["profile"].max()
        room = 0.36 * (high - low)
        inside = (result["parabola"] >= low - room) & (result["parabola"] <= high + room)
        assert inside.all() and len(result["parabola"]) > 5
        assert result["parabola_s"][0] <= result["foot"] + 0.02
        assert result["parabola_s"][-1] >= result["foot"] - 0.02


def test_on_a_log_scale_losses_at_or_below_zero_stay_in_the_picture(explorer):
    made = explorer({"filter 1": lambda: Slice("error rate", lambda a, b: np.maximum(0, a))})
    result = made.result(log=True)
    assert result["quantity"] == "log₁₀ loss" and np.isfinite(result["z"]).all()
    assert result["z"].min() == pytest.approx(np.log10(1 / 24))


def test_a_line_without_length_and_corners_are_drawn(explorer):
    made = explorer()
    for at in (-1.0, 0.0, 1.0):
        ends = {"a0": at, "b0": at, "a1": at, "b1": at}
        result = made.result(a=at, b=-at, zoom=0.05, **ends)
        assert result["barrier"] == 0 and result["curvature"] == 0
        for key, value in result.items():
            if isinstance(value, np.ndarray):
                assert np.isfinite(value).all(), key
        assert result["window_a"].min() >= -1 and result["window_a"].max() <= 1


def test_steep_landscapes_start_on_a_log_scale(explorer):
    def steep(a, b):
        return np.exp(6 * (a**2 + b**2))

    assert explorer({"filter 1": lambda: Slice("s", steep)}).state["log"]
    assert not explorer().state["log"]
    assert not explorer({"filter 1": lambda: Slice("s", steep)}, log=False).state["log"]


# ---- refinement


def slowly(seconds=0.002, calls=None):
    def evaluate(a, b):
        if calls is not None:
            calls.append((a, b))
        time.sleep(seconds * len(a))
        return bowl(a, b)

    return {"filter 1": lambda: Slice("slow", evaluate), "filter 2": lambda: Slice("other", bowl)}


def test_a_coarse_picture_comes_first_and_sharpens_in_the_background(explorer):
    made = explorer(slowly(), background=True, points=25)
    first = made.landscape.grids["filter 1"].evaluated
    assert 9 <= first <= 7**2 and not made.landscape.busy
    before = made.result()
    assert "of 625" in before["evaluated"] and made.landscape.busy
    after = settle(made)
    assert after["evaluated"] == "625"
    nodes = after["nodes"]
    exact = bowl(nodes, nodes[:, None])
    assert np.abs(after["z"] - exact).max() < 0.5 * np.abs(before["z"] - exact).max()


def test_the_line_is_evaluated_where_it_was_drawn(explorer):
    made = explorer(slowly(1e-4), background=True, points=9)
    state = {"a0": -0.9, "b0": 0.4, "a1": 0.8, "b1": -0.7, "a": 0.1, "b": 0.1}
    made.set(**state)
    result = settle(made)
    t = np.linspace(0, 1, STEPS)
    np.testing.assert_allclose(result["profile"], bowl(-0.9 + 1.7 * t, 0.4 - 1.1 * t), atol=1e-12)
    assert result["at_center"] == bowl(0.1, 0.1)


def test_zooming_in_evaluates_a_finer_grid_there(explorer):
    calls = []
    made = explorer(slowly(1e-5, calls), background=True, points=9)
    settle(made)
    calls.clear()
    made.set(a=0.5, b=-0.5, zoom=0.1)
    result = settle(made)
    a, b = np.concatenate(calls, 1)
    near = (np.abs(a - 0.5) <= 0.1 + 1e-9) & (np.abs(b + 0.5) <= 0.1 + 1e-9)
    assert near.sum() >= WINDOW**2
    exact = bowl(result["window_a"], result["window_b"][:, None])
    np.testing.assert_allclose(result["window_z"], exact, atol=1e-12)
    calls.clear()
    made.set(zoom=0.9)
    settle(made)
    made.set(zoom=0.1)
    settle(made)
    assert len(calls) == 0, "what was seen before is remembered"


def test_the_newest_wish_comes_first(explorer):
    calls = []
    made = explorer(slowly(0.001, calls), background=True, points=65)
    made.result()
    time.sleep(0.05)
    made.set(draw=2)
    start = time.monotonic()
    made.result()
    while not made.landscape.grids.get("filter 2") and time.monotonic() < start + 10:
        time.sleep(0.005)
    assert time.monotonic() - start < 2, "the first plane needs four seconds more"
    assert made.landscape.grids["filter 1"].evaluated < 65**2


def test_a_move_is_computed_in_milliseconds_while_the_background_works(explorer):
    made = explorer(slowly(0.01), background=True, points=49)
    made.result()
    seconds = []
    for i in range(30):
        start = time.process_time()
        made.result(a=0.02 * i, zoom=0.3)
        seconds.append(time.process_time() - start)
    assert made.landscape.busy and np.median(seconds) < 0.02


def test_closing_ends_the_thread_and_keeps_what_is_known(explorer):
    made = explorer(slowly(0.005), background=True, points=49)
    made.result()
    assert made.landscape.busy
    made.close()
    known = made.landscape.grids["filter 1"].evaluated
    assert not made.landscape.busy and 0 < known < 49**2
    assert f"{known:,} of" in made.result()["evaluated"] and not made.landscape.busy


def test_a_thread_that_nobody_looks_at_ends(explorer):
    made = explorer(slowly(0.002), background=True, points=65)
    face = made.face()
    assert made.landscape.busy
    face.close()
    end = time.monotonic() + 10
    while made.landscape.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert not made.landscape.busy
    assert made.landscape.grids["filter 1"].evaluated < 65**2


def test_a_finished_explorer_is_collected(explorer):
    made = explore_planes(slowly(1e-5), background=True, points=9)
    settle(made)
    gone = weakref.ref(made.landscape)
    del made
    gc.collect()
    assert gone() is None


def test_the_interpreter_ends_while_the_background_works():
    program = (
        "import time; from workbench.loss_landscapes.figures import explore_planes as e;"
        "from workbench.loss_landscapes.figures_field import Slice;"
        "f = lambda a, b: (time.sleep(0.02 * len(a)), a**2)[1];"
        "x = e({'filter 1': lambda: Slice('s', f)}, background=True); x.result();"
        "assert x.landscape.busy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""


def test_an_error_in_the_background_is_shown_and_other_planes_go_on(explorer):
    def fails(a, b):
        if threading.current_thread().name == "loss landscape":
            raise ZeroDivisionError("no <b>loss</b> here")
        return a**2

    planes = {"filter 1": lambda: Slice("fails", fails), "filter 2": lambda: Slice("works", bowl)}
    made = explorer(planes, background=True, points=17)
    face = made.face()
    settle(made)
    assert "no &lt;b&gt;loss&lt;/b&gt; here" in face.message.value
    assert "then ZeroDivisionError" in made.result()["evaluated"]
    made.set(draw=2)
    assert settle(made)["evaluated"] == "289"
    assert face.message.value == ""


def test_interrupted_at_once_keeps_what_there_is(explorer):
    calls = []

    def stopped(a, b):
        calls.append(len(a))
        if sum(calls) > 200:
            raise KeyboardInterrupt
        return bowl(a, b)

    made = explorer({"filter 1": lambda: Slice("s", stopped), "filter 2": makers()["filter 2"]})
    result = made.result()
    assert "of 2,401" in result["evaluated"] and 0 < len(made.to_frame()) < 2401
    assert np.isfinite(made.result(draw=2)["z"]).all()


# ---- exported and saved


def test_the_exported_formula_is_pythons(explorer):
    made = explorer(points=33)
    frozen = made.frozen()
    rng = np.random.default_rng(1)
    states = [
        {c.name: c.values[rng.integers(len(c.values))] for c in frozen.controls} for _ in range(40)
    ]
    same = dict.fromkeys(("a0", "a1"), 0.5) | dict.fromkeys(("b0", "b1"), -0.5)
    states += [frozen.state, frozen.state | same, frozen.state | same | {"a1": 0.52, "log": True}]
    assert js.check_formula(frozen, states) == 43


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_exported_face_is_small_and_near_the_live_one(explorer, count):
    many = {f"filter {i + 1}": makers()["filter 1"] for i in range(count)}
    made = explorer(many, points=49)
    exported = made.export()
    assert len(export.dumps(exported)) < 60_000
    assert len(exported["data"]["planes"]) == count and exported["formula"]
    live, stored = made.result(), made.frozen().result()
    np.testing.assert_allclose(stored["profile"], live["profile"], atol=0.02)


def test_a_page_gets_only_the_planes_that_are_known(explorer):
    made = explorer(slowly(1e-4), background=True, points=17, draw=2)
    settle(made)
    exported = made.export()
    assert list(exported["data"]["planes"]) == ["filter 2"]
    draw = next(c for c in exported["controls"] if c["name"] == "draw")
    assert draw["values"] == [2] and exported["state"]["draw"] == 2


def test_everything_at_once_is_deterministic(explorer):
    first, second = (explorer(points=17).to_frame() for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert len(first) == 3 * 17**2


def test_the_table_holds_every_loss_evaluated_and_is_saved_whole(explorer, tmp_path):
    made = explorer(slowly(1e-5), background=True, points=9, zoom=0.2)
    settle(made)
    frame = made.to_frame()
    assert list(frame.columns) == ["plane", "a", "b", "loss"]
    assert len(frame) >= 9**2 + WINDOW**2 - 9 and not frame.duplicated(["plane", "a", "b"]).any()
    np.testing.assert_allclose(frame.loss, bowl(frame.a, frame.b))
    back = pd.read_csv(made.save(tmp_path / "new" / "losses.csv"))
    pd.testing.assert_frame_equal(back, frame, check_exact=False)
    with np.load(made.save(tmp_path / "losses.npz"), allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["loss"], frame.loss)
        assert stored["plane"][0] == "filter 1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["losses.npz", "new"]
    with pytest.raises(ValueError, match=r"\.csv or \.npz"):
        made.save(tmp_path / "losses.pkl")


def test_the_static_twin_names_the_plane_and_the_path(explorer):
    made = explorer(plane="trajectory")
    axes = made.figure().axes[0]
    assert "the path" in axes.get_title(loc="left").replace("\n", " ")
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {
        "path", "centre", "zoom", "from", "to",
    }  # fmt: skip


def test_the_line_to_share_restores_the_state(explorer, monkeypatch):
    made = explorer(a=0.2, zoom=0.3, draw=2)
    assert made.restoring(made.state).startswith(
        "loss_landscapes.explore(model, loss_fn, data, plane='filter', draw=2, log=False, a=0.2"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"points": 4}, "points"),
        ({"radius": 0.0}, "radius"),
        ({"plane": "sideways"}, "plane"),
        ({"a": 2.0}, "a: expected"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        explore_planes(makers(), background=False, **settings)


# ---- real networks


@pytest.fixture(scope="module")
def trained():
    """A network, its data and checkpoints of its training."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 2))
    optimizer, path = torch.optim.Adam(model.parameters(), 0.02), []
    for step in range(60):
        if step % 10 == 0:
            path.append({k: v.clone() for k, v in model.state_dict().items()})
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y), [*path, {k: v.clone() for k, v in model.state_dict().items()}]


def test_planes_of_a_network_pass_through_it_and_leave_it_alone(trained):
    model, data, path = trained
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = explore(
        model, nn.functional.cross_entropy, data, trajectory=path, draws=2, points=17,
        background=False,
    )  # fmt: skip
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model.eval()(data[0]), data[1]))
    model.train()
    assert [c.values for c in made.controls[:2]] == [
        ["filter", "layer", "trajectory", "eigenvectors"], [1, 2],
    ]  # fmt: skip
    for state in ({}, {"draw": 2}, {"plane": "layer"}, {"plane": "eigenvectors"}):
        assert made.result(a=0.0, b=0.0, **state)["at_center"] == pytest.approx(loss, rel=1e-5)
    first, second = made.result()["z"], made.result(draw=2)["z"]
    assert np.abs(first - second).max() > 0.01
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert model.training and all(p.grad is not None for p in model.parameters())


def test_the_training_path_ends_at_the_network(trained):
    model, data, path = trained
    made = explore(
        model, nn.functional.cross_entropy, data, trajectory=path, eigen=False, normalize=(),
        points=33, background=False,
    )  # fmt: skip
    result = made.result()
    assert np.abs(result["path_a"]).max() <= 0.851 and np.abs(result["path_b"]).max() <= 0.851
    end = made.result(a=round(result["last_a"][0], 2), b=round(result["last_b"][0], 2))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model.eval()(data[0]), data[1]))
    model.train()
    assert end["at_center"] == pytest.approx(loss, abs=0.03)
    assert "% of its variance" in result["plane_title"]


def test_along_the_first_eigenvector_the_curvature_is_the_eigenvalue(trained):
    from workbench.loss_landscapes import Objective, top_eigs

    model, data, _ = trained
    model = nn.Sequential(*(m for m in model if not isinstance(m, nn.Dropout))).double()
    data = data[0].double(), data[1]
    made = explore(
        model, nn.functional.cross_entropy, data, normalize=(), points=33, radius=0.01,
        background=False,
    )  # fmt: skip
    value = float(top_eigs(Objective(model, nn.functional.cross_entropy, data)).values[0])
    ends = {"a0": -0.007, "b0": 0.0, "a1": 0.007, "b1": 0.0}
    assert made.result(a=0.0, b=0.0, **ends)["curvature"] == pytest.approx(value, rel=0.02)
    assert f"{value:.3g}" in made.result()["plane_title"]
    model.float()


def test_directions_of_ones_own_are_drawn_as_they_are(trained):
    model, data, path = trained
    step = {k: path[0][k] - v for k, v in model.state_dict().items()}
    other = {k: torch.zeros_like(v) for k, v in step.items()} | {"0.bias": torch.ones(12)}
    made = explore(
        model, nn.functional.cross_entropy, data, directions=(step, other), normalize=(),
        eigen=False, points=9, background=False,
    )  # fmt: skip
    start = type(model)(*model)
    held = {k: v.clone() for k, v in model.state_dict().items()}
    start.load_state_dict(path[0])
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(start.eval()(data[0]), data[1]))
    model.load_state_dict(held)
    model.train()
    assert made.result(a=1.0, b=0.0)["at_center"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"data": None}, ValueError, "data"),
        ({"model": lambda x: x}, TypeError, "model"),
        ({"normalize": ("sideways",)}, ValueError, "normalize"),
        ({"normalize": (), "eigen": False}, ValueError, "no plane"),
        ({"directions": (torch.zeros(3), torch.zeros(3))}, ValueError, r"directions\[0\]"),
        ({"draws": 0}, ValueError, "draws"),
    ],
)
def test_impossible_arguments_are_named(trained, settings, error, message):
    model, data, _ = trained
    given = {"model": model, "loss_fn": nn.functional.cross_entropy, "data": data} | settings
    with pytest.raises(error, match=message):
        explore(**given, background=False, points=5)


def test_a_network_in_the_background_may_be_trained_on(trained):
    model, data, _ = trained
    made = explore(model, nn.functional.cross_entropy, data, background=True, points=33, draws=1)
    here = made.result()["at_center"]
    held = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert settle(made)["at_center"] == pytest.approx(here, rel=1e-3)
    made.close()
    model.load_state_dict(held)
