"""The exported face: JSON within its caps, and JavaScript that draws what Python draws."""

from __future__ import annotations

import json
from dataclasses import replace

import demo
import js
import numpy as np
import pytest

from workbench.plots import bindings, export, fields, layout, passages
from workbench.plots.explorer import Axis, Choice, Explorer, Line, Panel, Slider


def tiny(**changes) -> Explorer:
    """The cheapest explorer: y = a x."""
    x = np.linspace(0, 1, 11)
    explorer = Explorer(
        name="demo.tiny",
        title="A slope",
        controls=[Slider("a", "Slope", 0, 10)],
        compute=lambda a: {"x": x, "y": a * x},
        panels=[Panel("y = {a} x", Axis("x"), Axis("y", (0, 10)), [Line("x", "y")])],
    )
    return replace(explorer, **changes)


def test_formula_agrees_with_python_over_the_control_grid():
    assert js.check_formula(demo.softmax()) == 4 * 4 * 2
    assert js.check_formula(demo.softmax(classes=(demo.NASTY, "a", "b"))) == 32


def test_a_wrong_formula_is_caught():
    wrong = tiny(script="function (c, d) { return {x: [0], y: [c.a]}; }")
    with pytest.raises(AssertionError, match="shape|Python"):
        js.check_formula(wrong)


@pytest.mark.parametrize("make", [demo.softmax, demo.gallery], ids=["formula", "grid"])
def test_a_narrow_page_gets_a_face_of_one_column(make):
    explorer = make()
    exported = explorer.export()
    spec = {k: v for k, v in exported.items() if k not in ("formula", "grid")}
    [face] = js.run(f"answer([workbench.core.face({json.dumps(spec)}, 'narrow')]);")
    narrow = layout.spec(
        explorer.panels, explorer.result(), columns=1, height=explorer.height, width=layout.NARROW
    )
    assert face["traces"] == json.loads(json.dumps(narrow.traces))
    assert face["layout"] == json.loads(json.dumps(narrow.layout))
    assert face["bindings"] == json.loads(json.dumps([b.json() for b in narrow.bindings]))
    assert len(json.dumps(exported["faces"]["narrow"])) < len(json.dumps(face))


@pytest.mark.parametrize("make", [demo.softmax, demo.gallery], ids=["formula", "grid"])
def test_the_scripts_figure_is_pythons_figure(make):
    explorer = make()
    exported = explorer.export()
    states = [c["values"] for c in exported["controls"]]
    moves = [[0] * len(states), [len(v) - 1 for v in states], [len(v) // 2 for v in states]]
    program = f"""
    const spec = {json.dumps({k: v for k, v in exported.items() if k != "formula"})};
    const f = {exported.get("formula", "null")};
    answer({json.dumps(moves)}.map(indices => {{
      const state = Object.assign({{}}, spec.state), at = {{}};
      spec.controls.forEach((c, i) => {{
        state[c.name] = c.values[indices[i]];
        at[c.name] = indices[i];
      }});
      const values = workbench.core.result(spec, f, state, at);
      return [workbench.core.filled(spec.faces.wide, values), values];
    }}));"""
    for indices, (figure, values) in zip(moves, js.run(program), strict=True):
        state = {
            c["name"]: c["values"][i] for c, i in zip(exported["controls"], indices, strict=True)
        }
        result = explorer.result(**state)
        for key in explorer.keys():  # noqa: SIM118
            js.same(result[key], values[key], f"{state} {key}", rtol=2e-3, atol=2e-4)
        spec = layout.spec(
            explorer.panels, explorer.result(), columns=explorer.columns, height=explorer.height
        )
        for binding in spec.bindings:
            ours = bindings.evaluate(binding, result)
            theirs = figure["layout"] if binding.trace is None else figure["data"][binding.trace]
            for part in binding.prop.replace("]", "").replace("[", ".").split("."):
                theirs = theirs[int(part) if part.isdigit() else part]
            where = f"{binding.prop} of {binding.trace} ({binding.op})"
            js.same(ours, theirs, where, rtol=2e-3, atol=2e-3)


def test_both_languages_write_numbers_alike():
    values = [0, 1, -1, 0.5, 1 / 3, -2.5e-7, 123456.789, 99999, 1e-5, 0.00012345, 1e15, 12345.6]
    specs = ["", "d", ".0f", ".3f", ".2e", ".3g", ".6g", ".1%", "+.2f", ",.1f", ",d"]
    cases = [(v, s) for v in values for s in specs]
    cases += [(None, ".2f"), ("word", ".2f"), (True, ""), (False, "d")]
    theirs = js.run(f"answer({json.dumps(cases)}.map(c => workbench.core.number(c[0], c[1])));")
    for (value, spec), text in zip(cases, theirs, strict=True):
        assert fields.number(value, spec) == text, (value, spec)


def test_both_languages_shade_tokens_alike():
    values = [None, -1.0, 0.0, 0.1, 0.333, 0.5, 1.0, 2.0]
    theirs = js.run(f"answer({json.dumps(values)}.map(v => workbench.core.shade(v, [0, 1])));")
    assert [passages.shade(v, (0.0, 1.0)) for v in values] == theirs


def test_both_languages_restore_alike():
    explorer = demo.gallery(call="calibration.explore(logits, labels, {state})")
    exported = export.dumps(explorer.export())
    line = js.run(f"const s = {exported}; answer(workbench.core.restoring(s, s.state));")
    assert line == explorer.restoring(explorer.state).replace("'", '"').replace("=1,", "=1,")


def test_titles_fill_alike():
    theirs = js.run(
        'answer(workbench.core.fill("{{a}} {x:.2f} of {n} {w}", {x: 0.125, n: 3, w: "<b>"}));'
    )
    assert theirs == fields.fill("{{a}} {x:.2f} of {n} {w}", {"x": 0.125, "n": 3, "w": "<b>"})


def test_numbers_are_rounded_but_not_blurred():
    years = export.plain(np.array([2021.25, 2021.5]))
    assert years == [2021.25, 2021.5]
    assert export.plain(np.array([0.123456, 100.0, np.nan, 1.23456e-9])) == [
        0.1235, 100.0, None, 1.235e-9,
    ]  # fmt: skip
    assert export.plain(np.array([1234567, 3])) == [1234567, 3]
    assert export.plain(1 / 3) == 0.333333
    assert export.plain(np.array([True, False])) == [1, 0]


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"a": list(np.linspace(0, 10, 51))}, "51 values"),
        ({"a": range(11), "b": range(20)}, "220 combinations"),
        ({"a": []}, "0 values"),
        ({"c": [1]}, "no control 'c'"),
        ({"a": [11]}, "expected a value"),
    ],
)
def test_a_grid_above_the_caps_is_refused(grid, message):
    both = [Slider("a", "Slope", 0, 10, step=0.2), Choice("b", "Other", list(range(20)))]
    explorer = tiny(controls=both, compute=lambda a, b: {"x": [0, 1], "y": [0, a]}, grid=grid)
    with pytest.raises(ValueError, match=message):
        explorer.export()


def test_a_large_export_is_refused(monkeypatch):
    wide = np.random.default_rng(0).normal(size=3000)
    explorer = tiny(compute=lambda a: {"x": wide, "y": wide * (a + 1)}, grid=True)
    assert len(export.dumps(explorer.export())) > 200_000
    monkeypatch.setattr(export, "MAX_BYTES", 200_000)
    with pytest.raises(ValueError, match="0.2 MB"):
        explorer.export()
    monkeypatch.setattr(export, "MAX_BYTES", export.MAX_BYTES * 100)
    monkeypatch.setattr(export, "MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match="more than 0 s"):
        explorer.export()


def test_controls_that_need_a_kernel_are_left_out():
    assert tiny().export()["controls"] == []
    partial = demo.gallery(grid={"bins": [5, 20]})
    exported = partial.export()
    assert [c["name"] for c in exported["controls"]] == ["bins"]
    assert exported["controls"][0]["labels"] == ["5", "20"]
    assert exported["state"] == {"noise_level": 1, "bins": 5, "shape": "rise"}


def test_equal_values_are_stored_once():
    exported = demo.gallery().export()
    grid = exported["grid"]
    assert len(grid["cells"]) == 5 * 3 * 2
    assert len(grid["pool"]) < len(grid["cells"]) * len(grid["keys"]) / 2


def test_the_state_moves_to_the_nearest_exported_position():
    exported = demo.gallery().export(noise_level=1.26)
    assert exported["state"]["noise_level"] == 1.5
    assert exported["controls"][0]["index"] == 3


def test_written_script_is_plain_javascript(tmp_path):
    for make in (demo.softmax, demo.gallery):
        written = export.write(make().export(), tmp_path)
        text = written.path.read_text()
        for word in ("import ", "fetch(", "eval(", "new Function", "<script"):
            assert word not in text
        assert written.bytes < 300_000
        program = f"{text}\nanswer(Object.keys(workbench.core.specs));"
        assert js.run(program) == [written.id]
    source = js.CORE.read_text()
    assert "eval(" not in source and "new Function" not in source and "innerHTML" not in source


def test_identity_follows_the_content(tmp_path):
    first, again = (export.write(demo.softmax().export(), tmp_path) for _ in range(2))
    other = export.write(demo.softmax().export(temperature=2.0), tmp_path)
    assert first == again and other.id != first.id
    assert export.element(first.id) == (
        f'<div class="workbench-explorer" data-explorer="{first.id}"></div>'
    )


def test_write_refuses_what_is_no_export(tmp_path):
    with pytest.raises(ValueError, match="exported"):
        export.write({"kind": "other"}, tmp_path)


def test_one_shared_plotly_is_the_packages_own(tmp_path):
    import plotly.offline

    paths = export.assets(tmp_path)
    assert [p.name for p in paths] == ["plotly.min.js", "explorer.js", "explorer.css"]
    assert paths[0].read_text(encoding="utf-8") == plotly.offline.get_plotlyjs()
