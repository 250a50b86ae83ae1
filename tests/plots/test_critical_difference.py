"""The critical-difference diagram: where things stand, and that no two labels meet."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from workbench.plots.critical_difference import _levels, rank_diagram


def ranks(k: int) -> dict[str, float]:
    rng = np.random.default_rng(k)
    middle = rng.normal((k + 1) / 2, 0.3, k).clip(1, k)  # as crowded as it gets
    names = (f"loss {i}" if i % 2 else f"a loss with quite a long name {i}" for i in range(k))
    return dict(zip(names, sorted(middle), strict=True))


def labels(ax):  # type: ignore[no-untyped-def]
    return [text for text in ax.texts if text.get_gid() == "label"]


@pytest.mark.parametrize("k", [2, 3, 13, 30])
def test_labels_neither_meet_nor_leave_the_figure(k: int) -> None:
    ax = rank_diagram(ranks(k), [list(ranks(k))[:2]], cd=1.0, title="All of them", note="small")
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in labels(ax)]
    assert len(boxes) == k
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = ax.figure.canvas.get_width_height()
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)
    plt.close(ax.figure)


def test_dots_bars_and_rule_have_their_lengths() -> None:
    ax = rank_diagram({"a": 1.2, "b": 2.0, "c": 2.8}, [("a", "b"), ("b", "c")], cd=0.9)
    marked = [line for line in ax.lines if line.get_marker() == "o"]
    dots = sorted(float(np.ravel(line.get_xdata())[0]) for line in marked)
    assert dots == [1.2, 2.0, 2.8]
    bars = [line for line in ax.lines if line.get_gid() == "group"]
    spans = sorted((line.get_xdata()[0], line.get_xdata()[-1]) for line in bars)
    assert np.allclose(spans, [(1.2, 2.0), (2.0, 2.8)], atol=0.03)
    assert len({line.get_ydata()[0] for line in bars}) == 2  # they share b, so not a line
    [rule] = [line for line in ax.lines if line.get_gid() == "cd"]
    assert np.ptp(rule.get_xdata()) == pytest.approx(0.9)
    plt.close(ax.figure)


def test_bars_take_the_first_free_level() -> None:
    assert _levels([(1, 2), (1.5, 3), (2.5, 4), (3.5, 5)]) == [0, 1, 0, 1]
    assert _levels([]) == []


def test_text_of_a_user_is_text() -> None:
    ax = rank_diagram({"$x$ loss": 1.0, "b": 2.0}, highlight={"b": "vermillion"}, title="cost in $")
    ax.figure.canvas.draw()
    assert any(r"\$x\$" in text.get_text() for text in labels(ax))
    assert labels(ax)[1].get_color() == "#D55E00"
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({"a": 1.0},), "ranks"),
        (({"a": 1.0, "b": float("nan")},), "ranks"),
        (({"a": 1.0, "b": 2.0}, [("a", "z")]), "groups: 'z'"),
    ],
)
def test_bad_input_is_named(given, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        rank_diagram(*given)
    with pytest.raises(ValueError, match="highlight"):
        rank_diagram({"a": 1.0, "b": 2.0}, highlight={"c": "blue"})


def test_it_draws_on_given_axes_and_leaves_the_settings() -> None:
    before = dict(matplotlib.rcParams)
    ax = plt.subplots(figsize=(8, 3))[1]
    assert rank_diagram({"a": 1.0, "b": 2.0}, ax=ax) is ax
    assert dict(matplotlib.rcParams) == before
    plt.close(ax.figure)
