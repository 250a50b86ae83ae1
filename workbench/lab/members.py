r"""Many small networks of one architecture trained together.

Their parameters and buffers are stacked along a leading axis of members and the model is vectorised
over it, so that a grid of seeds, losses and learning rates costs few large operations in place of
many small ones. Members with the same seed begin at the same weights and see the same minibatches:
whatever differs between them is what you made different.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from workbench.lab.checks import count, one_of, positive
from workbench.lab.seeding import seeded

States = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Schedule = str | tuple[Sequence[float], float]


def stack(states: Sequence[Mapping[str, Tensor]]) -> States:
    """State dicts of one architecture as one: each entry gains a leading axis of members."""
    return {name: torch.stack([s[name].detach() for s in states]).clone() for name in states[0]}


def member(states: Mapping[str, Tensor], index: int) -> States:
    """One network's state dict, to load into a model."""
    return {name: values[index] for name, values in states.items()}


def start(factory: Callable[[], nn.Module], seeds: Sequence[int]) -> tuple[nn.Module, States]:
    """Fresh networks, one a seed; equal seeds give equal weights.

    Args:
        factory: makes a network from torch's global generator.
        seeds: (m,).

    Returns:
        The architecture, and the members' states with a leading axis m.

    Raises:
        ValueError: there are no seeds.
    """
    if not len(seeds):
        raise ValueError("seeds: expected at least one member")
    made = {}
    for s in dict.fromkeys(int(s) for s in seeds):
        with seeded(s):
            made[s] = factory()
    first = made[int(seeds[0])]
    return first, stack([made[int(s)].state_dict() for s in seeds])


def forward(
    model: nn.Module, *, each: bool = True
) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """The model over its members: (states, x (m, b, ...)) -> (m, b, k); x (b, ...) if not each."""

    def one(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, dict(state), (x,))
        return out

    return torch.vmap(one, in_dims=(0, 0 if each else None), randomness="different")


@torch.no_grad()
def outputs(
    model: nn.Module, states: Mapping[str, Tensor], x: Tensor, *, each: bool = False
) -> Float[Tensor, "m n k"]:
    """What all members say, in evaluation mode.

    Args:
        model: the architecture; never changed.
        states: of m members.
        x: (n, ...), or (m, n, ...) with ``each``.
        each: whether every member has inputs of its own.
    """
    return forward(copy.deepcopy(model).eval(), each=each)(dict(states), x)


def train(
    model: nn.Module,
    states: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    *,
    seeds: Sequence[int],
    rows: Int[Tensor, "m r"] | None = None,
    each: bool = False,
    epochs: int,
    batch_size: int = 64,
    lr: float | Float[Tensor, " m"] = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float | Float[Tensor, " m"] = 0.0,
    schedule: Schedule = "constant",
    clip: float | None = None,
    after_epoch: Callable[[int, States], None] | None = None,
) -> States:
    r"""Train m networks of one architecture, each on its own rows.

    Args:
        model: the architecture; never changed.
        states: parameters and buffers with a leading axis m, from `start` or `stack`.
        x: inputs (n, ...), or (m, n, ...) with ``each``.
        y: targets (n, ...), or (m, n, ...) with ``each``.
        loss: ``loss(out (m, b, k), y (m, b, ...), index (m, b)) -> (m,)``, one number a member;
            ``index`` are row numbers, for a loss with a memory of each row.
        seeds: (m,), of each member's order of minibatches; equal seeds see equal minibatches.
        rows: (m, r), the rows of x that each member is trained on; default all.
        each: whether every member has data of its own.
        epochs: passes over a member's rows; the last, smaller batch of a pass is used too.
        batch_size: rows a step.
        lr: learning rate, one for all or one a member.
        optimizer: "adam" (betas 0.9 and 0.999, decay added to the gradient) or "sgd".
        momentum: of SGD.
        weight_decay: L2 penalty's factor in the gradient, one for all or one a member.
        schedule: "constant", "cosine" (falling to zero), or ``(milestones, gamma)``: the rate is
            multiplied by gamma after each of these shares of all steps.
        clip: largest allowed norm of a member's gradient.
        after_epoch: called with the epochs done and the states (not to be changed).

    Returns:
        The trained states.

    Raises:
        ValueError: lengths disagree or an argument is out of range.
    """
    m, n = len(next(iter(states.values()))), x.shape[1 if each else 0]
    if len(seeds) != m:
        raise ValueError(f"seeds: expected one for each of {m} members, got {len(seeds)}")
    if y.shape[: 2 if each else 1] != x.shape[: 2 if each else 1]:
        raise ValueError(f"y: expected {tuple(x.shape[: 2 if each else 1])} rows as x has")
    if rows is not None and (rows.ndim != 2 or len(rows) != m):
        raise ValueError(f"rows: expected ({m}, r), got {tuple(rows.shape)}")
    one_of(optimizer, ("adam", "sgd"), "optimizer")
    size = n if rows is None else rows.shape[1]
    total = count(epochs, "epochs") * math.ceil(size / count(batch_size, "batch_size"))

    worker = copy.deepcopy(model).train()
    run = forward(worker)
    held = {name: values.detach().clone() for name, values in states.items()}
    names = [name for name, p in worker.named_parameters() if p.requires_grad]
    weights = [held[name] for name in names]
    rates, decay = _per_member(lr, "lr", weights), _per_member(weight_decay, "decay", weights)
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights] if optimizer == "adam" else []
    who, step = torch.arange(m, device=x.device)[:, None], 0

    for epoch in range(epochs):
        for place in minibatches(size, seeds, batch_size, epoch, x.device):
            index = place if rows is None else rows.to(x.device).gather(1, place)
            leaves = [w.detach().requires_grad_() for w in weights]
            out = run(
                {**held, **dict(zip(names, leaves, strict=True))},
                x[who, index] if each else x[index],
            )
            losses = loss(out, y[who, index] if each else y[index], index)
            if losses.shape != (m,):
                raise ValueError(f"loss: expected ({m},), got {tuple(losses.shape)}")
            slopes = list(torch.autograd.grad(losses.sum(), leaves))
            if clip is not None:
                _clip(slopes, positive(clip, "clip"))
            torch._foreach_addcmul_(slopes, weights, decay)
            factor, step = _factor(schedule, step / total), step + 1
            if optimizer == "sgd":
                torch._foreach_mul_(first, momentum)
                torch._foreach_add_(first, slopes)
                moves = torch._foreach_mul(first, factor)
            else:
                torch._foreach_lerp_(first, slopes, 0.1)
                torch._foreach_mul_(second, 0.999)
                torch._foreach_addcmul_(second, slopes, slopes, 0.001)
                scale = torch._foreach_sqrt(second)
                torch._foreach_div_(scale, math.sqrt(1 - 0.999**step))
                torch._foreach_add_(scale, 1e-8)
                moves = torch._foreach_div(first, scale)
                torch._foreach_mul_(moves, factor / (1 - 0.9**step))
            torch._foreach_addcmul_(weights, moves, rates, -1.0)
        if after_epoch is not None:
            after_epoch(epoch + 1, held)
    return held


def minibatches(
    size: int, seeds: Sequence[int], batch_size: int, epoch: int, device: torch.device | str = "cpu"
) -> Iterator[Int[Tensor, "m b"]]:
    """Positions 0..size-1 in a random order of each member's, for one epoch."""
    distinct = list(dict.fromkeys(int(s) for s in seeds))
    orders = []
    for s in distinct:
        source = torch.Generator().manual_seed((s * 1_000_003 + epoch) % 2**63)
        orders.append(torch.randperm(size, generator=source))
    place = torch.tensor([distinct.index(int(s)) for s in seeds])
    yield from torch.stack(orders)[place].to(device).split(batch_size, 1)


def _per_member(value: float | Tensor, name: str, weights: list[Tensor]) -> list[Tensor]:
    """One number a member, shaped to multiply each stacked weight."""
    m = len(weights[0])
    given = torch.as_tensor(value, dtype=weights[0].dtype, device=weights[0].device)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != m):
        raise ValueError(f"{name}: expected a number or ({m},), got {tuple(given.shape)}")
    if not bool((given >= 0).all()):
        raise ValueError(f"{name}: expected numbers >= 0")
    return [given.expand(m).view(m, *[1] * (w.ndim - 1)) for w in weights]


def _factor(schedule: Schedule, progress: float) -> float:
    if isinstance(schedule, tuple):
        milestones, gamma = schedule
        return float(gamma ** sum(progress >= at for at in milestones))
    one_of(schedule, ("constant", "cosine"), "schedule")
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * progress)) / 2


def _clip(slopes: list[Tensor], largest: float) -> None:
    """Scale each member's gradient to the norm allowed, in place."""
    norms = torch.stack([g.flatten(1).square().sum(1) for g in slopes]).sum(0).sqrt()
    scale = (largest / (norms + 1e-6)).clamp_max(1.0)
    for g in slopes:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
