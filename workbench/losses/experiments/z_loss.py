"""Next-word models under four losses, and the time of one update over the number of classes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, seeded
from workbench.losses.spherical import FactoredOutput, Form, squared_form, taylor_form, z_form

TOP = (1, 5, 10, 20, 50)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "softmax": [{"lr": 0.05 * 2**i} for i in range(8)],
    "z": [{"lr": lr, "a": a, "b": b} for lr in (0.2, 0.8) for a in (0.1, 1) for b in (5, 20)],
    "released": [{"lr": 0.0125 * 2**i, "a": 1, "b": 0} for i in range(8)],
    "taylor": [{"lr": 0.2 * 2**i} for i in range(8)],
    "mse": [{"lr": 0.005 * 2**i} for i in range(8)],
}
"""Eight settings a loss: the Z-loss has to spend its own on a and b as well.

``released`` is the Z-loss of the authors' timing script, which fixes a = 1 and b = 0.
"""


# --- text -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def words(source: str, vocabulary: int) -> tuple[Tensor, int]:
    """A text as word numbers, the most frequent first, and how many there are.

    Words beyond the vocabulary share the last number.
    """
    found = [
        m[0] for m in re.finditer(r"[a-z_]+|[0-9]+|([^\sa-z0-9_])\1*", data.text(source).lower())
    ]
    known = {w: i for i, (w, _) in enumerate(Counter(found).most_common(vocabulary - 1))}
    return torch.tensor([known.get(w, len(known)) for w in found]), len(known) + 1


def deal(seed: int, tokens: Tensor, context: int, share: float = 1.0) -> dict[str, Tensor]:
    """Windows of ``context`` words and the next one, for training, validation and test.

    Passages of 500 words are dealt: a fifth is the test part of every seed, a seventh of the rest
    the seed's validation part.

    Args:
        seed: of the deal.
        tokens: word numbers.
        context: words that are seen.
        share: of the training passages that is used.
    """
    windows = tokens.unfold(0, context + 1, 1)
    passage = np.arange(len(windows)) // 500
    order = np.random.default_rng(0).permutation(passage[-1] + 1)
    held = len(order) // 5
    rest = np.random.default_rng(seed).permutation(order[held:])
    cut = len(rest) // 7
    chosen = {
        "test": order[:held],
        "validation": rest[:cut],
        "train": rest[cut : cut + round(share * (len(rest) - cut))],
    }
    return {name: windows[torch.from_numpy(np.isin(passage, p))] for name, p in chosen.items()}


# --- models ---------------------------------------------------------------------------------------


class Body(nn.Module):
    """Embeddings of the words seen, one tanh layer, and a constant for the output layer's bias."""

    def __init__(self, classes: int, context: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, features, sparse=True)
        self.hidden = nn.Linear(context * features, features - 1)

    def forward(self, seen: Tensor) -> Tensor:
        """(n, context) word numbers -> (n, features)."""
        h = torch.tanh(self.hidden(self.embedding(seen).flatten(1)))
        return F.pad(h, (0, 1), value=1.0)


class FullSoftmax(nn.Module):
    """Cross-entropy over all classes with the interface of `FactoredOutput`."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(classes, features).uniform_(-1, 1) * features**-0.5)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return F.cross_entropy(h @ self.W.T, y)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Gradient step in place."""
        grad, self.W.grad = self.W.grad, None
        if grad is not None:
            self.W.add_(grad, alpha=-lr)

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """All outputs."""
        return h @ self.W.T

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply the weights."""
        self.W.mul_(factor)


def output_layer(loss: str, classes: int, features: int, **hyper: Any) -> Any:
    """The output layer of a loss; the spherical ones are trained by the factored update."""
    if loss == "softmax":
        return FullSoftmax(classes, features)
    forms: dict[str, Form] = {"taylor": taylor_form, "mse": squared_form}
    return FactoredOutput(classes, features, loss=forms.get(loss, partial(z_form, **hyper)))


def train(
    seed: int,
    windows: Tensor,
    classes: int,
    loss: str,
    *,
    lr: float,
    features: int,
    epochs: int,
    batch: int,
    **hyper: Any,
) -> tuple[Body, Any]:
    """Plain stochastic gradient descent on body and output layer, one learning rate for both.

    Training ends where the loss is no longer finite.
    """
    with seeded(seed):
        body = Body(classes, windows.shape[1] - 1, features)
        layer = output_layer(loss, classes, features, **hyper)
    layer.scale_(0.1)
    body, layer = body.to(windows.device), layer.to(windows.device)
    optimizer = torch.optim.SGD(body.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(windows), generator=generator).to(windows.device)
        for rows in order.split(batch):
            optimizer.zero_grad()
            value = layer(body(windows[rows, :-1]), windows[rows, -1])
            if not value < 1e9:
                return body, layer
            value.backward()
            optimizer.step()
            layer.update(lr)
    return body, layer


@torch.no_grad()
def top_k(body: Body, layer: Any, windows: Tensor) -> dict[str, float]:
    """Per cent of next words among the k highest outputs; ties count against the word."""
    ranks = []
    for part in windows.split(2048):
        outputs = layer.logits(body(part[:, :-1]))
        ranks.append((outputs >= outputs.gather(1, part[:, -1:])).sum(1))
    rank = torch.cat(ranks)
    return {f"top{k}": float(100 * ((rank > 0) & (rank <= k)).double().mean()) for k in TOP}


def score(
    seed: int,
    *,
    loss: str,
    setting: int,
    on: str = "validation",
    source: str = "topics",
    vocabulary: int = 3000,
    context: int = 3,
    features: int = 32,
    epochs: int = 2,
    batch: int = 128,
    share: float = 1.0,
    device: str = "cpu",
) -> dict[str, float]:
    """Top-k accuracy of one model, and how often V took in U.

    Args:
        seed: of the deal of passages, the initial weights and the order of batches.
        loss: a key of `SETTINGS`.
        setting: which of its settings.
        on: part that is scored.
        source: text of `lab.data.text`.
        vocabulary: number of classes.
        context: words seen.
        features: d, the output layer's input with its constant.
        epochs: passes over the training part.
        batch: rows a step.
        share: of the training passages.
        device: where it is trained.
    """
    tokens, classes = words(source, vocabulary)
    part = {k: v.to(device) for k, v in deal(seed, tokens, context, share).items()}
    size = {"features": features, "epochs": epochs, "batch": batch}
    body, layer = train(seed, part["train"], classes, loss, **SETTINGS[loss][setting], **size)
    return {**top_k(body, layer, part[on]), "folds": float(getattr(layer, "folds", 0))}


def tune(
    seed: int, *, loss: str, setting: int, device: str = "cpu", **sizes: Any
) -> dict[str, float]:
    """Validation scores of one setting, from a seed that no comparison uses."""
    return score(seed + 1000, loss=loss, setting=setting, device=device, **sizes)


def best(tuning: pd.DataFrame, metric: str = "top10") -> dict[str, int]:
    """The setting of each loss with the highest validation score."""
    at = tuning.groupby("loss")[metric].idxmax()
    return {str(loss): int(tuning.setting[row]) for loss, row in at.items()}


def compare(
    seed: int, *, settings: Mapping[str, int], device: str = "cpu", **sizes: Any
) -> dict[str, float]:
    """Test accuracies of every loss at its tuned setting, as ``top10_z`` and so on."""
    found: dict[str, float] = {}
    for loss, setting in settings.items():
        row = score(seed, loss=loss, setting=setting, on="test", device=device, **sizes)
        found |= {f"{name}_{loss}": value for name, value in row.items()}
    return found


# --- time -----------------------------------------------------------------------------------------


def update_time(
    seed: int, *, classes: int, features: int = 32, batch: int = 64, repeat: int = 1
) -> dict[str, float]:
    """Processor milliseconds of a training step of the output layer: forward, backward, update.

    ``softmax`` computes all outputs and ``adaptive`` is torch's adaptive softmax, a hierarchy that
    gives rare classes fewer features: the fastest of ``repeat`` steps after a first one. ``z`` is
    the factored step of the Z-loss, the median of 20 after a first one. ``fold`` is the pass over V
    that becomes due when U has stretched. Labels follow Zipf's law.

    Args:
        seed: of weights and batches.
        classes: D.
        features: d.
        batch: rows.
        repeat: measured steps of the first two.
    """
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, features, generator=generator)
    draws = torch.rand(21, batch, generator=generator, dtype=torch.float64)
    labels = (classes**draws - 1).long()
    with seeded(seed):
        factored = FactoredOutput(classes, features)
        found = {"z": float(np.median(_times(lambda y: factored.step(h, y, 0.1), labels)))}
        start = time.process_time()
        factored.scale_(0.1 / factored.stretch)
        found["fold"] = 1e3 * (time.process_time() - start)
        del factored
        adaptive = nn.AdaptiveLogSoftmaxWithLoss(features, classes, [classes // 100, classes // 10])
        optimizer = torch.optim.SGD(adaptive.parameters(), lr=0.1)
        steps = labels[: repeat + 1]
        found["adaptive"] = min(_times(lambda y: _descend(adaptive, optimizer, h, y), steps))
        full = FullSoftmax(classes, features)

    def dense(y: Tensor) -> None:
        full(h.detach().requires_grad_(), y).backward()
        full.update(0.1)

    found["softmax"] = min(_times(dense, steps))
    return found


def _descend(
    adaptive: nn.AdaptiveLogSoftmaxWithLoss, optimizer: torch.optim.SGD, h: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    adaptive(h.detach().requires_grad_(), y).loss.backward()
    optimizer.step()


def _times(step: Callable[[Tensor], Any], labels: Tensor) -> list[float]:
    """Processor milliseconds of every step but the first."""
    taken = []
    for y in labels:
        start = time.process_time()
        step(y)
        taken.append(1e3 * (time.process_time() - start))
    return taken[1:]
