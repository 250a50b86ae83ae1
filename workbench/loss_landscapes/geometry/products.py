"""Products of the Hessian of a mean loss with vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from workbench.loss_landscapes.geometry.modes import twice
from workbench.loss_landscapes.geometry.parameters import Parameters

MEMORY = 2**30  # bytes of saved activations up to which graphs are kept


class HessianProduct:
    r"""$Hv=\nabla_\theta(\nabla_\theta L\cdot v)$, exactly, by differentiating the gradient.

    Args:
        parameters: of the model, which holds the point at which the Hessian is taken.
        losses: gives the loss batch by batch, each as its share of the mean.
        keep: keep each batch's gradient with its graph, up to `MEMORY`; a product then costs one
            backward pass in place of a forward and three backward ones.

    Attributes:
        products: how many were made.
        size: length of a vector.
    """

    def __init__(
        self, parameters: Parameters, losses: Callable[[], Iterator[Tensor]], *, keep: bool
    ) -> None:
        self.parameters, self.losses, self.keep = parameters, losses, keep
        self.size, self.products = parameters.size, 0
        self._kept: list[Sequence[Tensor]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """H v for v of shape (D,), or H of every row for (k, D)."""
        if v.shape[-1:] != (self.size,) or v.ndim not in (1, 2):
            raise ValueError(
                f"v: expected shape ({self.size},) or (k, {self.size}), got {tuple(v.shape)}"
            )
        rows = v.detach().to(self.parameters.device, self.parameters.dtype).reshape(-1, self.size)
        split = [self.parameters.split(row) for row in rows]
        sums: list[Tensor] = []
        for gradient, last in self._gradients():
            found = [
                self._product(gradient, parts, free=last and i + 1 == len(split))
                for i, parts in enumerate(split)
            ]
            sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
        self.products += len(rows)
        return torch.stack(sums) if v.ndim == 2 else sums[0]

    hvp = __call__

    def close(self) -> None:
        """Free the kept graphs."""
        self._kept = None

    def _product(self, gradient: Sequence[Tensor], parts: Sequence[Tensor], free: bool) -> Tensor:
        # A gradient that does not depend on the parameters (a linear loss) has no graph.
        pairs = [(g, p) for g, p in zip(gradient, parts, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros(self.size, dtype=self.parameters.dtype).to(self.parameters.device)
        outputs, weights = zip(*pairs, strict=True)
        weights = tuple(w.to(o.dtype) for w, o in zip(weights, outputs, strict=True))
        with twice():
            found = torch.autograd.grad(
                outputs, self.parameters.tensors, weights, retain_graph=not free,
                materialize_grads=True,
            )  # fmt: skip
        return self.parameters.join(found)

    def _gradients(self) -> Iterator[tuple[Sequence[Tensor], bool]]:
        """The gradient of each batch, and whether its graph may be freed after use."""
        if self._kept is not None:
            yield from ((gradient, False) for gradient in self._kept)
            return
        kept: list[Sequence[Tensor]] = []
        meter, losses = _Meter(), self.losses()
        while True:
            with meter.reading() if self.keep else contextlib.nullcontext(), twice():
                loss = next(losses, None)
                if loss is None:
                    break
                gradient = torch.autograd.grad(
                    loss, self.parameters.tensors, create_graph=True, materialize_grads=True
                )
            del loss
            if self.keep and meter.bytes > MEMORY:
                self.keep, kept = False, []
            if self.keep:
                kept.append(gradient)
            yield gradient, not self.keep
        self._kept = kept if self.keep else None


class _Meter:
    """Counts the bytes of the tensors that autograd saves inside the block, each storage once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield
