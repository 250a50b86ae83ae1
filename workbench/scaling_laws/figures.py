"""The family's explorer: a table of runs, a law, and how far to trust it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Band,
    Choice,
    Control,
    Diagonal,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    Toggle,
    VLine,
)
from workbench.scaling_laws import laws
from workbench.scaling_laws.fit import LawFit, fit_law
from workbench.scaling_laws.law import Law
from workbench.scaling_laws.table import prepare

CURVE = 40  # points of a drawn curve
MOVED = 3  # size cuts and budgets in the exported face
BEYOND = 3.0  # predicted losses are drawn up to so many times what was seen: bands may be endless
LOSSES = (
    "in_p", "in_low", "in_high", "out_p", "out_low", "out_high", "y", "y_low", "y_high", "iso_y",
    "iso_low", "iso_high",
)  # fmt: skip
NEEDED = 3  # distinct sizes that a fit needs at least
OFFERED = ("chinchilla", "over_training", "power", "nmt")


def explore(
    frame: pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    *,
    losses: Sequence[str] | None = None,
    laws_offered: Sequence[str | Law] | None = None,
    starts: int = 60,
    bootstrap: int = 500,
    shown: int = 200,
    seed: int = 0,
    **state: Any,
) -> Explorer:
    """Fit a law to your runs, hold out the large ones, and see how well they were foretold.

    Controls: the law, the loss column, the largest size in the fit (larger runs are held out and
    predicted), Huber's threshold, which pair of parameters is drawn, the compute budget, and the
    bands. A refit solves ``starts`` starting points and ``bootstrap`` resamples as one batch and is
    remembered; budget and bands only redraw.

    Args:
        frame: one row a run; see `fit_law`.
        columns: the user's column names; see `fit_law`.
        losses: loss columns to choose from; default the one in ``columns`` (or "loss").
        laws_offered: laws to choose from; default those of the house that the columns allow.
        starts: starting points of a fit.
        bootstrap: resamples of a fit.
        shown: most runs, and most refits, that are drawn; few make a light page.
        seed: of starts and resamples.
        state: where controls start: ``law``, ``loss``, ``cut``, ``delta``, ``pair``, ``budget``,
            ``bands``.

    Raises:
        ValueError: no law can read the table; the message is that of the first law tried.
    """
    checks.count(shown, "shown")
    named = dict(columns or {})
    first_loss = named.get("loss", "loss")
    names = list(losses or [first_loss])
    tried = [laws.get(law) for law in laws_offered or OFFERED]
    offered = _usable(frame, tried, {**named, "loss": names[0]})
    main = offered[0]
    size = main.inputs[0]
    table = prepare(frame, main, {**named, "loss": names[0]}).frame
    points = table[list(main.inputs)].drop_duplicates()
    cuts = _cuts(points, size, max(law.p for law in offered))
    trade = {"N", "D"} <= set(main.inputs) or {"N", "M"} <= set(main.inputs)
    compute_of = _flop(table) if trade else None
    low, high = (compute_of.min(), compute_of.max()) if compute_of is not None else (1.0, 10.0)

    @functools.lru_cache(maxsize=64)
    def fitted(law: str, loss: str, cut: float, delta: float) -> tuple[LawFit, pd.DataFrame]:
        chosen = next(candidate for candidate in offered if candidate.name == law)
        mapping = {**named, "loss": loss}
        rows = prepare(frame, chosen, mapping).frame
        inside = frame.loc[rows.index[rows[chosen.inputs[0]] <= cut * (1 + 1e-9)]]
        fit = fit_law(
            inside, chosen, columns=mapping, delta=delta, starts=starts, bootstrap=bootstrap,
            seed=seed, quiet=True, max_iterations=120,
        )  # fmt: skip
        band = fit.predict(rows, interval=0.95, new_run=True).set_index(rows.index)
        return fit, rows.join(band).assign(held=~rows.index.isin(fit.frame.index))

    def compute(
        law: str, loss: str, cut: float, delta: float, pair: str, budget: float, bands: bool
    ) -> dict[str, Any]:
        fit, rows = fitted(law, loss, float(cut), float(delta))
        out = _points(fit, rows, trade, shown)
        out |= _curve(fit, rows, trade, bands)
        out |= _pair(fit, pair, shown)
        if trade:
            out |= _iso_flop(fit, rows, budget, bands, shown)
        limits = rows["loss"].min() / BEYOND, rows["loss"].max() * BEYOND
        return out | {key: _within(key, out[key], limits) for key in LOSSES if key in out}

    pairs = _pairs(main)
    span = (float(table["loss"].min()) * 0.97, float(table["loss"].max()) * 1.03)
    controls: list[Control] = [
        Choice("law", "Law", [law.name for law in offered], value=main.name),
        Choice("loss", "Loss column", names, value=names[0]),
        Steps("cut", f"Largest {size} in the fit", cuts, value=cuts[len(cuts) // 2],
              labels=[f"{cut:.3g}" for cut in cuts]),
        Slider("delta", "Huber threshold", 1e-4, 1.0, log=True, value=1e-3, format=".1e"),
        Choice("pair", "Pair of parameters", pairs, value=pairs[0]),
        Slider("budget", "Budget (FLOP)", float(low) / 10, float(high) * 1e4, log=True,
               value=float(high), format=".1e"),
        Toggle("bands", "95% bands", True),
    ]  # fmt: skip
    explorer = Explorer(
        name="scaling_laws.fit",
        title="A law, its runs, and the runs it has not seen",
        about="Drag the largest size in the fit downwards: the larger runs are held out, and the "
        "fourth panel shows how well they are foretold.",
        controls=controls if trade else [c for c in controls if c.name != "budget"],
        compute=compute if trade else functools.partial(compute, budget=1.0),
        panels=_panels(size, trade, span, (float(low) / 2, float(high) * 5)),
        readouts=[
            Readout("error", "error on held-out runs", ".2%"),
            Readout("seen_error", "on fitted runs", ".2%"),
            Readout("covered", "held-out runs inside the band", ".0%"),
            Readout("at_best", "starts at the best optimum", ".0%"),
            *([Readout("best_N", "best N", ".3g", low="best_low", high="best_high"),
               Readout("best_ratio", "tokens per parameter", ".3g")] if trade else []),
            Readout("words", "fit"),
        ],
        grid=_grid(cuts, low, high, trade),
        call="scaling_laws.explore(frame, {state})",
        columns=3 if trade else 2,
        height=400,
    )  # fmt: skip
    return explorer.set(**state)


def _usable(frame: pd.DataFrame, tried: Sequence[Law], mapping: Mapping[str, str]) -> list[Law]:
    """The laws whose columns are there; laws of N and D do not mix with those of other sizes."""
    found, first = [], None
    for law in tried:
        wanted = {k: v for k, v in mapping.items() if k in law.inputs or k in ("loss", "C", "D")}
        try:
            prepare(frame, law, {**mapping, **wanted})
        except ValueError as error:
            first = first or error
            continue
        found.append(law)
    if not found:
        raise first or ValueError("laws_offered: expected at least one law")
    return [law for law in found if law.inputs[0] == found[0].inputs[0]]


def _cuts(points: pd.DataFrame, size: str, least: int) -> list[float]:
    """Where the fit may end: at most 12 of the sizes, from the third to the last.

    Up to each there are at least ``least`` distinct points, as many as a law has parameters.
    """
    sizes = np.sort(points[size].unique())
    below = np.searchsorted(np.sort(points[size]), sizes, side="right")
    allowed = sizes[NEEDED - 1 :][below[NEEDED - 1 :] >= least]
    allowed = allowed if len(allowed) else sizes[-1:]
    picked = np.unique(np.linspace(0, len(allowed) - 1, min(12, len(allowed))).round().astype(int))
    unit = 10.0 ** (np.floor(np.log10(allowed[picked])) - 2)  # rounded up to three digits
    return [float(f"{v:.3g}") for v in np.unique(np.ceil(allowed[picked] / unit) * unit)]


def _grid(cuts: list[float], low: float, high: float, trade: bool) -> dict[str, list[Any]]:
    picked = np.unique(np.linspace(0, len(cuts) - 1, min(MOVED, len(cuts))).round().astype(int))
    grid: dict[str, list[Any]] = {"cut": sorted({cuts[i] for i in picked} | {cuts[len(cuts) // 2]})}
    if trade:
        grid["budget"] = [float(v) for v in np.geomspace(low, high * 1e3, MOVED)]
    return grid


def _pairs(law: Law) -> list[str]:
    names = law.parameters
    order = sorted(
        ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]),
        key=lambda ab: (ab[0] in "ABE" or ab[0].startswith("N_"), ab),
    )
    return [f"{a}, {b}" for a, b in order]


def _flop(table: pd.DataFrame) -> pd.Series:
    tokens = table["D"] if "D" in table else table["M"] * table["N"]
    return 6 * table["N"] * tokens


def _points(fit: LawFit, rows: pd.DataFrame, trade: bool, most: int) -> dict[str, Any]:
    """Runs, residuals and predictions, fitted and held out."""
    across = _flop(rows) if trade else rows[fit.law.inputs[0]]
    residual = (rows["prediction"] / rows["loss"]).map(np.log)
    out: dict[str, Any] = {"words": _words(fit)}
    for name, mask in (("in", ~rows["held"]), ("out", rows["held"])):
        shown = rows.index[mask]
        if len(shown) > most:
            shown = shown[np.linspace(0, len(shown) - 1, most).astype(int)]
        part = rows.loc[shown]
        out[f"{name}_x"] = across.loc[shown].to_numpy()
        out[f"{name}_y"] = part["loss"].to_numpy()
        out[f"{name}_r"] = 100 * residual.loc[shown].to_numpy()
        out[f"{name}_p"] = part["prediction"].to_numpy()
        out[f"{name}_low"], out[f"{name}_high"] = part["low"].to_numpy(), part["high"].to_numpy()
    held = rows[rows["held"]]
    out["error"] = float((held["prediction"] / held["loss"] - 1).abs().mean()) if len(held) else 0.0
    out["seen_error"] = float(np.expm1(fit.residuals).abs().mean())
    inside = (held["low"] <= held["loss"]) & (held["loss"] <= held["high"])
    out["covered"] = float(inside.mean()) if len(held) else 1.0
    out["held"] = len(held)
    out["at_best"] = fit.at_best
    return out


def _within(key: str, values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Losses that can be drawn; where refits have no finite answer, a band has no end."""
    end = limits[1] if key.endswith("high") else limits[0]
    return np.clip(np.where(np.isnan(values), end, values), *limits)


def _words(fit: LawFit) -> str:
    trouble = next((w for w in fit.warnings if w.startswith("not identified")), "")
    return trouble.split(";")[0] or "identified"


def _curve(fit: LawFit, rows: pd.DataFrame, trade: bool, bands: bool) -> dict[str, Any]:
    """The law along compute (at the best size for it), or along its first input."""
    if trade:
        flop = _flop(rows)
        x = np.geomspace(flop.min() / 2, flop.max() * 5, CURVE)
        best = fit.optimal(x, interval=0.95)
        y, low, high = best[["loss", "loss_low", "loss_high"]].to_numpy().T
    else:
        name, *others = fit.law.inputs
        x = np.geomspace(rows[name].min() / 1.5, rows[name].max() * 3, CURVE)
        sizes = {name: x, **{other: float(rows[other].median()) for other in others}}
        line = fit.predict(pd.DataFrame(sizes), interval=0.95)
        y, low, high = line[["prediction", "low", "high"]].to_numpy().T
    return {"x": x, "y": y, "y_low": low if bands else y, "y_high": high if bands else y}


def _pair(fit: LawFit, pair: str, most: int) -> dict[str, Any]:
    first, second = pair.split(", ")
    if not {first, second} <= set(fit.params):
        first, second = _pairs(fit.law)[0].split(", ")
    draws = fit.draws.iloc[:most]
    both = fit.draws[[first, second]].to_numpy()
    spread = (both.std(0) > 0).all()
    return {
        "draw_x": draws[first].to_numpy(), "draw_y": draws[second].to_numpy(),
        "at_x": [fit.params[first]], "at_y": [fit.params[second]], "first": first,
        "second": second, "correlation": float(np.corrcoef(both.T)[0, 1]) if spread else 0.0,
    }  # fmt: skip


def _iso_flop(
    fit: LawFit, rows: pd.DataFrame, budget: float, bands: bool, most: int
) -> dict[str, Any]:
    """Loss against size at one budget, with the best size and the runs near that budget."""
    best = fit.optimal(budget, interval=0.95).iloc[0]
    N = best["N"] * np.geomspace(0.03, 30, CURVE)
    D = budget / (6 * N)
    token = {"D": D} if "D" in fit.law.inputs else {"M": D / N}
    line = fit.predict(N=N, interval=0.95, **token)
    flop = _flop(rows)
    near = rows[(flop > budget / 1.6) & (flop < budget * 1.6)].iloc[:most]
    y = line["prediction"].to_numpy()
    return {
        "iso_x": N, "iso_y": y,
        "iso_low": line["low"].to_numpy() if bands else y,
        "iso_high": line["high"].to_numpy() if bands else y,
        "near_x": near["N"].to_numpy(), "near_y": near["loss"].to_numpy(),
        "best_N": float(best["N"]), "best_low": float(best["N_low"]),
        "best_high": float(best["N_high"]), "best_ratio": float(best["ratio"]),
    }  # fmt: skip


def _panels(
    size: str, trade: bool, span: tuple[float, float], flop: tuple[float, float]
) -> list[Panel]:
    x = Axis("training FLOP", flop, log=True) if trade else Axis(size, log=True)
    line = "law at the best size" if trade else "law"
    found = [
        Panel(
            "Law and runs",
            x=x, y=Axis("loss", log=True),
            draws=[
                Band("x", "y_low", "y_high", label="95%", color="blue"),
                Line("x", "y", label=line, color="blue"),
                Points("in_x", "in_y", label="in the fit", color="grey", size=5.0),
                Points("out_x", "out_y", label="held out", color="vermillion", size=6.0),
            ],
        ),
        Panel(
            "Held-out error {error:.1%}",
            x=x, y=Axis("predicted against observed", unit="%"),
            draws=[
                HLine(0.0),
                Points("in_x", "in_r", label="in the fit", color="grey", size=5.0),
                Points("out_x", "out_r", label="held out", color="vermillion", size=6.0),
            ],
            legend=False,
        ),
        Panel(
            "Held out: {covered:.0%} inside",
            x=Axis("observed loss", span), y=Axis("predicted loss", span),
            draws=[
                Diagonal(),
                Points("in_y", "in_p", label="in the fit", color="grey", size=4.0),
                Points("out_y", "out_p", label="held out, 95%", color="vermillion", size=6.0,
                       low="out_low", high="out_high"),
            ],
        ),
        Panel(
            "{first}, {second}: r = {correlation:.2f}",
            x=Axis("first of the pair"), y=Axis("second of the pair"),
            draws=[
                Points("draw_x", "draw_y", label="refit", color="blue", size=4.0, opacity=0.5),
                Points("at_x", "at_y", label="best fit", color="vermillion", size=9.0,
                       symbol="diamond"),
            ],
        ),
    ]  # fmt: skip
    if trade:
        found.append(
            Panel(
                "Best N: {best_N:.2g}",
                x=Axis("parameters N at the budget", log=True),
                y=Axis("loss", log=True),
                draws=[
                    Band("iso_x", "iso_low", "iso_high", label="95%", color="green"),
                    Line("iso_x", "iso_y", label="law", color="green"),
                    Points("near_x", "near_y", label="runs near it", color="grey", size=6.0),
                    VLine("best_N", "best"),
                ],
            )
        )
    return found
