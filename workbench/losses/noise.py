"""Wrong labels and missing classes, with a stated rate and a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.lab.checks import as_generator, as_labels, count, fraction, positive

Seed = torch.Generator | int | None


def flip(y: Tensor, transition: Tensor, generator: Seed = None) -> Tensor:
    r"""Labels drawn from $P(\tilde y=j\mid y=i)=T_{ij}$.

    Args:
        y: (n,) class indices.
        transition: (k, k), rows sum to one.
        generator: torch generator or seed.

    Returns:
        (n,) class indices.

    Raises:
        ValueError: the matrix is not square, has a negative entry or a row that sums to another
            number than one, or a class has no row.
    """
    if transition.ndim != 2 or transition.shape[0] != transition.shape[1]:
        raise ValueError(f"transition: expected (k, k), got {tuple(transition.shape)}")
    y = as_labels(y, transition.shape[0], "y")
    table = transition.double()
    if bool((table < 0).any()) or not torch.allclose(table.sum(1), torch.ones(len(table)).double()):
        raise ValueError("transition: expected probabilities, each row summing to one")
    draws = torch.rand(len(y), 1, dtype=torch.float64, generator=as_generator(generator))
    return (draws > table.cumsum(1)[y, :-1]).sum(1).to(y)


def symmetric(y: Tensor, classes: int, rate: float, generator: Seed = None) -> Tensor:
    """A share ``rate`` of the labels becomes one of the other classes, each as likely.

    Args:
        y: (n,) class indices.
        classes: k, at least 2.
        rate: probability that a label is wrong, in [0, 1].
        generator: torch generator or seed.

    Returns:
        (n,) class indices.

    Raises:
        ValueError: an argument is out of range.
    """
    k, rate = count(classes, "classes", minimum=2), fraction(rate, "rate")
    return flip(y, torch.full((k, k), rate / (k - 1)).fill_diagonal_(1 - rate).double(), generator)


def class_dependent(y: Tensor, classes: int, rate: float, generator: Seed = None) -> Tensor:
    """With probability ``rate`` class c is labelled as class c + 1, the last one as class 0.

    Arguments, result and errors as of `symmetric`. With two classes it is the same thing.
    """
    k, rate = count(classes, "classes", minimum=2), fraction(rate, "rate")
    stay = torch.eye(k, dtype=torch.float64)
    return flip(y, (1 - rate) * stay + rate * stay.roll(1, 1), generator)


def imbalanced(y: Tensor, ratio: float, generator: Seed = None, *, least: int = 2) -> Tensor:
    r"""Rows to keep so that class sizes fall geometrically from the first class to the last.

    With k classes present and the largest of size m, class c keeps at most
    $m\,\rho^{-c/(k-1)}$ rows; with two classes the second keeps 1 for every $\rho$ of the first.

    Args:
        y: (n,) class indices; classes rank by size, the largest first.
        ratio: rho, largest class to smallest, at least 1.
        generator: torch generator or seed.
        least: rows that a class keeps at least.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: ``ratio`` is below 1, or a class has fewer than ``least`` rows.
    """
    y = as_labels(y, name="y", min_classes=2)
    if positive(ratio, "ratio") < 1:
        raise ValueError(f"ratio: expected a number >= 1, got {ratio:g}")
    found, sizes = torch.unique(y, return_counts=True)
    if int(sizes.min()) < least:
        raise ValueError(f"y: a class has {int(sizes.min())} rows, fewer than the {least} to keep")
    ranked = found[torch.argsort(sizes, descending=True, stable=True)]
    source, kept = as_generator(generator), []
    for rank, label in enumerate(ranked):
        rows = (y == label).nonzero()[:, 0]
        share = float(sizes.max()) * ratio ** (-rank / (len(ranked) - 1))
        size = min(len(rows), max(least, round(share)))
        kept.append(rows[torch.randperm(len(rows), generator=source)[:size]])
    return torch.cat(kept).sort().values
