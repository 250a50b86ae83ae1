"""Explorer of the amplifier and the boundary it trains; figures of who wins on which metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from workbench.lab import checks
from workbench.losses.anyloss import amplify, gradient_window, soft_confusion
from workbench.losses.experiments import anyloss as study
from workbench.plots import heatmap, theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
    VLine,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEEP = (5, 10, 20, 40, 73, 150, 300)
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "gmean": "G-mean",
}
P = np.linspace(0.002, 0.998, 125)
EDGE = 0.01  # the window ends where the slope is this share of its largest

SCRIPT = """
function (controls, data) {
  const L = controls.L, i = data.steep.indexOf(L), k = data.metrics.indexOf(controls.metric);
  const amplified = data.p.map(p => 1 / (1 + Math.exp(-L * (p - 0.5))));
  const slope = data.p.map((p, j) =>
    16 * amplified[j] * (1 - amplified[j]) * p * (1 - p));
  const w = data.weights[k][i];
  function line(weights, level) {
    const square = weights[0] * weights[0] + weights[1] * weights[1];
    const far = data.reach / Math.sqrt(square), move = (level - weights[2]) / square;
    return [[-1, 1].map(s => move * weights[0] - s * far * weights[1]),
            [-1, 1].map(s => move * weights[1] + s * far * weights[0])];
  }
  const z = data.edge[i], own = line(w, 0), above = line(w, z), below = line(w, -z);
  const plain = line(data.plain, 0), found = data.scores[k][i];
  return {
    p: data.p, amplified: amplified, slope: slope,
    low: 1 / (1 + Math.exp(z)), high: 1 / (1 + Math.exp(-z)),
    no_x: data.no_x, no_y: data.no_y, yes_x: data.yes_x, yes_y: data.yes_y,
    own_x: own[0], own_y: own[1], above_x: above[0], above_y: above[1],
    below_x: below[0], below_y: below[1], plain_x: plain[0], plain_y: plain[1],
    accuracy: found[0], f1: found[1], balanced_accuracy: found[2], gmean: found[3],
    moving: found[4], name: data.names[k]
  };
}
"""


def example(n: int = 240, positives: int = 36, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds in the plane, the smaller one positive."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) < positives).astype(int)
    x = rng.standard_normal((n, 2)) * np.where(y, 0.8, 1.0)[:, None]
    return x + y[:, None] * np.array([1.4, 0.9]), y


def explore_anyloss(
    x: Any = None, y: Any = None, *, steps: int = 400, rate: float = 0.1, **state: Any
) -> Explorer:
    """Choose a metric and a steepness: the amplifier, its gradient window, the line it trains.

    Args:
        x: points (n, 2) of yours; by default two clouds, 15% positive.
        y: labels 0 and 1, (n,).
        steps: of gradient descent, done once for all positions of the controls.
        rate: its learning rate.
        state: where the controls start: ``metric``, ``L``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: x is not (n, 2), or y holds other labels or one class only.
    """
    given = "" if x is None else "x, y, "
    x, y = example() if x is None else (x, y)
    points = np.asarray(checks.as_floats(x, "x", ndim=2), float)
    labels = np.asarray(checks.as_labels(y, 2, "y", min_classes=2))
    checks.same_length(x=points, y=labels)
    if points.shape[1] != 2:
        raise ValueError(f"x: expected two columns, got {points.shape[1]}")
    weights, plain = _lines(points, labels, steps, rate)
    scores = _scores(points, labels, weights)
    edge = [_edge(L) for L in STEEP]
    low, high = points.min(0) - 0.4, points.max(0) + 0.4
    reach = float(np.linalg.norm(high - low) + np.linalg.norm(points, axis=1).max())
    no, yes = points[labels == 0], points[labels == 1]
    cloud = {"no_x": no[:, 0], "no_y": no[:, 1], "yes_x": yes[:, 0], "yes_y": yes[:, 1]}
    names = list(METRICS)

    def line(w: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        square, ends = float(w[:2] @ w[:2]), np.array([-1.0, 1.0])
        far, move = reach / np.sqrt(square), (level - w[2]) / square
        return move * w[0] - ends * far * w[1], move * w[1] + ends * far * w[0]

    def compute(metric: str, L: int) -> dict[str, Any]:
        i, k = STEEP.index(L), names.index(metric)
        w, z = weights[k, i], edge[i]
        hat = amplify(torch.tensor(P), float(L)).numpy()
        own, above, below = line(w, 0.0), line(w, z), line(w, -z)
        other = line(plain, 0.0)
        return {
            "p": P,
            "amplified": hat,
            "slope": gradient_window(torch.tensor(P), float(L)).numpy() * 16 / L,
            "low": 1 / (1 + np.exp(z)),
            "high": 1 / (1 + np.exp(-z)),
            **cloud,
            "own_x": own[0], "own_y": own[1], "above_x": above[0], "above_y": above[1],
            "below_x": below[0], "below_y": below[1], "plain_x": other[0], "plain_y": other[1],
            **dict(zip((*names, "moving"), scores[k, i].tolist(), strict=True)),
            "name": METRICS[metric],
        }  # fmt: skip

    explorer = Explorer(
        name="losses.anyloss",
        title="A steep sigmoid makes the metric trainable, and blind to confident mistakes",
        about="Raise L: the window narrows, and only examples between the dotted lines still pull. "
        "Then change the metric and watch the line move.",
        controls=[
            Choice("metric", "Trained on", names, value="f1", labels=list(METRICS.values())),
            Steps("L", "Steepness L", list(STEEP), value=73),
        ],
        compute=compute,
        panels=[
            Panel(
                "Slope lives between {low:.2f} and {high:.2f}",
                x=Axis("probability p", (0, 1)),
                y=Axis("value, share of largest slope", (0, 1.05)),
                draws=[
                    Line("p", "amplified", label="A(p)", color="blue"),
                    Line("p", "slope", label="slope", color="vermillion"),
                    VLine("low", color="grey"),
                    VLine("high", color="grey"),
                ],
            ),
            Panel(
                "{name}: {moving:.0%} of the points still pull",
                x=Axis("first input", (float(low[0]), float(high[0]))),
                y=Axis("second input", (float(low[1]), float(high[1]))),
                draws=[
                    Points("no_x", "no_y", label="negative", color="sky", size=5),
                    Points("yes_x", "yes_y", label="positive", color="orange", size=6),
                    Line("plain_x", "plain_y", label="cross-entropy", color="grey", dash="dash"),
                    Line("own_x", "own_y", label="this metric", color="blue"),
                    Line("above_x", "above_y", color="blue", dash="dot", width=1.2),
                    Line("below_x", "below_y", color="blue", dash="dot", width=1.2),
                ],
            ),
        ],
        readouts=[
            Readout(name, label, ".3f") for name, label in METRICS.items()
        ] + [Readout("moving", "still pull", ".0%")],
        script=SCRIPT,
        data={
            "p": P, "steep": list(STEEP), "metrics": names, "names": list(METRICS.values()),
            "weights": weights, "plain": plain, "scores": scores, "edge": edge, "reach": reach,
            **cloud,
        },
        call=f"losses.figures_anyloss.explore_anyloss({given}" + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def _lines(x: np.ndarray, y: np.ndarray, steps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (metrics, steepness, 3) of the trained lines, and (3,) of cross-entropy."""
    labels, m = torch.tensor(y).float(), len(METRICS)
    inputs = torch.tensor(x).float()
    steep = torch.tensor(STEEP).float()[:, None]

    def loss(z: torch.Tensor) -> torch.Tensor:
        counts = soft_confusion(torch.sigmoid(z), labels.expand_as(z), steep)
        parts = [1 - study.JUDGED[n](*(c[k] for c in counts)) for k, n in enumerate(METRICS)]
        return torch.stack(parts)

    def plain(z: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            z, labels.expand_as(z), reduction="none"
        ).mean(-1)  # fmt: skip

    speed = torch.tensor(rate)
    ours = study.perceptrons(inputs, loss, (m, len(STEEP)), speed, steps=steps)
    other = study.perceptrons(inputs, plain, (1,), torch.tensor(1.0), steps=steps)
    return ours.double().numpy(), other[0].double().numpy()


def _scores(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The four metrics of each line's decisions, and the share of points inside the window."""
    z = torch.tensor(weights @ np.column_stack([x, np.ones(len(x))]).T)
    counts = soft_confusion((z > 0).double(), torch.tensor(y).expand(z.shape), L=1e6)
    found = [study.JUDGED[name](*counts).numpy() for name in METRICS]
    edge = np.array([_edge(L) for L in STEEP])[:, None]
    return np.stack([*found, (np.abs(z.numpy()) < edge).mean(-1)], -1)


def _edge(L: float) -> float:
    """Score at which the slope has fallen to `EDGE` of its largest."""
    z = np.linspace(0, 12, 24_001)
    window = gradient_window(torch.sigmoid(torch.tensor(z)), float(L)).numpy()
    return float(z[np.flatnonzero(window >= EDGE * window.max())[-1]])


def draw_tables(frame: pd.DataFrame, ax: Axes, metric: str = "f1") -> Axes:
    """One row a table, rarest positives below: the metric by what was trained.

    Args:
        frame: rows of `experiments.anyloss.on_table`.
        ax: axes to draw on.
        metric: which one.
    """
    rows = frame.sort_values("positives")
    at = np.arange(len(rows))
    colors = theme.palette()
    drawn = {
        "bce": ("cross-entropy", "grey", "s"), "smote": ("cross-entropy + SMOTE", "green", "^"),
        "threshold": ("cross-entropy, tuned threshold", "orange", "D"),
        metric: ("AnyLoss", "blue", "o"),
    }  # fmt: skip
    for name, (label, color, mark) in drawn.items():
        ink = colors.get(color, "0.5")
        ax.plot(rows[f"{metric}:{name}"], at, mark, ms=6, color=ink, label=label, alpha=0.85)
    shares = zip(rows.table, rows.positives, strict=True)
    ax.set_yticks(at, [f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares])
    ax.set(xlabel=f"test {METRICS[metric]}, mean of the folds", xlim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def draw_own(frame: pd.DataFrame, ax: Axes) -> Axes:
    """What each AnyLoss gains over cross-entropy on each metric, in points, mean over the tables.

    Args:
        frame: rows of `experiments.anyloss.on_table`.
        ax: axes to draw on.
    """
    names = list(METRICS)
    gain = pd.DataFrame(
        [
            [100 * (frame[f"{m}:{name}"] - frame[f"{m}:bce"]).mean() for m in names]
            for name in names
        ],
        index=list(METRICS.values()),
        columns=[label.replace(" ", "\n") for label in METRICS.values()],
    )
    most = float(np.abs(gain.to_numpy()).max())
    return heatmap(
        gain, ax=ax, colors="diverging", scale=(-most, most), cells="+.1f", xlabel="judged by",
        ylabel="trained on", label="gain over cross-entropy, points",
    )  # fmt: skip
