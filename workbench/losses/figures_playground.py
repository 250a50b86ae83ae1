"""Playground: a decision boundary that is retrained while noise, imbalance and loss are moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from workbench.losses import boundary
from workbench.plots.explorer import (
    Axis,
    Bars,
    Choice,
    Explorer,
    HeatMap,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    VLine,
)

GRID = np.linspace(-boundary.REACH, boundary.REACH, 33)
RATIOS = (1, 2, 5, 10, 20, 50)
METRICS = ("accuracy", "balanced", "F1")
REFERENCE = "logistic"

SCRIPT = """
function (controls, data) {
  const reach = data.reach, side = data.side, count = 1 + side * side;
  const line = Array.from({length: side}, (_, j) => -reach + 2 * reach * j / (side - 1));
  const width = line[1] - line[0], sigmoid = s => 1 / (1 + Math.exp(-s));
  function bumps(x, y) {
    const a = line.map(c => Math.exp(-(x - c) * (x - c) / (2 * width * width)));
    const b = line.map(c => Math.exp(-(y - c) * (y - c) / (2 * width * width)));
    const row = new Float64Array(count);
    row[0] = 1;
    for (let i = 0; i < side; i++)
      for (let j = 0; j < side; j++) row[1 + i * side + j] = a[i] * b[j];
    return row;
  }
  function dot(row, w) {
    let total = 0;
    for (let j = 0; j < count; j++) total += row[j] * w[j];
    return total;
  }
  const sum = values => values.reduce((a, b) => a + b, 0);
  const slopes = {
    "logistic": z => -sigmoid(-z),
    "hinge": z => z < 1 ? -1 : 0,
    "exponential": z => -Math.exp(-Math.max(z, -5)),
    "least squares": z => 2 * (z - 1),
    "GCE, q = 0.7": z => -Math.pow(sigmoid(z), 0.7) * sigmoid(-z),
    "MAE": z => -sigmoid(z) * sigmoid(-z)
  };
  function pull(name, s, y) {
    const n = s.length, ones = sum(y);
    if (name in slopes)
      return s.map((v, i) => (2 * y[i] - 1) * slopes[name]((2 * y[i] - 1) * v) / n);
    if (name === "logistic, classes weighted")
      return s.map((v, i) => (sigmoid(v) - y[i]) * (y[i] ? 1 / ones : 1 / (n - ones)) / 2);
    const p = s.map(sigmoid);
    if (name === "dice") {
      const top = 2 * sum(p.map((v, i) => v * y[i])) + 1;
      const bottom = sum(p.map(v => v * v)) + ones + 1;
      return p.map((v, i) =>
        -(2 * y[i] * bottom - top * 2 * v) / (bottom * bottom) * v * (1 - v));
    }
    const a = p.map(v => sigmoid(data.steep * (v - 0.5)));
    const size = ones + sum(a), hits = sum(a.map((v, i) => v * y[i]));
    return p.map((v, i) => {
      const soft = name === "AnyLoss, F1"
        ? -2 * (y[i] * size - hits) / (size * size)
        : -0.5 * (y[i] ? 1 / ones : -1 / (n - ones));
      return soft * data.steep * a[i] * (1 - a[i]) * v * (1 - v);
    });
  }
  function fit(rows, y, name) {
    const w = new Float64Array(count), first = new Float64Array(count);
    const second = new Float64Array(count);
    for (let step = 1; step <= data.steps; step++) {
      const g = pull(name, rows.map(r => dot(r, w)), y), slope = new Float64Array(count);
      rows.forEach((r, i) => { for (let j = 0; j < count; j++) slope[j] += r[j] * g[i]; });
      const one = 1 - Math.pow(0.9, step), two = 1 - Math.pow(0.999, step);
      for (let j = 0; j < count; j++) {
        const d = slope[j] + data.decay * w[j];
        first[j] = 0.9 * first[j] + 0.1 * d;
        second[j] = 0.999 * second[j] + 0.001 * d * d;
        w[j] -= data.rate / one * first[j] / (Math.sqrt(second[j] / two) + 1e-8);
      }
    }
    return w;
  }
  const all = data.y.map((v, i) => i);
  const zeros = all.filter(i => data.y[i] === 0), ones = all.filter(i => data.y[i] === 1);
  const share = zeros.length / controls.ratio, floor = Math.floor(share);
  const even = share - floor === 0.5 ? floor + floor % 2 : Math.round(share);
  const kept = zeros.concat(ones.slice(0, Math.max(3, even)));
  const wrong = kept.map(i => data.u[i] < controls.noise);
  const y = kept.map((i, k) => wrong[k] ? 1 - data.y[i] : data.y[i]);
  const rows = kept.map(i => bumps(data.x0[i], data.x1[i]));
  const rare = Math.max(3, even) < ones.length
    ? Math.max(3, even) / (zeros.length + Math.max(3, even))
    : ones.length / all.length;
  const test = data.t0.map((v, i) => bumps(v, data.t1[i]));
  function judged(w) {
    let hits = 0, quiet = 0;
    test.forEach((r, i) => {
      const say = dot(r, w) > 0 ? 1 : 0, is = data.ty[i];
      hits += say * is; quiet += (1 - say) * (1 - is);
    });
    const ones = sum(data.ty), recall = hits / ones, spared = quiet / (data.ty.length - ones);
    const called = rare * recall + (1 - rare) * (1 - spared);
    return [rare * recall + (1 - rare) * spared, (recall + spared) / 2,
            2 * rare * recall / (rare + called)];
  }
  const w = fit(rows, y, controls.loss), reference = fit(rows, y, data.reference);
  const grid = data.grid, z = grid.map(b => grid.map(a => dot(bumps(a, b), w)));
  const bx = [], by = [];
  for (let i = 0; i < grid.length; i++)
    for (let j = 0; j < grid.length; j++) {
      const here = z[i][j];
      if (j + 1 < grid.length && here > 0 !== z[i][j + 1] > 0) {
        bx.push(grid[j] + (grid[j + 1] - grid[j]) * here / (here - z[i][j + 1]));
        by.push(grid[i]);
      }
      if (i + 1 < grid.length && here > 0 !== z[i + 1][j] > 0) {
        bx.push(grid[j]);
        by.push(grid[i] + (grid[i + 1] - grid[i]) * here / (here - z[i + 1][j]));
      }
    }
  const s = rows.map(r => dot(r, w)), g = pull(controls.loss, s, y).map(Math.abs);
  const total = sum(g) || 1, pulls = g.map(v => v / total);
  const margin = s.map((v, k) => Math.max(-8, Math.min(8, (2 * y[k] - 1) * v)));
  const where = test => kept.map((i, k) => k).filter(test);
  const part = (rowsOf, values) => rowsOf.map(k => values[k]);
  const x0 = kept.map(i => data.x0[i]), x1 = kept.map(i => data.x1[i]);
  const zero = where(k => !y[k]), one = where(k => y[k]);
  const bad = where(k => wrong[k]), good = where(k => !wrong[k]);
  const scores = judged(w);
  return {
    grid: grid, z: z.map(row => row.map(sigmoid)), boundary_x: bx, boundary_y: by,
    zero_x: part(zero, x0), zero_y: part(zero, x1), one_x: part(one, x0), one_y: part(one, x1),
    wrong_x: part(bad, x0), wrong_y: part(bad, x1),
    metrics: data.metrics, scores: scores, reference_scores: judged(reference),
    good_margin: part(good, margin), good_pull: part(good, pulls),
    bad_margin: part(bad, margin), bad_pull: part(bad, pulls),
    wrong_share: sum(part(bad, pulls)), wrong_rows: bad.length / kept.length,
    positives: sum(y), rows: kept.length, accuracy: scores[0], balanced: scores[1], f1: scores[2]
  };
}
"""


def playground(
    x: Any = None,
    y: Any = None,
    *,
    losses: Mapping[str, boundary.Loss] | None = None,
    seed: int = 0,
    **state: Any,
) -> Explorer:
    """Move label noise, imbalance and loss: a small classifier is retrained each time.

    150 steps of Adam on at most 300 points; a few hundredths of a second. In an exported page the
    reader's browser retrains, except with losses of yours.

    Args:
        x: (n, 2) coordinates of points of yours; default two half moons.
        y: (n,), two classes.
        losses: further losses by name, ``loss(scores (n,), y (n,) in {0, 1}) -> scalar`` in torch.
        seed: of the split, the noise and the moons.
        state: where the controls start: ``loss``, ``noise``, ``ratio``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: only one of x and y is given, or they are not points of two classes.
    """
    if (x is None) != (y is None):
        raise ValueError("y: give x and y together" if y is None else "x: give x and y together")
    points = boundary.moons(seed) if x is None else boundary.points(x, y, seed=seed)
    own = {name: boundary.from_torch(loss) for name, loss in (losses or {}).items()}
    pulls = own | boundary.PULLS
    features, test = boundary.bumps(points.x), boundary.bumps(points.x_test)
    mesh = np.stack(np.meshgrid(GRID, GRID), -1).reshape(-1, 2)
    plane = boundary.bumps(mesh)

    def compute(loss: str, noise: float, ratio: int) -> dict[str, Any]:
        kept, labels, wrong = points.noisy(noise, ratio)
        right = ~wrong
        rows, pull = features[kept], pulls[loss]
        weights = boundary.fit(rows, labels, pull)
        reference = boundary.fit(rows, labels, pulls[REFERENCE])
        height = (plane @ weights).reshape(len(GRID), len(GRID))
        found, base = (
            boundary.scores_of(test @ w > 0, points.y_test, float(points.y[kept].mean()))
            for w in (weights, reference)
        )
        scores = rows @ weights
        strength = np.abs(pull(scores, labels))
        strength = strength / (strength.sum() or 1.0)
        margin = np.clip((2 * labels - 1) * scores, -8, 8)
        bx, by = _crossings(height)
        at = points.x[kept]
        return {
            "grid": GRID, "z": expit(height), "boundary_x": bx, "boundary_y": by,
            "zero_x": at[labels == 0, 0], "zero_y": at[labels == 0, 1],
            "one_x": at[labels == 1, 0], "one_y": at[labels == 1, 1],
            "wrong_x": at[wrong, 0], "wrong_y": at[wrong, 1],
            "metrics": np.array(METRICS, dtype=object),
            "scores": np.array(list(found.values())),
            "reference_scores": np.array(list(base.values())),
            "good_margin": margin[right], "good_pull": strength[right],
            "bad_margin": margin[wrong], "bad_pull": strength[wrong],
            "wrong_share": float(strength[wrong].sum()), "wrong_rows": float(wrong.mean()),
            "positives": float(labels.sum()), "rows": len(kept),
            **{name: found[name] for name in ("accuracy", "balanced", "f1")},
        }  # fmt: skip

    names = list(pulls)
    square = (-boundary.REACH, boundary.REACH)
    data = {
        "x0": points.x[:, 0], "x1": points.x[:, 1], "y": points.y.astype(int), "u": points.u,
        "t0": points.x_test[:, 0], "t1": points.x_test[:, 1], "ty": points.y_test.astype(int),
        "grid": GRID, "reach": boundary.REACH, "side": boundary.SIDE, "steep": boundary.STEEP,
        "steps": boundary.STEPS, "rate": boundary.RATE, "decay": boundary.DECAY,
        "metrics": list(METRICS), "reference": REFERENCE,
    }  # fmt: skip
    explorer = Explorer(
        name="losses.playground",
        title="The boundary moves with the loss: retrained at each change",
        about="Raise the noise and compare MAE with the exponential loss. Then make one class rare "
        "and compare the logistic loss with its weighted form and with F1 as a loss.",
        controls=[
            Choice("loss", "Loss", names, value=names[0]),
            Slider("noise", "Share of wrong labels", 0, 0.45, value=0.2, step=0.05),
            Steps("ratio", "Negatives to each positive", RATIOS, value=1),
        ],
        compute=compute,
        panels=[
            Panel(
                "{wrong_rows:.0%} of {rows:d} labels wrong",
                x=Axis("first coordinate", square), y=Axis("second coordinate", square),
                draws=[
                    HeatMap("z", "grid", "grid", scale=(0, 1), colors="diverging",
                            label="score, squashed"),
                    Points("zero_x", "zero_y", label="negative", color="#0b3c5d", size=5),
                    Points("one_x", "one_y", label="positive", color="#7f2704", size=5),
                    Points("wrong_x", "wrong_y", label="wrong", color="ink", size=8,
                           symbol="ring"),
                    Points("boundary_x", "boundary_y", label="boundary", color="ink", size=3),
                ],
                weight=1.35,
            ),
            Panel(
                "Accuracy {accuracy:.0%}",
                x=Axis("clean test points, same share of positives", categories=True),
                y=Axis("score", (0, 1.02)),
                draws=[
                    Bars("metrics", "scores", label="this loss", color="blue"),
                    Points("metrics", "reference_scores", label=REFERENCE, color="vermillion",
                           symbol="diamond", size=10),
                ],
            ),
            Panel(
                "They have {wrong_share:.0%} of the pull",
                x=Axis("margin of the label given", (-8.2, 8.2)), y=Axis("share of the pull"),
                draws=[
                    VLine(0.0, color="grey", dash="dot"),
                    Points("good_margin", "good_pull", label="right label", color="blue", size=5),
                    Points("bad_margin", "bad_pull", label="wrong label", color="vermillion",
                           size=6, symbol="diamond"),
                ],
            ),
        ],
        readouts=[
            Readout("positives", "positive labels", "d"), Readout("accuracy", "accuracy", ".1%"),
            Readout("balanced", "balanced accuracy", ".1%"), Readout("f1", "F1", ".3f"),
        ],
        script=None if own else SCRIPT,
        data=None if own else data,
        grid={"loss": names} if own else None,
        call="losses.playground(" + ("" if x is None else "x, y, ")
        + ("losses=losses, " if own else "") + "{state})",
        columns=3,
        height=360,
    )  # fmt: skip
    return explorer.set(**state)


def _crossings(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the score changes its sign along the lines of the grid, in the script's order."""
    step, up = GRID[1] - GRID[0], height > 0
    right, above = up[:, :-1] != up[:, 1:], up[:-1] != up[1:]
    found = []
    for mask, ahead in ((right, height[:, 1:]), (above, height[1:])):
        i, j = np.nonzero(mask)
        share = step * height[i, j] / (height[i, j] - ahead[i, j])
        across = mask is right
        order = (i * len(GRID) + j) * 2 + (not across)
        shift = (share, 0 * share) if across else (0 * share, share)
        found.append(np.stack([order, GRID[j] + shift[0], GRID[i] + shift[1]], 1))
    every = np.concatenate(found)
    every = every[np.argsort(every[:, 0], kind="stable")]
    return every[:, 1], every[:, 2]
