"""How a model behaves while it is looked at: dropout off, batch norm by choice, all put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORM = ("frozen", "batch", "reestimate")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch-norm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextlib.contextmanager
def looking(model: nn.Module, batch_norm: str) -> Iterator[list[nn.Module]]:
    """Evaluation mode inside the block; flags and buffers are afterwards what they were.

    With "batch" the statistics are those of each batch. With "reestimate" they are copies that
    `restatistic` may overwrite. The model's own buffers are set aside, never written to: those of
    other layers are copies inside the block as well.

    Yields:
        The batch-norm layers to re-estimate, empty for the other choices.
    """
    flags = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    norms = batch_norms(model)
    try:
        copies = {id(buffer): buffer.clone() for _, _, buffer in kept}
        for module, name, buffer in kept:
            module._buffers[name] = copies[id(buffer)]
        model.eval()
        if batch_norm == "batch":
            for module in norms:
                for name in STATISTICS:
                    module._buffers[name] = None
        yield norms if batch_norm == "reestimate" else []
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
        for module, training in flags.items():
            module.training = training


def restatistic(norms: list[nn.Module], forward: Callable[[], None]) -> None:
    """Running statistics become the plain averages over the batches of one pass ``forward``."""
    momenta = [module.momentum for module in norms]
    try:
        for module in norms:
            module.reset_running_stats()  # type: ignore[operator]
            module.momentum = None  # type: ignore[assignment]
            module.training = True
        forward()
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            module.training = False


@contextlib.contextmanager
def twice() -> Iterator[None]:
    """Only operations that can be differentiated twice: fused attention and cuDNN's RNNs cannot."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
