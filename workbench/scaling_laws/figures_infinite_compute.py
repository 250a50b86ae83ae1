"""Explorer of recipes under fixed data, and the figure of their limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import t

from workbench.plots import theme
from workbench.plots.explorer import (
    Axis,
    Band,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
)
from workbench.scaling_laws.infinite_compute import PowerLaw, power_asymptote

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MORE = 3.0  # how far beyond the data the laws are drawn
CURVE = np.linspace(0, 1, 25)

FALLS = 0.01  # nats by which the last point may lie above the lowest of a curve that has a limit

SCRIPT = """
function (controls, data) {
  const n = data.sizes.indexOf(controls.N), e = data.epochs.indexOf(controls.epochs);
  const w = data.decays.indexOf(controls.decay), k = controls.K - 1;
  const nE = data.epochs.length, nW = data.decays.length, nK = data.counts.length;
  const at = (i, m) => ((i * nE + e) * nW + w) * nK + m;
  function side(name, index, x, grid, law, cell) {
    const loss = index.map(i => data.mean[i]), half = index.map(i => data.half[i]);
    const falls = loss[loss.length - 1] <= Math.min(...loss) + data.falls;
    const shown = falls ? grid : [], limit = law[0][cell], out = {};
    out[name + "_x"] = x; out[name + "_loss"] = loss;
    out[name + "_low"] = loss.map((v, i) => v - half[i]);
    out[name + "_high"] = loss.map((v, i) => v + half[i]);
    out[name + "_wide"] = grid; out[name + "_usual"] = grid.map(x => data.usual);
    out[name + "_shown"] = shown; out[name + "_line"] = shown.map(x => limit);
    out[name + "_fit"] = shown.map(x => limit + law[1][cell] * Math.pow(x, -law[2][cell]));
    out[name + "_limit"] = falls ? limit.toFixed(3) : "none, turns up";
    return out;
  }
  const here = data.mean[at(n, k)], excess = here - data.fresh[0];
  const size = side("size", data.sizes.map((v, i) => at(i, k)), data.sizes, data.wide,
                    data.size_law, (e * nW + w) * nK + k);
  const count = side("count", data.counts.map((v, m) => at(n, m)), data.counts, data.many,
                     data.count_law, (n * nE + e) * nW + w);
  const fresh = Math.pow(data.fresh[1] / excess, 1 / data.fresh[2]) / data.tokens;
  return Object.assign(size, count, {
    here_N: [controls.N], here_K: [controls.K], here_loss: [here], loss: here,
    half: data.half[at(n, k)], fresh: excess > 0 ? fresh : 999
  });
}
"""


def centred(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over slices, and the half width of its 95% interval, each slice's level taken out.

    Args:
        losses: (slices, sizes, epochs, decays, members).

    A slice is harder or easier for all recipes alike. What is taken out is its loss at each size's
    best single recipe, averaged over sizes.
    """
    mean = losses.mean(0)
    flat = losses[..., 0].reshape(len(losses), losses.shape[1], -1)
    best = flat.mean(0).argmin(-1)
    level = flat[:, np.arange(losses.shape[1]), best].mean(1)
    apart = losses - (level - level.mean())[:, None, None, None, None]
    if len(losses) == 1:
        return mean, np.zeros_like(mean)
    spread = apart.std(0, ddof=1) / np.sqrt(len(losses))
    return mean, np.asarray(t.ppf(0.975, len(losses) - 1) * spread)


def explore_recipes(
    frame: pd.DataFrame,
    fresh: PowerLaw | None = None,
    tokens: int = 1536,
    **state: Any,
) -> Explorer:
    """Move size, epochs, weight decay and members; see the two power laws and their limits.

    Args:
        frame: rows of `experiments.infinite_compute.fixed_data`, one a slice.
        fresh: the standard recipe's loss against tokens, for the readout of equivalent data.
        tokens: of a slice.
        state: where the controls start: ``N``, ``epochs``, ``decay``, ``K``.

    Returns:
        The explorer; `.show()` it.
    """
    losses = np.stack(frame["losses"].tolist())
    sizes, budgets = (np.asarray(frame[q].iloc[0]).astype(int).tolist() for q in ("N", "epochs"))
    decays = np.asarray(frame["decays"].iloc[0], float).tolist()
    counts = np.arange(1, losses.shape[-1] + 1)
    mean, half = centred(losses)
    by_size = power_asymptote(sizes, np.moveaxis(mean, 0, -1))  # (epochs, decays, members)
    by_count = power_asymptote(counts, mean)  # (sizes, epochs, decays)
    wide = np.geomspace(sizes[0], MORE * sizes[-1], len(CURVE))
    many = np.geomspace(1, MORE * counts[-1], len(CURVE))
    law = (
        [1e-3, 1.0, 1.0] if fresh is None else [float(fresh.E), float(fresh.A), float(fresh.alpha)]
    )
    usual = float(mean[:, :, 0, 0].min())
    data = {
        "sizes": sizes, "epochs": budgets, "decays": decays, "counts": counts.tolist(),
        "mean": mean.ravel(), "half": half.ravel(), "wide": wide, "many": many,
        "size_law": [q.ravel().tolist() for q in (by_size.E, by_size.A, by_size.alpha)],
        "count_law": [q.ravel().tolist() for q in (by_count.E, by_count.A, by_count.alpha)],
        "fresh": law, "tokens": tokens, "usual": usual, "falls": FALLS,
    }  # fmt: skip

    def side(
        name: str, x: list[int], loss: np.ndarray, half: np.ndarray, grid: np.ndarray,
        fitted: PowerLaw, at: tuple[int, ...],
    ) -> dict[str, Any]:  # fmt: skip
        falls = bool(loss[-1] <= loss.min() + FALLS)
        shown, limit = grid if falls else grid[:0], float(fitted.E[at])
        parts = {
            "x": x, "loss": loss, "low": loss - half, "high": loss + half, "wide": grid,
            "usual": np.full(len(grid), usual), "shown": shown,
            "line": np.full(len(shown), limit),
            "fit": limit + fitted.A[at] * shown ** -fitted.alpha[at],
            "limit": f"{limit:.3f}" if falls else "none, turns up",
        }  # fmt: skip
        return {f"{name}_{key}": value for key, value in parts.items()}

    def compute(N: int, epochs: int, decay: float, K: int) -> dict[str, Any]:
        n, e, w, k = sizes.index(N), budgets.index(epochs), decays.index(decay), int(K) - 1
        here = float(mean[n, e, w, k])
        excess = here - law[0]
        many_sizes = mean[:, e, w, k], half[:, e, w, k]
        return {
            **side("size", sizes, *many_sizes, wide, by_size, (e, w, k)),
            **side("count", counts.tolist(), mean[n, e, w], half[n, e, w], many, by_count,
                   (n, e, w)),
            "here_N": [N], "here_K": [K], "here_loss": [here], "loss": here,
            "half": float(half[n, e, w, k]),
            "fresh": (law[1] / excess) ** (1 / law[2]) / tokens if excess > 0 else 999.0,
        }  # fmt: skip

    def panel(name: str, title: str, x: Axis, color: str, direction: str) -> Panel:
        return Panel(
            title, x=x, y=Axis("held-out loss", unit="nats a character"),
            draws=[
                Band(f"{name}_x", f"{name}_low", f"{name}_high", color=color),
                Line(f"{name}_wide", f"{name}_usual", label="default decay",
                     color="vermillion", width=1.0),
                Line(f"{name}_shown", f"{name}_fit", label="power law", color=color, dash="dot"),
                Line(f"{name}_shown", f"{name}_line", label="limit",
                     color="grey", dash="dash", width=1.5),
                Points(f"{name}_x", f"{name}_loss", label="measured", color=color),
                Points(f"here_{direction}", "here_loss", color="ink", symbol="ring",
                       size=12),
            ],
        )  # fmt: skip

    readouts = [
        Readout("loss", "loss here", ".3f"), Readout("half", "± over slices", ".3f"),
        Readout("size_limit", "limit in N"), Readout("count_limit", "limit in K"),
    ]  # fmt: skip
    if fresh is not None:
        readouts.append(Readout("fresh", "equivalent data", ".2f", unit="x"))
    explorer = Explorer(
        name="scaling_laws.infinite_compute",
        title="Fixed data: what more epochs, decay, parameters or members are worth",
        about="Take the decay from its default to ten or a hundred times that, then add members: "
        "the dashed lines are what each direction tends to, where it does not turn up.",
        controls=[
            Steps("N", "Parameters N", sizes, value=sizes[min(1, len(sizes) - 1)]),
            Steps("epochs", "Epochs", budgets, value=budgets[-2]),
            Steps("decay", "Weight decay", decays, value=decays[0]),
            Steps("K", "Members K", counts.tolist(), value=1),
        ],
        compute=compute,
        panels=[
            panel(
                "size", "Larger models: loss with K = {K:d}",
                Axis("parameters N", (0.8 * sizes[0], MORE * sizes[-1]), log=True), "blue", "N",
            ),
            panel(
                "count", "More members: loss with N = {N:d}",
                Axis("members K", (0.9, MORE * float(counts[-1])), log=True), "orange", "K",
            ),
        ],
        readouts=readouts,
        script=SCRIPT,
        data=data,
        call="scaling_laws.figures_infinite_compute.explore_recipes(frame, "
        + ("" if fresh is None else "fresh, ") + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_sizes(judged: pd.DataFrame, ax: Axes) -> Axes:
    """Tuned losses against size: default decay, tuned decay, and unlimited members.

    Args:
        judged: of `experiments.infinite_compute.judge`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    sizes = np.asarray(judged["sizes"].iloc[0], float)
    wide = np.geomspace(sizes[0], MORE * sizes[-1], 60)
    series = (
        ("standard_N", "vermillion", "default decay", False),
        ("regularised_N", "blue", "tuned decay", True),
        ("limit_N", "orange", "tuned ensemble, K → ∞", True),
    )
    for column, name, label, fitted in series:
        values, color = np.stack(judged[column].tolist()), colors[name]
        mean, x = values.mean(0), sizes[: values.shape[1]]
        ax.errorbar(x, mean, _half(values, judged), fmt="o", ms=5, color=color, capsize=2,
                    label=label)  # fmt: skip
        if not fitted:
            ax.plot(x, mean, color=color, lw=1)
            continue
        law = power_asymptote(x, mean)
        ax.plot(wide, law(wide), color=color, lw=1.5)
        ax.axhline(float(law.E), color=color, ls="--", lw=1)
    ax.plot([], [], "--", color="0.4", lw=1, label="limits of the fits")
    ax.set_xscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.3 * (high - low))
    ax.set(xlabel="parameters N", ylabel="held-out loss (nats a character)")
    ax.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return ax


def draw_members(judged: pd.DataFrame, ax: Axes) -> Axes:
    """Loss of ensembles of one small size against K, beside the limit of ever larger models.

    Args:
        judged: of `experiments.infinite_compute.judge`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    values = np.stack(judged["curve_K"].tolist())
    count = np.arange(1, values.shape[1] + 1)
    mean, half = values.mean(0), _half(values, judged)
    law = power_asymptote(count, mean)
    many = np.geomspace(1, 8 * len(count), 60)
    ax.errorbar(count, mean, half, fmt="o", ms=5, color=colors["orange"], capsize=2,
                label="ensembles of one small size")  # fmt: skip
    ax.plot(many, law(many), color=colors["orange"], lw=1.5)
    ax.axhline(float(law.E), color=colors["orange"], ls="--", lw=1, label="their limit, K → ∞")
    ax.axhline(judged["regularised"].mean(), color=colors["blue"], ls="--", lw=1,
               label="limit of one model, N → ∞")  # fmt: skip
    ax.set_xscale("log")
    ticks = [1, 2, 4, 8, 16, 32]
    ax.set_xticks(ticks, [str(q) for q in ticks])
    ax.minorticks_off()
    ax.set(xlabel="members K", ylabel="held-out loss (nats a character)")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    return ax


def _half(values: np.ndarray, judged: pd.DataFrame) -> np.ndarray:
    """Half width of the mean's 95% interval over slices, their common level taken out."""
    if len(values) == 1:
        return np.zeros(values.shape[1])
    level = np.stack(judged["regularised_N"].tolist()).mean(1)
    apart = values - (level - level.mean())[:, None]
    width = t.ppf(0.975, len(values) - 1) / np.sqrt(len(values))
    return np.asarray(width * apart.std(0, ddof=1))
