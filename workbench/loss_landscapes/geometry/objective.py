"""A loss as a function of one flat vector: the parameters of any torch model."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lab import checks
from workbench.loss_landscapes.geometry.batches import Batch, Batches, has_convolutions, length
from workbench.loss_landscapes.geometry.batches import scalar as one_number
from workbench.loss_landscapes.geometry.modes import BATCH_NORM, looking, restatistic, twice
from workbench.loss_landscapes.geometry.parameters import Parameters, Setter, eager
from workbench.loss_landscapes.geometry.products import HessianProduct

ROWS = 128  # rows that a convolutional network takes at once on a CPU: activations stay in cache
BLOCK = 64  # points evaluated on one batch of a loader before the next is fetched
STATISTIC_ROWS = 1024  # rows of tensors whose batch-norm statistics are taken together
TOGETHER = 16  # points evaluated in one batched pass on a GPU


class Objective:
    r"""$L(\theta)$: the mean loss of a model over data, as a function of its parameters.

    While it is looked at, the model is in evaluation mode (dropout off) and holds other tensors;
    afterwards, also after an exception or Ctrl-C, it is what it was to the last bit: parameters,
    gradients, buffers, training flags. Nothing here runs in two threads at once on one model.

    Args:
        model: any ``nn.Module``, also compiled. Tied parameters count once, frozen ones stay where
            they are, half precision is perturbed in float32 and rounded.
        loss_fn: ``loss_fn(model(*inputs), *rest)`` for a batch ``(*inputs, *rest)``: the mean over
            its rows (any other metric where no gradient is asked for). With ``data=None`` a closure
            without arguments that runs the model itself and returns the loss.
        data: tensors ``(x, y, ...)``, an object with ``x`` and ``y``, or a loader that can be gone
            through again; a loader is streamed. Its batches should be the same at every pass.
        inputs: how many leading entries of a batch the model takes, or their names if batches are
            mappings (they are then passed by name).
        batch_size: rows of tensors taken at once; None takes what is fastest. A loss that is no
            mean over rows is noticed and gets all rows together.
        batch_norm: "frozen" uses the running statistics as they are; "reestimate" recomputes them
            by one pass over the data at every point (derivatives take them for constants); "batch"
            uses the statistics of each batch, as in training.
        frozen: also vary the parameters that do not require a gradient.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        data: Any = None,
        *,
        inputs: int | list[str] = 1,
        batch_size: int | None = None,
        batch_norm: str = "frozen",
        frozen: bool = False,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
        self.parameters = Parameters(model, frozen=frozen)
        self.model, self.plain, self.loss_fn = model, eager(model), loss_fn
        self.batch_norm: str = checks.one_of(batch_norm, BATCH_NORM, "batch_norm")
        self.device = self.parameters.device
        self.batches = None if data is None else Batches(data, inputs, self.device, batch_size)
        if self.batches is None and self.batch_norm == "reestimate":
            raise ValueError("batch_norm: 'reestimate' needs data to pass over, not a closure")
        self._rows: int | None = None  # see _chunk
        self._mean_of_rows: bool | None = None

    # ---- the vector

    @property
    def theta(self) -> Float[Tensor, " D"]:
        """A copy of the model's present parameters."""
        return self.parameters.theta

    @property
    def size(self) -> int:
        """D, the number of parameters that are varied."""
        return self.parameters.size

    @property
    def names(self) -> list[str]:
        """Their names, in the order of the vector."""
        return self.parameters.names

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Their shapes, in the order of the vector."""
        return self.parameters.shapes

    def flatten(self, values: Any) -> Float[Tensor, " D"]:
        """A module, a ``state_dict`` or a list of tensors as a vector."""
        return self.parameters.vector(values, "values")

    def unflatten(self, theta: Float[Tensor, " D"]) -> dict[str, Tensor]:
        """The vector as tensors by name."""
        parts = self.parameters.split(self.parameters.vector(theta))
        return dict(zip(self.names, parts, strict=True))

    # ---- values

    def __call__(self, theta: Any = None) -> float:
        """The loss at ``theta`` (default: at the present parameters)."""
        return next(self.values([self.theta if theta is None else theta]))

    @contextlib.contextmanager
    def at(self, theta: Any = None) -> Iterator[nn.Module]:
        """Inside the block the model holds ``theta``, in evaluation mode, statistics as chosen."""
        vector = self.theta if theta is None else self.parameters.vector(theta)
        with self._held() as (put, norms):
            put(vector)
            if norms:
                self._reestimate(norms)
            yield self.model

    @torch.no_grad()
    def values(self, thetas: Iterable[Any], *, together: int | None = None) -> Generator[float]:
        """The loss at one vector after the other.

        A loader is gone through once for every 64 vectors, not once for each. On a GPU 16 vectors
        share one batched forward pass (``torch.vmap``).

        Args:
            thetas: vectors (D,), made while they are consumed.
            together: vectors in one batched pass; None chooses. More than 1 needs data, a model
                that is not compiled, and batch norm "frozen" or "batch".
        """
        if together is None:
            together = TOGETHER if self._batchable and self.device.type == "cuda" else 1
        elif checks.count(together, "together") > 1 and not self._batchable:
            raise ValueError(
                "together: more than 1 needs data, a model that is not compiled, and batch norm "
                "'frozen' or 'batch'"
            )
        vectors = (self.parameters.vector(theta) for theta in thetas)
        if together > 1:
            for block in _blocks(vectors, together):
                yield from self._stacked(block)
            return
        streamed = self.batches is not None and self.batches.tensors is None
        if streamed and self.batch_norm != "reestimate":
            for block in _blocks(vectors, BLOCK):
                yield from self._streamed(block)
            return
        chunk = self._chunk()
        with self._held(fast=True) as (put, norms):
            for vector in vectors:
                put(vector)
                if norms:
                    self._reestimate(norms)
                yield self._mean(chunk)

    def _mean(self, chunk: int | None) -> float:
        """The loss where the model is now."""
        if self.batches is None:
            return float(one_number(self.loss_fn()))
        total, rows = 0.0, 0
        for batch in self._parts(chunk):
            loss = self.batches.loss(self.model, self.loss_fn, batch)
            total += float(loss) * length(batch)
            rows += length(batch)
        return total / rows

    def _streamed(self, block: list[Tensor]) -> list[float]:
        """The losses at several vectors from one pass over a loader."""
        assert self.batches is not None
        totals, rows = [0.0] * len(block), 0
        with self._held(fast=True) as (put, _):
            for batch in self.batches:
                n = length(batch)
                rows += n
                for i, vector in enumerate(block):
                    put(vector)
                    totals[i] += n * float(self.batches.loss(self.model, self.loss_fn, batch))
        return [total / rows for total in totals]

    def _stacked(self, block: list[Tensor]) -> list[float]:
        """The losses at several vectors from one batched pass."""
        assert self.batches is not None
        split = zip(*(self.parameters.split(vector) for vector in block), strict=True)
        stacked = {
            name: torch.stack(parts).to(own.dtype)
            for name, own, parts in zip(self.names, self.parameters.tensors, split, strict=True)
        }
        batches, loss_fn = self.batches, self.loss_fn

        def loss(weights: dict[str, Tensor], batch: Batch) -> Tensor:
            def run(*args: Any, **named: Any) -> Any:
                return torch.func.functional_call(self.plain, weights, args, named)

            return batches.loss(run, loss_fn, batch)

        total, rows = torch.zeros(len(block), device=self.device, dtype=torch.float64), 0
        with looking(self.plain, self.batch_norm), twice():
            for batch in self._parts(self._chunk()):
                n = length(batch)
                total += n * torch.vmap(loss, (0, None))(stacked, batch)
                rows += n
        return [float(value) for value in total / rows]

    # ---- derivatives

    def gradient(self, theta: Any = None) -> tuple[float, Float[Tensor, " D"]]:
        """Loss and gradient at ``theta``; the model's own ``.grad`` fields are left alone."""
        with self._differentiable(theta) as losses:
            value, total = 0.0, torch.zeros(self.size, dtype=self.parameters.dtype).to(self.device)
            for loss in losses():
                parts = torch.autograd.grad(loss, self.parameters.tensors, materialize_grads=True)
                value += float(loss.detach())
                total += self.parameters.join(parts)
        return value, total

    def hvp(self, v: Tensor, theta: Any = None) -> Tensor:
        """Hessian times ``v`` at ``theta``, for v of shape (D,) or (k, D).

        For many products at the same place use ``with objective.curvature(theta) as product``,
        which keeps the graph of the gradient.
        """
        with self.curvature(theta, keep=v.ndim > 1) as product:
            return product(v)

    @contextlib.contextmanager
    def curvature(self, theta: Any = None, *, keep: bool = True) -> Iterator[HessianProduct]:
        """``product(v)`` is the Hessian at ``theta`` times v, shape (D,) or (k, D).

        Args:
            theta: where; default at the present parameters.
            keep: keep the graph of the gradient between products as far as a gigabyte allows
                (tensors in memory and closures; a loader is gone through for each product).

        Raises:
            TypeError: a parameter is in half precision, which has no room for second derivatives.
        """
        for name, parameter in zip(self.names, self.parameters.tensors, strict=True):
            if parameter.element_size() < 4:
                raise TypeError(
                    f"model: {name} is {parameter.dtype}; curvature needs float32 or float64 "
                    "(model.float())"
                )
        with self._differentiable(theta) as losses:
            streamed = self.batches is not None and self.batches.tensors is None
            product = HessianProduct(self.parameters, losses, keep=keep and not streamed)
            try:
                yield product
            finally:
                product.close()

    @contextlib.contextmanager
    def _differentiable(self, theta: Any) -> Iterator[Callable[[], Iterator[Tensor]]]:
        """A function that gives the loss batch by batch, each as its share of the mean."""
        if self.batches is None and self.model is not self.plain:
            raise ValueError(
                "model: is compiled, and second derivatives do not pass through compiled code; "
                "give (loss_fn, data) in place of a closure"
            )
        vector = self.theta if theta is None else self.parameters.vector(theta)
        chunk = self._chunk()

        def losses() -> Iterator[Tensor]:
            if self.batches is None:
                yield one_number(self.loss_fn())
                return
            rows = self._count()
            for batch in self._parts(chunk):
                loss = self.batches.loss(self.plain, self.loss_fn, batch)
                yield loss * (length(batch) / rows)

        with self._held(fast=True) as (put, norms), torch.enable_grad():
            put(vector)
            if norms:
                with torch.no_grad():
                    self._reestimate(norms)
            yield losses

    # ---- inside

    @contextlib.contextmanager
    def _held(self, fast: bool = False) -> Iterator[tuple[Setter, list[nn.Module]]]:
        """The model lent out: where to put a vector, and the batch norms to re-estimate."""
        layout = fast and self._channels_last
        with (
            self.parameters.lent(channels_last=layout) as put,
            looking(self.plain, self.batch_norm) as norms,
        ):
            yield put, norms

    def _reestimate(self, norms: list[nn.Module]) -> None:
        """Statistics of batch norm from one pass over the data."""
        assert self.batches is not None
        batches = self.batches

        def forward() -> None:
            for batch in self._parts(STATISTIC_ROWS):
                batches.loss(self.model, self.loss_fn, batch)

        with torch.no_grad():
            restatistic(norms, forward)

    @property
    def _channels_last(self) -> bool:
        compiled = self.model is not self.plain
        return self.batches is not None and not compiled and has_convolutions(self.plain)

    @property
    def _batchable(self) -> bool:
        usual = self.batches is not None and self.model is self.plain
        return usual and self.batch_norm != "reestimate"

    def _parts(self, chunk: int | None) -> Iterator[Batch]:
        """One pass over the data, tensors in memory ``chunk`` rows at a time."""
        assert self.batches is not None
        if self.batches.tensors is None:
            return iter(self.batches)
        return self.batches.chunks(self.batches.batch_size or chunk)

    def _count(self) -> int:
        """Rows of the data; counted once for a loader."""
        assert self.batches is not None
        if self._rows is None:
            known = self.batches.rows
            self._rows = known if known is not None else sum(length(b) for b in self.batches)
        return self._rows

    def _chunk(self) -> int | None:
        """Rows of tensors in memory to take at once; None for all of them together."""
        small = (
            self.batches is not None
            and self.batches.tensors is not None
            and self.batches.batch_size is None
            and self.batch_norm != "batch"
            and self.model is self.plain
            and self.device.type == "cpu"
            and (self.batches.rows or 0) > 2 * ROWS
            and has_convolutions(self.plain)
        )
        if not small:
            return None
        if self._mean_of_rows is None:
            self._mean_of_rows = self._is_mean_of_rows()
        return ROWS if self._mean_of_rows else None

    @torch.no_grad()
    def _is_mean_of_rows(self) -> bool:
        """Whether the loss of two chunks is the mean of their losses, tried where the model is."""
        batches = self.batches
        assert batches is not None and batches.tensors is not None
        rows, theta = [tensor[: 2 * ROWS] for tensor in batches.tensors], self.theta
        with self._held(fast=True) as (put, _):
            put(theta)
            whole = float(batches.loss(self.model, self.loss_fn, tuple(rows)))
            halves = zip(*(tensor.split(ROWS) for tensor in rows), strict=True)
            parts = [float(batches.loss(self.model, self.loss_fn, half)) for half in halves]
        mean = sum(parts) / len(parts)
        return math.isfinite(whole) and abs(whole - mean) <= 1e-4 * max(abs(whole), 1e-8)


def _blocks(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
