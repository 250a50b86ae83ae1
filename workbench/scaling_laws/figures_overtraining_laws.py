"""Explorer of the over-training law, from which runs it is fitted and what it foretells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.plots import theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Control,
    Diagonal,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
)
from workbench.scaling_laws.overtraining_laws import (
    ErrorLaw,
    LossLaw,
    compute,
    fit_error_each,
    fit_overtrain_each,
    predict_error,
    predict_loss,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE = 40  # points of a drawn line
LIMITS = 12  # positions of the largest compute in the fit
SHOWN = 400  # runs at most

SCRIPT = """
function (controls, data) {
  const table = data.runs[controls.group], law = data.laws[controls.group][controls.limit];
  const runs = Object.assign({C: table.N.map((v, i) => 6 * table.M[i] * v * v)}, table);
  const M = controls.M, n = runs.C.map((v, i) => i), limit = data.limits[controls.limit];
  const inside = runs.C.map((v, i) => limit ? v <= limit : runs.for_loss[i] === 1);
  const lossAt = (C, m) =>
    law[3] + (law[0] * Math.pow(m, law[2]) + law[1] * Math.pow(m, -law[2])) * Math.pow(C, -law[2]);
  const errorAt = L => law[6] - law[4] * Math.exp(-law[5] * L);
  const foretold = n.map(i => lossAt(runs.C[i], runs.M[i]));
  const mean = (values) => values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0;
  const held = n.filter(i => !inside[i]), fitted = n.filter(i => inside[i]);
  const off = i => 100 * Math.abs(foretold[i] / runs.loss[i] - 1);
  let target = 0;
  const far = i => Math.abs(Math.log(runs.M[i] / M));
  n.forEach(i => {
    const nearer = far(i) - far(target);
    if (nearer < -1e-9 || (Math.abs(nearer) <= 1e-9 && runs.C[i] > runs.C[target])) target = i;
  });
  const out = {
    C: data.C, curve: data.C.map(c => lossAt(c, M)),
    fit_C: fitted.map(i => runs.C[i]), fit_loss: fitted.map(i => runs.loss[i]),
    held_C: held.map(i => runs.C[i]), held_loss: held.map(i => runs.loss[i]),
    held_foretold: held.map(i => foretold[i]), fit_foretold: fitted.map(i => foretold[i]),
    target_C: [runs.C[target]], target_loss: [runs.loss[target]],
    target_foretold: [foretold[target]], target_N: runs.N[target], target_M: runs.M[target],
    loss_foretold: foretold[target], loss_measured: runs.loss[target],
    used: fitted.length, off: mean(held.map(off)), off_target: off(target),
    best_M: Math.exp(Math.max(-700, Math.min(700,
      0.5 / law[2] * (Math.log(law[1]) - Math.log(law[0]))))), E: law[3]
  };
  if (data.levels.length) {
    const offError = i => 100 * Math.abs(errorAt(foretold[i]) / runs.error[i] - 1);
    out.levels = data.levels; out.error_curve = data.levels.map(errorAt);
    const taught = n.filter(i => limit ? inside[i] : runs.for_error[i]);
    const fresh = n.filter(i => !(limit ? inside[i] : runs.for_error[i]));
    out.taught_loss = taught.map(i => runs.loss[i]);
    out.taught_error = taught.map(i => runs.error[i]);
    out.new_loss = fresh.map(i => runs.loss[i]); out.new_error = fresh.map(i => runs.error[i]);
    out.target_error = [errorAt(foretold[target])];
    out.error_foretold = errorAt(foretold[target]); out.error_measured = runs.error[target];
    out.off_error = mean(fresh.map(offError));
  }
  return out;
}
"""


def explore_overtraining(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    error: str | None = None,
    by: str | None = None,
    marked: tuple[str, str] | None = None,
    **state: Any,
) -> Explorer:
    """Choose the runs of the fit and a token multiplier; see loss and error foretold.

    Args:
        runs: a row a run.
        columns: which columns hold ``N``, ``M`` (tokens per parameter) and ``loss`` where they are
            called otherwise.
        error: column of the average downstream error; without it only losses are shown.
        by: column whose values are fitted apart, such as the training set.
        marked: two columns, true for the runs in the fit of the loss and in that of the error; this
            choice is offered beside the limits of compute.
        state: where the controls start: ``group`` (a value of that column), ``limit``, ``M``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: a group has too few runs for the law.
    """
    names = {q: q for q in ("N", "M", "loss")} | dict(columns or {})
    table = pd.DataFrame({q: runs[column].to_numpy(float) for q, column in names.items()})
    table["C"] = compute(table["N"], table["M"])
    table["error"] = runs[error].to_numpy(float) if error else np.nan
    table["group"] = runs[by].astype(str).to_numpy() if by else "all runs"
    for q, column in zip(("for_loss", "for_error"), marked or (None, None), strict=True):
        table[q] = runs[column].to_numpy(bool) if column else False
    table = table.iloc[:: -(-len(table) // SHOWN)]
    groups = {str(name): rows.reset_index(drop=True) for name, rows in table.groupby("group")}
    limits = _limits(groups)
    used, told = (
        {
            name: np.array(([rows[q]] if marked else []) + [rows["C"] <= c for c in limits])
            for name, rows in groups.items()
        }
        for q in ("for_loss", "for_error")
    )
    laws = {
        name: _fits(rows, used[name], told[name] if error else None)
        for name, rows in groups.items()
    }
    labels = [f"{c:.1e} FLOP" for c in limits]
    if marked:
        labels = [f"{int(next(iter(used.values()))[0].sum())} marked runs", *labels]
    ends = {q: (table[q].min(), table[q].max()) for q in ("C", "M", "loss")}
    C = np.geomspace(ends["C"][0] / 2, ends["C"][1] * 2, CURVE)
    levels = np.linspace(0.97 * ends["loss"][0], ends["loss"][1], CURVE) if error else np.empty(0)

    def foretell(group: str, limit: int, M: float) -> dict[str, Any]:
        rows, inside, taught = groups[group], used[group][limit], told[group][limit]
        law = LossLaw(*laws[group][limit][:4])
        foretold = predict_loss(rows["C"], rows["M"], law)
        off = 100 * np.abs(foretold / rows["loss"] - 1).to_numpy()
        outside = off[~inside]
        far = np.abs(np.log(rows["M"] / M)).round(9)
        target = rows["C"].where(far == far.min(), -1.0).argmax()
        run = rows.iloc[target]
        out: dict[str, Any] = {
            "C": C, "curve": predict_loss(C, M, law),
            "fit_C": rows["C"][inside], "fit_loss": rows["loss"][inside],
            "held_C": rows["C"][~inside], "held_loss": rows["loss"][~inside],
            "held_foretold": foretold[~inside], "fit_foretold": foretold[inside],
            "target_C": run[["C"]].astype(float), "target_loss": run[["loss"]].astype(float),
            "target_foretold": foretold[[target]], "target_N": run["N"],
            "target_M": run["M"], "loss_foretold": foretold[target], "loss_measured": run["loss"],
            "used": int(inside.sum()), "off": float(outside.mean()) if len(outside) else 0.0,
            "off_target": off[target], "best_M": law.best_multiplier, "E": law.E,
        }  # fmt: skip
        if error:
            link = ErrorLaw(*laws[group][limit][4:])
            errors = predict_error(foretold, link)
            apart = 100 * np.abs(errors / rows["error"] - 1).to_numpy()[~taught]
            out |= {
                "levels": levels, "error_curve": predict_error(levels, link),
                "taught_loss": rows["loss"][taught], "taught_error": rows["error"][taught],
                "new_loss": rows["loss"][~taught], "new_error": rows["error"][~taught],
                "target_error": errors[[target]], "error_foretold": errors[target],
                "error_measured": run["error"],
                "off_error": float(apart.mean()) if len(apart) else 0.0,
            }  # fmt: skip
        return out

    controls: list[Control] = [
        Choice("group", by or "Runs", list(groups)),
        Steps("limit", "Fit to runs up to", list(range(len(labels))), labels=labels,
              value=0 if marked else LIMITS // 2),
        Slider("M", "Tokens per parameter M", *ends["M"], value=float(ends["M"][1]), log=True,
               format=".3g"),
    ]  # fmt: skip
    loss_range = (0.95 * ends["loss"][0], 1.05 * ends["loss"][1])
    readouts = [
        Readout("loss_foretold", "loss of the target, foretold", ".3f"),
        Readout("loss_measured", "measured", ".3f"),
        Readout("off", "mean error of held-out losses", ".2f", unit="%"),
        Readout("best_M", "compute-optimal M", ".3g"),
        Readout("E", "irreducible loss E", ".3f"),
    ]
    if error:
        readouts[2:2] = [
            Readout("error_foretold", "top-1 error of the target, foretold", ".3f"),
            Readout("error_measured", "measured", ".3f"),
        ]
        readouts.append(Readout("off_error", "of held-out top-1 errors", ".2f", unit="%"))
    explorer = Explorer(
        name="scaling_laws.overtraining",
        title="Over-training shifts the line of loss against compute; it does not bend it",
        about="The target is the dearest run whose M is nearest to yours. Lower the limit until "
        "the fit misses it.",
        controls=controls,
        compute=foretell,
        panels=[
            Panel(
                "{used:d} runs foretell N = {target_N:.2e}, M = {target_M:.3g} "
                "to {off_target:.1f}%",
                x=Axis("training compute", (C[0], C[-1]), unit="FLOP", log=True),
                y=Axis("loss", loss_range, unit="nats"),
                draws=[
                    Points("held_C", "held_loss", label="held out", color="grey", size=5),
                    Points("fit_C", "fit_loss", label="in the fit", color="blue", size=7),
                    Line("C", "curve", label="law at your M", color="vermillion"),
                    Points("target_C", "target_loss", label="target", color="ink",
                           symbol="ring", size=13),
                ],
            ),
            _downstream(levels, table["error"]) if error else _foretold(loss_range),
        ],
        readouts=readouts,
        script=SCRIPT,
        data={
            "C": C,
            "levels": levels,
            "limits": [*([0.0] if marked else []), *limits.tolist()],
            "laws": {name: [_short(row) for row in rows] for name, rows in laws.items()},
            "runs": {
                name: {
                    **{q: _short(rows[q]) for q in ("N", "M", "loss")},
                    "error": _short(rows["error"]) if error else [],
                    **{q: rows[q].astype(int).tolist() for q in ("for_loss", "for_error")},
                }
                for name, rows in groups.items()
            },
        },
        call="scaling_laws.figures_overtraining_laws.explore_overtraining("
        f"runs, columns=columns, error={error!r}, by={by!r}, marked={marked!r}, {{state}})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_runs(
    runs: pd.DataFrame,
    loss: str,
    law: LossLaw,
    fitted: np.ndarray,
    ax: Axes,
    *,
    lines: Sequence[float] = (20.0, 640.0),
    scale: Any = None,
) -> Axes:
    """Reducible loss of runs against compute, coloured by M, with the law's parallel lines.

    Args:
        runs: columns ``C``, ``M`` and ``loss``; one training set.
        loss: column of the loss.
        law: the law, whose E is taken off.
        fitted: true for the runs of the fit; they get a ring.
        ax: axes to draw on.
        lines: multipliers whose line is drawn.
        scale: colours by M, such as ``matplotlib.colors.LogNorm(5, 640)``.
    """
    from matplotlib import colors

    scale = scale or colors.LogNorm(runs["M"].min(), runs["M"].max())
    shades = theme.colormap("sequential")
    C = np.array([runs["C"].min(), runs["C"].max()])
    for M in lines:
        ax.plot(C, predict_loss(C, M, law) - law.E, color=shades(scale(M)), lw=1.2)
    above, inside = runs[runs[loss] > law.E], runs[fitted]
    ax.scatter(above["C"], above[loss] - law.E, c=shades(scale(above["M"])), s=14, zorder=3)
    rings: dict[str, Any] = {"mfc": "none", "mec": "black", "ms": 9, "label": "in the fit"}
    ax.plot(inside["C"], inside[loss] - law.E, "o", **rings)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="training compute (FLOP)")
    return ax


def _downstream(levels: np.ndarray, errors: pd.Series) -> Panel:
    ends = (0.9 * float(errors.min()), 1.05 * float(errors.max()))
    return Panel(
        "Downstream: top-1 error {error_foretold:.3f} foretold, {error_measured:.3f} measured",
        x=Axis("loss", (levels[0], levels[-1]), unit="nats", reverse=True),
        y=Axis("average top-1 error", ends),
        draws=[
            Points("new_loss", "new_error", label="held out", color="grey", size=5),
            Points("taught_loss", "taught_error", label="in the fit", color="blue", size=7),
            Line("levels", "error_curve", label="error law", color="green"),
            Points("target_foretold", "target_error", label="target, foretold",
                   color="vermillion", symbol="diamond", size=11),
        ],
    )  # fmt: skip


def _foretold(ends: tuple[float, float]) -> Panel:
    return Panel(
        "Held-out losses are off by {off:.1f}% on average",
        x=Axis("measured loss", ends, unit="nats"),
        y=Axis("foretold loss", ends, unit="nats"),
        draws=[
            Diagonal("foretold = measured", color="grey"),
            Points("held_loss", "held_foretold", label="held out", color="grey", size=5),
            Points("fit_loss", "fit_foretold", label="in the fit", color="blue", size=7),
            Points("target_loss", "target_foretold", label="target", color="vermillion",
                   symbol="ring", size=13),
        ],
        square=True,
    )  # fmt: skip


def _limits(groups: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """Limits of compute below which every group has six runs, of three sizes and multipliers."""
    least = 0.0
    for name, rows in groups.items():
        ordered = rows.sort_values("C")
        several = [
            i >= 6 and min(ordered["N"].iloc[:i].nunique(), ordered["M"].iloc[:i].nunique()) >= 3
            for i in range(len(ordered) + 1)
        ]
        if not any(several):
            raise ValueError(
                f"runs: {name!r} needs six runs of three sizes and three multipliers at least"
            )
        least = max(least, float(ordered["C"].iloc[several.index(True) - 1]))
    most = max(float(rows["C"].max()) for rows in groups.values())
    return np.array([float(f"{c:.6g}") for c in np.geomspace(least, most, LIMITS) * 1.001])


def _fits(rows: pd.DataFrame, used: np.ndarray, told: np.ndarray | None) -> list[list[float]]:
    """Constants of both laws on each subset: a, b, eta, E, and k, gamma, eps."""
    N, M, loss = (rows[q].to_numpy(float) for q in ("N", "M", "loss"))
    out = [list(vars(law).values()) for law in fit_overtrain_each(N, M, loss, used)]
    if told is not None:
        links = fit_error_each(loss, rows["error"].to_numpy(float), told.astype(float))
        out = [[*first, *vars(link).values()] for first, link in zip(out, links, strict=True)]
    return out


def _short(values: Any) -> list[float]:
    """As the exported face stores numbers: eleven digits."""
    return [float(f"{v:.11g}") for v in values]
