"""Pairs of digits, few rows, wrong labels: does a loss drawn at every step over-fit less?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_1samp
from torch import Tensor

from workbench.lab import data, members
from workbench.lab.models import MLP
from workbench.lab.seeding import seeded
from workbench.losses import margins, noise
from workbench.losses.ensloss import average_derivatives, ensloss, margins_of

FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "bce": margins.bce,
    "hinge": margins.hinge,
    "exponential": margins.exponential,
}
LOSSES = ("ensloss", *FIXED)
RATES = (0.001, 0.003, 0.01, 0.03)
NEIGHBOURS = tuple((c, (c + 1) % 10) for c in range(10))
CLIPPED = ((("ensloss", "bce", "hinge"), None), (("exponential",), 10.0))
"""Losses trained without and with a bound on the gradient's norm, as the authors do."""


@dataclass(frozen=True)
class Pairs:
    """Binary problems, one a pair of digits: x (p, n, d), labels 0 and 1 of shape (p, n)."""

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor


def problems(
    seed: int,
    pairs: Sequence[tuple[int, int]] = NEIGHBOURS,
    *,
    source: str = "digits",
    train: int = 30,
    val: int = 50,
    test: int = 90,
    flips: float = 0.1,
    device: str = "cpu",
) -> Pairs:
    """Rows of each pair, drawn anew; labels of training and validation are flipped, of test not.

    Args:
        seed: of rows and flips.
        pairs: which digit is class 0 and which class 1.
        source: ``digits`` or ``mnist5000``.
        train: rows of each class to train on; likewise ``val`` and ``test``.
        val: see ``train``.
        test: see ``train``.
        flips: share of wrong labels.
        device: where the tensors live.
    """
    x, y = getattr(data, source)().flat.tensors()
    generator = torch.Generator().manual_seed(seed)
    cuts, parts = (train, val, test), []
    for pair in pairs:
        rows = []
        for digit in pair:
            own = (y == digit).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=generator)]
            rows.append(own[: sum(cuts)].split(cuts))
        labels = [torch.arange(2).repeat_interleave(size) for size in cuts]
        labels[:2] = [noise.symmetric(part, 2, flips, generator) for part in labels[:2]]
        for k, label in enumerate(labels):
            parts.append((x[torch.cat([rows[0][k], rows[1][k]])], label))
    stacked = [
        torch.stack([part[what] for part in parts[k::3]]).to(device)
        for k in range(3)
        for what in range(2)
    ]
    return Pairs(*stacked)


class Variant(NamedTuple):
    """What a group of networks is trained with."""

    loss: str
    rate: float
    weight_decay: float = 0.0


def objective(plan: Sequence[Variant], pairs: int, generator: torch.Generator) -> members.Loss:
    """Each variant's own loss on its ``pairs`` members: scores (m, b, 1), labels (m, b) -> (m,)."""

    def loss(out: Tensor, y: Tensor, _: Tensor) -> Tensor:
        groups = zip(plan, out[..., 0].split(pairs), y.split(pairs), strict=True)
        return torch.cat([one(variant.loss, *group) for variant, *group in groups])

    def one(name: str, scores: Tensor, y: Tensor) -> Tensor:
        if name == "ensloss":
            return ensloss(scores, y, generator=generator)
        z = margins_of(scores, y)
        values = average_derivatives(z) * z if name == "average" else FIXED[name](z)
        return values.mean(-1)

    return loss


def accuracy(model: Any, states: members.States, x: Tensor, y: Tensor) -> np.ndarray:
    """Accuracy in per cent, (variants, pairs), of members that lie variant by variant."""
    times = len(next(iter(states.values()))) // len(x)
    scores = members.outputs(model, states, x.repeat(times, 1, 1), each=True)[..., 0]
    right = ((scores > 0) == (y == 1).repeat(times, 1)).double().mean(1)
    return (100 * right).view(times, len(x)).cpu().numpy()


def fit(
    plan: Sequence[Variant],
    task: Pairs,
    seed: int,
    *,
    hidden: Sequence[int],
    epochs: int,
    batch_size: int,
    dropout: float = 0.0,
    clip: float | None = None,
    after_epoch: Callable[[Any, int, members.States], None] | None = None,
) -> tuple[Any, members.States]:
    """One network a variant and pair, by SGD with momentum 0.9 and a cosine schedule.

    Variants share first weights and minibatches; pairs do not.
    """
    p, r, device = len(task.x), len(plan), task.x.device
    seeds = [seed * 1000 + i for i in range(p)] * r
    model, states = members.start(
        lambda: MLP((task.x.shape[2], *hidden, 1), dropout=dropout), seeds
    )
    states = members.train(
        model.to(device),
        {key: values.to(device) for key, values in states.items()},
        task.x.repeat(r, 1, 1),
        task.y.repeat(r, 1),
        objective(plan, p, torch.Generator().manual_seed(seed)),
        seeds=seeds,
        each=True,
        epochs=epochs,
        batch_size=batch_size,
        lr=torch.tensor([v.rate for v in plan]).repeat_interleave(p),
        optimizer="sgd",
        weight_decay=torch.tensor([v.weight_decay for v in plan]).repeat_interleave(p),
        schedule="cosine",
        clip=clip,
        after_epoch=None if after_epoch is None else partial(after_epoch, model),
    )
    return model, states


def tune(
    seed: int,
    *,
    rates: Sequence[float] = RATES,
    pairs: Sequence[tuple[int, int]] = NEIGHBOURS,
    hidden: Sequence[int] = (128, 128),
    epochs: int = 150,
    batch_size: int = 30,
    device: str = "cpu",
    **setting: Any,
) -> dict[str, Any]:
    """Validation accuracy of every loss at every learning rate, mean over pairs, in per cent.

    ``train_*`` is the accuracy on the training labels. Rows, flips and weights are not those of
    `compare` at the same seed.

    Args:
        seed: of rows, flips, weights and draws.
        rates: learning rates, the same for all losses.
        pairs: see `problems`.
        hidden: widths of the network.
        epochs: of training; all are run, there is no early stop.
        batch_size: rows a step.
        device: where to train.
        **setting: passed on to `problems`.
    """
    task = problems(seed + 500_000, pairs, device=device, **setting)
    found: dict[str, Any] = {"rates": np.array(rates)}
    for names, clip in CLIPPED:
        plan = [Variant(name, rate) for name in names for rate in rates]
        model, states = fit(
            plan, task, seed + 500_000, hidden=hidden, epochs=epochs, batch_size=batch_size,
            clip=clip,
        )  # fmt: skip
        for what, x, y in (("val", task.val_x, task.val_y), ("train", task.x, task.y)):
            score = accuracy(model, states, x, y).mean(1).reshape(len(names), -1)
            found |= {f"{what}_{name}": row for name, row in zip(names, score, strict=True)}
    return found


def best_rates(tuned: pd.DataFrame) -> dict[str, float]:
    """Each loss's learning rate of the highest validation accuracy, mean over `tune`'s rows."""
    means = {name: np.mean(np.stack(list(tuned[f"val_{name}"])), 0) for name in LOSSES}
    return {name: float(tuned.rates.iloc[0][value.argmax()]) for name, value in means.items()}


def compare(
    seed: int,
    *,
    rates: Mapping[str, float],
    shared: float = RATES[-1],
    pairs: Sequence[tuple[int, int]] = NEIGHBOURS,
    hidden: Sequence[int] = (128, 128),
    epochs: int = 150,
    batch_size: int = 30,
    weight_decay: float = 5e-3,
    dropout: float = 0.3,
    every: int = 15,
    device: str = "cpu",
    **setting: Any,
) -> dict[str, Any]:
    """Clean test accuracy of every loss after the last epoch, in per cent.

    ``acc_*`` is the mean over pairs and ``pairs_*`` each pair's; ``curve_*`` the mean after every
    ``every`` epochs, ``train_*`` the accuracy on the (partly wrong) training labels; ``average`` is
    EnsLoss with average slopes in place of drawn ones. EnsLoss and BCE are trained again with
    weight decay (``_wd``), with dropout (``_dropout``; ``_reg`` is the mean of the two) and with
    one learning rate for both (``_shared``), as in the paper.

    Args:
        seed: of rows, flips, weights and draws; losses share the first three.
        rates: learning rate of each loss, from `best_rates`.
        shared: the one learning rate of ``_shared``.
        pairs: see `problems`.
        hidden: widths of the network.
        epochs: of training; all are run, there is no early stop.
        batch_size: rows a step.
        weight_decay: the paper's largest.
        dropout: likewise.
        every: epochs between two points of the curves.
        device: where to train.
        **setting: passed on to `problems`.
    """
    task = problems(seed, pairs, device=device, **setting)
    common: dict[str, Any] = {"hidden": hidden, "epochs": epochs, "batch_size": batch_size}
    found: dict[str, Any] = {"epoch": np.arange(every, epochs + 1, every)}
    two = ("ensloss", "bce")

    def record(names: Sequence[str], model: Any, states: members.States) -> None:
        test = accuracy(model, states, task.test_x, task.test_y)
        train = accuracy(model, states, task.x, task.y)
        for name, score, known in zip(names, test, train, strict=True):
            found[f"pairs_{name}"], found[f"acc_{name}"] = score, float(score.mean())
            found[f"train_{name}"] = float(known.mean())

    for names, clip in CLIPPED:
        labels, plan = list(names), [Variant(name, rates[name]) for name in names]
        if clip is None:
            labels += ["average", *(f"{name}_{what}" for what in ("wd", "shared") for name in two)]
            plan += [Variant("average", rates["ensloss"])]
            plan += [Variant(name, rates[name], weight_decay) for name in two]
            plan += [Variant(name, shared) for name in two]
        curve: list[np.ndarray] = []

        def follow(
            model: Any, epoch: int, states: members.States, curve: list[np.ndarray] = curve
        ) -> None:
            if epoch % every == 0:
                curve.append(accuracy(model, states, task.test_x, task.test_y).mean(1))

        record(labels, *fit(plan, task, seed, clip=clip, after_epoch=follow, **common))
        for name, points in zip(labels, np.stack(curve, 1), strict=True):
            found[f"curve_{name}"] = points
    plan = [Variant(name, rates[name]) for name in two]
    with seeded(seed):  # dropout takes no generator of its own
        fitted = fit(plan, task, seed, dropout=dropout, **common)
    record([f"{name}_dropout" for name in two], *fitted)
    for name in two:
        found[f"acc_{name}_reg"] = (found[f"acc_{name}_wd"] + found[f"acc_{name}_dropout"]) / 2
    return found


def verdicts(frame: pd.DataFrame, ours: str = "ensloss", level: float = 0.05) -> pd.DataFrame:
    """Better, tie, worse: on each pair of digits a one-sided paired t-test over seeds each way.

    Args:
        frame: rows of `compare`.
        ours: the loss that the others are compared with.
        level: of each test, as in the paper.

    Returns:
        A row a fixed loss with ``better``, ``tie``, ``worse`` and the mean ``gap`` in points.
    """
    mine = np.stack(list(frame[f"pairs_{ours}"]))
    table = {}
    for name in FIXED:
        gap = mine - np.stack(list(frame[f"pairs_{name}"]))
        moved = np.ptp(gap, axis=0) > 0  # equal everywhere: a tie, no test
        tests = [ttest_1samp(gap[:, moved], 0, alternative=a).pvalue for a in ("greater", "less")]
        better, worse = (int((p < level).sum()) for p in tests)
        tie = gap.shape[1] - better - worse
        table[name] = {"better": better, "tie": tie, "worse": worse, "gap": float(gap.mean())}
    return pd.DataFrame(table).T.astype({"better": int, "tie": int, "worse": int})


PUBLISHED = {
    "ResNet34": {"BCE": (41, 4, 0), "EXP": (45, 0, 0), "Hinge": (36, 9, 0)},
    "ResNet50": {"BCE": (42, 3, 0), "EXP": (45, 0, 0), "Hinge": (43, 2, 0)},
    "ResNet101": {"BCE": (39, 6, 0), "EXP": (45, 0, 0), "Hinge": (40, 5, 0)},
    "VGG16": {"BCE": (36, 9, 0), "EXP": (45, 0, 0), "Hinge": (29, 16, 0)},
    "VGG19": {"BCE": (36, 9, 0), "EXP": (45, 0, 0), "Hinge": (27, 18, 0)},
    "MobileNet": {"BCE": (45, 0, 0), "EXP": (45, 0, 0), "Hinge": (44, 1, 0)},
    "MobileNetV2": {"BCE": (45, 0, 0), "EXP": (45, 0, 0), "Hinge": (45, 0, 0)},
}
"""Better, no difference, worse on 45 pairs of CIFAR-10, as the authors' summary prints them."""


def released() -> pd.DataFrame | None:
    """The authors' logs on CIFAR-10, a row a network, pair and fixed loss; None without the file.

    ``gap`` is EnsLoss's mean test accuracy over 5 trials minus the fixed loss's; ``better`` and
    ``worse`` are the logged one-sided p-values of the paired t-tests.
    """
    folder = data.authors("ensloss")
    if folder is None:
        return None
    return read_log((folder / "out" / "out_cifar.md").read_text(encoding="utf8"))


def read_log(text: str) -> pd.DataFrame:
    """What `released` returns, from the text of the log."""
    rows = []
    for block in re.split(r"^(?=#### )", text, flags=re.MULTILINE):
        head = re.match(r"#### (\w+) - model: (\w+) ####", block)
        if head is None:
            continue
        names, values = (
            [cell.strip() for cell in re.search(pattern, block)[1].split("|")]  # type: ignore[index]
            for pattern in (r"\|\s+\|(.*ensLoss.*)\|", r"'test_acc', 'mean'\) \|(.*)\|")
        )
        mean = dict(zip(names, map(float, values), strict=True))
        for fixed in ("BCE", "EXP", "Hinge"):
            tests = re.findall(
                rf"\| {fixed}\s*\| ensLoss \|\s*(\S+)\s*\|.*\| (less|greater)", block
            )
            p = {side: float(value) for value, side in reversed(tests)}  # accuracy is logged first
            rows.append(
                {
                    "model": head[2],
                    "pair": head[1],
                    "fixed": fixed,
                    "gap": 100 * (mean["ensLoss"] - mean[fixed]),
                    "better": p["less"],
                    "worse": p["greater"],
                }
            )
    return pd.DataFrame(rows)
