"""The data of an objective: tensors in memory, a loader that is streamed, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from workbench.lab import checks

Batch: TypeAlias = Any  # a tuple of tensors, or a mapping from names to tensors


class Batches:
    """Passes over the data, a batch at a time, on the model's device.

    Args:
        data: a tensor, a tuple of tensors or arrays of one length, an object with ``x`` and ``y``,
            or a loader that can be gone through again and again, giving tuples or mappings.
        inputs: how many leading entries of a batch the model takes; for mappings, their keys.
        device: where batches are moved to.
        batch_size: rows of tensors taken at once; None leaves it to the objective.
    """

    def __init__(
        self,
        data: Any,
        inputs: int | Sequence[str],
        device: torch.device,
        batch_size: int | None,
    ) -> None:
        self.inputs = inputs if isinstance(inputs, int) else list(inputs)
        if isinstance(inputs, int):
            checks.count(inputs, "inputs")
        self.device = device
        self.batch_size = None if batch_size is None else checks.count(batch_size, "batch_size")
        self.tensors: tuple[Tensor, ...] | None = None
        self.loader: Any = None
        if hasattr(data, "x") and hasattr(data, "y"):
            data = (data.x, data.y)
        if isinstance(data, Tensor):
            data = (data,)
        if isinstance(data, tuple) and all(hasattr(part, "__array__") for part in data):
            self.tensors = tuple(torch.as_tensor(part).to(device) for part in data)
            rows = checks.same_length(**{f"data[{i}]": t for i, t in enumerate(self.tensors)})
            if rows == 0:
                raise ValueError("data: is empty; expected at least one row")
        elif isinstance(data, Iterator):
            raise TypeError(
                "data: is an iterator, used up after one pass; give tensors or a loader"
            )
        elif hasattr(data, "__iter__"):
            self.loader = data
        else:
            raise TypeError(
                "data: expected tensors (x, y), a loader of batches, or None with a closure, got "
                f"{type(data).__name__}"
            )

    @property
    def rows(self) -> int | None:
        """Rows of tensors in memory; None for a loader."""
        return None if self.tensors is None else len(self.tensors[0])

    def __iter__(self) -> Iterator[Batch]:
        if self.tensors is not None:
            yield from self.chunks(self.batch_size)
            return
        empty = True
        for batch in self.loader:
            empty = False
            yield self._moved(batch)
        if empty:
            raise ValueError("data: the loader gave no batch")

    def chunks(self, size: int | None) -> Iterator[Batch]:
        """Tensors in memory, ``size`` rows at a time."""
        assert self.tensors is not None
        if size is None or size >= len(self.tensors[0]):
            yield self.tensors
            return
        yield from zip(*(tensor.split(size) for tensor in self.tensors), strict=True)

    def _moved(self, batch: Any) -> Batch:
        if isinstance(batch, Mapping):
            return {k: torch.as_tensor(v).to(self.device) for k, v in batch.items()}
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        return tuple(torch.as_tensor(part).to(self.device) for part in parts)

    def loss(
        self, model: Callable[..., Any], loss_fn: Callable[..., Tensor], batch: Batch
    ) -> Tensor:
        """``loss_fn(model(*inputs), *rest)`` of one batch, a scalar."""
        if isinstance(batch, Mapping):
            keys = self.inputs if isinstance(self.inputs, list) else list(batch)[: self.inputs]
            if absent := [key for key in keys if key not in batch]:
                raise ValueError(f"inputs: a batch has no {absent[0]!r}; it has {list(batch)}")
            output = model(**{key: batch[key] for key in keys})
            rest = [value for key, value in batch.items() if key not in keys]
        elif isinstance(self.inputs, int):
            output, rest = model(*batch[: self.inputs]), batch[self.inputs :]
        else:
            raise TypeError("inputs: names were given, but batches are tuples; give their number")
        return scalar(loss_fn(output, *rest))


def length(batch: Batch) -> int:
    """Rows of a batch."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(first) if first.ndim else 1


def scalar(loss: Any) -> Tensor:
    """The loss, if it is one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected one number (the mean over the batch), got {found}")
    return loss.reshape(())


def has_convolutions(model: nn.Module) -> bool:
    """Whether a model has two-dimensional convolutions."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())
