"""Explorer of an aggregated distribution: its fan, its quantile curve and its weights at one x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.calibration.quantiles import as_levels, isotonize, pairs, wis
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Band,
    Choice,
    Explorer,
    HeatMap,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
    VLine,
)

ORDERS = ("none", "sort", "pava")
COLORS = ("orange", "green", "purple", "sky", "grey", "ink")


def explore_quantiles(
    z: ArrayLike,
    weights: ArrayLike,
    y: ArrayLike,
    levels: ArrayLike,
    *,
    models: Sequence[str] | None = None,
    shown: int = 24,
    unit: str = "",
    **state: Any,
) -> Explorer:
    """Pick a row: its predicted distribution, with and without order, and who it was made of.

    Args:
        z: (n, p, m) predictions of p base models at m levels.
        weights: (n, inputs, outputs) convex weights, as `Aggregator.weights` or `DQA.weights` give
            them: inputs p or p m, outputs 1 or m.
        y: (n,) targets. levels: (m,) symmetric.
        models: names of the base models.
        shown: rows to choose from, spread over the predicted medians.
        unit: of the target.
        state: where the controls start: `row`, `order`.

    Returns:
        The explorer; `.show()` it.
    """
    z = np.asarray(checks.to_numpy(checks.as_floats(z, "z", ndim=3)), float)
    w = np.asarray(checks.to_numpy(checks.as_floats(weights, "weights", ndim=3)), float)
    y = np.asarray(checks.to_numpy(checks.as_floats(y, "y", ndim=1)), float)
    checks.same_length(z=z, weights=w, y=y)
    _, p, m = z.shape
    u = as_levels(levels, m).numpy()
    k = pairs(as_levels(u))
    if w.shape[1:] not in ((p, 1), (p, m), (p * m, m)):
        raise ValueError(f"weights: expected (n, {p}, 1), (n, {p}, {m}) or (n, {p * m}, {m}), got "
                         f"{w.shape}")  # fmt: skip
    names = [f"model {j}" for j in range(p)] if models is None else [str(v) for v in models]
    if len(names) != p:
        raise ValueError(f"models: expected {p} names, got {len(names)}")
    raw = np.einsum("nk,nku->nu", z.reshape(len(z), -1), w) if w.shape[1] == p * m else (
        z * w).sum(1)  # fmt: skip
    rows = np.argsort(raw[:, m // 2])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(shown, len(rows))).round().astype(int))]
    z, w, y, raw = z[rows], w[rows], y[rows], raw[rows]
    shares = w.reshape(len(w), p, -1, w.shape[2]).sum(2) + np.zeros((p, m))  # (n, p, m)
    fans = {"none": raw} | {how: isotonize(raw, how) for how in ORDERS[1:]}
    scores = {how: wis(fan, y, u) for how, fan in fans.items()}
    uniform = wis(np.sort(z.mean(1), 1), y, u)
    place = np.arange(len(y))
    span = _span(np.concatenate([z.reshape(len(z), -1), y[:, None]], 1))
    outer, inner = 0, k // 2
    promised = [f"{1 - 2 * u[i]:.0%}" for i in (outer, inner)]

    def compute(row: int, order: str) -> dict[str, Any]:
        fan = fans[order]
        return {
            "place": place, "y": y, "median": fan[:, m // 2],
            "low": fan[:, outer], "high": fan[:, -1 - outer],
            "inner_low": fan[:, inner], "inner_high": fan[:, -1 - inner],
            "levels": u, "curve": fan[row], "truth": float(y[row]), "at": float(row),
            "share": shares[row], "names": np.array(names, dtype=object),
            "score": float(scores[order][row]), "raw": float(scores["none"][row]),
            "mean": float(scores[order].mean()), "mean_raw": float(scores["none"].mean()),
            "uniform": float(uniform.mean()), "crossings": int((np.diff(fan[row]) < 0).sum()),
        } | {f"base{j}": z[row, j] for j in range(p)}  # fmt: skip

    return Explorer(
        name="calibration.quantiles",
        title="One distribution out of several, row by row",
        about="Move along the rows; then put the crossing quantiles in order.",
        controls=[
            Steps("row", "Row, by predicted median", place.tolist(), value=int(len(y) // 2)),
            Choice("order", "Order", list(ORDERS), value="none",
                   labels=["as aggregated", "sorted", "PAVA"]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Mean WIS {mean:.3g}, uniform average {uniform:.3g}",
                x=Axis("row, by predicted median", (-0.5, len(y) - 0.5)),
                y=Axis("target", span, unit=unit),
                draws=[
                    Band("place", "low", "high", label=promised[0], color="blue", opacity=0.18),
                    Band("place", "inner_low", "inner_high", label=promised[1], color="blue",
                         opacity=0.3),
                    Line("place", "median", label="median", color="blue"),
                    Points("place", "y", label="target", color="vermillion", size=5, click="row"),
                    VLine("at", "this row"),
                ],
            ),
            Panel(
                "This row: {crossings:d} crossing(s), WIS {score:.3g}",
                x=Axis("level u", (0, 1)), y=Axis("quantile", span, unit=unit),
                draws=[
                    *(Line("levels", f"base{j}", label=name, width=1.2, dash="dot",
                           color=COLORS[j % len(COLORS)]) for j, name in enumerate(names)),
                    Line("levels", "curve", label="aggregate", color="blue", width=2.5,
                         markers=True),
                    HLine("truth", "target"),
                ],
            ),
            Panel(
                "Who speaks at which level",
                x=Axis("level u", (0, 1)), y=Axis("base model", categories=True),
                draws=[HeatMap("share", "levels", "names", label="weight", scale=(0, 1))],
            ),
        ],
        readouts=[
            Readout("score", "WIS of this row", ".4g"),
            Readout("raw", "before ordering", ".4g"),
            Readout("mean", "mean WIS of these rows", ".4g"),
            Readout("mean_raw", "before ordering", ".4g"),
            Readout("uniform", "uniform average", ".4g"),
        ],
        columns=2,
        height=320,
        grid={"row": place[:: max(1, -(-len(place) // 40))].tolist(), "order": list(ORDERS)},
        call="calibration.figures_quantiles.explore_quantiles(z, weights, y, levels, {state})",
    ).set(**state)  # fmt: skip


def _span(values: NDArray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.002, 0.998])
    pad = 0.05 * (high - low) + 1e-9
    return float(low - pad), float(high + pad)
