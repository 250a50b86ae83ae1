"""Explorers that the tests of the plotting floor and of the site show, move and export."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from workbench.plots.explorer import (
    Axis,
    Band,
    Bars,
    Choice,
    Diagonal,
    Explorer,
    Handle,
    HeatMap,
    HLine,
    Line,
    Panel,
    Passage,
    Points,
    Readout,
    Slider,
    Steps,
    Surface,
    Toggle,
    VLine,
)

NASTY = '<img src=x onerror="window.broken=1"> $x_1$ %{y}'

SOFTMAX = """
function (controls, data) {
  var z = data.logits[controls.sample].map(function (v) { return v / controls.temperature; });
  var top = Math.max.apply(null, z);
  var e = z.map(function (v) { return Math.exp(v - top); });
  var sum = e.reduce(function (a, b) { return a + b; }, 0);
  var p = e.map(function (v) { return v / sum; });
  var temperatures = [], confidences = [];
  for (var i = 0; i <= 60; i++) {
    var t = Math.pow(10, -1 + i / 30);
    temperatures.push(t);
    var total = 0, largest = Math.max.apply(null, data.logits[controls.sample]);
    data.logits[controls.sample].forEach(function (v) { total += Math.exp((v - largest) / t); });
    confidences.push(1 / total);
  }
  var entropy = 0;
  p.forEach(function (v) { if (v > 0) { entropy -= v * Math.log(v); } });
  return {
    classes: data.classes, p: p, zero: p.map(function () { return 0; }),
    temperatures: temperatures, confidences: confidences,
    confidence: Math.max.apply(null, p), entropy: entropy,
    shown: controls.guide ? 1 / p.length : null
  };
}
"""


def softmax(classes: tuple[str, ...] = ("cat", "dog", "fox", "owl")) -> Explorer:
    """One sample's softmax at a temperature: exported by formula."""
    logits = np.random.default_rng(0).normal(0, 2, (6, len(classes))).round(3)

    def compute(temperature: float, sample: int, guide: bool) -> dict:
        z = logits[sample] / temperature
        p = np.exp(z - z.max())
        p /= p.sum()
        ts = np.logspace(-1, 1, 61)
        curve = 1 / np.exp((logits[sample] - logits[sample].max()) / ts[:, None]).sum(1)
        return {
            "classes": list(classes),
            "p": p,
            "zero": np.zeros(len(p)),
            "temperatures": ts,
            "confidences": curve,
            "confidence": p.max(),
            "entropy": -(p[p > 0] * np.log(p[p > 0])).sum(),
            "shown": 1 / len(p) if guide else float("nan"),
        }

    return Explorer(
        name="demo.softmax",
        title="Temperature and confidence",
        about="Move the temperature and watch one prediction sharpen or spread.",
        controls=[
            Slider("temperature", "Temperature", 0.1, 10.0, value=1.0, log=True),
            Choice("sample", "Sample", list(range(6)), labels=[f"no. {i}" for i in range(6)]),
            Toggle("guide", "Show the uniform level", True),
        ],
        compute=compute,
        panels=[
            Panel(
                "The top class gets {confidence:.1%}",
                Axis("class", categories=True),
                Axis("probability", (0, 1.05)),
                [Bars("classes", "p", label=classes[0]), HLine("shown", "uniform")],
            ),
            Panel(
                "Confidence falls as the temperature rises",
                Axis("temperature", (0.1, 10), log=True),
                Axis("confidence", (0, 1.05)),
                [
                    Line("temperatures", "confidences", "this sample"),
                    VLine("temperature", "T = {temperature:.3g}", color="vermillion"),
                ],
            ),
        ],
        readouts=[
            Readout("confidence", "Confidence", ".3f"),
            Readout("entropy", "Entropy", ".3f", unit="nats"),
        ],
        script=SOFTMAX,
        data={"logits": logits, "classes": list(classes)},
        call="demo.softmax().set({state})",
    )


def gallery(**changes) -> Explorer:
    """Every kind of mark at once: exported by grid."""
    x = np.linspace(0, 1, 41)
    noise = np.random.default_rng(1).normal(0, 1, (8, 41))

    def compute(noise_level: float, bins: int, shape: str) -> dict:
        runs = {"rise": x**2, "wave": 0.5 + 0.4 * np.sin(6 * x)}[shape] + noise_level * noise * 0.1
        mean, spread = runs.mean(0), runs.std(0, ddof=1)
        edges = np.linspace(0, 1, bins + 1)
        mid = (edges[1:] + edges[:-1]) / 2
        level = np.interp(mid, x, mean)
        half = np.full(bins, noise_level * 0.1)
        grid = mean[:, None] * mean[None, ::4]
        words = ["the", "model", "gives\nevery", "token", "a", "number"]
        return {
            "x": x, "mean": mean, "low": mean - 2 * spread, "high": mean + 2 * spread,
            "mid": mid, "level": level, "width": np.full(bins, 1 / bins),
            "level_low": level - half, "level_high": level + half,
            "z": grid + 0.01, "zx": x[::4], "zy": x,
            "loss": 10.0 ** (-3 * grid),
            "names": [f"m{i}" for i in range(8)], "seed_x": runs[:, 10], "seed_y": runs[:, 30],
            "sizes": 6.0 + 2 * np.arange(8), "order": np.arange(8),
            "error": float(np.abs(runs - mean).mean()),
            "error_low": float(spread.min()), "error_high": float(spread.max()),
            "words": words, "shades": np.linspace(0, 1, len(words)) * noise_level,
        }  # fmt: skip

    explorer = Explorer(
        name="demo.gallery",
        title="Every kind of mark",
        controls=[
            Slider("noise_level", "Noise", 0, 2, step=0.25, value=1),
            Steps("bins", "Bins", [5, 10, 20], value=10),
            Choice("shape", "Shape", ["rise", "wave"]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Eight seeds agree within {error:.3f} on average, whatever the shape of the curve",
                Axis("input"), Axis("output", (-0.5, 1.5)),
                [
                    Band("x", "low", "high", label="mean of 8 seeds"),
                    Line("x", "mean", label="mean of 8 seeds"),
                    Line("x", "low", label="lower end", dash="dash", color="grey", width=1,
                         direct=True),
                    Line("x", "high", label="upper end", dash="dot", color="grey", width=1,
                         direct=True),
                ],
            ),
            Panel(
                "Binned levels with intervals",
                Axis("confidence", (0, 1)), Axis("accuracy", (0, 1)),
                [
                    Bars("mid", "level", "width", label="level", low="level_low",
                         high="level_high"),
                    Bars("mid", "mid", "width", base="level", label="gap", color="vermillion",
                         opacity=0.35),
                    Diagonal("perfect"),
                ],
                square=True,
            ),
            Panel("A landscape", Axis("a"), Axis("b"), [HeatMap("z", "zx", "zy", "loss", (0, 1))]),
            Panel(
                "Contours over decades", Axis("a"), Axis("b", reverse=True),
                [HeatMap("loss", "zx", "zy", "loss", (1e-3, 1), log=True, contours=True)],
            ),
            Panel(
                "Seeds as points", Axis("early", (-1, 2)), Axis("late", (-1, 2)),
                [Points("seed_x", "seed_y", text="names", size="sizes", value="order",
                        label="seed", click="bins", hover="names")],
            ),
            Panel("In three dimensions", Axis("a"), Axis("b"), [Surface("z", "zx", "zy")]),
        ],
        readouts=[Readout("error", "Spread", ".3f", low="error_low", high="error_high")],
        passages=[Passage("Tokens, shaded", "words", "shades", (0, 1), label="weight")],
        grid={"noise_level": [0, 0.5, 1, 1.5, 2], "bins": [5, 10, 20], "shape": ["rise", "wave"]},
        columns=2,
    )  # fmt: skip
    return replace(explorer, **changes)


BOWL = """
function (controls, data) {
  var c = controls, x = [], z = [], t = [], along = [];
  function bowl(a, b) { return a * a + 3 * b * b; }
  data.grid.forEach(function (b) {
    z.push(data.grid.map(function (a) { return bowl(a, b); }));
  });
  for (var i = 0; i <= 20; i++) {
    t.push(i / 20);
    along.push(bowl(c.x + i / 20 * (c.end - c.x), c.y + i / 20 * (0.5 - c.y)));
  }
  return {
    grid: data.grid, z: z, t: t, along: along, line_x: [c.x, c.end], line_y: [c.y, 0.5],
    half: 0.5, box_x: [c.x - c.r, c.x + c.r], box_y: [c.y, c.y], here: bowl(c.x, c.y)
  };
}
"""


def bowl(**changes) -> Explorer:
    """A line across a bowl whose ends are dragged, beside rules that are not."""
    grid = np.linspace(-1, 1, 21)

    def at(a, b):
        return a**2 + 3 * b**2

    def compute(x: float, y: float, end: float, high: float, r: float) -> dict:
        t = np.linspace(0, 1, 21)
        return {
            "grid": grid, "z": at(grid, grid[:, None]), "t": t,
            "along": at(x + t * (end - x), y + t * (0.5 - y)),
            "line_x": np.array([x, end]), "line_y": np.array([y, 0.5]),
            "box_x": np.array([x - r, x + r]), "box_y": np.array([y, y]),
            "here": at(x, y), "half": 0.5,
        }  # fmt: skip

    plane = Axis("a", (-1, 1)), Axis("b", (-1, 1))
    explorer = Explorer(
        name="demo.bowl",
        title="A bowl, cut along a line",
        controls=[
            Slider("x", "Start a", -1.0, 1.0, step=0.02, value=-0.5),
            Slider("y", "Start b", -1.0, 1.0, step=0.02, value=-0.5),
            Slider("end", "End a", -1.0, 1.0, step=0.02, value=0.5),
            Slider("high", "End b", -1.0, 1.0, step=0.02, value=0.5),
            Slider("r", "Radius", 0.1, 1.0, step=0.02, value=0.3),
        ],
        compute=compute,
        panels=[
            Panel(
                "The start lies at {here:.2f}", *plane,
                [
                    HeatMap("z", "grid", "grid", "height at {half:.1f}", contours=True),
                    VLine("half", "a rule"), HLine(0.0, "another"),
                    Line("line_x", "line_y", color="orange"),
                    Line("box_x", "box_y", color="#FFFFFF", width=1),
                    Handle("x", "y", "start", color="vermillion"),
                    Handle("end", "high", "end"),
                    Handle("x", "y", "radius", radius="r"),
                ],
            ),
            Panel("Along the line", Axis("t", (0, 1)), Axis("height, {here:.1f} at 0", (0, 4)),
                  [Line("t", "along")]),
        ],
        readouts=[Readout("here", "Height at the start", ".3f")],
        script=BOWL,
        data={"grid": grid},
    )  # fmt: skip
    return replace(explorer, **changes)
