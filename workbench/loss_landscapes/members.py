r"""Many small networks of one architecture trained and looked at together.

Their parameters and buffers are stacked along a leading axis of members, and the model is
vectorised over it, so that a grid of settings costs few large operations in place of many small
ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks
from workbench.lab.members import States, forward, outputs

Array = np.ndarray[Any, np.dtype[Any]]
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: SGD with momentum, the rate divided in steps. Paper's defaults.

    Attributes:
        epochs: of the whole schedule.
        batch_size: rows a step.
        lr, momentum, weight_decay: of SGD.
        milestones: shares of the schedule after which the rate is multiplied by ``gamma``.
    """

    epochs: int = 160
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        checks.count(self.epochs, "epochs")
        checks.count(self.batch_size, "batch_size")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            checks.positive(getattr(self, name), name, zero=True)

    def steps(self, rows: int) -> int:
        """Steps of the whole schedule on that many rows."""
        return self.epochs * math.ceil(rows / self.batch_size)

    def rate(self, progress: float) -> float:
        """Learning rate after a share of the schedule."""
        return self.lr * self.gamma ** sum(progress >= m for m in self.milestones)


def train_members(
    model: nn.Module,
    states: Mapping[str, Tensor],
    data: Data,
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    rho: Float[Tensor, " m"] | None = None,
    steps: int | None = None,
    stops: Sequence[int] = (),
) -> tuple[States, list[States]]:
    r"""Train m networks of one architecture together, each in its own order of minibatches.

    A step is SGD's, $v\leftarrow\mu v+g+\lambda\theta,\ \theta\leftarrow\theta-\eta v$, with $g$
    multiplied by the mask, so that what was pruned stays 0. With ``rho`` the gradient is taken at
    $\theta+\rho g/\|g\|$ (SAM).

    Args:
        model: the architecture; never changed.
        states: parameters and buffers with a leading axis m, from `stack`.
        data: x (n, ...) and class indices y (n,).
        seeds: (m,), of each member's minibatch order; equal seeds see equal minibatches.
        recipe: hyper-parameters.
        masks: by name, (m, ...) or broadcasting against it, True where a weight stays.
        rho: (m,), SAM's radius of each member; 0 is plain SGD.
        steps: of the schedule; by default ``recipe.epochs`` through the data.
        stops: steps after which to keep a copy (early stopping); they ascend.

    Returns:
        The states after the last step, and those at ``stops``.

    Raises:
        ValueError: lengths disagree or a stop lies beyond the schedule.
    """
    recipe, (x, y) = recipe or Recipe(), data
    rows, m = checks.same_length(x=x, y=y), len(next(iter(states.values())))
    if len(seeds) != m:
        raise ValueError(f"seeds: expected one for each of {m} members, got {len(seeds)}")
    total = recipe.steps(rows) if steps is None else checks.count(steps, "steps")
    if any(not 0 < s <= total for s in stops) or list(stops) != sorted(stops):
        raise ValueError(f"stops: expected ascending steps from 1 to {total}, got {list(stops)}")
    worker = copy.deepcopy(model).train()
    run = forward(worker)
    held = {name: values.detach().clone() for name, values in states.items()}
    names = [name for name, p in worker.named_parameters() if p.requires_grad]
    kept = {name: masks[name].to(held[name]) for name in names if masks and name in masks}
    for name, mask in kept.items():
        held[name].mul_(mask)
    weights = [held[name] for name in names]
    speeds = [torch.zeros_like(w) for w in weights]

    def gradients(at: list[Tensor], here: Mapping[str, Tensor], rows: Tensor) -> list[Tensor]:
        leaves = [w.detach().requires_grad_() for w in at]
        logits = run({**here, **dict(zip(names, leaves, strict=True))}, x[rows])
        loss = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum")
        found = list(torch.autograd.grad(loss / rows.shape[1], leaves))
        for name, g in zip(names, found, strict=True):
            if name in kept:
                g.mul_(kept[name])
        return found

    copies = []
    for step, chosen in enumerate(_minibatches(rows, seeds, recipe.batch_size, total, x.device)):
        found = gradients(weights, held, chosen)
        if rho is not None:
            sizes = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
            scale = rho.to(sizes) / (sizes + 1e-12)
            moved = [
                w + scale.view(-1, *[1] * (g.ndim - 1)) * g
                for w, g in zip(weights, found, strict=True)
            ]
            # running statistics follow the first pass only
            aside = {k: v.clone() for k, v in held.items() if k not in names}
            found = gradients(moved, aside, chosen)
        torch._foreach_add_(found, weights, alpha=recipe.weight_decay)
        torch._foreach_mul_(speeds, recipe.momentum)
        torch._foreach_add_(speeds, found)
        torch._foreach_add_(weights, speeds, alpha=-recipe.rate(step / total))
        if step + 1 in stops:
            copies.append({name: values.clone() for name, values in held.items()})
    return held, copies


def _minibatches(
    rows: int, seeds: Sequence[int], size: int, total: int, device: torch.device
) -> Iterator[Tensor]:
    """Row numbers (m, b) for each step; members with the same seed share their order."""
    distinct = list(dict.fromkeys(seeds))
    sources = [torch.Generator().manual_seed(int(s)) for s in distinct]
    place = torch.tensor([distinct.index(s) for s in seeds])
    done = 0
    while True:
        order = torch.stack([torch.randperm(rows, generator=g) for g in sources])[place]
        for chosen in order.to(device).split(size, 1):
            if done == total:
                return
            yield chosen
            done += 1


@torch.no_grad()
def restate(model: nn.Module, states: Mapping[str, Tensor], x: Tensor) -> States:
    """The same members with batch-norm statistics taken over x, all rows together."""
    worker = copy.deepcopy(model).eval()
    norms = [m for m in worker.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    out = {name: values.clone() for name, values in states.items()}
    if norms:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        forward(worker, each=False)(out, x)
    return out


def errors(model: nn.Module, states: Mapping[str, Tensor], data: Data) -> Array:
    """Share of rows (m,) that each member gets wrong."""
    wrong = outputs(model, states, data[0]).argmax(-1) != data[1]
    return wrong.double().mean(1).cpu().numpy()


def profiles(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], data: Data, points: int = 11
) -> Array:
    """Error rates (m, points) on the straight lines from members of ``a`` to those of ``b``.

    Batch-norm statistics are taken over ``data`` at each point.
    """
    floats = [name for name, values in a.items() if values.is_floating_point()]
    found = []
    for t in np.linspace(0, 1, checks.count(points, "points", minimum=2)):
        point = {**a, **{name: torch.lerp(a[name], b[name], float(t)) for name in floats}}
        found.append(errors(model, restate(model, point, data[0]), data))
    return np.stack(found, 1)
