"""Explorer of the risk of learning from bag means; figure of measured and predicted risks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.losses.aggregate_responses import limiting_risk, noise_variance
from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
)
from workbench.plots.mpl import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RHO = np.geomspace(1e-3, 1, 61)
SIZES = np.arange(1, 33)
TOP = 1e3  # what is drawn of an infinite risk, beyond the axis
FREE = 100.0  # privacy budget at which the noise can hardly be seen

SCRIPT = """
function (controls, data) {
  const k = controls.k, alpha = controls.alpha, sigma = controls.sigma, eps = controls.eps;
  const clip = 3 * Math.sqrt(1 + sigma * sigma);
  function noise(k) { return sigma * sigma + 8 * clip * clip / (k * eps * eps); }
  function risk(a, k, rho) {
    if (k === 1) rho = 1;
    if (!(a * k > 1) || (rho === 0 && !(a > 1)))
      return [data.top, data.top, data.top, 0];
    const b = a * (k - 1), linear = 1 + rho - a - b * rho;
    const root = Math.sqrt(linear * linear + 4 * rho * (a * k - 1));
    const t = linear > 0 ? (linear + root) / (2 * rho * (a * k - 1)) : 2 / (root - linear);
    const kept = a * t / (1 + t), u = a * Math.pow(t / (1 + t), 2);
    const v = b * Math.pow(rho * t / (1 + rho * t), 2), left = 1 - u - v;
    const shrunk = (1 - kept) * (1 - kept);
    const bias = shrunk + (u * shrunk + v * kept * kept) / left, variance = u * noise(k) / left;
    return [bias + variance, bias, variance, kept].map(r => Math.min(r, data.top));
  }
  function best(a, k) {
    let least = [Infinity, 0];
    data.rho.forEach(r => { const f = risk(a, k, r)[0]; if (f < least[0]) least = [f, r]; });
    return least;
  }
  const rows = data.rho.map(r => risk(alpha, k, r)), least = best(alpha, k);
  const samples = alpha * k, all = data.sizes.map(j => best(samples / j, j));
  const values = all.map(a => a[0]), at = values.indexOf(Math.min(...values));
  const bag = risk(alpha, k, 0)[0], instance = risk(alpha, k, 1)[0];
  return {
    rho: data.rho, risk: rows.map(r => r[0]), bias: rows.map(r => r[1]),
    variance: rows.map(r => r[2]), best_rho: [least[1]], best_risk: [least[0]],
    at_rho: least[1], at_risk: least[0], bag: bag, instance: instance,
    sizes: data.sizes, mixed: values,
    bags: data.sizes.map(j => risk(samples / j, j, 0)[0]),
    instances: data.sizes.map(j => risk(samples / j, j, 1)[0]),
    best_k: [data.sizes[at]], least: [values[at]], at_k: data.sizes[at], samples: samples,
    here_k: [k], here: [least[0]]
  };
}
"""


def bound(sigma: float) -> float:
    """Where responses are clipped: three standard deviations of them, for theta of norm 1."""
    return 3 * float(np.sqrt(1 + sigma**2))


def explore_aggregate(**state: Any) -> Explorer:
    """Move bag size, number of bags, noise and privacy: risk against rho, and against bag size.

    Args:
        state: where the sliders start: ``k``, ``alpha`` (bags per input), ``sigma``, ``eps``.

    Returns:
        The explorer; `.show()` it.
    """

    def capped(values: Any) -> np.ndarray:
        return np.minimum(np.asarray(values, float), TOP)

    def compute(k: int, alpha: float, sigma: float, eps: float) -> dict[str, Any]:
        noise = noise_variance(sigma, k, eps, bound(sigma))
        curve = limiting_risk(alpha, k, RHO, noise=noise)
        ends = capped(limiting_risk(alpha, k, np.array([0.0, 1.0]), noise=noise).risk)
        risk = capped(curve.risk)
        i = int(risk.argmin())
        samples = alpha * k
        noises = noise_variance(sigma, SIZES, eps, bound(sigma))
        per = samples / SIZES
        grid = capped(limiting_risk(per[:, None], SIZES[:, None], RHO, noise=noises[:, None]).risk)
        mixed = grid.min(1)
        j = int(mixed.argmin())
        return {
            "rho": RHO, "risk": risk, "bias": capped(curve.bias),
            "variance": capped(curve.variance),
            "best_rho": RHO[[i]], "best_risk": risk[[i]], "at_rho": RHO[i], "at_risk": risk[i],
            "bag": ends[0], "instance": ends[1],
            "sizes": SIZES, "mixed": mixed,
            "bags": capped(limiting_risk(per, SIZES, 0.0, noise=noises).risk),
            "instances": capped(limiting_risk(per, SIZES, 1.0, noise=noises).risk),
            "best_k": SIZES[[j]], "least": mixed[[j]], "at_k": int(SIZES[j]), "samples": samples,
            "here_k": np.array([k]), "here": risk[[i]],
        }  # fmt: skip

    explorer = Explorer(
        name="losses.aggregate_responses",
        title="Between bag loss and instance loss lies the least risk",
        about="Fewer bags or more noise move the best rho to the right, more bags to the left. "
        "Lower the privacy budget and watch the best bag size grow.",
        controls=[
            Slider("k", "Bag size k", 2, 32, value=4),
            Slider("alpha", "Bags per input m/d", 0.5, 50, value=5.0, log=True),
            Slider("sigma", "Noise sigma", 0.0, 3.0, 0.05, value=1.0),
            Slider("eps", "Privacy budget", 0.1, FREE, value=FREE, log=True),
        ],
        compute=compute,
        panels=[
            Panel(
                "Least risk {at_risk:.3f} at rho = {at_rho:.3f}",
                x=Axis("rho (0: bag loss, 1: instance loss)", (1e-3, 1), log=True),
                y=Axis("risk (theta has norm 1)", (1e-2, 10), log=True),
                draws=[
                    Line("rho", "risk", label="risk", color="blue"),
                    Line("rho", "bias", label="bias", color="green", dash="dash"),
                    Line("rho", "variance", label="variance", color="orange", dash="dot"),
                    Points("best_rho", "best_risk", label="least", color="vermillion",
                           symbol="diamond", size=11),
                ],
            ),
            Panel(
                "{samples:.0f} examples per input: best bag size {at_k}",
                x=Axis("bag size k", (0, 33)),
                y=Axis("risk (theta has norm 1)", (1e-2, 10), log=True),
                draws=[
                    Line("sizes", "bags", label="bag loss", color="orange", dash="dot"),
                    Line("sizes", "instances", label="instance loss", color="green", dash="dash"),
                    Line("sizes", "mixed", label="best rho", color="blue"),
                    Points("best_k", "least", label="least", color="vermillion",
                           symbol="diamond", size=11),
                    Points("here_k", "here", label="your k", color="ink", symbol="ring", size=12),
                ],
            ),
        ],
        readouts=[
            Readout("at_rho", "best rho", ".3f"), Readout("at_risk", "its risk", ".3f"),
            Readout("bag", "bag loss", ".3f"), Readout("instance", "instance loss", ".3f"),
        ],
        script=SCRIPT,
        data={"rho": RHO, "sizes": SIZES, "top": TOP},
        call="losses.figures_aggregate_responses.explore_aggregate({state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_risks(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Measured risks (dots, mean over seeds) on the limit (lines) against rho.

    Args:
        frame: rows of `experiments.aggregate_responses.simulate` with columns ``d``, ``k``, ``m``,
            ``sigma``.
        ax: axes to draw on.
    """
    names = ("blue", "vermillion", "green", "orange", "purple")
    rho = np.linspace(0, 1, 201)
    settings = frame[["m", "sigma"]].drop_duplicates().itertuples(index=False)
    for (m, sigma), name in zip(settings, names, strict=False):
        rows = frame[(frame.m == m) & (frame.sigma == sigma)]
        ink = theme.palette()[name]
        first = rows.iloc[0]
        label = f"{m / first.d:.1f} bags per input, noise {sigma:g}"
        ax.plot(rho, limiting_risk(m / first.d, first.k, rho, noise=sigma**2).risk, color=ink)
        risks = np.stack(rows.risk.to_list())
        ax.plot(first.rhos, risks.mean(0), "o", ms=5, color=ink, label=escape.matplotlib(label))
    ax.set(xlabel="rho (0: bag loss, 1: instance loss)", ylabel="risk", yscale="log")
    _plain(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_tables(frame: pd.DataFrame, rhos: Any, ax: Axes) -> Axes:
    """Test error of each table against rho, relative to its bag loss: mean and 95% interval.

    Args:
        frame: rows of `experiments.aggregate_responses.on_table`.
        rhos: the values trained with.
        ax: axes to draw on.
    """
    at = np.arange(len(rhos))
    for i, (table, rows) in enumerate(frame.groupby("table", sort=False)):
        curves = np.stack(rows.by_rho.to_list())
        mean, low, high = interval(curves / curves[:, :1])
        ax.errorbar(
            at + 0.02 * i, mean, [mean - low, high - mean], fmt="o", ms=4, lw=1.2, elinewidth=0.8,
            ls="-" if i < 6 else "--", color=theme.color(None, i), label=escape.matplotlib(table),
        )  # fmt: skip
    ax.axhline(1, color="0.5", lw=1, ls=":")
    ax.set_xticks(at, [f"{r:g}" for r in rhos])
    ax.set(xlabel="rho", ylabel="test error / that of the bag loss", yscale="log")
    _plain(ax)
    ax.legend(frameon=False, fontsize=7.5, ncol=2)
    return ax


def _plain(ax: Axes) -> None:
    """A logarithmic axis with the numbers 1, 2, 5, 10 written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
