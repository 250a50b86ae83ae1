"""What a Hessian is to an algorithm: a length and a product with vectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.lab import checks


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix known by its products.

    Args:
        product: v (D,) -> H v (D,).
        size: D.
        dtype: of the vectors it takes.
        device: where they live.
        blocks: whether ``product`` also takes several vectors at once, (b, D) -> (b, D).
    """

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    blocks: bool = False

    def __call__(self, v: Tensor) -> Tensor:
        """H v for v of shape (D,), or H of every row for (b, D)."""
        if v.ndim == 2 and not self.blocks:
            return torch.stack([self(row) for row in v])
        out = self.product(v)
        if not isinstance(out, Tensor) or out.shape != v.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"obj: H v has shape {found}; expected {tuple(v.shape)} like v")
        if not math.isfinite(float(out.sum())):
            raise ValueError("obj: H v holds NaN or infinity; is the loss finite and smooth here?")
        return out.detach()

    def signs(self, generator: torch.Generator, draws: int | None = None) -> Tensor:
        """Rademacher vectors: every entry is -1 or 1; shape (D,) or (draws, D)."""
        shape = (self.size,) if draws is None else (draws, self.size)
        bits = torch.randint(2, shape, generator=generator, device=generator.device)
        return (2 * bits - 1).to(self.device, self.dtype)

    def normal(self, generator: torch.Generator, draws: int | None = None) -> Tensor:
        """Standard normal vectors of shape (D,) or (draws, D)."""
        shape = (self.size,) if draws is None else (draws, self.size)
        # Drawn in one precision, so that a seed means the same vector in all of them.
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(self.device, self.dtype)


@contextlib.contextmanager
def operator(obj: Any, theta: Any = None, size: int | None = None) -> Iterator[Operator]:
    """``obj`` as an `Operator`, for the length of a block.

    Args:
        obj: an `Objective`, whose gradient graph is then kept between products; or anything with
            ``hvp(v)`` and ``size`` (and ``dtype``, ``device`` if they are not torch's defaults); or
            a function v -> H v together with ``size``.
        theta: where an objective is looked at; default at the model's present parameters.
        size: D, for a function.

    Raises:
        TypeError: ``obj`` is none of these, or ``theta`` is given for what has no such argument.
    """
    if isinstance(obj, Operator):
        yield obj
        return
    if hasattr(obj, "curvature") and hasattr(obj, "theta"):
        like = obj.theta
        with obj.curvature(theta) as product:
            yield Operator(product, obj.size, like.dtype, like.device, blocks=True)
        return
    if theta is not None:
        raise TypeError("theta: only an Objective can be looked at elsewhere")
    product = getattr(obj, "hvp", obj)
    size = getattr(obj, "size", size)
    if not callable(product) or isinstance(obj, Tensor):
        raise TypeError(
            f"obj: expected an Objective, an object with hvp and size, or a function v -> H v with "
            f"size=, got {type(obj).__name__}"
        )
    if size is None:
        raise TypeError("size: is needed with a function v -> H v")
    dtype = getattr(obj, "dtype", None) or torch.get_default_dtype()
    yield Operator(product, checks.count(size, "size"), dtype, getattr(obj, "device", "cpu"))
