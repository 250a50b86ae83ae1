"""Explorer of the law of loss, size, steps and batch; figure of predicted and measured curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)
from workbench.scaling_laws.scaling_trajectory import (
    KAPLAN,
    Constants,
    critical_batch,
    loss_at,
    minimum_loss,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANGES = {"N": (1e6, 1e11), "S": (1e3, 1e6), "B": (1e4, 1e8)}
KNEE = np.linspace(-2.5, 2.5, 41)  # decades of batch size around the critical one
SHOWN = 300  # measured points at most, so that the exported face stays small

SCRIPT = """
function (controls, data) {
  const law = data.law, N = controls.N, B = controls.B, S = controls.S;
  const floor = Math.pow(law.N_c / N, law.a_N);
  function lossAt(steps, batch) {
    const excess = Math.pow(law.S_c / steps, law.a_S);
    let u = Math.log(floor + excess);
    for (let i = 0; i < 60; i++) {
      const noise = law.B_star / batch * Math.exp(-u / law.a_B);
      const term = excess * Math.pow(1 + noise, law.a_S);
      const slope = 1 + term / (floor + term) * noise / (1 + noise) * law.a_S / law.a_B;
      const step = (Math.log(floor + term) - u) / slope;
      u += step;
      if (Math.abs(step) < 1e-14) break;
    }
    return Math.exp(u);
  }
  const loss = lossAt(S, B), critical = law.B_star * Math.pow(loss, -1 / law.a_B);
  const least = S / (1 + critical / B), tokens = least * critical;
  function nearest(values, wanted) {
    return values.reduce((best, v) =>
      Math.abs(Math.log(v / wanted)) < Math.abs(Math.log(best / wanted)) ? v : best);
  }
  let rows = [];
  if (data.N.length) {
    const n = nearest(data.N, N), b = nearest(data.B, B);
    rows = data.N.map((v, i) => i).filter(i => data.N[i] === n && data.B[i] === b);
  }
  return {
    steps: data.steps, curve: data.steps.map(s => lossAt(s, B)),
    infinite: data.steps.map(s => lossAt(s, Infinity)), floor: floor,
    measured_steps: rows.map(i => data.S[i]), measured_loss: rows.map(i => data.loss[i]),
    here_steps: [S], here_loss: [loss], here_tokens: [S * B], loss: loss,
    trade_steps: data.knee.map(t => least * (1 + Math.pow(10, -t))),
    trade_tokens: data.knee.map(t => tokens * (1 + Math.pow(10, t))),
    knee_steps: [2 * least], knee_tokens: [2 * tokens], least: least, tokens: tokens,
    critical: critical, more_steps: S / least, more_tokens: S * B / tokens
  };
}
"""


def explore_trajectory(
    law: Constants = KAPLAN,
    runs: pd.DataFrame | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    **state: Any,
) -> Explorer:
    """Move size, batch and steps: the predicted curve, and what else would give the same loss.

    Args:
        law: constants, for instance `scaling_trajectory.Constants(**fit.params)`.
        runs: measured rows; those of the size and batch nearest to the controls are drawn. Without
            them the law is shown alone, over the range of Kaplan's experiments.
        columns: which columns hold ``N``, ``S``, ``B`` and ``loss`` where they are called
            otherwise.
        state: where the sliders start: ``N``, ``B``, ``S``.

    Returns:
        The explorer; `.show()` it.
    """
    if runs is None:
        points = pd.DataFrame({q: np.empty(0) for q in ("N", "S", "B", "loss")})
        ranges = RANGES
    else:
        names = {q: q for q in ("N", "S", "B", "loss")} | dict(columns or {})
        points = pd.DataFrame({q: runs[column].to_numpy(float) for q, column in names.items()})
        points = points.iloc[:: -(-len(points) // SHOWN)]
        ranges = {q: (points[q].min() / 1.5, points[q].max() * 1.5) for q in ("N", "S", "B")}
    steps = np.geomspace(*ranges["S"], 50)
    data = {
        "law": asdict(law),
        "steps": steps,
        "knee": KNEE,
        **{q: points[q].to_numpy() for q in ("N", "S", "B", "loss")},
    }

    def compute(N: float, B: float, S: float) -> dict[str, Any]:
        rows = points
        if len(points):
            n, b = _nearest(points["N"], N), _nearest(points["B"], B)
            rows = points[(points["N"] == n) & (points["B"] == b)]
        loss = float(loss_at(N, S, B, law))
        critical = float(critical_batch(loss, law))
        least = S / (1 + critical / B)
        tokens = least * critical
        return {
            "steps": steps,
            "curve": loss_at(N, steps, B, law),
            "infinite": loss_at(N, steps, np.inf, law),
            "floor": float(minimum_loss(N, law)),
            "measured_steps": rows.S.to_numpy(),
            "measured_loss": rows.loss.to_numpy(),
            "here_steps": np.array([S]), "here_loss": np.array([loss]),
            "here_tokens": np.array([S * B]), "loss": loss,
            "trade_steps": least * (1 + 10**-KNEE),
            "trade_tokens": tokens * (1 + 10**KNEE),
            "knee_steps": np.array([2 * least]), "knee_tokens": np.array([2 * tokens]),
            "least": least, "tokens": tokens, "critical": critical,
            "more_steps": S / least, "more_tokens": S * B / tokens,
        }  # fmt: skip

    corners = [compute(N, B, S) for N in ranges["N"] for B in ranges["B"] for S in ranges["S"]]
    high = max([c["loss"] for c in corners] + points.loss.tolist())
    low = min([c["loss"] for c in corners] + points.loss.tolist())
    drawn = (ranges["S"][0] * ranges["B"][0], ranges["S"][1] * ranges["B"][1])
    marks = Points("measured_steps", "measured_loss", label="measured", color="green", size=5)
    measured = [marks] if len(points) else []
    explorer = Explorer(
        name="scaling_laws.trajectory",
        title="One law gives the whole curve at any batch size",
        about="Raise the batch: the curve falls towards the dotted one, while each step costs more "
        "tokens. At the diamond both costs are twice their least.",
        controls=[
            Slider("N", "Parameters N", *ranges["N"], value=_inside(ranges["N"], 0.9), log=True),
            Slider("B", "Batch B", *ranges["B"], value=_inside(ranges["B"], 0.5), unit="tokens",
                   log=True),
            Slider("S", "Steps S", *ranges["S"], value=_inside(ranges["S"], 0.6), log=True),
        ],
        compute=compute,
        panels=[
            Panel(
                "After {S:.0f} steps of {B:.0f} tokens: loss {loss:.3f}",
                x=Axis("steps", ranges["S"], log=True),
                y=Axis("loss", (0.95 * low, 1.05 * high), unit="nats a token"),
                draws=[
                    Line("steps", "infinite", label="infinite batch", color="grey", dash="dot"),
                    Line("steps", "curve", label="this batch", color="blue"),
                    *measured,
                    Points("here_steps", "here_loss", label="here", color="vermillion",
                           symbol="ring", size=12),
                ],
            ),
            Panel(
                "The same loss with other batches: critical one {critical:.0f} tokens",
                x=Axis("steps", ranges["S"], log=True), y=Axis("tokens", drawn, log=True),
                draws=[
                    Line("trade_steps", "trade_tokens", label="same loss", color="blue"),
                    VLine("least", "least steps", color="grey"),
                    HLine("tokens", "least tokens", color="grey"),
                    Points("knee_steps", "knee_tokens", label="critical batch", color="orange",
                           symbol="diamond", size=11),
                    Points("here_steps", "here_tokens", label="here", color="vermillion",
                           symbol="ring", size=12),
                ],
            ),
        ],
        readouts=[
            Readout("loss", "loss", ".4f"), Readout("floor", "minimum loss of this size", ".3f"),
            Readout("critical", "critical batch", ".0f", unit="tokens"),
            Readout("more_steps", "steps / least steps", ".2f"),
            Readout("more_tokens", "tokens / least tokens", ".2f"),
        ],
        script=SCRIPT,
        data=data,
        call="scaling_laws.figures_scaling_trajectory.explore_trajectory("
        + ("" if runs is None else "law, runs, columns=columns, ") + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_predictions(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Measured curves of the predicted model with the law's and the batch-blind fit's forecasts.

    Args:
        frame: rows of `experiments.scaling_trajectory.predict_larger`; one curve per batch size is
            drawn, of the first seed.
        ax: axes to draw on.
    """
    colors = theme.palette()
    for row, name in zip(
        frame[frame.seed == frame.seed.min()].sort_values("batch").itertuples(),
        ("blue", "green", "orange"),
        strict=False,
    ):
        label = escape.matplotlib(f"{row.batch:,} tokens a step")
        ax.plot(row.step, row.loss, "o", ms=3, color=colors[name], label=label)
        ax.plot(row.step, row.curve_law, color=colors[name])
        ax.plot(row.step, row.curve_blind, color=colors[name], ls=":")
    ax.plot([], [], color="0.4", label="the law")
    ax.plot([], [], color="0.4", ls=":", label="without batch")
    ax.set_xscale("log")
    ax.set(xlabel="steps", ylabel="held-out loss (nats a byte)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def _inside(ends: tuple[float, float], share: float) -> float:
    """A position of a logarithmic slider, ``share`` of the way up."""
    low, high = np.log10(ends)
    return float(f"{10 ** (low + round(100 * share) / 100 * (high - low)):.6g}")


def _nearest(values: pd.Series, wanted: float) -> float:
    return float(values.iloc[np.abs(np.log(values / wanted)).argmin()])
