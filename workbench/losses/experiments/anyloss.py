"""Train on the metric or on something else: perceptrons on tables, a network, synthetic data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, members
from workbench.losses.anyloss import (
    METRICS,
    anyloss,
    f_beta,
    gradient_window,
    scaled_counts,
    score_oriented,
    soft_confusion,
)

TABLES = (
    "pima", "phishing", "breast_cancer", "modechoice", "wine", "anes96", "seattle_weather",
    "shuttle", "yeast6", "land_vs_satan", "abalone19", "synthetic",
)  # fmt: skip
JUDGED = {"accuracy": METRICS["accuracy"], "f1": f_beta(1.0),
          "balanced_accuracy": METRICS["balanced_accuracy"], "gmean": METRICS["gmean"]}  # fmt: skip
OURS = tuple(JUDGED)
SOL = ("f1", "balanced_accuracy")
LOSSES = ("bce", "mse", "under", *(f"sol_{name}" for name in SOL), *OURS)
RATES = (0.01, 0.1, 1.0)
_LEFT_OUT = {"modechoice": ["individual"]}

Loss = Callable[[Tensor], Tensor]  # scores (members..., n) -> one loss a member


def binary(name: str, rows: int = 2000) -> tuple[Tensor, Tensor]:
    """A table with its smallest class as positives: standardised inputs (n, d) and labels (n,).

    Args:
        name: of a table, or ``synthetic`` (3,000 x 10, 7% positives).
        rows: of the table `shuttle`, a fixed sample of its 49,097.
    """
    if name == "synthetic":
        return _synthetic(0)
    table = data.table(name)
    if name == "shuttle":
        table = table.split(0, kept=rows / len(table)).kept
    plain = table.X.drop(columns=_LEFT_OUT.get(name, []))
    x = pd.get_dummies(plain, dtype=float).to_numpy(np.float64)
    x = x[:, x.std(0) > 0]
    y = table.y.to_numpy()
    positive = np.bincount(y).argmin()
    x = (x - x.mean(0)) / x.std(0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor((y == positive).astype(np.float32))


def _synthetic(seed: int) -> tuple[Tensor, Tensor]:
    x, y = make_classification(3000, 10, weights=[0.93], random_state=seed)
    return torch.tensor((x - x.mean(0)) / x.std(0)).float(), torch.tensor(y).float()


# --- perceptrons ---------------------------------------------------------------------------------


def perceptrons(
    x: Tensor, loss: Loss, shape: tuple[int, ...], rates: Tensor, *, steps: int, bias: Any = 0.0
) -> Tensor:
    """Weights (members..., d + 1) after gradient descent on all rows, from zero; bias last.

    Args:
        x: (n, d), shared by all members; who counts for whom is the loss's business.
        loss: of the scores.
        shape: of the members.
        rates: learning rates, broadcast to ``shape``.
        steps: of gradient descent.
        bias: where the bias begins.
    """
    inputs = _with_bias(x)
    w = torch.zeros(*shape, inputs.shape[1])
    w[..., -1] = torch.as_tensor(bias)
    speed = rates.expand(shape)[..., None]
    for _ in range(steps):
        w.requires_grad_()
        (slope,) = torch.autograd.grad(loss(w @ inputs.T).sum(), w)
        w = w.detach() - speed * slope
    return w


def score(w: Tensor, x: Tensor) -> Tensor:
    """Scores (members..., n) of rows (n, d)."""
    return w @ _with_bias(x).T


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def on_table(
    seed: int, table: str, *, folds: int = 10, steps: int = 300, L: float = 73.0
) -> dict[str, Any]:
    """Cross-validated test metrics of perceptrons trained with each loss on one table.

    Of each rotation of the folds one is the test set, the next chooses the learning rate of each
    loss for each metric, the others train. Columns ``metric:loss`` are means over the folds;
    ``threshold`` is cross-entropy with a decision threshold chosen together with its rate.

    Args:
        seed: of the folds, of under-sampling and SMOTE.
        table: one of `TABLES`.
        folds: of the cross-validation.
        steps: of full-batch gradient descent.
        L: steepness of AnyLoss.
    """
    x, y = binary(table)
    fold = torch.empty(len(y), dtype=torch.long)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for i, (_, rows) in enumerate(splitter.split(x, y)):
        fold[torch.from_numpy(rows)] = i
    away = (fold - torch.arange(folds)[:, None]) % folds
    test, valid, train = ((away == 0).float(), (away == 1).float(), (away > 1).float())
    weights = perceptrons(
        x, _all_losses(y, train, _thinned(y, train, seed), L),
        (folds, len(LOSSES), len(RATES)), torch.tensor(RATES), steps=steps,
    )  # fmt: skip
    smote = torch.stack([_smote(x, y, rows > 0, seed, steps) for rows in train])
    scores = score(torch.cat([weights, smote[:, None]], 1), x)
    found: dict[str, Any] = {"positives": float(y.mean()), "rows": len(y)}
    cut = scores[:, 0].quantile(torch.linspace(0.01, 0.995, 60), dim=-1).permute(1, 2, 0)
    moved = scores[:, 0, :, None] - cut[..., None]
    ways = [(scores, (*LOSSES, "smote")), (moved.flatten(1, 2)[:, None], ("threshold",))]
    for z, names in ways:
        counts = [_decided(z, y, part) for part in (valid, test)]
        for metric, function in JUDGED.items():
            tuned, judged = (function(*c) for c in counts)
            values = judged.gather(-1, tuned.argmax(-1, keepdim=True))[..., 0].mean(0)
            found |= {f"{metric}:{n}": v for n, v in zip(names, values.tolist(), strict=True)}
    return found


def _all_losses(y: Tensor, train: Tensor, thinned: Tensor, L: float) -> Loss:
    """The losses of `LOSSES` in order, over scores (folds, losses, rates, n)."""
    share, fewer = train[:, None], thinned[:, None]
    first = len(LOSSES) - len(OURS)

    def each(names: tuple[str, ...]) -> Callable[..., Tensor]:
        def metric(*counts: Tensor) -> Tensor:
            parts = [JUDGED[m](*(c[:, i] for c in counts)) for i, m in enumerate(names)]
            return torch.stack(parts, 1)

        return metric

    def loss(z: Tensor) -> Tensor:
        labels = y.expand_as(z)
        bce = F.binary_cross_entropy_with_logits(
            z[:, [0, 2]], labels[:, [0, 2]], reduction="none"
        )  # fmt: skip
        plain = (bce[:, 0] * share).sum(-1) / share.sum(-1)
        under = (bce[:, 1] * fewer).sum(-1) / fewer.sum(-1)
        square = ((z[:, 1] + 0.5 - labels[:, 1]).square() * share).sum(-1) / share.sum(-1)
        p = torch.sigmoid(z[:, 3:])
        cut = first - 3
        sol = score_oriented(
            p[:, :cut], labels[:, 3:first], metric=each(SOL), delta=0.1, weight=share[:, None]
        )
        ours = anyloss(p[:, cut:], labels[:, first:], metric=each(OURS), L=L, weight=share[:, None])
        return torch.cat([torch.stack([plain, square, under], 1), sol, ours], 1)

    return loss


def _decided(scores: Tensor, y: Tensor, part: Tensor) -> tuple[Tensor, ...]:
    """Counts of decisions at probability one half, (folds, losses, rates), on each fold's part."""
    hard = (scores > 0).float()
    share = part.view(len(part), 1, 1, -1).expand_as(hard)
    return tuple(soft_confusion(hard, y.expand_as(hard), L=1e6, weight=share))


def _thinned(y: Tensor, train: Tensor, seed: int) -> Tensor:
    """Training rows with as many negatives, drawn at random, as positives."""
    from imblearn.under_sampling import RandomUnderSampler

    kept = torch.zeros_like(train)
    for row, rows in zip(kept, train, strict=True):
        at = rows.nonzero()[:, 0].numpy()
        sampler = RandomUnderSampler(random_state=seed)
        sampler.fit_resample(at[:, None], y[at].numpy())
        row[at[sampler.sample_indices_]] = 1.0
    return kept


def _smote(x: Tensor, y: Tensor, rows: Tensor, seed: int, steps: int) -> Tensor:
    """Weights (rates, d + 1) of cross-entropy, training rows filled up with synthetic positives."""
    from imblearn.over_sampling import SMOTE

    near = min(5, int(y[rows].sum()) - 1)
    more, labels = SMOTE(k_neighbors=near, random_state=seed).fit_resample(
        x[rows].numpy(), y[rows].numpy()
    )
    target = torch.tensor(labels)

    def loss(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            z, target.expand_as(z), reduction="none"
        ).mean(-1)  # fmt: skip

    return perceptrons(
        torch.tensor(more), loss, (len(RATES),), torch.tensor(RATES), steps=steps
    )  # fmt: skip


# --- the synthetic table, the steepness, a bad start --------------------------------------

STEEP = (5.0, 20.0, 300.0)


def on_synthetic(
    seed: int, *, steps: int = 1000, rate: float = 0.1, bias: float = -3.0
) -> dict[str, Any]:
    """The paper's recipe (learning rate 0.1, 1,000 steps) on 3,000 x 10 with 7% positives.

    Columns ``metric:loss`` of 900 test rows. ``f1_L5`` and so on change the steepness;
    ``f1_late`` and ``bce_late`` begin with a bias at which every example is called negative.

    Args:
        seed: of the data.
        steps, rate: of gradient descent.
        bias: where the late starters begin.
    """
    x, y = _synthetic(seed)
    names = ("bce", "bce_late", *OURS, *(f"f1_L{L:g}" for L in STEEP), "f1_late")
    steep = torch.tensor([73.0] * len(OURS) + [*STEEP, 73.0])[:, None]

    def loss(z: Tensor) -> Tensor:
        labels = y[:2100].expand_as(z)
        bce = F.binary_cross_entropy_with_logits(z[:2], labels[:2], reduction="none").mean(-1)
        tp, fp, fn, tn = soft_confusion(torch.sigmoid(z[2:]), labels[2:], steep)
        ours = [JUDGED[m](tp[i], fp[i], fn[i], tn[i]) for i, m in enumerate(OURS)]
        f1 = JUDGED["f1"](tp[4:], fp[4:], fn[4:], tn[4:])
        return torch.cat([bce, 1 - torch.stack(ours), 1 - f1])

    begin = torch.tensor([bias if name.endswith("late") else 0.0 for name in names])
    w = perceptrons(x[:2100], loss, (len(names),), torch.tensor(rate), steps=steps, bias=begin)
    hard = (score(w, x[2100:]) > 0).float()
    counts = soft_confusion(hard, y[2100:].expand_as(hard), L=1e6)
    return {
        f"{metric}:{name}": value
        for metric, function in JUDGED.items()
        for name, value in zip(names, function(*counts).tolist(), strict=True)
    }


def window_along(
    table: str,
    *,
    steps: tuple[int, ...] = (0, 1, 5, 20, 100, 300),
    rate: float = 0.01,
    L: float = 73.0,
) -> pd.DataFrame:
    """One perceptron trained on F1 on all rows of a table, looked at along the way.

    Args:
        table: one of `TABLES`.
        steps: when to look.
        rate: learning rate.
        L: steepness.

    Returns:
        Per look ``steps``, false positives, false negatives, F1, and the share of rows ``inside``
        the window (slope of at least 1% of its largest).
    """
    x, y = binary(table)
    rows = []
    for many in steps:
        w = perceptrons(
            x, lambda z: anyloss(torch.sigmoid(z), y.expand_as(z), L=L), (1,), torch.tensor(rate),
            steps=many,
        )  # fmt: skip
        z = score(w, x)[0]
        counts = soft_confusion((z > 0).float(), y, L=1e6)
        inside = (gradient_window(torch.sigmoid(z), L) > 0.01 * L / 16).float().mean()
        rows.append((many, counts.fp, counts.fn, JUDGED["f1"](*counts), inside))
    columns = ["steps", "false positives", "false negatives", "F1", "inside"]
    return pd.DataFrame([[float(v) for v in row] for row in rows], columns=columns)


# --- the paper's network -------------------------------------------------------------------------


class TwoNodes(nn.Module):
    """Two hidden nodes, batch norm, sigmoid, one score; normalised by the rows it is given."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (b, 1)."""
        score: Tensor = self.head(torch.sigmoid(self.norm(self.hidden(x))))
        return score


NETWORK = ("bce", "f1", "balanced_accuracy", "released", "halves")


def on_network(
    seed: int, table: str, *, epochs: int = 100, rates: tuple[float, ...] = (0.003, 0.03)
) -> dict[str, Any]:
    """The paper's network with batches of 5% of the rows, each loss at its better learning rate.

    ``released`` is balanced accuracy with the training set's n beside sums over a batch, as the
    authors' network code has it; ``halves`` has that n at twice the batch, the ratio of the
    authors' run, which takes batches of half the rows for this loss. 60% of the rows train, 20%
    choose the rate, 20% test.

    Args:
        seed: of the split, the weights and the batches.
        table: one of `TABLES`.
        epochs: over the training rows.
        rates: learning rates of Adam to choose from.
    """
    x, y = binary(table)
    place = torch.empty(len(y), dtype=torch.long)
    for i, (_, rows) in enumerate(StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y)):
        place[torch.from_numpy(rows)] = i
    train = (place > 1).nonzero()[:, 0]
    size = len(train) // 20
    train = train[: 20 * size]  # batch norm cannot take a last batch of one row
    m = len(NETWORK) * len(rates)
    model, states = members.start(lambda: TwoNodes(x.shape[1]), [seed] * m)

    def loss(out: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        z, labels = (v.unflatten(0, (len(NETWORK), len(rates))) for v in (out[..., 0], labels))
        bce = F.binary_cross_entropy_with_logits(z[0], labels[0], reduction="none").mean(-1)
        counts = soft_confusion(torch.sigmoid(z[1:]), labels[1:])
        own = [type(counts)(*(c[i] for c in counts)) for i in range(4)]
        balanced = JUDGED["balanced_accuracy"]
        sizes = (len(train), 2 * z.shape[-1])
        metrics = [JUDGED["f1"](*own[0]), balanced(*own[1])]
        metrics += [balanced(*scaled_counts(c, n)) for c, n in zip(own[2:], sizes, strict=True)]
        return torch.cat([bce, *(1 - v for v in metrics)])

    states = members.train(
        model, states, x, y, loss, seeds=[seed] * m, rows=train.expand(m, -1), epochs=epochs,
        batch_size=size, lr=torch.tensor(rates).repeat(len(NETWORK)),
    )  # fmt: skip
    scores = members.outputs(model, states, x)[..., 0].unflatten(0, (len(NETWORK), len(rates)))
    parts = [(place == i).float()[None] for i in (1, 0)]
    found: dict[str, Any] = {}
    for metric, function in JUDGED.items():
        valid, test = (function(*(c[0] for c in _decided(scores[None], y, p))) for p in parts)
        values = test.gather(-1, valid.argmax(-1, keepdim=True))[..., 0]
        found |= {f"{metric}:{n}": v for n, v in zip(NETWORK, values.tolist(), strict=True)}
    return found


# --- what the authors released -------------------------------------------------------------------

RELEASED = {
    "perceptron": "10CV_Perceptron_102datasets(12282023).csv",
    "network": "10CV_MLP_102datasets(12292023).csv",
}
_AIMS = {
    "Acc": ("accuracy", "AccAim"), "F1": ("f1", "F1Aim"), "Gmean": ("gmean", "GAim"),
    "B_Acc": ("balanced_accuracy", "BAim"),
}  # fmt: skip
RELEASED_SIGN_TEST = {
    ("perceptron", "f1"): 0.75888,
    ("perceptron", "balanced_accuracy"): 0.13714,
    ("network", "f1"): 0.4991,
    ("network", "balanced_accuracy"): 0.09702,
}
"""Probability that AnyLoss beats cross-entropy by more than 0.05, as the authors computed it."""

RELEASED_RATES = {
    "cross-entropy": 0.1, "squared error": 0.01, "F1": 0.01, "balanced accuracy": 0.005
}  # fmt: skip
"""Learning rates of the perceptrons in the released run; the paper says 0.1."""


def released(model: str = "perceptron") -> pd.DataFrame | None:
    """The authors' results on 102 data sets, or None without their files.

    One row a data set and metric: ``metric``, ``mse``, ``bce`` and ``ours`` (AnyLoss of that
    metric), means over their ten folds.
    """
    folder = data.authors("anyloss")
    if folder is None:
        return None
    return tidy(pd.read_csv(folder / RELEASED[model]))


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """The released layout, a header repeated before each data set, as one row a result."""
    table = table.rename(columns={table.columns[0]: "score"}).dropna(subset=["score"])
    mse = "MSE" if "MSE" in table else "Delta"
    parts = [
        pd.DataFrame(
            {
                "metric": metric,
                "mse": rows[mse].astype(float),
                "bce": rows.BCE.astype(float),
                "ours": rows[aim].astype(float),
            }
        )
        for score, (metric, aim) in _AIMS.items()
        for rows in [table[table.score == score]]
    ]
    return pd.concat(parts, ignore_index=True)
