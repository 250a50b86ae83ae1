"""Torch's conventions for losses, in one place: targets, weights, reductions, precision.

A loss of this family says what one row costs; `labelled` does what
`torch.nn.functional.cross_entropy` would do around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.lab import checks
from workbench.lab.checks import is_tensor, one_of
from workbench.losses import streaming

REDUCTIONS = ("mean", "sum", "none")
_HALF = (torch.float16, torch.bfloat16)

Hard = Callable[[Tensor, Tensor], Tensor]  # logits (n, k), classes (n,) -> losses (n,)
Soft = Callable[[Tensor, Tensor], Tensor]  # logits (n, k), probabilities (n, k) -> losses (n,)


def labelled(
    logits: Tensor,
    target: Tensor,
    hard: Hard,
    soft: Soft | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    name: str = "logits",
) -> Tensor:
    r"""A loss of labelled rows with the arguments of ``torch.nn.functional.cross_entropy``.

    With class indices a row costs $w_y\ell(h,y)$ and the mean divides by $\sum_iw_{y_i}$ over the
    rows that are not ignored. With probabilities q it costs $\sum_kw_kq_k\ell(h,k)$ and the mean
    divides by the number of rows. Half precision is raised to float32, and autocast is off inside.

    Args:
        logits: (n, k), (n, k, d1, ...) or (k,).
        target: class indices (n,), (n, d1, ...) or (), or probabilities of the shape of ``logits``.
        hard: what a row with a class costs.
        soft: what a row with probabilities costs, linear in them; None where that has no meaning.
        weight: (k,), of each class; default 1.
        ignore_index: class index of rows that do not count.
        reduction: ``mean``, ``sum`` or ``none``.
        name: of the first argument, for messages.

    Returns:
        Scalar, or one loss a row in the target's shape for ``none``; float32 for half precision.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: shapes disagree, a class index is out of range, or soft labels have no meaning.
    """
    floating(logits, name)
    if not is_tensor(target):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if logits.ndim == 0:
        raise ValueError(f"{name}: expected (n, k) or (n, k, d1, ...), got a scalar")
    one_of(reduction, REDUCTIONS, "reduction")
    classes = logits.shape[0 if logits.ndim == 1 else 1]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(f"weight: expected ({classes},), got {tuple(weight.shape)}")
    shape = logits.shape[:0] if logits.ndim == 1 else (logits.shape[0], *logits.shape[2:])
    flat = _flat(logits)
    with single(logits):
        if target.is_floating_point():
            if soft is None:
                raise ValueError("target: expected class indices; soft labels have no meaning here")
            if target.shape != logits.shape:
                raise ValueError(
                    f"target: expected probabilities of shape {tuple(logits.shape)}, "
                    f"got {tuple(target.shape)}"
                )
            q = full(_flat(target))
            q = q if weight is None else q * weight.to(q)
            values = streaming.rows(lambda h, p: soft(full(h), p), flat, q)
            return reduced(values.view(shape), reduction)
        if tuple(target.shape) != tuple(shape):
            raise ValueError(f"target: expected shape {tuple(shape)}, got {tuple(target.shape)}")
        y = target.reshape(-1)
        kept = y != ignore_index
        y = torch.where(kept, y, 0).long()
        in_range(y, classes, "target")
        values = streaming.rows(lambda h, c: hard(full(h), c), flat, y)
        values = torch.where(kept, values, 0)
        share = kept.to(values) if weight is None else torch.where(kept, weight.to(values)[y], 0)
        values = values if weight is None else values * share
        if reduction == "mean":
            return values.sum() / share.sum()
        return reduced(values.view(shape), reduction)


def reduced(values: Tensor, reduction: str) -> Tensor:
    """Mean, sum, or the values themselves for ``none``."""
    one_of(reduction, REDUCTIONS, "reduction")
    return values.mean() if reduction == "mean" else values.sum() if reduction == "sum" else values


def full(values: Tensor) -> Tensor:
    """Half precision raised to float32; anything else as it is."""
    return values.float() if values.dtype in _HALF else values


@contextmanager
def single(values: Tensor) -> Iterator[None]:
    """Autocast switched off on the device of ``values``."""
    with torch.autocast(values.device.type, enabled=False):
        yield


def floating(values: Any, name: str) -> Tensor:
    """The argument, if it is a tensor of floating-point numbers.

    Raises:
        TypeError: it is not.
    """
    if not is_tensor(values):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got {values.dtype}")
    found: Tensor = values
    return found


def in_range(y: Tensor, classes: int, name: str = "target") -> None:
    """Refuse class indices outside 0..classes-1; not looked at while compiling or under vmap.

    Raises:
        TypeError: the numbers are not whole.
        ValueError: a class index is out of range.
    """
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{name}: expected whole numbers, got {y.dtype}")
    if looks(y) and y.numel():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: expected classes 0..{classes - 1}, got {wrong}")


def within(values: Tensor, low: float, high: float, name: str) -> None:
    """Refuse numbers outside [low, high] and NaN; not looked at while compiling or under vmap.

    Raises:
        ValueError: a number lies outside.
    """
    if looks(values) and values.numel():
        least, most = torch.aminmax(values.detach())
        if not bool((least >= low) & (most <= high)):
            raise ValueError(
                f"{name}: expected numbers in [{low:g}, {high:g}], got {float(least):g} to "
                f"{float(most):g}"
            )


def positive(value: float, name: str, *, zero: bool = False) -> float:
    """As `lab.checks.positive`; while compiling, where a number may be a symbol, as it is."""
    return value if torch.compiler.is_compiling() else checks.positive(value, name, zero=zero)


def fraction(value: float, name: str, *, zero: bool = True, one: bool = True) -> float:
    """As `lab.checks.fraction`; while compiling, where a number may be a symbol, as it is."""
    if torch.compiler.is_compiling():
        return value
    return checks.fraction(value, name, zero=zero, one=one)


def looks(values: Tensor) -> bool:
    """Whether values can be read now: neither compiled nor transformed by ``torch.func``."""
    return not torch.compiler.is_compiling() and torch.func.debug_unwrap(values) is values


def _flat(values: Tensor) -> Tensor:
    """Classes last, all else in one axis: (n, k)."""
    if values.ndim == 1:
        return values[None]
    return values if values.ndim == 2 else values.movedim(1, -1).reshape(-1, values.shape[1])


class Loss(nn.Module):
    """A loss as a module: subclasses name their ``function``; hyper-parameters become attributes.

    Args:
        weight: (k,), weight of each class; moves with the module and is part of its state.
        ignore_index: class index of rows that do not count.
        reduction: ``mean``, ``sum`` or ``none``.
        **hyper: passed on to the function at each call.
    """

    function: ClassVar[Callable[..., Tensor]]
    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = one_of(reduction, REDUCTIONS, "reduction")
        self.hyper = tuple(hyper)
        for name, value in hyper.items():
            setattr(self, name, value)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The function's value with this module's settings."""
        return type(self).function(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **{name: getattr(self, name) for name in self.hyper},
        )

    def extra_repr(self) -> str:
        """Hyper-parameters and reduction."""
        shown = [f"{name}={getattr(self, name)!r}" for name in self.hyper]
        return ", ".join([*shown, f"reduction={self.reduction!r}"])
