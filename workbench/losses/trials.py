"""The same networks trained with many losses and learning rates, and how they are judged.

A *problem* is one training set with its seed: a fold, or a table with wrong labels. For each
problem every loss at every learning rate starts from the same weights and sees the same order of
minibatches; all of them are trained together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.lab import checks, members
from workbench.losses import zoo

Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """Networks of one architecture, members in the order (loss, learning rate, problem).

    Attributes:
        model: the architecture.
        states: with a leading axis of members.
        shape: numbers of losses, learning rates and problems.
    """

    model: nn.Module
    states: members.States
    shape: tuple[int, int, int]

    def problem(self, p: int) -> Trained:
        """The networks of one problem."""
        where = torch.arange(math.prod(self.shape)).view(self.shape)[..., p].flatten()
        states = {name: values[where] for name, values in self.states.items()}
        return Trained(self.model, states, (*self.shape[:2], 1))

    def outputs(self, x: Float[Tensor, "p n d"]) -> Float[Tensor, "l r p n k"]:
        """Logits of all networks for their problem's inputs; what overflowed becomes 0."""
        checks.same_length(x=x, problems=range(self.shape[2]))
        parts = [self.problem(p).states for p in range(len(x))]
        found = [members.outputs(self.model, s, v) for s, v in zip(parts, x, strict=True)]
        logits = torch.stack(found, 1).unflatten(0, self.shape[:2])
        return logits.nan_to_num(0.0, 0.0, 0.0)


def train(
    factory: Callable[[], nn.Module],
    x: Float[Tensor, "p n d"],
    y: Int[Tensor, "p n"],
    losses: Mapping[str, zoo.Entry],
    *,
    classes: int,
    lrs: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int = 64,
    weight_decay: float = 0.0,
) -> Trained:
    """Train a network for each loss, learning rate and problem with Adam.

    Args:
        factory: makes a network from torch's global generator.
        x: inputs of each problem, rows in random order.
        y: class indices.
        losses: from `zoo.entries`. One that sees bags takes neighbouring rows as a bag, and as many
            bags a step as fill a minibatch.
        classes: k.
        lrs: learning rates.
        seeds: one a problem, of the first weights and of the order of minibatches.
        epochs: passes over the rows.
        batch_size: rows a step.
        weight_decay: L2 penalty's factor.

    Raises:
        ValueError: lengths disagree, there is nothing to train, or a loss needs more classes.
    """
    problems = checks.same_length(x=x, y=y, seeds=seeds)
    if not losses or not lrs or not problems:
        raise ValueError("losses, lrs, x: expected at least one of each")
    for name, e in losses.items():
        if e.least > classes:
            raise ValueError(f"losses: {name!r} needs {e.least} classes or more, got {classes}")
    width = len(lrs) * problems
    shape = (len(losses), len(lrs), problems)
    parts: dict[str, members.States] = {}
    model = factory()
    by_bag = {
        size: [name for name in losses if losses[name].bag == size]
        for size in dict.fromkeys(e.bag for e in losses.values())
    }
    for size, names in by_bag.items():
        make = (lambda: zoo.Bagged(factory())) if size else factory
        net, states = members.start(make, list(seeds) * (len(names) * len(lrs)))
        pairs = [
            zoo.bags(a, b, classes, size) if size else (a, b) for a, b in zip(x, y, strict=True)
        ]
        inputs, targets = (torch.stack(values) for values in zip(*pairs, strict=True))
        rows = inputs.shape[1]
        setting = zoo.Setting(classes, rows, width, int(seeds[0]))
        first = torch.arange(problems).repeat(len(names) * len(lrs))
        states = members.train(
            net,
            states,
            inputs.flatten(0, 1),
            targets.flatten(0, 1),
            zoo.together([(zoo.member_loss(losses[name], setting), width) for name in names]),
            seeds=list(seeds) * (len(names) * len(lrs)),
            rows=first[:, None] * rows + torch.arange(rows),
            epochs=epochs,
            batch_size=max(1, batch_size // max(1, size)),
            lr=torch.tensor(list(lrs)).repeat_interleave(problems).repeat(len(names)),
            weight_decay=weight_decay,
        )
        plain = {key.removeprefix("net.") if size else key: v for key, v in states.items()}
        for i, name in enumerate(names):
            at = slice(i * width, (i + 1) * width)
            parts[name] = {key: values[at] for key, values in plain.items()}
    joined = {key: torch.cat([parts[name][key] for name in losses]) for key in model.state_dict()}
    return Trained(model, joined, shape)


# --- measures ------------------------------------------------------------------------------------


def confusion(
    predicted: Int[Tensor, "*s n"], y: Int[Tensor, "*s n"], classes: int
) -> Float[Tensor, "*s k k"]:
    """Counts of (true class, predicted class) over the last axis; y broadcasts."""
    y = y.expand(predicted.shape)
    cells = y * classes + predicted
    counts = torch.zeros(*cells.shape[:-1], classes * classes, dtype=torch.float64)
    ones = torch.ones((), dtype=torch.float64).expand(cells.shape)
    return counts.scatter_add(-1, cells, ones).unflatten(-1, (classes, classes))


def accuracy(counts: Float[Tensor, "*s k k"]) -> Float[Tensor, "*s"]:
    """Share of rows that are right."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))


def balanced_accuracy(counts: Float[Tensor, "*s k k"]) -> Float[Tensor, "*s"]:
    """Mean recall of the classes that occur."""
    size = counts.sum(-1)
    recall = counts.diagonal(dim1=-2, dim2=-1) / size.clamp(min=1)
    return recall.sum(-1) / (size > 0).sum(-1)


def f1_macro(counts: Float[Tensor, "*s k k"]) -> Float[Tensor, "*s"]:
    """Mean F1 of the classes that occur or are predicted."""
    hits = counts.diagonal(dim1=-2, dim2=-1)
    total = counts.sum(-1) + counts.sum(-2)
    return (2 * hits / total.clamp(min=1)).sum(-1) / (total > 0).sum(-1)


def f1(counts: Float[Tensor, "*s k k"]) -> Float[Tensor, "*s"]:
    """F1 of class 1 of two; 0 when it neither occurs nor is predicted."""
    total = counts[..., 1, :].sum(-1) + counts[..., :, 1].sum(-1)
    return 2 * counts[..., 1, 1] / total.clamp(min=1)


def log_loss(logits: Float[Tensor, "*s n k"], y: Int[Tensor, "*s n"]) -> Float[Tensor, "*s"]:
    """Mean negative log of the softmax's probability of the label, in nats."""
    at = y.expand(logits.shape[:-1])[..., None]
    return -logits.double().log_softmax(-1).gather(-1, at)[..., 0].mean(-1)


COUNTED: dict[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
}


def score(
    metric: str | Callable[..., float], logits: Float[Tensor, "*s n k"], y: Int[Tensor, "*s n"]
) -> Float[Tensor, "*s"]:
    """A measure of predictions over the last axes.

    Args:
        metric: a name in ``COUNTED``, ``log_loss``, or a function of true and predicted classes
            (n,), as scikit-learn's.
        logits: (..., n, k).
        y: (..., n), broadcasts.

    Raises:
        ValueError: there is no metric of that name, or F1 is asked of more than two classes.
    """
    classes = logits.shape[-1]
    if isinstance(metric, str):
        checks.one_of(metric, (*COUNTED, "log_loss"), "metric")
        if metric == "f1" and classes != 2:
            raise ValueError(f"metric: 'f1' is of two classes, here are {classes}; use 'f1_macro'")
        if metric == "log_loss":
            return log_loss(logits, y)
        return COUNTED[metric](confusion(logits.argmax(-1), y, classes))
    predicted = logits.argmax(-1)
    pairs = zip(
        y.expand(predicted.shape).flatten(0, -2).numpy(),
        predicted.flatten(0, -2).numpy(),
        strict=True,
    )
    values = [checks.number(metric(true, found), "metric") for true, found in pairs]
    return torch.tensor(values, dtype=torch.float64).view(predicted.shape[:-1])
