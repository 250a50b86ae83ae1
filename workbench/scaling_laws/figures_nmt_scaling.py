"""Explorer of the split between encoder and decoder; figures of predictions and floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)
from workbench.scaling_laws.nmt_scaling import (
    NmtLaw,
    loss_at_budget,
    optimal_split,
    split_penalty,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLE = NmtLaw(alpha=0.5, p_e=0.2, p_d=0.3, L_inf=1.0, Ne_ref=1e8, Nd_ref=1e8)
LEVELS = np.array([4.0, 2.0, 1.0, 0.5, 0.25])  # reducible loss over that of the reference model
SHARES = np.linspace(0.02, 0.98, 49)
WORST = 3.0  # top of the penalty's axis

SCRIPT = """
function (controls, data) {
  const law = data.law, B = controls.budget, r = controls.share;
  const pe = controls.p_e, pd = controls.p_d, best = pe / (pe + pd);
  const box = data.box.map(v => Math.log(v));
  function excess(ne, nd) {
    return law.alpha * Math.pow(law.Ne_ref / ne, pe) * Math.pow(law.Nd_ref / nd, pd);
  }
  function penalty(s) { return Math.pow(best / s, pe) * Math.pow((1 - best) / (1 - s), pd); }
  function clamp(v, low, high) { return Math.min(Math.max(v, low), high); }
  function contour(level) {
    const c = Math.log(law.alpha / level) + pe * Math.log(law.Ne_ref) + pd * Math.log(law.Nd_ref);
    const ends = [box[3], box[2]].map(y => {
      const x = clamp((c - pd * y) / pe, box[0], box[1]);
      return [x, clamp((c - pe * x) / pd, box[2], box[3])];
    });
    return {x: ends.map(p => Math.exp(p[0])), y: ends.map(p => Math.exp(p[1]))};
  }
  const here = excess(r * B, (1 - r) * B), least = excess(best * B, (1 - best) * B);
  const out = {
    budget_e: data.shares.map(s => s * B), budget_d: data.shares.map(s => (1 - s) * B),
    here_e: [r * B], here_d: [(1 - r) * B], best_e: [best * B], best_d: [(1 - best) * B],
    shares: data.shares, penalties: data.shares.map(s => Math.min(penalty(s), data.worst)),
    here_share: [r], here_penalty: [Math.min(penalty(r), data.worst)],
    best_share: [best], best_penalty: [1], best: best, penalty: penalty(r),
    loss: here + law.L_inf, least: least + law.L_inf,
    wasted: 1 - Math.pow(penalty(r), -1 / (pe + pd)),
    run_e: data.run_e, run_d: data.run_d
  };
  data.levels.forEach((level, i) => {
    const line = contour(level * law.alpha);
    out["level_e" + i] = line.x; out["level_d" + i] = line.y;
  });
  const mine = contour(here), ideal = contour(least);
  out.same_e = mine.x; out.same_d = mine.y; out.ideal_e = ideal.x; out.ideal_d = ideal.y;
  return out;
}
"""


def explore_split(
    law: NmtLaw = EXAMPLE,
    runs: pd.DataFrame | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    **state: Any,
) -> Explorer:
    """Split a budget of parameters between encoder and decoder.

    Args:
        law: constants, such as ``fit_bivariate(runs).law``. The default is an example of the size
            of published models, not a fit.
        runs: models to draw, with columns ``Ne`` and ``Nd``.
        columns: which columns hold them where they are called otherwise.
        state: where the sliders start: ``budget``, ``share``, ``p_e``, ``p_d``.

    Returns:
        The explorer; `.show()` it.
    """
    names = {"Ne": "Ne", "Nd": "Nd"} | dict(columns or {})
    run_e, run_d = (
        np.empty(0) if runs is None else runs[names[q]].to_numpy(float) for q in ("Ne", "Nd")
    )
    middle = np.array([law.Ne_ref, law.Nd_ref])
    low = np.array([min([m / 10, *v / 1.5]) for m, v in zip(middle, (run_e, run_d), strict=True)])
    high = np.array([max([m * 10, *v * 1.5]) for m, v in zip(middle, (run_e, run_d), strict=True)])
    box = np.array([low[0], high[0], low[1], high[1]])
    budgets = (float(f"{max(low):.3g}"), float(f"{min(high):.3g}"))

    usual = float(np.clip(float(f"{law.Ne_ref + law.Nd_ref:.3g}"), *budgets))

    def compute(budget: float, share: float, p_e: float, p_d: float) -> dict[str, Any]:
        now = replace(law, p_e=p_e, p_d=p_d)
        best = optimal_split(p_e, p_d)
        penalty = float(split_penalty(share, p_e, p_d))
        loss, least = float(loss_at_budget(budget, now, share)), float(loss_at_budget(budget, now))
        lines = [contour(level * law.alpha, now, box) for level in LEVELS]
        same, ideal = contour(loss - law.L_inf, now, box), contour(least - law.L_inf, now, box)
        return {
            "budget_e": SHARES * budget, "budget_d": (1 - SHARES) * budget,
            "here_e": np.array([share * budget]), "here_d": np.array([(1 - share) * budget]),
            "best_e": np.array([best * budget]), "best_d": np.array([(1 - best) * budget]),
            "shares": SHARES, "penalties": np.minimum(split_penalty(SHARES, p_e, p_d), WORST),
            "here_share": np.array([share]), "here_penalty": np.array([min(penalty, WORST)]),
            "best_share": np.array([best]), "best_penalty": np.array([1.0]), "best": best,
            "penalty": penalty, "loss": loss, "least": least,
            "wasted": 1 - penalty ** (-1 / (p_e + p_d)),
            "run_e": run_e, "run_d": run_d,
            **{f"level_e{i}": line[0] for i, line in enumerate(lines)},
            **{f"level_d{i}": line[1] for i, line in enumerate(lines)},
            "same_e": same[0], "same_d": same[1], "ideal_e": ideal[0], "ideal_d": ideal[1],
        }  # fmt: skip

    grey = [
        Line(f"level_e{i}", f"level_d{i}", color="grey", dash="dot", width=1.0,
             label="equal loss" if i == 0 else "")
        for i in range(len(LEVELS))
    ]  # fmt: skip
    trained = [Points("run_e", "run_d", label="trained", color="green", size=5)]
    explorer = Explorer(
        name="scaling_laws.split",
        title="How much of the budget should the encoder have?",
        about="Move the ring along the budget: the best split is where the budget touches a line "
        "of equal loss and does not cross it. The lines' steepness is p_e / p_d.",
        controls=[
            Slider("budget", "Budget Ne + Nd", *budgets, value=usual, log=True),
            Slider("share", "Encoder's share", 0.02, 0.98, step=0.01, value=0.7),
            Slider("p_e", "Exponent p_e", 0.05, 1.5, step=0.01, value=_step(law.p_e)),
            Slider("p_d", "Exponent p_d", 0.05, 1.5, step=0.01, value=_step(law.p_d)),
        ],
        compute=compute,
        panels=[
            Panel(
                "Loss {loss:.3f} here, {least:.3f} at best",
                x=Axis("encoder parameters", (box[0], box[1]), log=True),
                y=Axis("decoder parameters", (box[2], box[3]), log=True),
                draws=[
                    *grey,
                    Line("ideal_e", "ideal_d", color="blue"),
                    Line("same_e", "same_d", color="vermillion"),
                    Line("budget_e", "budget_d", label="budget", color="ink", dash="dash"),
                    *(trained if len(run_e) else []),
                    Points("best_e", "best_d", label="best", color="blue",
                           symbol="diamond", size=11),
                    Points("here_e", "here_d", label="here", color="vermillion",
                           symbol="ring", size=12),
                ],
            ),
            Panel(
                "{penalty:.2f} times the least",
                x=Axis("encoder's share of the budget", (0.0, 1.0)),
                y=Axis("reducible loss / least", (0.9, 1.02 * WORST)),
                draws=[
                    Line("shares", "penalties", label="at any budget", color="ink"),
                    VLine("best", "best: {best:.0%}", color="blue"),
                    Points("best_share", "best_penalty", color="blue", symbol="diamond", size=11),
                    Points("here_share", "here_penalty", color="vermillion", symbol="ring",
                           size=12),
                ],
                legend=False,
            ),
        ],
        readouts=[
            Readout("loss", "loss", ".4f", unit="nats a word"),
            Readout("least", "best loss of this budget", ".4f", unit="nats a word"),
            Readout("best", "encoder's best share", ".1%"),
            Readout("wasted", "budget wasted", ".1%"),
        ],
        height=420,
        script=SCRIPT,
        data={"law": asdict(law), "box": box, "levels": LEVELS, "shares": SHARES, "worst": WORST,
              "run_e": run_e, "run_d": run_d},
        call="scaling_laws.figures_nmt_scaling.explore_split("
        + ("" if runs is None else "law, runs, ") + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def contour(excess: float, law: NmtLaw, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of an iso-loss line within a box: encoder and decoder parameters, each (2,).

    Args:
        excess: loss above the irreducible one.
        law: the constants.
        box: least and greatest encoder, least and greatest decoder parameters. Of a line that
            misses the box both ends fall on a corner.
    """
    x0, x1, y0, y1 = np.log(box)
    height = (
        np.log(law.alpha / excess) + law.p_e * np.log(law.Ne_ref) + law.p_d * np.log(law.Nd_ref)
    )
    x = np.clip((height - law.p_d * np.array([y1, y0])) / law.p_e, x0, x1)
    y = np.clip((height - law.p_e * x) / law.p_d, y0, y1)
    return np.exp(x), np.exp(y)


def draw_predictions(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Predicted against measured losses of the joint cells, of both laws, all members.

    The two axes have their own ranges: a bad prediction is far above or below the grey line.

    Args:
        frame: rows of `experiments.nmt_scaling.predict_joint`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    measured = np.concatenate(list(frame.loss))
    low = measured.min()
    for name, label, color, marker in (
        ("bivariate", "encoder and decoder apart", "blue", "o"),
        ("total", "all parameters together", "orange", "s"),
    ):
        predicted = np.concatenate(list(frame[f"predicted_{name}"]))
        ax.plot(measured, predicted, marker, ms=4.5, color=colors[color], alpha=0.75,
                mec="white", mew=0.4, label=escape.matplotlib(label))  # fmt: skip
    ends = np.array([low, measured.max()])
    ax.plot(ends, ends, color="0.6", lw=1, zorder=0)
    ax.set(xlabel="measured loss (nats a word)", ylabel="predicted loss (nats a word)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def _step(value: float) -> float:
    """The slider's position nearest to an exponent."""
    return float(np.clip(round(value, 2), 0.05, 1.5))
