"""Losses of large inputs in blocks of rows that stay in the processor's cache.

A loss of 65,536 x 1,000 logits that is written as tensor expressions walks through main memory once
for each of them. Here a block of rows goes through all of them before the next one is touched. The
gradients are exact, second derivatives work, and small inputs take the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 19  # numbers a block: 2 MB in float32
LARGE = 1 << 22  # from here on a block at a time is faster

Rowwise = Callable[..., Tensor]
Totals = Callable[..., tuple[Tensor, ...]]


def rows(fn: Rowwise, logits: Tensor, *others: Tensor) -> Tensor:
    """``fn(logits, *others)`` for a function that acts on each row alone.

    Args:
        fn: (n, k), then tensors of n rows -> (n,).
        logits: (n, k); gradients go here.
        *others: (n, ...) each; where one of them needs a gradient, nothing is cut into blocks.

    Returns:
        (n,).
    """
    if _plain(logits, others):
        return fn(logits, *others)
    found: Tensor = _Rows.apply(fn, logits, *others)
    return found


def sums(fn: Totals, logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """``fn(logits, *others)`` for a function whose results add up over rows.

    Args:
        fn: (n, k), then tensors of n rows -> tuple of tensors whose shapes do not depend on n.
        logits: (n, k); gradients go here.
        *others: (n, ...) each, as of `rows`.

    Returns:
        The tuple of sums over all rows.
    """
    if _plain(logits, others):
        return fn(logits, *others)
    found: tuple[Tensor, ...] = _Sums.apply(fn, logits, *others)
    return found


def _plain(logits: Tensor, others: tuple[Tensor, ...]) -> bool:
    return (
        logits.ndim != 2
        or logits.numel() < LARGE
        or logits.device.type != "cpu"  # elsewhere a kernel a block costs more than it saves
        or torch.compiler.is_compiling()
        or torch.func.debug_unwrap(logits) is not logits
        or any(o.requires_grad for o in others)
    )


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK // logits.shape[1])
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_()


class _Rows(torch.autograd.Function):
    """Values and slopes in one pass; the slopes are scaled when the gradient comes in."""

    @staticmethod
    def forward(ctx: Any, fn: Rowwise, logits: Tensor, *others: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        slopes = torch.empty_like(logits) if wanted else None
        values = []
        for at in _blocks(logits):
            cut = [o[at] for o in others]
            if slopes is None:
                values.append(fn(logits[at], *cut))
                continue
            with torch.enable_grad():
                part = _leaf(logits[at])
                value = fn(part, *cut)
                (slope,) = torch.autograd.grad(value.sum(), part)
            slopes[at] = slope
            values.append(value.detach())
        ctx.fn, ctx.slopes = fn, slopes
        ctx.save_for_backward(logits, *others)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        logits, *others = ctx.saved_tensors
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is None or torch.is_grad_enabled():  # asked a second time, or for a graph
            return None, _slope(ctx.fn, logits, others, (grad,)), *(None for _ in others)
        return None, slopes.mul_(grad[:, None]), *(None for _ in others)


class _Sums(torch.autograd.Function):
    """Sums without a graph; their gradient block by block from the same function."""

    @staticmethod
    def forward(ctx: Any, fn: Totals, logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.fn = fn
        ctx.save_for_backward(logits, *others)
        total: list[Tensor] = []
        for at in _blocks(logits):
            found = fn(logits[at], *(o[at] for o in others))
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        return tuple(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, _slope(ctx.fn, logits, others, grads), *(None for _ in others)
        slopes = torch.empty_like(logits)
        for at in _blocks(logits):
            with torch.enable_grad():
                part = _leaf(logits[at])
                found = ctx.fn(part, *(o[at] for o in others))
            used = [(f, g) for f, g in zip(found, grads, strict=True) if f.requires_grad]
            (slopes[at],) = torch.autograd.grad(
                [f for f, _ in used], part, [g for _, g in used], materialize_grads=True
            )
        return None, slopes, *(None for _ in others)


def _slope(
    fn: Callable[..., Any], logits: Tensor, others: list[Tensor], grads: tuple[Tensor, ...]
) -> Tensor:
    """The gradient by the plain way, itself differentiable when a graph is being built."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = logits if graph and logits.requires_grad else _leaf(logits)
        found = fn(at, *others)
        found = found if isinstance(found, tuple) else (found,)
    used = [(f, g) for f, g in zip(found, grads, strict=True) if f.requires_grad]
    (slope,) = torch.autograd.grad(
        [f for f, _ in used], at, [g for _, g in used], create_graph=graph, materialize_grads=True
    )
    return slope
