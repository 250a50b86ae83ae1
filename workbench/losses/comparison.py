"""Losses compared on a table: cross-validated, tuned equally, paired, with honest intervals.

`compare` trains a small network with each loss on the same folds from the same weights and returns
a `Comparison`. Folds of one table share training rows, so that the usual interval of their
differences is too narrow; Nadeau and Bengio's correction is used throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lab import checks, ranks
from workbench.lab.models import MLP
from workbench.lab.progress import Progress
from workbench.losses import noise as wrong_labels
from workbench.losses import tables, trials, zoo

if TYPE_CHECKING:
    import pandas as pd

LRS = (3e-3, 1e-2, 3e-2)
LOSSES = (
    "cross_entropy", "gce", "focal", "ldr_kl", "aldr_kl", "ensloss", "anyloss_f1", "dsc",
)  # fmt: skip
Factory = Callable[[int, int], nn.Module]
Noise = tuple[str, float] | Callable[[Tensor, int, torch.Generator], Tensor] | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        frame: a row for each loss, repeat and fold: ``score`` on the fold, ``validation`` and
            ``lr`` of the learning rate chosen, ``loss`` and ``label``.
        metric: its name.
        better: ``higher`` or ``lower``.
        baseline: label of the loss that the others are compared with.
        folds, repeats: of cross-validation.
        classes: names of the classes.
        settings: how the networks were trained, in words.
    """

    frame: pd.DataFrame
    metric: str
    better: str
    baseline: str
    folds: int
    repeats: int
    classes: tuple[str, ...]
    settings: str = field(repr=False)

    @property
    def scores(self) -> pd.DataFrame:
        """Scores with a row for each repeat and fold and a column for each loss."""
        order = list(dict.fromkeys(self.frame["label"]))
        wide = self.frame.pivot(index=["repeat", "fold"], columns="label", values="score")
        return wide[order]

    def differences(self, baseline: str | None = None) -> pd.DataFrame:
        r"""Each loss minus the baseline on the same folds, positive where it is better.

        ``low`` and ``high`` are ends of a 95% interval by Nadeau and Bengio's corrected t
        (`lab.ranks.resampled`), ``p`` is its two-sided probability and ``adjusted`` that by Holm's
        method for all losses.

        Args:
            baseline: label of a loss; default the comparison's.

        Raises:
            ValueError: there is no such loss.
        """
        import pandas as pd

        scores = self.scores
        base = checks.one_of(baseline or self.baseline, scores.columns, "baseline")
        sign = 1 if self.better == "higher" else -1
        others = [name for name in scores if name != base]
        found = [self._paired(sign * (scores[name] - scores[base])) for name in others]
        out = pd.DataFrame(
            [(f.mean, f.low, f.high, f.p) for f in found],
            columns=["difference", "low", "high", "p"],
            index=pd.Index(others, name="loss"),
        )
        out["adjusted"] = ranks.holm(out["p"].to_numpy())
        return out

    def _paired(self, differences: Any) -> ranks.Resampled:
        return ranks.resampled(np.asarray(differences, float), 1 / (self.folds - 1))

    @property
    def mean_ranks(self) -> dict[str, float]:
        """Mean rank by loss over repeats and folds, the best first."""
        scores = self.scores
        mean = ranks.ranks(scores, self.better).mean(0)
        pairs = sorted(zip(scores.columns, mean, strict=True), key=lambda pair: pair[1])
        return {str(name): float(rank) for name, rank in pairs}

    @property
    def alike(self) -> list[tuple[str, ...]]:
        """Largest sets of neighbours in rank of which no two differ at 5% (Holm, all pairs).

        The folds are not independent blocks, so these sets come from corrected t tests of the
        scores and not from Nemenyi's critical difference, which would be too small.
        """
        scores = self.scores
        names = list(scores.columns)
        pairs = list(combinations(range(len(names)), 2))
        p = [self._paired(scores[names[i]] - scores[names[j]]).p for i, j in pairs]
        same = np.eye(len(names), dtype=bool)
        for (i, j), adjusted in zip(pairs, ranks.holm(p), strict=True):
            same[i, j] = same[j, i] = adjusted > 0.05
        order = [self.mean_ranks[name] for name in names]
        return [tuple(names[i] for i in group) for group in ranks.groups(order, same)]

    def table(self, digits: int = 3) -> pd.DataFrame:
        """Losses by mean rank: score, rank, difference to the baseline with its interval, rate."""
        import pandas as pd

        by = self.frame.groupby("label", sort=False)
        score, rate = by["score"].mean(), by["lr"].agg(lambda v: v.mode().iloc[0])
        against = self.differences()
        rows = {}
        for name, rank in self.mean_ranks.items():
            text, adjusted = "baseline", ""
            if name != self.baseline:
                mean, low, high, _, p = against.loc[name]
                text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
                adjusted = f"{p:.2g}"
            rows[name] = {
                self.metric: round(float(score[name]), digits),
                "mean rank": round(rank, 2),
                f"better than {self.baseline} by": text,
                "p (Holm)": adjusted,
                "rate chosen most": f"{rate[name]:g}",
            }
        return pd.DataFrame(rows).T.rename_axis("loss")

    def __str__(self) -> str:
        return f"{self.table()}\n{self.settings}"


def compare(
    X: Any,
    y: Any,
    *,
    model: Factory | None = None,
    losses: Sequence[zoo.Given] | Mapping[str, zoo.Given] = LOSSES,
    metric: str | Callable[..., float] = "accuracy",
    better: str | None = None,
    baseline: str | None = None,
    folds: int = 5,
    repeats: int = 3,
    noise: Noise = None,
    lrs: Sequence[float] = LRS,
    validation: float = 0.2,
    epochs: int | None = None,
    batch_size: int = 64,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Comparison:
    """Compare losses on a table of your own.

    For each repeat and fold every loss trains a network at each learning rate on the same rows,
    from the same weights, in the same order; the rate is chosen by the metric on a validation part
    of the training rows, and that network (not refitted) is judged on the fold. Nothing is fitted
    outside the training part.

    Args:
        X: data frame (numbers and categories, missing values allowed), or array (n, d).
        y: (n,) class labels of any kind.
        model: ``model(inputs, classes) -> nn.Module``; default an MLP with 64 hidden units.
        losses: names in `zoo.ZOO`, functions ``loss(logits, y) -> scalar``, modules; or a mapping
            from names to any of these.
        metric: ``accuracy``, ``balanced_accuracy``, ``f1`` (of the second of two classes, sorted),
            ``f1_macro``, ``log_loss`` (of the softmax), or ``metric(y, predicted) -> number`` with
            class numbers.
        better: ``higher`` or ``lower``, for a metric of your own; default higher.
        baseline: name of the loss to compare with; default the first.
        folds: of stratified cross-validation, at least 2.
        repeats: times it is repeated with other folds, weights and orders.
        noise: ``("symmetric", rate)``, ``("class_dependent", rate)``, or ``noise(y, classes,
            generator) -> y``: wrong labels in training and validation, never in the test fold.
        lrs: learning rates of Adam to choose from.
        validation: share of the training rows that choose.
        epochs: passes over the training rows; default 20, and more on a small table, so that there
            are at least 300 steps.
        batch_size: rows a step.
        weight_decay: L2 penalty's factor.
        seed: of folds, weights, orders and noise.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: labels are missing, a class has fewer rows than folds, or an argument is out of
            range; the message names it.
    """
    import pandas as pd
    from sklearn.model_selection import StratifiedKFold

    chosen = zoo.entries(losses)
    table, labels, names = tables.checked(X, y)
    classes = len(names)
    folds = checks.count(folds, "folds", minimum=2)
    repeats, seed = checks.count(repeats, "repeats"), checks.count(seed, "seed", minimum=0)
    share = checks.fraction(validation, "validation", zero=False, one=False)
    rates = [checks.positive(lr, "lrs") for lr in lrs]
    direction = _direction(metric, better)
    trials.score(metric, torch.eye(classes), torch.arange(classes))
    base = checks.one_of(next(iter(chosen)) if baseline is None else baseline, chosen, "baseline")
    sizes = np.bincount(labels)
    if sizes.min() < folds:
        raise ValueError(
            f"y: class {names[int(sizes.argmin())]!r} has {sizes.min()} row(s); {folds} folds need "
            f"at least {folds}"
        )
    corrupt = _noise(noise)
    build = model or _default
    rows = []
    with Progress("compare losses", repeats) as bar:
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, repeat])
            cuts = StratifiedKFold(folds, shuffle=True, random_state=int(rng.integers(2**31)))
            parts = [
                _fold(table, labels, train, test, share, corrupt, classes, rng)
                for train, test in cuts.split(labels, labels)
            ]
            width = max(part[0].shape[1] for part in parts)
            least = min(len(part[1]) for part in parts)
            passes = checks.count(epochs, "epochs") if epochs else _epochs(least, batch_size)
            trained = trials.train(
                lambda width=width: build(width, classes),  # type: ignore[misc]
                torch.stack([tables.wide(part[0], width)[:least] for part in parts]),
                torch.stack([part[1][:least] for part in parts]),
                chosen,
                classes=classes,
                lrs=rates,
                seeds=[int(rng.integers(2**31)) for _ in parts],
                epochs=passes,
                batch_size=batch_size,
                weight_decay=weight_decay,
            )
            for f, part in enumerate(parts):
                rows += [
                    {"repeat": repeat, "fold": f, **row}
                    for row in _judged(trained, f, part, width, chosen, rates, metric, direction)
                ]
            bar.step()
    frame = pd.DataFrame(rows)
    about = (
        f"{repeats} x {folds}-fold cross-validation, {passes} epochs of Adam in minibatches of "
        f"{batch_size}, learning rate of {rates} chosen on {share:.0%} of the training rows for "
        "each loss and fold; intervals by the corrected t of Nadeau and Bengio (2003)"
    )
    title = metric if isinstance(metric, str) else str(getattr(metric, "__name__", "metric"))
    return Comparison(frame, title, direction, chosen[base].label, folds, repeats, names, about)


def _default(inputs: int, classes: int) -> nn.Module:
    return MLP((inputs, 64, classes))


def _epochs(rows: int, batch_size: int) -> int:
    return max(20, math.ceil(300 / math.ceil(rows / batch_size)))


def _direction(metric: Any, better: str | None) -> str:
    own = "lower" if metric == "log_loss" else "higher"
    if isinstance(metric, str):
        if better not in (None, own):
            raise ValueError(f"better: {metric!r} is better when {own}")
        return own
    if not callable(metric):
        raise TypeError(f"metric: expected a name or a function, got {metric!r}")
    return str(checks.one_of(better or own, ("higher", "lower"), "better"))


def _noise(noise: Noise) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    if noise is None:
        return lambda y, classes, generator: y
    if callable(noise):
        return noise
    kinds = {
        "symmetric": wrong_labels.symmetric,
        "class_dependent": wrong_labels.class_dependent,
    }
    if not isinstance(noise, tuple) or len(noise) != 2:
        raise TypeError(f"noise: expected (kind, rate), a function or None, got {noise!r}")
    fn = kinds[checks.one_of(noise[0], kinds, "noise")]
    rate = checks.fraction(noise[1], "noise")
    return lambda y, classes, generator: fn(y, classes, rate, generator)


Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fold(
    table: pd.DataFrame,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    share: float,
    corrupt: Callable[[Tensor, int, torch.Generator], Tensor],
    classes: int,
    rng: np.random.Generator,
) -> Part:
    """x and y of training, validation and test; labels of the first two may be wrong."""
    source = torch.Generator().manual_seed(int(rng.integers(2**31)))
    given = np.asarray(corrupt(torch.from_numpy(labels[train]), classes, source))
    fit, check = tables.held_out(given, share, rng)
    x = tables.encoded(table, train[fit], train[check], test)
    y = [torch.from_numpy(v) for v in (given[fit], given[check], labels[test])]
    return x[0], y[0], x[1], y[1], x[2], y[2]


def _judged(
    trained: trials.Trained,
    fold: int,
    part: Part,
    width: int,
    chosen: Mapping[str, zoo.Entry],
    rates: Sequence[float],
    metric: str | Callable[..., float],
    direction: str,
) -> list[dict[str, Any]]:
    """A row for each loss at the rate that validated best."""
    one = trained.problem(fold)
    checked = trials.score(metric, one.outputs(tables.wide(part[2], width)[None])[:, :, 0], part[3])
    tested = trials.score(metric, one.outputs(tables.wide(part[4], width)[None])[:, :, 0], part[5])
    best = checked.argmax(1) if direction == "higher" else checked.argmin(1)
    return [
        {
            "loss": name,
            "label": entry.label,
            "score": float(tested[i, best[i]]),
            "validation": float(checked[i, best[i]]),
            "lr": rates[int(best[i])],
        }
        for i, (name, entry) in enumerate(chosen.items())
    ]
