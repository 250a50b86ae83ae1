"""Explorer of predicted losses over mixtures of domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.plots.explorer import (
    Axis,
    Bars,
    Choice,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
)
from workbench.scaling_laws.regmix import MixtureFit, best_mixture, simulate

GRID = np.linspace(0, 1, 21)  # positions of the first weight
PARTS = np.linspace(0, 1, 11)  # of the second one, a share of what is left
ROWS = 8  # domains shown one by one; the others are summed

SCRIPT = """
function (controls, data) {
  const t = data.names.indexOf(controls.target), s = data.tops.indexOf(controls.top);
  const i = Math.round(20 * controls.first), j = Math.round(10 * controls.second);
  const a = controls.first, b = controls.second, here = data.rest.map(r => (1 - a) * (1 - b) * r);
  here[0] += a;
  here[1] += (1 - a) * b;
  const row = data.surface[t][j];
  const best = data.chosen[t][s], loss = row[i];
  return {
    grid: data.grid, curve: row, line: data.plain[t][j], cloud_x: data.cloud_x,
    cloud_y: data.cloud[t], here_x: [a], here_y: [loss], best_x: [best[0]],
    best_y: [data.found[t][s]], rows: data.rows, here: here, best: best, shares: data.shares,
    loss: loss, shares_loss: data.base[t], best_loss: data.found[t][s],
    gain: loss - data.found[t][s]
  };
}
"""


def explore_mixture(
    fit: MixtureFit,
    prior: pd.Series | Mapping[str, float],
    *,
    plain: MixtureFit,
    domains: tuple[str, str] | None = None,
    targets: Sequence[str] | None = None,
    tops: Sequence[int] = (1, 8, 32, 128),
    candidates: int = 5000,
    shown: int = 150,
    unit: str = "nats a token",
    seed: int = 0,
    **state: Any,
) -> Explorer:
    """Move two domains' weights: the predicted loss, the simulated mixtures, the chosen one.

    Args:
        fit: the regression to be shown, of `regmix.fit_mixture`.
        prior: shares of tokens; the domains that are not moved keep their proportions to it.
        plain: a second regression for comparison, usually the linear one.
        domains: the two that are moved; by default the two heaviest in the mixture chosen for the
            first target.
        targets: losses on offer; by default the first three.
        tops: how many of the best candidates may be averaged.
        candidates: simulated mixtures that are searched.
        shown: of these, drawn.
        unit: of the losses.
        seed: of the simulation.
        state: where the controls start: ``target``, ``first``, ``second``, ``top``.

    Returns:
        The explorer; `.show()` it.
    """
    shares = pd.Series(prior, dtype=float)[list(fit.domains)]
    shares /= shares.sum()
    names = list(fit.targets[:3] if targets is None else targets)
    simulated = simulate(shares, candidates, random_state=seed)
    mixtures, found = {}, {}
    for q in names:
        best = best_mixture(fit, simulated, target=q, top=max(tops)).best
        means = pd.DataFrame([best.iloc[:k].mean() for k in tops])
        for k, row, loss in zip(tops, means.to_numpy(), fit.predict(means)[q], strict=True):
            mixtures[q, k], found[q, k] = pd.Series(row, shares.index), float(loss)
    widest = mixtures[names[0], tops[-1]]
    first, second = domains or tuple(widest.sort_values(ascending=False).index[:2])
    others = [q for q in shares.index if q not in (first, second)]
    weight = pd.Series(np.maximum(shares, widest))[others].sort_values(ascending=False)
    single = list(weight.index[: ROWS - 3 if len(others) > ROWS - 2 else len(others)])
    order = [first, second, *single]
    rest = shares.where(~shares.index.isin([first, second]), 0.0)
    rest /= rest.sum()

    def mix(a: Any, b: Any) -> pd.DataFrame:
        a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
        rows = ((1 - a) * (1 - b)).reshape(-1, 1) * rest.to_numpy()
        frame = pd.DataFrame(rows, columns=shares.index)
        frame[first] += a.ravel()
        frame[second] += ((1 - a) * b).ravel()
        return frame

    def table(mixture: pd.Series) -> np.ndarray:
        named = mixture[order].to_numpy()
        return named if len(order) == len(mixture) else np.append(named, 1 - named.sum())

    square = mix(GRID, PARTS[:, None])
    shape = (len(PARTS), len(GRID))
    surface = {q: fit.predict(square)[q].to_numpy().reshape(shape) for q in names}
    flat = {q: plain.predict(square)[q].to_numpy().reshape(shape) for q in names}
    cloud = simulated.iloc[:shown]
    losses, base = fit.predict(cloud), fit.predict(shares)
    data = {
        "names": names, "tops": list(tops), "grid": GRID, "rest": table(rest),
        "surface": [surface[q].round(4) for q in names],
        "plain": [flat[q].round(4) for q in names],
        "cloud_x": cloud[first].to_numpy().round(3),
        "cloud": [losses[q].to_numpy().round(4) for q in names],
        "chosen": [[table(mixtures[q, k]) for k in tops] for q in names],
        "found": [[found[q, k] for k in tops] for q in names],
        "base": [float(base[q].iloc[0]) for q in names],
        "rows": [*order, *(["others"] if len(order) < len(shares) else [])],
        "shares": table(shares),
    }  # fmt: skip

    def compute(target: str, top: int, first: float, second: float) -> dict[str, Any]:
        t, s = names.index(target), list(tops).index(top)
        i, j = round(20 * first), round(10 * second)
        here = (1 - first) * (1 - second) * np.asarray(data["rest"])
        here[:2] += first, (1 - first) * second
        best, low = data["chosen"][t][s], data["found"][t][s]
        row = data["surface"][t][j]
        return {
            "grid": GRID, "curve": row, "line": data["plain"][t][j],
            "cloud_x": data["cloud_x"], "cloud_y": data["cloud"][t],
            "here_x": np.array([first]), "here_y": row[i : i + 1],
            "best_x": best[:1], "best_y": np.array([low]),
            "rows": data["rows"], "here": here, "best": best, "shares": data["shares"],
            "loss": float(row[i]), "shares_loss": data["base"][t], "best_loss": low,
            "gain": float(row[i]) - low,
        }  # fmt: skip

    everything = [*data["surface"], *data["plain"], *data["cloud"], np.ravel(data["found"])]
    low, high = (float(f([f(part) for part in everything])) for f in (np.min, np.max))
    pad = 0.05 * (high - low)
    explorer = Explorer(
        name="scaling_laws.mixture",
        title="What would this mixture of data give?",
        about="Drag the two weights; the other domains share the rest as in the corpus. Then "
        "average more or fewer of the best simulated mixtures: one alone is often a fluke.",
        controls=[
            Choice("target", "Loss on", names),
            Slider("first", f"Weight of {first}", 0.0, 1.0, step=0.05, value=0.3),
            Slider("second", f"{second}, of what is left", 0.0, 1.0, step=0.1, value=0.2),
            Steps("top", "Best averaged", list(tops), value=tops[-1]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Here {loss:.3f}, chosen {best_loss:.3f}",
                x=Axis(f"weight of {first}", (-0.03, 1.03)),
                y=Axis("predicted loss", (low - pad, high + pad), unit=unit),
                draws=[
                    Points("cloud_x", "cloud_y", label="simulated mixtures", color="grey", size=4,
                           opacity=0.5),
                    Line("grid", "curve", label=fit.model, color="blue"),
                    Line("grid", "line", label=plain.model, color="orange", dash="dash"),
                    Points("here_x", "here_y", label="here", color="vermillion", symbol="ring",
                           size=12),
                    Points("best_x", "best_y", label="chosen", color="green", symbol="diamond",
                           size=11),
                ],
            ),
            Panel(
                "Best {top} simulated, averaged",
                x=Axis("weight", (0, 1)), y=Axis("", categories=True, reverse=True),
                draws=[
                    Bars("rows", "best", label="chosen", color="green", horizontal=True),
                    Points("shares", "rows", label="shares of tokens", color="grey",
                           symbol="square", size=8),
                    Points("here", "rows", label="here", color="vermillion", symbol="ring",
                           size=11),
                ],
            ),
        ],
        readouts=[
            Readout("loss", "predicted here", ".4f"),
            Readout("best_loss", "predicted for the chosen", ".4f"),
            Readout("shares_loss", "predicted for the shares", ".4f"),
            Readout("gain", "here above the chosen", "+.4f"),
        ],
        script=SCRIPT,
        data=data,
        call="scaling_laws.figures_regmix.explore_mixture(fit, prior, plain=plain, {state})",
    )  # fmt: skip
    return explorer.set(**state)
