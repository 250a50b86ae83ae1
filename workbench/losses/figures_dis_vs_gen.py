"""Explorer of two learning curves and the samples they need; figure of both on learned features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.losses.dis_vs_gen import crossing, first_passage
from workbench.plots import escape, mpl, theme
from workbench.plots.explorer import (
    Axis,
    Band,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"nb": "blue", "lr": "vermillion"}
NAMES = {"nb": "naive Bayes", "lr": "logistic regression"}
TARGETS = (0.02, 0.05, 0.1, 0.2, 0.3)
LEAST = 0.002  # errors below are drawn here, on the logarithmic axis
KINDS = {
    "pixels": "pixels",
    "autoencoder": "autoencoder",
    "cnn": "supervised CNN",
    "efficientnet": "EfficientNet-Lite0",
}

SCRIPT = """
function (controls, data) {
  const names = data.names, d = names.indexOf("data" in controls ? controls.data : names[0]);
  const target = controls.target;
  function nearest(values, wanted) {
    return values.reduce((best, v) =>
      Math.abs(Math.log(v / wanted)) < Math.abs(Math.log(best / wanted)) - 1e-12 ? v : best);
  }
  const all = data.d.map((v, i) => i).filter(i => data.d[i] === d);
  const K = nearest(all.map(i => data.K[i]), "K" in controls ? controls.K : data.K[0]);
  const group = all.filter(i => data.K[i] === K);
  const dims = group.map(i => data.n[i]).filter((v, i, list) => list.indexOf(v) === i);
  const n = nearest(dims, "n" in controls ? controls.n : data.n[0]);
  const rows = group.filter(i => data.n[i] === n);
  function passage(m, errors) {
    const i = errors.findIndex(e => e <= target);
    if (i <= 0) return i < 0 ? null : m[0];
    const share = (errors[i - 1] - target) / (errors[i - 1] - errors[i]);
    return m[i - 1] * Math.pow(m[i] / m[i - 1], share);
  }
  const take = (name, where) => where.map(i => data[name][i]);
  const shown = name => take(name, rows).map(v => Math.min(Math.max(v, data.least), 1));
  const m = take("m", rows), nb = take("nb", rows), lr = take("lr", rows);
  const out = {
    m: m, target: target, K_here: K, n_here: n, name: names[d], cross_m: [], cross_e: [],
    cross: null, last_nb: nb[nb.length - 1], last_lr: lr[lr.length - 1], here_n: [], here_m: []
  };
  for (const q of ["nb", "lr"]) {
    out[q] = shown(q); out["low_" + q] = shown("low_" + q); out["high_" + q] = shown("high_" + q);
    const need = dims.map(v => {
      const part = group.filter(i => data.n[i] === v);
      return passage(take("m", part), take(q, part));
    });
    out["n_" + q] = dims.filter((v, i) => need[i] !== null);
    out["need_" + q] = need.filter(v => v !== null);
    const here = need[dims.indexOf(n)];
    out["here_" + q] = here;
    if (here !== null) { out.here_n.push(n); out.here_m.push(here); }
  }
  const gap = lr.map((v, i) => v - nb[i]);
  let last = -1;
  gap.forEach((g, i) => { if (g >= 0) last = i; });
  if (last < 0) out.cross = m[0];
  else if (last < m.length - 1) {
    const share = gap[last] / (gap[last] - gap[last + 1]);
    const error = nb[last] + share * (nb[last + 1] - nb[last]);
    out.cross = m[last] * Math.pow(m[last + 1] / m[last], share);
    out.cross_m = [out.cross]; out.cross_e = [Math.max(error, data.least)];
  }
  return out;
}
"""


def explore_regimes(curves: pd.DataFrame | Mapping[str, pd.DataFrame], **state: Any) -> Explorer:
    """Move classes, features and the error you want: both learning curves and the samples needed.

    Args:
        curves: a table, or several by name, with columns ``K``, ``n``, ``m``, ``seed`` and errors
            ``nb`` and ``lr``: what `dis_vs_gen.learning_curves` returns for your features.
        state: where the controls start: ``data``, ``K``, ``n`` (those of which there are several)
            and ``target``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: a column is missing.
    """
    tables = {"data": curves} if isinstance(curves, pd.DataFrame) else dict(curves)
    table = pd.concat([_summary(t).assign(d=i) for i, t in enumerate(tables.values())])
    names = list(tables)
    data: dict[str, Any] = {"names": names, "least": LEAST}
    data |= {str(q): table[q].to_numpy() for q in table}

    groups: dict[int, dict[int, dict[int, dict[str, np.ndarray]]]] = {}
    for key, part in table.groupby(["d", "K", "n"]):
        d, K, n = np.asarray(key, int).tolist()
        arrays = {str(q): part[q].to_numpy() for q in part}
        groups.setdefault(d, {}).setdefault(K, {})[n] = arrays
    first = {q: int(table[q].iloc[0]) for q in ("K", "n")}

    def compute(target: float, **where: Any) -> dict[str, Any]:
        d = names.index(where.get("data", names[0]))
        K = _nearest(groups[d], where.get("K", first["K"]))
        by_n = groups[d][K]
        n = _nearest(by_n, where.get("n", first["n"]))
        here = by_n[n]
        m, dims = here["m"], np.array(list(by_n))
        cross = crossing(m, here["nb"], here["lr"])
        inside = m[0] < cross < np.inf
        at = np.interp(np.log(cross), np.log(m), here["nb"]) if inside else 0.0
        out: dict[str, Any] = {
            "m": m, "target": target, "K_here": K, "n_here": n, "name": names[d],
            "cross": None if cross == np.inf else cross,
            "cross_m": np.array([cross] if inside else []),
            "cross_e": np.array([max(at, LEAST)] if inside else []),
        }  # fmt: skip
        marks = []
        for q in COLORS:
            for name in (q, f"low_{q}", f"high_{q}"):
                out[name] = here[name].clip(LEAST, 1)
            need = np.array([first_passage(g["m"], g[q], target) for g in by_n.values()])
            known = np.isfinite(need)
            mine = float(need[list(by_n).index(n)])
            marks += [mine] if np.isfinite(mine) else []
            out |= {
                f"n_{q}": dims[known], f"need_{q}": need[known], f"last_{q}": float(here[q][-1]),
                f"here_{q}": mine if np.isfinite(mine) else None,
            }  # fmt: skip
        return out | {"here_n": np.full(len(marks), n), "here_m": np.array(marks)}

    levels = {"K": sorted(table.K.unique().tolist()), "n": sorted(table.n.unique().tolist())}
    words = {"K": "Classes K", "n": "Features n"}
    controls: list[Any] = [
        Steps(q, words[q], values, value=values[len(values) // 2])
        for q, values in levels.items()
        if len(values) > 1
    ]
    if len(names) > 1:
        controls.insert(0, Choice("data", "Data", names))
    controls.append(Steps("target", "Error you want", TARGETS, value=TARGETS[1]))
    sizes = (0.8 * table.m.min(), 1.25 * table.m.max())
    wide = 10 ** np.floor(np.log10(levels["n"][0])), 10 ** np.ceil(np.log10(levels["n"][-1] + 1))
    explorer = Explorer(
        name="losses.regimes",
        title="Count or optimise? Two linear classifiers over the number of samples",
        about="Raise n: does naive Bayes need more samples, and does logistic regression? Where "
        "features depend on each other, look for the ring: from there on optimising pays. Where "
        "the data lack a K or n, the nearest is shown.",
        controls=controls,
        compute=compute,
        panels=[
            Panel(
                "{name}: K = {K_here:d}, n = {n_here:d}",
                x=Axis("training rows m", sizes, log=True),
                y=Axis("error", (LEAST, 1.0), log=True),
                draws=[
                    *[Band("m", f"low_{q}", f"high_{q}", color=COLORS[q]) for q in COLORS],
                    *[
                        Line("m", q, label=NAMES[q], color=COLORS[q], markers=True)
                        for q in COLORS
                    ],
                    HLine("target", "wanted", color="grey"),
                    Points("cross_m", "cross_e", label="crossing", color="ink", symbol="ring",
                           size=15),
                ],
            ),
            Panel(
                "Rows to an error of {target:.2f}",
                x=Axis("features n", wide, log=True), y=Axis("rows needed", sizes, log=True),
                draws=[
                    *[
                        Line(f"n_{q}", f"need_{q}", label=NAMES[q], color=COLORS[q], markers=True)
                        for q in COLORS
                    ],
                    Points("here_n", "here_m", label="this n", color="ink", symbol="ring", size=13),
                ],
            ),
        ],
        readouts=[
            Readout("here_nb", "rows needed, naive Bayes", ".0f"),
            Readout("here_lr", "rows needed, logistic regression", ".0f"),
            Readout("cross", "logistic regression ahead from row", ".0f"),
            Readout("last_nb", "last error, naive Bayes", ".3f"),
            Readout("last_lr", "last error, logistic regression", ".3f"),
        ],
        script=SCRIPT,
        data=data,
        call="losses.figures_dis_vs_gen.explore_regimes(curves, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_features(table: pd.DataFrame, fig: Figure) -> None:
    """Errors over shots for every kind of features, side by side, with intervals over seeds.

    Args:
        table: rows of `experiments.dis_vs_gen.measured`.
        fig: figure to draw on.
    """
    kinds = [kind for kind in KINDS if kind in set(table.kind)]
    inks = theme.palette()
    for ax, kind in zip(
        fig.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True
    ):
        part = table[table.kind == kind]
        for q, ink in COLORS.items():
            runs = part.pivot(index="seed", columns="shots", values=q)
            mean, low, high = mpl.interval(runs.to_numpy())
            ax.plot(runs.columns, mean, "o-", ms=3, color=inks[ink], label=NAMES[q])
            ax.fill_between(runs.columns, low, high, color=inks[ink], alpha=0.2, lw=0)
            tuned = part.dropna(subset=[f"{q}_tuned"]).groupby("shots")[f"{q}_tuned"].mean()
            tuned = tuned[tuned.index >= 3]
            ax.plot(tuned.index, tuned, ":", color=inks[ink], label=f"{NAMES[q]}, tuned")
        ax.set_xscale("log")
        ax.set_xticks([1, 10, 100], ["1", "10", "100"])
        label = escape.matplotlib(f"{KINDS[kind]} (n = {part.n.iloc[0]:,})")
        ax.set_title(label, loc="left", fontsize=9)
        ax.set_xlabel("images a class")
    fig.suptitle(_who_leads(table), x=0.01, ha="left", fontsize=11, fontweight="bold")
    fig.axes[0].set_ylabel("error on five unseen digits")
    fig.axes[0].legend(frameon=False, fontsize=7.5)


def _who_leads(table: pd.DataFrame) -> str:
    """The finding: who has the lower mean error from which number of images on."""
    means = table.groupby(["kind", "shots"])[["nb", "lr"]].mean()
    ahead = (means.lr < means.nb).unstack("kind").all(axis=1)
    always = [shots for shots in ahead.index if ahead[ahead.index >= shots].all()]
    if not always:
        return "Neither classifier is ahead on all features at all sizes"
    return f"Logistic regression is ahead on all features from {always[0]:.0f} images a class on"


def _summary(curves: pd.DataFrame) -> pd.DataFrame:
    """Means and 95% intervals over seeds, at the sizes that every seed has."""
    for name in ("K", "n", "m", "seed", "nb", "lr"):
        if name not in curves:
            raise ValueError(f"curves: expected a column {name!r}, got {list(curves)}")
    rows = []
    for (K, n), part in curves.groupby(["K", "n"]):
        nb, lr = (part.pivot(index="seed", columns="m", values=q).dropna(axis=1) for q in COLORS)
        limits = {q: mpl.interval(runs.to_numpy()) for q, runs in (("nb", nb), ("lr", lr))}
        found = pd.DataFrame({"K": K, "n": n, "m": nb.columns})
        for q, (mean, low, high) in limits.items():
            found[q] = mean
            found[f"low_{q}"] = np.where(np.isfinite(low), low, mean)
            found[f"high_{q}"] = np.where(np.isfinite(high), high, mean)
        rows.append(found)
    return pd.concat(rows, ignore_index=True)


def _nearest(values: Iterable[int], wanted: float) -> int:
    """The value whose logarithm is nearest; the first of two."""
    return min(values, key=lambda v: round(abs(np.log(v / wanted)), 12))
