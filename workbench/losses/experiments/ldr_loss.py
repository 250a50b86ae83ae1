"""Nine losses under label noise, each with its best learning rate; all networks train together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, members
from workbench.lab.models import CNN, MLP
from workbench.losses import baselines as known
from workbench.losses import noise
from workbench.losses.ldr_loss import aldr_kl, aldr_lambda, ldr_kl, normalised

SETTINGS: dict[str, tuple[str, float]] = {
    "clean": ("symmetric", 0.0),
    "symmetric 0.3": ("symmetric", 0.3),
    "symmetric 0.6": ("symmetric", 0.6),
    "symmetric 0.9": ("symmetric", 0.9),
    "class-dependent 0.3": ("class-dependent", 0.3),
}
"""Of the paper's seven settings; as there, a symmetric draw may hit the true class."""

LOSSES: dict[str, Callable[..., Tensor]] = {
    "CE": F.cross_entropy,
    "GCE": known.gce,
    "SCE": known.sce,
    "MAE": known.mae,
    "NCE+RCE": known.nce_rce,
    "CS": known.crammer_singer,
    "WW": known.weston_watkins,
    "LDR": ldr_kl,
}
RANKED = (*LOSSES, "ALDR")
UNSOFTENED = "LDR without softplus"
"""LDR-KL with ALDR-KL's normalisation: differs from it by nothing but the adaptation."""
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
TOP = 5  # top-1 to top-5 accuracy
BINS = 24  # of the histograms of lambda


class Memory:
    """ALDR-KL of many networks at once: a lambda for each of them and each training row."""

    def __init__(self, networks: int, size: int, lam0: float) -> None:
        self.lam0 = lam0
        self.lam = torch.full((networks, size), lam0)
        self.history: list[Tensor] = []

    def loss(self, out: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """(g, b, k), (g, b), (g, b) -> (g,); the memory is renewed first, as in `ALDR`."""
        scores = normalised(out, softplus=False)
        self.lam = self.lam.to(out.device)
        lam = aldr_lambda(scores, self.lam.gather(1, index), lam0=self.lam0)
        self.lam.scatter_(1, index, lam)
        return aldr_kl(scores, y, lam, lam0=self.lam0).mean(1)

    def keep(self) -> None:
        """Remember how the lambdas are now."""
        self.history.append(self.lam.cpu().clone())


def noisy(y: Tensor, classes: int, seed: int) -> Tensor:
    """The labels under each setting, (n, settings)."""
    columns = []
    for at, (kind, rate) in enumerate(SETTINGS.values()):
        source = torch.Generator().manual_seed(1000 * seed + at)
        if kind == "symmetric":
            columns.append(noise.symmetric(y, classes, rate * (classes - 1) / classes, source))
        else:
            columns.append(noise.class_dependent(y, classes, rate, source))
    return torch.stack(columns, 1)


def compare_losses(
    seed: int,
    *,
    source: str = "digits",
    size: int | None = None,
    epochs: int = 25,
    rates: Sequence[float] = RATES,
    adaptive: Sequence[float] = (10.0, 1.0),
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a network for every loss, noise setting and learning rate; choose the rates; rank.

    The rate is chosen for each loss and setting by the accuracy on validation rows whose labels
    are as noisy as those of training; test labels are clean. Every loss has the same rates, weights
    at the start, minibatches and epochs; its own hyper-parameters stay at their papers' values.

    Args:
        seed: of the split, the noise, the weights and the minibatches.
        source: "digits" (network 64-64-10, tanh) or "mnist5000" (convolutions).
        size: rows used; default all.
        epochs: the rate falls tenfold after one half and three quarters of them.
        rates: learning rates of SGD with momentum 0.9 and weight decay 0.005.
        adaptive: lambda_0 of ALDR-KL; the first is ranked, the others are for comparison.
        device: where to train.

    Returns:
        ``rank_LOSS`` and ``rank5_LOSS``: mean rank over settings by top-1 accuracy, and over
        settings and top-1 to top-5; ``acc_NAME``: mean top-1 accuracy (%) under noise; ``top``
        (names, settings, 5); ``rate`` (names, settings); per lambda_0 ``auc_``, how well lambda
        tells flipped rows from clean ones, and ``hist_`` (noisy settings, epochs, 2, bins).
    """
    images = data.digits().flat if source == "digits" else data.mnist5000()
    images = images if size is None else images.sample(size, seed)
    parts = images.split(seed, train=0.55, validation=0.2, test=0.25)
    classes = int(images.y.max()) + 1
    x, y = parts.train.tensors(device)
    labels = noisy(y.cpu(), classes, seed).to(device)
    shape = (len(SETTINGS), len(rates))
    each = math.prod(shape)
    memories = {f"ALDR {lam0:g}": Memory(each, len(x), lam0) for lam0 in adaptive}
    objectives: dict[str, members.Loss] = {
        **{name: partial(_mean, function) for name, function in LOSSES.items()},
        **{name: memory.loss for name, memory in memories.items()},
        UNSOFTENED: partial(_mean, partial(ldr_kl, softplus=False)),
    }
    names = list(objectives)
    setting = torch.arange(len(SETTINGS), device=device).repeat_interleave(len(rates))
    setting = setting.repeat(len(names))

    def loss(out: Tensor, y: Tensor, index: Tensor) -> Tensor:
        y = y.gather(2, setting[:, None, None].expand(*index.shape, 1))[..., 0]
        groups = zip(*(v.split(each) for v in (out, y, index)), strict=True)
        return torch.cat([f(*g) for f, g in zip(objectives.values(), groups, strict=True)])

    def after(epoch: int, _: members.States) -> None:
        for memory in memories.values():
            memory.keep()

    model, states = members.start(partial(_network, source, classes), [seed] * (each * len(names)))
    states = members.train(
        model,
        {name: values.to(device) for name, values in states.items()},
        x,
        labels,
        loss,
        seeds=[seed] * (each * len(names)),
        epochs=epochs,
        lr=torch.tensor(rates).repeat(len(SETTINGS) * len(names)),
        optimizer="sgd",
        weight_decay=5e-3,
        schedule=((0.5, 0.75), 0.1),
        after_epoch=after,
    )
    x_val, y_val = parts.validation.tensors(device)
    said = members.outputs(model, states, x_val).argmax(-1).cpu()
    wanted = noisy(y_val.cpu(), classes, seed + 10_000).T[setting.cpu()]
    best = (said == wanted).float().mean(1).view(len(names), *shape).numpy().argmax(2)
    x_test, y_test = parts.test.tensors(device)
    out = members.outputs(model, states, x_test)
    right = (out.topk(TOP).indices == y_test[:, None]).cumsum(-1).float().mean(1)
    every = 100 * right.view(len(names), *shape, TOP).cpu().numpy()
    top = np.take_along_axis(every, best[:, :, None, None], 2)[:, :, 0]
    flipped = (labels != y[:, None]).T.cpu().numpy()
    return {
        **_ranks(top[: len(RANKED)]),
        **{f"acc_{n}": float(t[1:, 0].mean()) for n, t in zip(names, top, strict=True)},
        "top": top,
        "rate": np.asarray(rates)[best],
        "names": np.array(names),
        "rows": len(x),
        **_memories(memories, dict(zip(names, best, strict=True)), shape, flipped),
    }


def _network(source: str, classes: int) -> nn.Module:
    if source == "digits":
        return MLP((64, 64, classes), "tanh")
    return CNN(classes=classes, norm="group")


def _mean(function: Callable[..., Tensor], out: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return function(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def _ranks(top: np.ndarray) -> dict[str, float]:
    """Mean ranks; (losses, settings, TOP) -> numbers by name."""
    ranks = rankdata(-top, axis=0)
    return {
        **{f"rank_{name}": float(r[:, 0].mean()) for name, r in zip(RANKED, ranks, strict=True)},
        **{f"rank5_{name}": float(r.mean()) for name, r in zip(RANKED, ranks, strict=True)},
    }


def _memories(
    memories: Mapping[str, Memory],
    best: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    flipped: np.ndarray,
) -> dict[str, Any]:
    """What the chosen networks' lambdas say about each row's label, without the clean setting."""
    found: dict[str, Any] = {}
    for at, memory in memories.items():
        kept = torch.stack(memory.history).unflatten(1, shape).numpy()
        lam = np.stack([kept[:, s, rate] for s, rate in enumerate(best[at])])[1:]
        pairs = list(zip(lam, flipped[1:], strict=True))  # (epochs, rows), (rows,) each
        name = f"{memory.lam0:g}"
        found |= {
            f"auc_{name}": float(np.mean([roc_auc_score(bad, rows[-1]) for rows, bad in pairs])),
            f"clean_{name}": np.array([rows[-1, ~bad].mean() for rows, bad in pairs]),
            f"flipped_{name}": np.array([rows[-1, bad].mean() for rows, bad in pairs]),
            f"least_{name}": float(lam.min()),
            f"hist_{name}": np.array([shares(rows, bad, memory.lam0) for rows, bad in pairs]),
        }
    return found


def shares(lam: np.ndarray, bad: np.ndarray, lam0: float) -> np.ndarray:
    """How lambda is spread over clean and over flipped rows, epoch by epoch.

    Args:
        lam: (epochs, rows).
        bad: (rows,), whether the label is flipped.
        lam0: the largest lambda; bins are equal from half of it, the least with alpha = 2.

    Returns:
        (epochs, 2, BINS), each row of bins sums to one.
    """
    edges = np.linspace(lam0 / 2, lam0, BINS + 1)  # alpha is 2
    parts = [lam[:, ~bad], lam[:, bad]]
    return np.array(
        [
            [np.histogram(part[e], edges)[0] / part.shape[1] for part in parts]
            for e in range(len(lam))
        ]
    )
