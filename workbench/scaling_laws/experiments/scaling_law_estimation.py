"""Refit Chinchilla's published points; forecast the largest of released families by protocol."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.lab import data
from workbench.scaling_laws.early_stops import HOFFMANN, lbfgsb
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.scaling_law_estimation import (
    FRACTIONS,
    NAMES,
    are,
    are_grid,
    borrow,
    component_law,
    estimate,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

REPLICATED = {"A": 477.84, "B": 2143.86, "E": 1.817236, "alpha": 0.347313, "beta": 0.367183}
"""Best fit in the notebook of Besiroglu et al. (2024, arXiv 2404.10102), to their digits."""

PRINTED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
"""The same as printed in their paper, after a scale-free refit."""

PRINTED_SD = {"A": 124.58, "B": 1293.23, "E": 0.03, "alpha": 0.02, "beta": 0.02}
"""Their standard errors, from 4,000 bootstrap samples."""

BUDGET = 5.76e23  # FLOP of Chinchilla and Gopher
PASSES = ("1", "2", "3", "4")  # over the data: up to four, repeated tokens are almost as good
REPEATED = "oscar_4"  # its smallest run is, in the released table, that of oscar_3 again
KEPT = 40  # checkpoints a run, evenly over it
T5 = {"base": 247_586_304, "large": 783_173_632, "xl": 2_849_804_288, "xxl": 11_135_426_560}
NATS = ("opt", "c4", "oscar")  # losses are nats a token: a size term may be borrowed
UNITS = tuple(
    f"{family}/{target}"
    for family, targets in {
        "opt": ("6.7b", "13b", "30b", "175b"),
        "t5_pile": ("xl", "xxl"),
        "lamda": ("2.62e+08", "4.53e+08", "1.07e+09"),
        **{f"{text}_{n}": ("8.7B",) for text in ("c4", "oscar") for n in PASSES},
    }.items()
    for target in targets
    if family != REPEATED
)
"""Family and target: every size with at least two smaller ones."""

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "early": {"cut": 0.0},
    "final": {"final_only": True},
    "all_held": {"held": ("alpha", "beta")},
    "final_held": {"final_only": True, "held": ("alpha", "beta")},
    "huber": {"objective": "huber_log"},
    "largest": {"which": "largest"},
}
"""Protocols by name; ``held`` parameters are those of the replicated Chinchilla fit."""


def protocol(variant: str) -> dict[str, Any]:
    """Arguments of `are_grid` for one of `VARIANTS`."""
    options = dict(VARIANTS[variant])
    held = options.pop("held", ())
    return options | ({"fixed": {q: PRINTED[q] for q in held}} if held else {})


# --- data ---------------------------------------------------------------------------------------


def chinchilla_points() -> pd.DataFrame:
    """The 240 points (N, D, loss) of the replication; its five highest losses are left out.

    Raises:
        ValueError: the authors' table is not on this machine.
    """
    table = pd.read_csv(_folder("chinchilla_points") / "data" / "svg_extracted_data.csv")
    size, flop = table["Model Size"], table["Training FLOP"]
    points = pd.DataFrame({"N": size, "D": flop / (6 * size), "loss": table.loss})
    return points.drop(points.loss.nlargest(5).index).reset_index(drop=True)


def _folder(slug: str) -> Path:
    folder = data.authors(slug)
    if folder is None:
        raise ValueError(f"{slug} is not on this machine; `workbench data get {slug}` brings it")
    return folder


@lru_cache(maxsize=1)
def released() -> pd.DataFrame:
    """Losses along training of 10 released families: ``family``, ``model``, ``N``, ``D``, ``loss``.

    OPT and Pile-T5 give validation perplexity, of which the logarithm is taken (Pile-T5's is per
    byte or so, not per token); LaMDA's is scaled to below 1 by those who published it. The families
    c4_n and oscar_n saw their text n times. Runs are thinned to `KEPT` checkpoints.

    Raises:
        ValueError: the authors' tables are not on this machine.
    """
    folder = _folder("hitchhikers") / "aggregated_eval"
    opt = pd.read_csv(folder / "opt_trajectories.csv")
    t5 = pd.read_csv(folder / "t5_pile.csv", usecols=["model_name", "steps", "val_perplexity"])
    t5 = t5[t5.steps > 0]
    lamda = pd.read_csv(folder / "revisiting_lang.csv").query("Domain == 'LM'")
    lamda = lamda.groupby(["Model", "Seen Examples"])[["Loss"]].mean().reset_index()
    passes = pd.read_csv(folder / "datablations_losses.csv", dtype={"epochs": str})
    passes = passes[passes.epochs.isin(PASSES)]
    parts = [
        _family("opt", opt.model_size, opt.model_size.map(_count), 10.0**opt.num_token,
                np.log(opt.ppl)),
        _family("t5_pile", t5.model_name, t5.model_name.map(T5), 1e6 * t5.steps,
                np.log(t5.val_perplexity)),
        _family("lamda", lamda.Model, lamda.Model.astype(float), lamda["Seen Examples"],
                lamda.Loss),
        _family(passes.data + "_" + passes.epochs, passes.num_params,
                passes.num_params.map(_count), passes.token_num, passes.loss),
    ]  # fmt: skip
    table = pd.concat(parts).dropna().sort_values(["family", "N", "D"], kind="stable")
    table = table.drop_duplicates(["family", "model", "D"], keep="last").query(
        "family != @REPEATED"
    )
    return _thin(table, ["family", "model"])


def _family(name: Any, model: Any, N: Any, D: Any, loss: Any) -> pd.DataFrame:
    columns = {"family": name, "model": model, "N": N, "D": D, "loss": loss}
    return pd.DataFrame(columns).astype({"N": float, "D": float, "loss": float})


def _count(text: str) -> float:
    return float(text[:-1]) * {"m": 1e6, "b": 1e9}[text[-1].lower()]


def _thin(table: pd.DataFrame, run: list[str]) -> pd.DataFrame:
    """At most `KEPT` checkpoints of each run: the nearest ones to even steps of its tokens."""
    kept = []
    for _, rows in table.groupby(run, sort=False):
        wanted = np.linspace(0, rows.D.max(), KEPT + 1)[1:]
        nearest = np.abs(rows.D.to_numpy()[:, None] - wanted).argmin(0)
        kept.append(rows.iloc[np.unique(nearest)])
    return pd.concat(kept).reset_index(drop=True)


@lru_cache(maxsize=1)
def tiny() -> pd.DataFrame:
    """Runs of tiny_lm_grid at constant learning rate; a family is a batch size and a seed."""
    table = tiny_lm_grid("laptop")
    table = table[table.phase == "constant"]
    family = "batch" + table.batch.astype(str) + "_seed" + table.seed.astype(str)
    part = _family(family, table.N.map("{:,}".format), table.N, table.tokens, table.loss)
    return part.sort_values(["family", "N", "D"], kind="stable").reset_index(drop=True)


def tiny_units() -> list[str]:
    """Families of `tiny`, each with its largest model as the target."""
    table = tiny()
    return [f"{name}/{rows.model.iloc[-1]}" for name, rows in table.groupby("family")]


def family(unit: str) -> tuple[pd.DataFrame, str]:
    """Runs of a unit's family up to its target, and the target's name."""
    name, target = unit.split("/")
    table = tiny() if name.startswith("batch") else released()
    runs = table[table.family == name]
    if target not in set(runs.model):
        raise ValueError(f"unit: no model {target!r} in family {name!r}")
    top = runs[runs.model == target].N.max()
    return runs[runs["N"] <= top].reset_index(drop=True), target


# --- experiments --------------------------------------------------------------------------------


def replicate(seed: int, *, starts: int = 60, bootstrap: int = 1000) -> dict[str, Any]:
    """The replicated Chinchilla fit and its bootstrap: parameters, spreads, objective, optimum.

    Args:
        seed: of starts and resamples.
        starts: drawn from the published grid's box.
        bootstrap: resamples of the 240 points.
    """
    points = chinchilla_points()
    fit = fit_law(points, starts=starts, bootstrap=bootstrap, seed=seed, quiet=True)
    share = fit.draws.beta / (fit.draws.alpha + fit.draws.beta)
    plan = fit.optimal(BUDGET).iloc[0]
    return {
        **fit.params,
        **{f"sd_{q}": float(fit.draws[q].std()) for q in NAMES},
        "objective": fit.objective,
        "at_best": fit.at_best,
        "exponent": fit.params["beta"] / (fit.params["alpha"] + fit.params["beta"]),
        "exponent_low": float(share.quantile(0.025)),
        "exponent_high": float(share.quantile(0.975)),
        "plan_N": float(plan["N"]),
        "plan_D": float(plan["D"]),
    }


def early_stops(seed: int = 0, *, points: pd.DataFrame | None = None) -> pd.DataFrame:
    """L-BFGS-B from Chinchilla's constants: a mean, a sum, and a scaled sum with tight tolerance.

    Args:
        seed: not used, nothing is drawn.
        points: N, D and loss; the replication's by default.

    Returns:
        A row a way to fit: ``how``, parameters, ``objective`` (always the sum), ``iterations``,
        ``success``, and arrays ``path_alpha``, ``path_beta``, ``values``.
    """
    table = chinchilla_points() if points is None else points
    ways: dict[str, dict[str, float]] = {
        "mean, default tolerances": {"scale": 1 / len(table)},
        "sum, default tolerances": {},
        "1000 x sum, tight tolerances": {"scale": 1e3, "ftol": 1e-14, "gtol": 1e-10},
    }
    rows = []
    for how, options in ways.items():
        stop = lbfgsb(table.N, table.D, table.loss, HOFFMANN, **options)  # type: ignore[arg-type]
        rows.append(
            {
                "how": how, **stop.params, "objective": stop.objective,
                "iterations": stop.iterations, "success": stop.success,
                "path_alpha": stop.path[:, 3], "path_beta": stop.path[:, 4],
                "values": stop.values,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def forecast(
    seed: int,
    *,
    unit: str,
    variants: tuple[str, ...] = tuple(VARIANTS),
    fractions: tuple[float, ...] = FRACTIONS,
) -> dict[str, Any]:
    """ARE (%) of each protocol on one family and target: the median over models x fractions.

    ``grid_*`` are the cells themselves, rows of numbers of models (2 and more), columns of
    fractions. ``wins`` is the share of cells in which all checkpoints beat only final ones with
    held exponents. ``last`` takes the last loss of the largest model in the fit for the forecast.

    Args:
        seed: not used, nothing is drawn.
        unit: "family/target", one of `UNITS` or of `tiny_units`.
        variants: names of `VARIANTS`.
        fractions: parts of the runs.
    """
    runs, target = family(unit)
    grids = {v: are_grid(runs, target, fractions=fractions, **protocol(v)) for v in variants}
    out: dict[str, Any] = {"family": unit.split("/")[0], "sizes": runs.model.nunique() - 1}
    for name, grid in grids.items():
        cells = 100 * grid["are"].to_numpy()
        out[f"are_{name}"] = float(np.median(cells))
        out[f"grid_{name}"] = cells.reshape(-1, len(fractions))
    out["identified"] = float(grids["all"].identified.mean())
    out["are_last"] = _last(runs, target)
    if {"all", "final_held"} <= set(variants):
        out["wins"] = float(np.mean(out["grid_all"] < out["grid_final_held"]))
    return out


def _last(runs: pd.DataFrame, target: str) -> float:
    ahead = runs[runs.model == target]
    ahead = ahead[ahead["D"] >= 0.7 * ahead["D"].max()]
    below = runs[runs.model != target]
    lowest = below[below["N"] == below["N"].max()].loss.iloc[-1]
    return 100 * are(np.full(len(ahead), lowest), ahead.loss.to_numpy())


def one_model(seed: int, *, unit: str) -> dict[str, Any]:
    """Forecast from one smaller model, the largest: borrow its size term, or do without.

    ``are_borrowed`` holds A and alpha of the replicated Chinchilla fit and fits B, E and beta;
    ``are_free`` fits all five (which one size cannot tell apart); ``are_last`` forecasts no change.

    Args:
        seed: not used, nothing is drawn.
        unit: "family/target" of a family whose losses are nats a token.
    """
    runs, target = family(unit)
    options: dict[str, Any] = {"n_models": 1, "which": "largest"}
    held = estimate(runs, target, fixed=borrow(PRINTED), **options)
    free = estimate(runs, target, **options)
    return {
        "are_borrowed": 100 * held.are,
        "are_free": 100 * free.are,
        "are_last": _last(runs, target),
    }


def components(seed: int, *, unit: str, k: int = 3) -> dict[str, Any]:
    """Fit along k principal components of the parameters of the *other* released sources.

    Losses are in units of the last loss of each family's smallest model.

    Args:
        seed: of the starts.
        unit: "family/target".
        k: components.
    """
    runs, target = family(unit)
    source = unit.split("/")[0].split("_")[0]
    table = released()
    others = [
        table[table.family == name]
        for name in ("opt", "t5_pile", "lamda", "c4_1", "oscar_1")
        if not name.startswith(source)
    ]
    donors = pd.DataFrame([estimate(_unit(rows)).params for rows in others])
    scaled = _unit(runs)
    train = estimate(scaled, target).train
    law = component_law(donors, k)
    fit = fit_law(
        train, law, objective="lsq", fixed={"mean": 1.0}, starts="grid", seed=seed, quiet=True
    )
    ahead = scaled[scaled.model == target]
    ahead = ahead[ahead["D"] >= 0.7 * ahead["D"].max()]
    return {
        "are_components": 100 * are(fit.predict(N=ahead.N, D=ahead.D), ahead.loss.to_numpy()),
        "are_five": 100 * estimate(scaled, target).are,
    }


def _unit(rows: pd.DataFrame) -> pd.DataFrame:
    """Losses in units of the smallest model's last one."""
    return rows.assign(loss=rows.loss / rows[rows["N"] == rows["N"].min()].loss.iloc[-1])
