"""Predict the runs outside the fit: the authors' 104 models, or the tiny grid without them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.lab import checks, data
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.overtraining_laws import (
    as_loss_law,
    box,
    compute,
    fit_error,
    leave_one_out,
    predict_error,
    predict_loss,
)
from workbench.scaling_laws.solve import solve
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

TRAIN = {"rpj": "RedPajama", "c4_original": "C4", "rw_original": "RefinedWeb"}
VALIDATION = (
    "c4_val", "openlm", "paloma_c4_en", "paloma_falcon-refinedweb", "paloma_redpajama",
    "paloma_ptb", "paloma_dolma_100_programing_languages", "val_de-en_100",
)  # fmt: skip
TASKS = (
    "arc_easy", "bigbench_cs_algorithms", "bigbench_dyck_languages", "bigbench_novel_concepts",
    "bigbench_operators", "bigbench_qa_wikidata", "boolq", "commonsense_qa", "copa", "coqa",
    "hellaswag", "hellaswag_zeroshot", "lambada_openai", "piqa", "pubmed_qa_labeled", "squad",
    "winograd",
)  # fmt: skip
"""The paper's 17 tasks: a model of 154M parameters is ten points better than chance on each."""

PUBLISHED = {
    ("1.4B, M = 640", "loss"): 0.7, ("6.9B, M = 20", "loss"): 0.7,
    ("1.4B, M = 640", "error"): 3.6, ("6.9B, M = 20", "error"): 0.05,
}  # fmt: skip
"""The paper's relative errors in per cent, trained on RedPajama (loss on C4; 17 tasks)."""

LEAST = 20.0  # tokens per parameter at least: below, models are under-trained


def released() -> pd.DataFrame | None:
    """The 104 released runs, or None without them.

    Returns:
        Columns ``train`` (RedPajama, C4, RefinedWeb), ``N`` (all parameters), ``D``, ``M``, ``C``,
        a column of losses per validation set, ``error``, the average over the 17 tasks, and
        ``five`` and ``six``: whether the paper fits the loss and the error to the run.
    """
    folder = data.authors("over_training")
    if folder is None:
        return None
    rows = []
    for file in sorted((folder / "exp_data" / "models").glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        tasks = file.parent.parent / "evals" / f"evaluation_{file.stem}_heavy.json"
        scores = json.loads(tasks.read_text(encoding="utf-8"))["eval_metrics"]["icl"]
        setting = run["hyperparameters"]
        M = 20.0 * setting["chinchilla_multiplier"]
        row: dict[str, Any] = {
            "train": TRAIN[run["dataset_name"]], "N": setting["params"], "D": setting["tokens"],
            "M": M, "C": float(compute(setting["params"], M)),
        }  # fmt: skip
        for result in run["results"]:
            shard = result["val_data"][0]
            row[next(name for name in VALIDATION if f"{name}/" in shard or f"{name}." in shard)] = (
                result["loss"]
            )
        row["error"] = float(np.mean([1.0 - scores[task] for task in TASKS]))
        rows.append(row)
    table = pd.DataFrame(rows).sort_values(["train", "N", "M"], ignore_index=True)
    table["five"] = np.concatenate([paper_fit(runs) for _, runs in table.groupby("train")])
    fifth = np.sort(table["N"].unique())[4]
    table["six"] = table["five"] | ((table["N"] == fifth) & (table["M"] == 20))
    return table


def tiny_runs(made: str = "laptop") -> pd.DataFrame:
    """Finished runs of the tiny grid: ``N`` (all parameters), ``D``, ``M``, ``C``, ``loss``, ..."""
    table = tiny_lm_grid(made)
    table = table[table.phase == "decayed"].rename(columns={"tokens": "D"})
    table = table.assign(
        N=table.N_total, M=table.D / table.N_total, C=6.0 * table.N_total * table.D
    )
    return table[["N", "D", "M", "C", "batch", "seed", "budget", "loss"]].reset_index(drop=True)


def paper_fit(runs: pd.DataFrame) -> np.ndarray:
    """Which runs of one training set the paper fits: four sizes at M = 20, the smallest at 320."""
    small = np.sort(runs["N"].unique())[:4]
    return np.asarray(
        (runs["N"].isin(small) & (runs["M"] == 20)) | ((runs["N"] == small[0]) & (runs["M"] == 320))
    )


def cheap_fit(runs: pd.DataFrame) -> np.ndarray:
    """Which runs cost no more than the dearest of the paper's five, under-trained ones left out."""
    limit = runs["C"][paper_fit(runs)].max()
    return np.asarray((runs["C"] <= limit) & (runs["M"] >= LEAST))


def fit_and_predict(
    runs: pd.DataFrame, used: np.ndarray, loss: str, *, starts: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Losses of all runs, predicted by three laws fitted to the same rows with as many starts.

    ``law`` is the over-training law, ``free`` Chinchilla's with an exponent for either term,
    ``compute`` a power law of compute that knows no M. The free law begins at the over-training
    law's optimum too, so it never fits the rows worse; where several pairs of exponents fit them
    equally well, the pair that differs least is taken.

    Returns:
        Predictions by law; constants of the laws.
    """
    N, M, C, L = (runs[q].to_numpy(float) for q in ("N", "M", "C", loss))
    rows = {"N": N[used], "M": M[used], "D": N[used] * M[used], "x": C[used] / C[used].min()}
    over = _best("over_training", rows, L[used], starts, seed)
    free = _best("chinchilla", rows, L[used], starts, seed, also=over[[0, 1, 2, 3, 3]])
    law = as_loss_law(over)
    A, B, E, alpha, beta = LAWS["chinchilla"].natural(free).tolist()
    alone = _best("power", rows, L[used], starts, seed)
    scale, floor, power = LAWS["power"].natural(alone).tolist()
    predicted = {
        "law": predict_loss(C, M, law),
        "free": E + A * N**-alpha + B * (N * M) ** -beta,
        "compute": floor + scale * (C / C[used].min()) ** -power,
    }
    constants = {"a": law.a, "b": law.b, "eta": law.eta, "E": law.E}
    constants |= {"alpha": alpha, "beta": beta, "E_free": E, "best_M": law.best_multiplier}
    return predicted, constants


def predict_released(
    seed: int,
    *,
    train: str = "RedPajama",
    validation: str = "c4_val",
    fit: str = "five",
    starts: int = 128,
) -> dict[str, Any]:
    """Fit on cheap runs of one training set, predict its other runs with M >= 20.

    Args:
        seed: of the starts.
        train: RedPajama, C4 or RefinedWeb.
        validation: column of the loss.
        fit: "five" (the paper's rows) or "cheap" (`cheap_fit`).
        starts: of each law.

    Returns:
        ``err_*``: mean relative error in per cent over the held-out runs, by law; arrays ``N``,
        ``M``, ``loss``, ``each_*`` over them; ``fitted_*``: mean relative error on the rows of the
        fit; the constants.
    """
    runs = _released(train)
    chosen = {"five": paper_fit, "cheap": cheap_fit}
    used = chosen[checks.one_of(fit, chosen, "fit")](runs)
    predicted, constants = fit_and_predict(runs, used, validation, starts=starts, seed=seed)
    return _summary(runs, used, runs[validation].to_numpy(float), predicted) | constants


def predict_tiny(
    seed: int, *, batch: int = 1536, starts: int = 128, made: str = "laptop"
) -> dict[str, Any]:
    """Fit on all but the largest size and the largest budget of the tiny grid, predict these.

    Args:
        seed: which of the table's seeds, counted round; and of the starts.
        batch: batch size of the runs.
        starts: of each law.
        made: scale at which the rows were trained.
    """
    runs = tiny_runs(made)
    seeds = sorted(runs["seed"].unique())
    runs = runs[(runs["batch"] == batch) & (runs["seed"] == seeds[seed % len(seeds)])]
    used = np.asarray((runs["N"] < runs["N"].max()) & (runs["budget"] < runs["budget"].max()))
    predicted, constants = fit_and_predict(runs, used, "loss", starts=starts, seed=seed)
    return _summary(runs, used, runs["loss"].to_numpy(float), predicted, least=0.0) | constants


def predict_downstream(
    seed: int, *, train: str = "RedPajama", validation: str = "c4_val", starts: int = 128
) -> dict[str, Any]:
    """Average error of the held-out runs, through the predicted loss and straight from the sizes.

    The loss law is fitted to the paper's five runs, the error law to these and the 1.4B run at
    M = 20. ``direct`` fits the over-training law to the errors of the same six runs, with as many
    starts: the same inputs, no detour. ``seen`` is the error law at the measured loss.

    Returns:
        As `predict_released`; errors are relative to the measured top-1 error.
    """
    runs = _released(train)
    five, six = runs["five"].to_numpy(), runs["six"].to_numpy()
    predicted, _ = fit_and_predict(runs, five, validation, starts=starts, seed=seed)
    loss, error = runs[validation].to_numpy(float), runs["error"].to_numpy(float)
    law = fit_error(loss[six], error[six])
    N, M, C = (runs[q].to_numpy(float) for q in ("N", "M", "C"))
    straight = _best("over_training", {"N": N[six], "M": M[six]}, error[six], starts, seed)
    direct = predict_loss(C, M, as_loss_law(straight))
    chained = {
        "law": predict_error(predicted["law"], law), "direct": direct,
        "free": predict_error(predicted["free"], law), "seen": predict_error(loss, law),
    }  # fmt: skip
    constants = {"k": law.k, "gamma": law.gamma, "eps": law.eps}
    return _summary(runs, six, error, chained) | constants


def without_one(
    seed: int, *, train: str = "RedPajama", validation: str = "c4_val"
) -> dict[str, Any]:
    """What the five-run fit foretells when one of the five is missing.

    Args:
        seed: unused by the fit, which starts from a fixed grid.
        train: training set.
        validation: column of the loss.

    Returns:
        ``without_N`` and ``without_M`` of the run left out; ``loss_over`` and ``loss_large``, the
        predictions for the dearest 1.4B run and the 6.9B run; ``true_*``; and the errors predicted
        from these (``error_*``).
    """
    runs = _released(train)
    five, six = runs[runs["five"]], runs[runs["six"]]
    laws = leave_one_out(five["N"], five["M"], five[validation])
    sizes = np.sort(runs["N"].unique())
    over = runs[runs["N"] == sizes[4]].sort_values("M").iloc[-1]
    large = runs[runs["N"] == sizes[5]].iloc[0]
    error = fit_error(six[validation], six["error"])
    out: dict[str, Any] = {
        "without_N": five["N"].to_numpy(float)[list(laws)],
        "without_M": five["M"].to_numpy(float)[list(laws)],
    }
    for name, target in (("over", over), ("large", large)):
        losses = [float(predict_loss(target.C, target.M, law)) for law in laws.values()]
        out[f"loss_{name}"] = np.array(losses)
        out[f"error_{name}"] = predict_error(losses, error)
        out[f"true_{name}"], out[f"M_{name}"] = float(target[validation]), float(target.M)
    return out


def by_run(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a held-out run, out of rows that hold arrays over them.

    Rows that differ in the seed of the starts only are averaged.
    """
    arrays = ["N", "M", "observed", *(c for c in frame.columns if c.startswith("each_"))]
    names = [c for c in ("train", "validation", "batch", "fit") if c in frame]
    out = pd.concat(
        [
            pd.DataFrame({c: row[c] for c in arrays}).assign(**{c: row[c] for c in names})
            for _, row in frame.iterrows()
        ]
    )
    out = out.groupby([*names, "N", "M"], as_index=False, sort=False).mean()
    out.attrs = dict(frame.attrs)
    return out


def _released(train: str) -> pd.DataFrame:
    table = released()
    if table is None:
        raise ValueError("the released runs are not on this machine; bring them first")
    checks.one_of(train, TRAIN.values(), "train")
    return table[table["train"] == train].reset_index(drop=True)


def _best(
    name: str,
    rows: dict[str, np.ndarray],
    observed: np.ndarray,
    starts: int,
    seed: int,
    also: torch.Tensor | None = None,
) -> torch.Tensor:
    """The law's least-squares optimum over as many starts, in the solver's coordinates."""
    law = LAWS[name]
    begin = law.draw(starts, torch.Generator().manual_seed(seed))
    if also is not None:
        begin = torch.cat([also[None], begin])
    inputs = {q: torch.tensor(rows[q]) for q in law.inputs}
    lower, upper = box(law)
    found = solve(
        law, inputs, torch.tensor(observed), begin, objective="lsq", lower=lower, upper=upper
    )
    best = found.theta[found.objective <= found.objective.min() * (1 + 1e-6) + 1e-12]
    exponents = best[:, [not log for log in law.logs]]
    return best[(exponents.amax(1) - exponents.amin(1)).argmin()]


def _summary(
    runs: pd.DataFrame,
    used: np.ndarray,
    observed: np.ndarray,
    predicted: dict[str, np.ndarray],
    least: float = LEAST,
) -> dict[str, Any]:
    held = ~used & np.asarray(runs["M"] >= least)
    out: dict[str, Any] = {q: runs[q].to_numpy(float)[held] for q in ("N", "M")}
    out["observed"] = observed[held]
    out["fitted"] = int(used.sum())
    for name, values in predicted.items():
        off = np.round(100 * (values / observed - 1), 4)  # what the solver's tolerance leaves sure
        out[f"each_{name}"] = np.abs(off[held])
        out[f"err_{name}"] = float(np.abs(off[held]).mean())
        out[f"bias_{name}"] = float(off[held].mean())
        out[f"fitted_{name}"] = float(np.abs(off[used]).mean())
    return out
