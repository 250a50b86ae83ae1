"""The parameters of a module as one flat vector: which they are, out, in, and safely back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

COMPILED = "_orig_mod."


def eager(model: nn.Module) -> nn.Module:
    """The module itself, also where `torch.compile` has wrapped it."""
    return getattr(model, "_orig_mod", model)


class Parameters:
    """Trainable parameters of a model as a flat vector theta of length D.

    A parameter used in several places (tied) counts once. The vector is float32, or float64 where
    a parameter is; parameters in half precision are rounded when they are put back.

    Args:
        model: any module; compiled ones are looked into.
        frozen: also take the parameters that do not require a gradient.

    Raises:
        TypeError: ``model`` is no module, or a parameter is not floating point.
        ValueError: there is no parameter to vary, one is not initialised yet, or two different
            parameters share memory. The message names them.
    """

    def __init__(self, model: nn.Module, *, frozen: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = eager(model)
        chosen = {n: p for n, p in self.model.named_parameters() if frozen or p.requires_grad}
        if not chosen:
            raise ValueError(
                "model: has no trainable parameters; pass frozen=True to vary frozen ones"
            )
        for name, parameter in chosen.items():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"model: {name} is not initialised; run one batch through it")
            if not parameter.is_floating_point():
                raise TypeError(
                    f"model: {name} is {parameter.dtype}; expected floating-point parameters"
                )
        _refuse_shared(chosen)
        self.names = list(chosen)
        self.tensors = list(chosen.values())
        self.shapes = [tuple(p.shape) for p in self.tensors]
        self.sizes = [p.numel() for p in self.tensors]
        self.size = sum(self.sizes)
        self.device = self.tensors[0].device
        wide = any(p.dtype == torch.float64 for p in self.tensors)
        self.dtype = torch.float64 if wide else torch.float32

    @property
    def theta(self) -> Float[Tensor, " D"]:
        """A copy of the present values."""
        return self.join([p.detach() for p in self.tensors])

    def join(self, parts: Sequence[Tensor]) -> Float[Tensor, " D"]:
        """One vector out of tensors in the order of ``names``."""
        return torch.cat([p.reshape(-1).to(self.device, self.dtype) for p in parts])

    def split(self, theta: Float[Tensor, " D"]) -> list[Tensor]:
        """Views of the vector in the shapes of the parameters."""
        pieces = theta.split(self.sizes)
        return [part.view(shape) for part, shape in zip(pieces, self.shapes, strict=True)]

    def vector(self, theta: Any, name: str = "theta") -> Float[Tensor, " D"]:
        """``theta`` as a vector on the right device, or a ValueError that names the argument.

        Takes a vector, a module of the same architecture, a mapping from names to tensors (a
        ``state_dict``), or a sequence of tensors in the order of ``names``.
        """
        if isinstance(theta, nn.Module):
            theta = dict(eager(theta).named_parameters())
        if isinstance(theta, Mapping):
            given = {key.removeprefix(COMPILED): value for key, value in theta.items()}
            if missing := [key for key in self.names if key not in given]:
                raise ValueError(f"{name}: has no {missing[0]!r}; expected the model's parameters")
            theta = [given[key] for key in self.names]
        if isinstance(theta, (list, tuple)):
            shapes = [tuple(part.shape) for part in theta]
            if shapes != self.shapes:
                raise ValueError(f"{name}: expected tensors of shapes {self.shapes}, got {shapes}")
            return self.join([part.detach() for part in theta])
        if not isinstance(theta, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(theta).__name__}")
        if tuple(theta.shape) != (self.size,):
            raise ValueError(f"{name}: expected shape ({self.size},), got {tuple(theta.shape)}")
        return theta.detach().to(self.device, self.dtype)

    @contextlib.contextmanager
    def lent(self, *, channels_last: bool = False) -> Iterator[Setter]:
        """Inside the block the model holds other tensors; its own ones are never written to.

        At the end, also after an exception or an interruption, every parameter points to its own
        memory again, so nothing has to be copied back and no bit can differ.

        Args:
            channels_last: lay out convolution kernels in that memory format.
        """
        own = [p.data for p in self.tensors]
        asked = [p.requires_grad for p in self.tensors]
        work = [_like(data, channels_last) for data in own]
        try:
            for parameter, data in zip(self.tensors, work, strict=True):
                parameter.data = data
                parameter.requires_grad_(True)
            yield Setter(self, work)
        finally:
            for parameter, data, flag in zip(self.tensors, own, asked, strict=True):
                parameter.data = data
                parameter.requires_grad_(flag)


class Setter:
    """Puts a vector into the tensors that the model holds for the time being."""

    def __init__(self, parameters: Parameters, work: list[Tensor]) -> None:
        self.parameters, self.work = parameters, work

    @torch.no_grad()
    def __call__(self, theta: Float[Tensor, " D"]) -> None:
        """The model holds ``theta`` from now on."""
        for held, part in zip(self.work, self.parameters.split(theta), strict=True):
            held.copy_(part)


def _like(data: Tensor, channels_last: bool) -> Tensor:
    if channels_last and data.ndim == 4:
        return torch.empty_like(data, memory_format=torch.channels_last)
    return torch.empty_like(data)


def _refuse_shared(chosen: Mapping[str, nn.Parameter]) -> None:
    """Different parameters in the same memory cannot be varied apart."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in chosen.items():
        if p.numel() == 0 or p.device.type == "meta":
            raise ValueError(f"model: {name} holds no numbers (shape {tuple(p.shape)}, {p.device})")
        start = int(p.storage_offset())
        last = sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))
        end = start + int(last) + 1
        spans.setdefault(p.untyped_storage().data_ptr(), []).append((start, end, name))
    for same in spans.values():
        for (a0, a1, first), (b0, b1, second) in combinations(same, 2):
            if a0 < b1 and b0 < a1:
                raise ValueError(
                    f"model: {first} and {second} are different parameters in the same memory; to "
                    "tie them, assign the same nn.Parameter to both"
                )
