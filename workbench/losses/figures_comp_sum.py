"""Explorer of the comp-sum family and its guarantee; figures of the section's experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from workbench.losses.comp_sum import comp_sum_loss, gamma
from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)
from workbench.plots.mpl import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P = np.round(np.linspace(0.01, 1.0, 67), 4)
REGRETS = np.array([float(f"{v:.4g}") for v in np.geomspace(1e-3, 1.0, 49)])
MARKED = 0.1  # surrogate regret that the third panel's title speaks of
CLASSES = (2, 3, 10, 100, 1000)
TOP = {"loss": 4.0, "pull": 2.0}

SCRIPT = """
function (controls, data) {
  const tau = controls.tau, n = controls.n, p = controls.p;
  const loss = (p, tau) => tau === 1 ? -Math.log(p) : (Math.pow(p, tau - 1) - 1) / (1 - tau);
  const pull = (p, tau) => Math.pow(p, tau - 1) * (1 - p);
  function T(b, tau) {
    if (tau === 1) {
      const half = v => v > 0 ? v * Math.log(v) / 2 : 0;
      return half(1 + b) + half(1 - b);
    }
    const scale = (tau - 1) * Math.pow(tau < 1 ? 2 : n, tau - 1);
    if (tau >= 2) return b / scale;
    const s = 2 - tau, A = (Math.pow(1 + b, 1 / s) + Math.pow(1 - b, 1 / s)) / 2;
    return (Math.pow(A, s) - 1) / scale;
  }
  function gamma(t, tau) {
    let low = 0, high = 1;
    for (let i = 0; i < 60; i++) {
      const middle = (low + high) / 2;
      if (T(middle, tau) < t) low = middle; else high = middle;
    }
    return high;
  }
  const here = loss(p, tau), slope = pull(p, tau), allowed = gamma(data.marked, tau);
  return {
    prob: data.p, loss: data.p.map(v => loss(v, tau)),
    ce: data.p.map(v => loss(v, 1)), mae: data.p.map(v => 1 - v),
    pull: data.p.map(v => pull(v, tau)),
    pull_ce: data.p.map(v => 1 - v), pull_mae: data.p.map(v => v * (1 - v)),
    here_p: [p], here_loss: [Math.min(here, data.top.loss)],
    here_pull: [Math.min(slope, data.top.pull)],
    t: data.t, bound: data.t.map(t => gamma(t, tau)), bound_ce: data.t.map(t => gamma(t, 1)),
    marked: data.marked, marked_t: [data.marked], allowed_at: [allowed], allowed: allowed,
    here: here, slope: slope
  };
}
"""


def explore_comp_sum(**state: Any) -> Explorer:
    """Move the exponent: loss, pull on the true class's score, and what the guarantee allows.

    Args:
        state: where the controls start: ``tau``, ``p``, ``n``.

    Returns:
        The explorer; `.show()` it.
    """

    def losses(p: Any, tau: float) -> np.ndarray:
        """Of two classes of which the true one has probability p."""
        logits = torch.stack([torch.as_tensor(p).log(), torch.log1p(-torch.as_tensor(p))], -1)
        target = torch.zeros(len(logits), dtype=torch.long)
        return comp_sum_loss(logits, target, tau=tau, reduction="none").numpy()

    def pulls(p: Any, tau: float) -> np.ndarray:
        """Minus the loss's derivative in the true class's score, p^(tau - 1) (1 - p)."""
        return np.asarray(p) ** (tau - 1) * (1 - np.asarray(p))

    ce = losses(P, 1.0)
    bound_ce = gamma(REGRETS, 1.0).numpy()
    levels = np.append(REGRETS, MARKED)

    def compute(tau: float, p: float, n: int) -> dict[str, Any]:
        here, slope = float(losses(np.array([p]), tau)[0]), float(pulls(p, tau))
        *bound, allowed = gamma(levels, tau, n).tolist()
        return {
            "prob": P, "loss": losses(P, tau), "ce": ce, "mae": 1 - P,
            "pull": pulls(P, tau), "pull_ce": 1 - P, "pull_mae": P * (1 - P),
            "here_p": np.array([p]), "here_loss": np.minimum([here], TOP["loss"]),
            "here_pull": np.minimum([slope], TOP["pull"]),
            "t": REGRETS, "bound": np.array(bound), "bound_ce": bound_ce,
            "marked": MARKED, "marked_t": np.array([MARKED]), "allowed_at": np.array([allowed]),
            "allowed": allowed, "here": here, "slope": slope,
        }  # fmt: skip

    probability = Axis("probability of the true class", (0.0, 1.0))
    ring: dict[str, Any] = {"color": "vermillion", "symbol": "ring", "size": 12}
    return Explorer(
        name="losses.comp_sum",
        title="One exponent from sum-exponential to mean absolute error",
        about="Raise τ above 1: hopeless examples stop pulling. Then add classes: the guarantee of "
        "τ > 1 weakens, that of τ ≤ 1 does not notice.",
        controls=[
            Slider("tau", "τ", 0.0, 2.0, step=0.05, value=1.5),
            Slider("p", "p of the true class", 0.02, 0.98, step=0.02, value=0.1),
            Choice("n", "classes n", list(CLASSES), value=10),
        ],
        compute=compute,
        panels=[
            Panel(
                "τ = {tau:.2f} costs {here:.2f} at p = {p:.2f}",
                x=probability, y=Axis("loss", (0.0, TOP["loss"])),
                draws=[
                    Line("prob", "ce", label="cross-entropy (τ = 1)", color="grey", dash="dash"),
                    Line("prob", "mae", label="mean absolute (τ = 2)", color="grey", dash="dot"),
                    Line("prob", "loss", label="this τ", color="blue"),
                    Points("here_p", "here_loss", **ring),
                ],
            ),
            Panel(
                "It pulls the score up by {slope:.2f}",
                x=probability, y=Axis("−∂loss/∂score of the true class", (0.0, TOP["pull"])),
                draws=[
                    Line("prob", "pull_ce", label="cross-entropy", color="grey", dash="dash"),
                    Line("prob", "pull_mae", label="mean absolute", color="grey", dash="dot"),
                    Line("prob", "pull", label="this τ", color="blue"),
                    Points("here_p", "here_pull", **ring),
                ],
            ),
            Panel(
                "{n:d} classes: regret {marked:.1f} allows zero-one regret {allowed:.2f}",
                x=Axis("surrogate regret", (REGRETS[0], REGRETS[-1]), log=True),
                y=Axis("largest zero-one regret Γ", (0.0, 1.05)),
                draws=[
                    Line("t", "bound_ce", label="cross-entropy", color="grey", dash="dash"),
                    Line("t", "bound", label="this τ", color="blue"),
                    VLine("marked", color="grey", dash="dot"),
                    Points("marked_t", "allowed_at", **ring),
                ],
            ),
        ],
        readouts=[
            Readout("here", "loss", ".3f"), Readout("slope", "pull", ".3f"),
            Readout("allowed", "Γ at regret 0.1", ".3f"),
        ],
        script=SCRIPT,
        data={"p": P, "t": REGRETS, "marked": MARKED, "top": TOP},
        call="losses.figures_comp_sum.explore_comp_sum({state})",
    ).set(**state)  # fmt: skip


def draw_accuracy(
    frames: Mapping[str, pd.DataFrame], ax: Axes, *, taus: Sequence[float], title: str = ""
) -> Axes:
    """Test accuracy against the exponent, a line with 95% intervals for each named frame.

    Args:
        frames: rows of `experiments.comp_sum.clean` by label.
        ax: axes to draw on.
        taus: exponents of the columns ``acc_<tau>``.
        title: the finding.
    """
    colors = ("blue", "green", "orange", "vermillion")
    for i, ((label, frame), color) in enumerate(zip(frames.items(), colors, strict=False)):
        middle, low, _ = interval(frame[[f"acc_{tau:g}" for tau in taus]].to_numpy())
        bars = np.nan_to_num(middle - low)
        at = np.asarray(taus) + 0.02 * (i - 1.5)  # so that no interval hides another
        ax.errorbar(at, middle, bars, fmt="o-", ms=4, capsize=2, color=theme.color(color),
                    label=escape.matplotlib(label))  # fmt: skip
    ax.set(xlabel="exponent τ", ylabel="test accuracy", xticks=list(taus))
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_tradeoff(frame: pd.DataFrame, ax: Axes, *, title: str = "") -> Axes:
    """Accuracy under attack against clean accuracy: every setting, and what each loss chose.

    Settings that hardly learn (accuracy below 0.8) are counted in a corner, not drawn.

    Args:
        frame: rows of `experiments.comp_sum.robust`.
        ax: axes to draw on.
        title: the finding.
    """
    palette = theme.palette()
    hidden: list[str] = []
    for name, label, color, mark, side in (
        ("trades", "TRADES", "orange", "s", (-7, 7)),
        ("smooth", "smooth", "blue", "o", (7, -14)),
        ("plain", "cross-entropy", "grey", "^", (-7, 7)),
    ):
        x = np.stack(frame[f"all_clean_{name}"].tolist()).mean(0)
        y = np.stack(frame[f"all_robust_{name}"].tolist()).mean(0)
        seen = x >= 0.8
        if not seen.all():
            hidden.append(f"{(~seen).sum()} of {len(x)} of {label}")
        ax.plot(x[seen], y[seen], mark, ms=5, mfc="none", color=palette[color])
        middle = [frame[f"{kind}_{name}"].to_numpy() for kind in ("clean", "robust")]
        bars = [np.ptp(interval(values)[1:]) / 2 if len(values) > 1 else 0.0 for values in middle]
        at = (middle[0].mean(), middle[1].mean())
        ax.errorbar(
            *at, xerr=bars[0], yerr=bars[1], fmt=mark, ms=8, color=palette[color], capsize=3
        )
        ax.annotate(label, at, side, textcoords="offset points", fontsize=9, color=palette[color],
                    ha="left" if side[0] > 0 else "right")  # fmt: skip
    ax.set(xlabel="accuracy (open: every setting)", ylabel="accuracy under attack")
    if hidden:
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.15 * (high - low), high)
        text = "below 0.8, not drawn:\n" + "\n".join(hidden)
        ax.text(0.98, 0.02, text, transform=ax.transAxes, fontsize=7, ha="right")
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def draw_tightness(
    taus: Sequence[float], classes: Sequence[int], ratios: np.ndarray, ax: Axes, *, title: str = ""
) -> Axes:
    """Least regret found as a multiple of the bound, against the exponent, a line a class count.

    Args:
        taus, classes: of the first two axes of ``ratios``.
        ratios: of `experiments.comp_sum.tightness`, at one zero-one regret.
        ax: axes to draw on.
        title: the finding.
    """
    colors = ("grey", "sky", "blue", "purple")
    for i, (n, color) in enumerate(zip(classes, colors, strict=False)):
        ax.plot(taus, ratios[:, i], color=theme.palette()[color], label=f"{n} classes")
    ax.set(xlabel="exponent τ", ylabel="least regret / T")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return ax
