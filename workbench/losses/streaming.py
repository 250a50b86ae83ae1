"""Losses of large inputs in blocks of rows that stay in the processor's cache.

A loss of 65,536 x 1,000 logits that is written as tensor expressions walks through main memory once
for each of them. Here a block of rows goes through all of them before the next one is touched. Each
core has blocks of its own: an operation that is split over cores ends when the last one is done,
and a loss has twenty of them. The gradients are exact, second derivatives work, and small inputs
take the plain way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

BLOCK = 1 << 19  # numbers a block: 2 MB in float32
LARGE = 1 << 22  # from here on a block at a time is faster

Rowwise = Callable[..., Tensor]
Totals = Callable[..., tuple[Tensor, ...]]
Slope = Callable[..., Tensor]
T = TypeVar("T")


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


def sums(
    fn: Totals, logits: Tensor, *others: Tensor, slope: Slope | None = None
) -> tuple[Tensor, ...]:
    """``fn(logits, *others)`` for a function whose results add up over rows.

    Args:
        fn: (n, k), then tensors of n rows -> tuple of tensors whose shapes do not depend on n.
        logits: (n, k); gradients go here.
        *others: (n, ...) each, as of `rows`.
        slope: the gradient of a block in closed form, ``slope(block, grads, *others) -> (b, k)``
            with one gradient for each result of ``fn``; by default autograd takes it, at about
            twice the time.

    Returns:
        The tuple of sums over all rows.
    """
    if _plain(logits, others):
        return fn(logits, *others)
    found: tuple[Tensor, ...] = _Sums.apply(fn, slope, logits, *others)
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


def _by_block(fn: Callable[[slice], T], logits: Tensor) -> Iterator[T]:
    """``fn`` of each block of rows, as many at a time as torch has threads; results in order."""
    size = max(1, BLOCK // logits.shape[1])
    blocks = [slice(start, start + size) for start in range(0, logits.shape[0], size)]
    cores = min(torch.get_num_threads(), len(blocks))
    return map(fn, blocks) if cores < 2 else _pool(cores).map(fn, blocks)


@lru_cache
def _pool(cores: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one core each."""
    before, gate = torch.get_num_threads(), threading.Barrier(cores)

    def alone() -> None:
        torch.get_num_threads()  # a new thread takes the common number at its first use
        torch.set_num_threads(1)  # of this thread, and of those that are new from here on
        gate.wait()

    pool = ThreadPoolExecutor(cores, thread_name_prefix="losses", initializer=alone)
    for started in [pool.submit(int) for _ in range(cores)]:
        started.result()
    torch.set_num_threads(before)
    return pool


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_()


class _Rows(torch.autograd.Function):
    """Values and slopes in one pass; the slopes are scaled when the gradient comes in."""

    @staticmethod
    def forward(ctx: Any, fn: Rowwise, logits: Tensor, *others: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        slopes = torch.empty_like(logits) if wanted else None

        def block(at: slice) -> Tensor:
            cut = [o[at] for o in others]
            if slopes is None:
                with torch.no_grad():
                    return fn(logits[at], *cut)
            with torch.enable_grad():
                part = _leaf(logits[at])
                value = fn(part, *cut)
                (slope,) = torch.autograd.grad(value.sum(), part)
            slopes[at] = slope
            return value.detach()

        ctx.fn, ctx.slopes = fn, slopes
        ctx.save_for_backward(logits, *others)
        return torch.cat(list(_by_block(block, logits)))

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
    def forward(
        ctx: Any, fn: Totals, slope: Slope | None, logits: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fn, ctx.slope = fn, slope
        ctx.save_for_backward(logits, *others)

        def block(at: slice) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return fn(logits[at], *(o[at] for o in others))

        found = _by_block(block, logits)
        total = next(found)
        for part in found:
            total = tuple(a + b for a, b in zip(total, part, strict=True))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, _slope(ctx.fn, logits, others, grads), *(None for _ in others)
        slopes = torch.empty_like(logits)

        def block(at: slice) -> None:
            cut = [o[at] for o in others]
            if ctx.slope is not None:
                with torch.no_grad():
                    slopes[at] = ctx.slope(logits[at], grads, *cut)
                return
            with torch.enable_grad():
                part = _leaf(logits[at])
                found = ctx.fn(part, *cut)
            used = [(f, g) for f, g in zip(found, grads, strict=True) if f.requires_grad]
            (slopes[at],) = torch.autograd.grad(
                [f for f, _ in used], part, [g for _, g in used], materialize_grads=True
            )

        for _ in _by_block(block, logits):
            pass
        return None, None, slopes, *(None for _ in others)


def through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    r"""$p_k(g_k-\sum_jp_jg_j)$: a gradient in probabilities taken back to the logits, in place.

    Args:
        p: (n, k), a softmax.
        slope: (n, k), gradient in p; overwritten.
    """
    return slope.sub_(torch.linalg.vecdot(p, slope)[:, None]).mul_(p)


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
