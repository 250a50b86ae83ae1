"""The definition: controls, state, results, and errors that name what is wrong."""

import subprocess
import sys

import demo
import numpy as np
import pytest

from workbench.plots import escape, theme
from workbench.plots.bindings import put, wrap
from workbench.plots.controls import Choice, Slider, Steps, Toggle, nearest
from workbench.plots.explorer import Axis, Explorer, HeatMap, Line, Panel, Readout, Surface


def explorer(compute=lambda a: {"x": [0, 1], "y": [0, a]}, **changes):
    settings = {
        "name": "t", "title": "t", "controls": [Slider("a", "A", 0, 10)], "compute": compute,
        "panels": [Panel("p", Axis("x"), Axis("y"), [Line("x", "y")])],
    }  # fmt: skip
    return Explorer(**settings | changes)


# ---- controls


def test_slider_positions_hold_both_ends():
    assert Slider("a", "A", 0, 10).values == list(range(11))
    assert Slider("a", "A", 0.2, 5.0, step=0.01).values[:2] == [0.2, 0.21]
    assert Slider("a", "A", 0, 1, step=0.3).values == [0, 0.3, 0.6, 0.9, 1]
    log = Slider("a", "A", 0.001, 1000, log=True).values
    assert log[0] == 0.001 and log[-1] == 1000 and len(log) == 101
    assert np.allclose(np.diff(np.log10(log)), 0.06, atol=1e-5)


def test_whole_sliders_hand_out_integers():
    slider = Slider("a", "A", 1, 9, step=2)
    assert slider.check(3.0) == 3 and isinstance(slider.check(3.0), int)
    assert isinstance(Slider("a", "A", 0, 1).check(0.5), float)


def test_initial_values():
    assert Slider("a", "A", 0, 10).initial == 5
    assert Choice("c", "C", ["x", "y"]).initial == "x"
    assert Steps("s", "S", [5, 10], value=10).initial == 10
    assert Toggle("t", "T").initial is False


def test_values_in_words():
    assert Slider("a", "A", 0.2, 5, step=0.01, unit="s").text(1) == "1.00 s"
    assert Slider("a", "A", -1, 1, step=0.5).text(-0.5) == "−0.5"
    assert Choice("c", "C", [1, 2], labels=["one", "two"]).text(2) == "two"
    assert Toggle("t", "T").text(True) == "on"


def test_nearest_position():
    assert nearest(Slider("a", "A", 0, 10), 3.4) == 3
    assert nearest(Slider("a", "A", 1, 100, log=True), 10) == 50
    assert nearest(Steps("s", "S", [5, 10]), 10) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Slider("a b", "A", 0, 1), "identifier"),
        (lambda: Slider("a", "A", 1, 1), "low must be below high"),
        (lambda: Slider("a", "A", 0, 1, log=True), "above 0"),
        (lambda: Slider("a", "A", 0, 1, step=-1), "step"),
        (lambda: Slider("a", "A", 0, 1, step=1e-6), "larger step"),
        (lambda: Slider("a", "A", 0, 1, value=2), "from 0 to 1"),
        (lambda: Slider("a", "A", 0, 1, format="q"), "format"),
        (lambda: Choice("a", "A", []), "no options"),
        (lambda: Choice("a", "A", [1, 2], labels=["x"]), "1 labels for 2 options"),
        (lambda: Choice("a", "A", [1, 2], value=3), "one of"),
        (lambda: Toggle("a", "A", value="yes"), "True or False"),
        (lambda: Axis("a", (1, 0)), "rise"),
        (lambda: Axis("a", (0, 1), log=True), "above 0"),
        (lambda: HeatMap("z", "x", "y", log=True), "scale"),
        (lambda: Panel("p", Axis("x"), Axis("y"), []), "nothing"),
        (
            lambda: Panel("p", Axis("x"), Axis("y"), [Surface("z", "x", "y"), Line("x", "y")]),
            "alone",
        ),
        (lambda: explorer(controls=[Toggle("a", "A"), Toggle("a", "B")]), "share a name"),
        (lambda: explorer(panels=[]), "no panels"),
        (lambda: explorer(script="x", grid=True), "either"),
        (lambda: explorer(readouts=[Readout("y", "Y", "0.3")]), "format"),
        (lambda: theme.color("mauve"), "mauve"),
        (lambda: theme.stops("rainbow"), "rainbow"),
    ],
)
def test_bad_definitions_name_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ---- state and result


def test_state_can_be_set_and_restored(capsys):
    found = demo.softmax().set(temperature=2.5, guide=False)
    assert found.state == {"temperature": 2.5, "sample": 0, "guide": False}
    line = found.restore()
    assert capsys.readouterr().out == line + "\n"
    assert line == "demo.softmax().set(temperature=2.5, sample=0, guide=False)"
    assert eval(line, {"demo": demo}).state == found.state


def test_the_default_line_and_a_call_without_controls():
    assert explorer().restoring({"a": 3}) == "explorer.set(a=3)"
    still = explorer(lambda: {"x": [0], "y": [0]}, controls=[], call="explore(logits, {state})")
    assert still.restore() == "explore(logits)"


def test_unknown_and_impossible_states_are_refused():
    with pytest.raises(ValueError, match="no control 'b'; there are a"):
        explorer().set(b=1)
    with pytest.raises(ValueError, match="from 0 to 10"):
        explorer().set(a=11)
    with pytest.raises(TypeError, match="number"):
        explorer().set(a="1")
    assert explorer().state == {"a": 5}


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"compute returned no 'y'; it returned 'x'"):
        explorer(lambda a: {"x": [1]}).result()


def test_controls_can_be_drawn_without_being_returned():
    panel = Panel("a is {a}", Axis("x"), Axis("y"), [Line("x", "y")])
    assert explorer(panels=[panel]).result(a=3)["a"] == 3


def test_results_are_numpy_whatever_compute_returns():
    torch = pytest.importorskip("torch")
    given = {"x": torch.ones(2, requires_grad=True), "y": [1, 2], "names": ["a", "b"], "w": "word"}
    result = explorer(lambda a: given).result()
    assert isinstance(result["x"], np.ndarray) and result["y"].dtype.kind == "i"
    assert result["names"].dtype == object and result["w"] == "word"
    with pytest.raises(TypeError, match="compute's 'z'"):
        explorer(lambda a: given | {"z": [object()]}).result()


def test_pandas_strings_are_words():
    pd = pytest.importorskip("pandas")
    result = explorer(lambda a: {"x": [0], "y": [0], "n": pd.Series(["a", "b"])}).result()
    assert result["n"].tolist() == ["a", "b"]


# ---- text


def test_escaping_is_total():
    assert "<" not in escape.html(demo.NASTY) and '"' not in escape.html(demo.NASTY)
    assert "<" not in escape.plotly(demo.NASTY) and "%{" not in escape.plotly(demo.NASTY)
    assert escape.matplotlib("$x$") == r"\$x\$"


def test_titles_wrap_at_spaces():
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("unbreakable", 3) == ["unbreakable"]


def test_put_reaches_into_lists():
    figure = {"shapes": [{}, {}]}
    put(figure, "shapes[1].label.text", "x")
    assert figure == {"shapes": [{}, {"label": {"text": "x"}}]}


# ---- cost


def test_importing_plots_is_cheap():
    program = (
        "import sys, workbench.plots as p; p.Slider; p.Explorer;"
        "heavy = {'plotly', 'ipywidgets', 'matplotlib', 'IPython', 'torch', 'scipy'};"
        "heavy &= set(sys.modules);"
        "assert not heavy, heavy; assert 'Explorer' in dir(p)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_names_raise():
    from workbench import plots

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = plots.nothing_here
    for name in plots.__all__:
        assert getattr(plots, name) is not None
