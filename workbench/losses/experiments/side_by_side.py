"""Every loss of the family on 13 data sets, with clean, wrong and missing labels.

One call trains all losses on one data set: `trial`. `tidy` turns calls into a frame with a row for
each loss, condition and repeat; `against` and `rankings` say what it shows over data sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.lab import checks, data, ranks
from workbench.lab.claims import interval
from workbench.lab.models import MLP
from workbench.losses import noise, tables, trials, zoo
from workbench.losses.naive_bayes import SharedVarianceNB

DATA = (
    "iris", "wine", "breast_cancer", "anes96", "modechoice", "abalone19", "yeast6",
    "land_vs_satan", "pima", "phishing", "shuttle", "seattle_weather", "mnist5000",
)  # fmt: skip
WRONG = {
    "clean": ("symmetric", 0.0),
    "symmetric 20%": ("symmetric", 0.2),
    "symmetric 40%": ("symmetric", 0.4),
    "by class 20%": ("class_dependent", 0.2),
    "by class 40%": ("class_dependent", 0.4),
}
RARE = {"imbalance 1:10": 10, "imbalance 1:100": 100}
CONDITIONS = (*WRONG, *RARE)
GROUPS = {
    "clean labels": ("clean",),
    "symmetric noise": ("symmetric 20%", "symmetric 40%"),
    "noise by class": ("by class 20%", "by class 40%"),
    "imbalance": tuple(RARE),
}
JUDGE = dict.fromkeys(WRONG, "accuracy") | dict.fromkeys(RARE, "balanced_accuracy")
NAIVE = "naive_bayes"
MEASURES = ("accuracy", "balanced_accuracy", "f1_macro")


def load(name: str, rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """A data set with classes numbered from the most to the least frequent; tables are sampled.

    Args:
        name: table of `lab.data`, or ``mnist5000``, which is not sampled.
        rows: at most, in the proportions of the classes.
        seed: of the sample.
    """
    if name == "mnist5000":
        images = data.mnist5000().flat
        return pd.DataFrame(images.x), images.y
    found = data.table(name)
    y = found.y.to_numpy()
    by_size = np.argsort(-np.bincount(y), kind="stable")
    y = np.argsort(by_size)[y]
    if len(y) > rows:
        kept = tables.held_out(y, rows / len(y), np.random.default_rng(seed))[1]
        return found.X.iloc[kept].reset_index(drop=True), y[kept]
    return found.X, y


def inputs(
    name: str, X: pd.DataFrame, train: np.ndarray, *others: np.ndarray, parts: int, seed: int
) -> list[Tensor]:
    """Encoded inputs; of images the first principal components of the training part.

    Args:
        name: of the data set.
        X: (n, d).
        train: rows that everything is fitted on.
        *others: further rows.
        parts: principal components kept, all brought to one common scale.
        seed: of the randomised decomposition.
    """
    if name != "mnist5000":
        return tables.encoded(X, train, *others)
    from sklearn.decomposition import PCA

    pixels = X.to_numpy()
    fitted = PCA(parts, random_state=seed).fit(pixels[train])
    scale = math.sqrt(fitted.explained_variance_.mean())
    return [
        torch.tensor(fitted.transform(pixels[r]) / scale, dtype=torch.float32)
        for r in (train, *others)
    ]


def corrupted(y: Tensor, kind: str, rate: float, classes: int, source: torch.Generator) -> Tensor:
    """Wrong labels; by class: c becomes c + 1, of two classes only the larger one loses labels.

    With two classes the cyclic shift would be symmetric noise.
    """
    if kind == "symmetric":
        return noise.symmetric(y, classes, rate, source)
    if classes > 2:
        return noise.class_dependent(y, classes, rate, source)
    one_sided = torch.tensor([[1 - rate, rate], [0.0, 1.0]], dtype=torch.float64)
    return noise.flip(y, one_sided, source)


def supports(y: np.ndarray, ratio: float, least: int = 4) -> bool:
    """Whether every class keeps ``least`` rows when the smallest is cut to 1 for ``ratio``."""
    sizes = np.bincount(y)
    return bool(min(sizes.min(), round(sizes.max() / ratio)) >= least)


def trial(
    *,
    seed: int,
    table: str,
    losses: Sequence[str] = tuple(zoo.ZOO),
    repeats: int = 5,
    rows: int = 1500,
    steps: int = 200,
    hidden: int = 32,
    batch_size: int = 64,
    lrs: Sequence[float] = (3e-3, 1e-2, 3e-2),
    components: int = 50,
    test: float = 0.25,
    validation: float = 0.2,
    least: int = 4,
) -> dict[str, Any]:
    """All losses that it has classes enough for on one data set, where it supports the condition.

    A quarter is the test part, with its own labels. Of the rest a fifth is the validation part.
    Labels of both are made wrong, or their rows rarer, in the same way. For each loss the learning
    rate with the best validation measure is taken: accuracy, and balanced accuracy under imbalance.
    Naive Bayes with a shared variance, which minimises no loss of labels given inputs, is run
    beside them.

    Args:
        seed: of the sample, and with the repeat's number of all else.
        table: name in ``DATA``.
        losses: names in `zoo.ZOO`.
        repeats: other splits, noise and weights.
        rows: a table is sampled down to this many.
        steps: of Adam, at least; whole passes over the rows.
        hidden: units of the one hidden layer.
        batch_size: rows a step.
        lrs: learning rates.
        components: principal components of images.
        test: share of rows.
        validation: share of the rest.
        least: rows of the smallest class below which imbalance is not tried.

    Returns:
        ``conditions`` (c,), ``losses`` (l,) with naive Bayes last, ``lr`` (c, repeats, l), and
        ``accuracy``, ``balanced_accuracy`` and ``f1_macro`` (c, repeats, l) on the test part.
    """
    checks.one_of(table, DATA, "table")
    X, y = load(table, rows, seed)
    classes = int(y.max()) + 1
    chosen = {n: e for n, e in zoo.entries(list(losses)).items() if e.least <= classes}
    splits = [_split(table, X, y, test, validation, components, [seed, r]) for r in range(repeats)]
    width = max(s["x_train"].shape[1] for s in splits)
    for s in splits:
        s.update({k: tables.wide(s[k], width) for k in ("x_train", "x_validate", "x_test")})
    develop = np.concatenate([splits[0]["y_train"], splits[0]["y_validate"]])
    groups = [tuple(WRONG)] + [(c,) for c, r in RARE.items() if supports(develop, r, least)]
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*MEASURES, "lr")}
    for conditions in groups:
        problems = [_problem(s, c, classes) for c in conditions for s in splits]
        size = min(len(p["y_train"]) for p in problems)
        trained = trials.train(
            lambda: MLP((width, hidden, classes)),
            torch.stack([p["x_train"][:size] for p in problems]),
            torch.stack([p["y_train"][:size] for p in problems]),
            chosen,
            classes=classes,
            lrs=lrs,
            seeds=[p["seed"] for p in problems],
            epochs=math.ceil(steps / math.ceil(size / batch_size)),
            batch_size=batch_size,
        )
        judged = [
            _judge(trained.problem(i), p, JUDGE[conditions[0]], lrs, classes)
            for i, p in enumerate(problems)
        ]
        for name, values in found.items():
            values.append(np.stack([j[name] for j in judged]).reshape(len(conditions), repeats, -1))
    return {
        "conditions": np.array([c for group in groups for c in group]),
        "losses": np.array([*chosen, NAIVE]),
        "rows": len(y),
        "classes": classes,
        **{name: np.concatenate(values) for name, values in found.items()},
    }


def _split(
    name: str,
    X: pd.DataFrame,
    y: np.ndarray,
    test: float,
    validation: float,
    components: int,
    seed: Sequence[int],
) -> dict[str, Any]:
    """Training, validation and test part of one repeat, with correct labels, encoded together."""
    rng = np.random.default_rng(seed)
    rest, held = tables.held_out(y, test, rng)
    fit, check = (rest[r] for r in tables.held_out(y[rest], validation, rng))
    draw = int(rng.integers(2**31))
    x = inputs(name, X, fit, check, held, parts=components, seed=draw)
    encoded = dict(zip(("x_train", "x_validate", "x_test"), x, strict=True))
    labels = {"y_train": y[fit], "y_validate": y[check], "y_test": y[held]}
    return {**encoded, **labels, "seed": draw}


def _problem(split: Mapping[str, Any], condition: str, classes: int) -> dict[str, Any]:
    """A split under a condition: wrong labels, or fewer rows, in training and validation."""
    out = dict(split)
    source = torch.Generator().manual_seed(split["seed"])
    for part in ("train", "validate"):
        y = torch.from_numpy(split[f"y_{part}"])
        if condition in WRONG:
            y = corrupted(y, *WRONG[condition], classes, source)
        else:
            kept = noise.imbalanced(y, RARE[condition], source, least=1)
            kept = kept[torch.randperm(len(kept), generator=source)]
            y, out[f"x_{part}"] = y[kept], split[f"x_{part}"][kept]
        out[f"y_{part}"] = y
    return out


def _judge(
    trained: trials.Trained,
    problem: Mapping[str, Any],
    measure: str,
    lrs: Sequence[float],
    classes: int,
) -> dict[str, np.ndarray]:
    """Measures (l + 1,) of each loss at its best learning rate, and of naive Bayes."""
    logits = trained.outputs(problem["x_validate"][None])[:, :, 0]
    best = trials.score(measure, logits, problem["y_validate"]).argmax(1)
    logits = trained.outputs(problem["x_test"][None])[torch.arange(len(best)), best, 0]
    naive = SharedVarianceNB().fit(problem["x_train"].numpy(), problem["y_train"].numpy())
    predicted = torch.from_numpy(naive.predict(problem["x_test"].numpy()))
    everyone = torch.cat([logits.argmax(-1), predicted[None]])
    counts = trials.confusion(everyone, torch.from_numpy(problem["y_test"]), classes)
    return {name: trials.COUNTED[name](counts).numpy() for name in MEASURES} | {
        "lr": np.append(np.asarray(lrs)[best], np.nan)
    }


# --- what it shows -------------------------------------------------------------------------------


def tidy(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each data set, condition, repeat and loss, with every measure.

    ``score`` is the measure that the condition is judged by. Each call's arrays become rows.
    """
    parts = []
    for call in runs.to_dict("records"):
        shape = call["accuracy"].shape
        index = pd.MultiIndex.from_product(
            [call["conditions"], range(shape[1]), call["losses"]],
            names=["condition", "repeat", "loss"],
        )
        measures = {name: call[name].ravel() for name in (*MEASURES, "lr")}
        part = pd.DataFrame(measures, index=index).reset_index()
        part.insert(0, "table", call["table"])
        parts.append(part)
    out = pd.concat(parts, ignore_index=True)
    out["label"] = [zoo.ZOO[n].label if n in zoo.ZOO else "naive Bayes" for n in out["loss"]]
    judge = out["condition"].map(JUDGE)
    out["score"] = np.where(judge == "accuracy", out["accuracy"], out["balanced_accuracy"])
    return out


def blocks(frame: pd.DataFrame, conditions: Sequence[str], value: str = "score") -> pd.DataFrame:
    """Means over repeats and conditions: a row a data set that has them all, a column a loss.

    NaN where a loss was not tried on a data set.
    """
    part = frame[frame["condition"].isin(conditions)]
    complete = part.groupby("table")["condition"].transform("nunique") == len(conditions)
    wide = part[complete].pivot_table(index="table", columns="label", values=value, sort=False)
    return wide[[label for label in dict.fromkeys(frame["label"]) if label in wide]]


def rankings(frame: pd.DataFrame) -> dict[str, ranks.Ranking]:
    """Losses that were tried on all data sets, ranked over them for each group of conditions."""
    there = set(frame["condition"])
    groups = {name: [c for c in group if c in there] for name, group in GROUPS.items()}
    wide = {name: blocks(frame, group).dropna(axis=1) for name, group in groups.items() if group}
    return {name: ranks.ranking(found) for name, found in wide.items() if len(found) > 1}


def against(frame: pd.DataFrame, baseline: str = "cross-entropy") -> pd.DataFrame:
    """Mean difference to a baseline over data sets, with a 95% t interval, in percentage points.

    Returns:
        A row for each condition and loss: ``difference``, ``low``, ``high``, ``p`` (Wilcoxon's
        signed-rank test over data sets, adjusted by Holm within the condition), ``rank`` (mean over
        data sets, of the losses tried on all; else NaN), ``tables`` (how many).
    """
    rows = []
    for condition in [c for c in CONDITIONS if c in set(frame["condition"])]:
        wide = blocks(frame, [condition])
        everywhere = wide.dropna(axis=1)
        mean = dict(zip(everywhere, ranks.ranks(everywhere).mean(0), strict=True))
        others = [label for label in wide if label != baseline]
        pairs = [wide[[label, baseline]].dropna() for label in others]
        p = ranks.holm([float(ranks.wilcoxon(pair)["p"].iloc[0]) for pair in pairs])
        adjusted = dict(zip(others, p, strict=True))
        for label in wide:
            d = 100 * (wide[label] - wide[baseline]).dropna().to_numpy()
            low, high = interval(d) if len(d) > 1 else (-math.inf, math.inf)
            rows.append(
                {
                    "condition": condition,
                    "label": label,
                    "difference": d.mean(),
                    "low": low,
                    "high": high,
                    "p": float(adjusted.get(label, 1.0)),
                    "rank": float(mean.get(label, np.nan)),
                    "tables": len(d),
                }
            )
    return pd.DataFrame(rows)
