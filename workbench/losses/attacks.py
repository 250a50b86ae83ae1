r"""Projected gradient ascent on any objective in an $L_\infty$ or $L_2$ ball.

$$x^{t+1} = \Pi\big(x^t + \alpha\,d(\nabla_{x^t} J(x^t))\big), \qquad
  d(g) = \mathrm{sign}(g) \ (L_\infty), \quad g/\|g\|_2 \ (L_2),$$

where $\Pi$ projects onto $\{x' : \|x' - x\| \le \epsilon\}$ and the box of valid inputs. `pgd`
keeps the best point seen, so a restart or a step more never gives a lower objective.

Reference: Madry, Makelov, Schmidt, Tsipras and Vladu (2018), arXiv 1706.06083, section 2.1; margin
objective: Carlini and Wagner (2017), arXiv 1608.04644.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks
from workbench.losses.conventions import floating

Objective = Callable[[Tensor], Tensor]
Model = Callable[[Tensor], Tensor]
NORMS = ("linf", "l2")


def pgd(
    objective: Objective,
    x: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    restarts: int = 1,
    start: Tensor | None = None,
    box: tuple[float, float] | None = None,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Points near ``x`` with a high objective.

    Args:
        objective: points of the shape of ``x`` -> one value a sample, to be raised; its shape says
            which leading dimensions of ``x`` are samples (several networks at once: two).
        x: (n, ...) or (m, n, ...), the centres; where a box is given, inside it.
        eps: radius of the ball, in the units of ``x``.
        steps: gradients per restart.
        step_size: length of a step in that norm; default 2.5 eps / steps.
        norm: ``linf`` or ``l2``.
        restarts: how many starts; the first is ``start`` if that is given, the others are uniform
            in the ball.
        start: first points; projected before use.
        box: lowest and highest valid input.
        generator: of the uniform starts.

    Returns:
        Tensor of the shape of ``x``, outside any graph.

    Raises:
        ValueError: a number is out of range, ``start`` has another shape, or the objective does not
            return one value a sample.

    Reference: Madry et al. (2018), arXiv 1706.06083, section 2.1.
    """
    x = floating(x, "x").detach()
    checks.positive(eps, "eps", zero=True)
    checks.count(steps, "steps")
    checks.count(restarts, "restarts")
    checks.one_of(norm, NORMS, "norm")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start: expected shape {tuple(x.shape)}, got {tuple(start.shape)}")
    length = 2.5 * eps / steps if step_size is None else checks.positive(step_size, "step_size")
    random = checks.as_generator(generator, device=x.device)
    best, most = x, _values(objective, x)
    for restart in range(restarts):
        first = start if restart == 0 and start is not None else None
        at = _uniform(x, eps, norm, most.ndim, random) if first is None else first.detach()
        at = _project(at, x, eps, norm, most.ndim, box)
        for _ in range(steps):
            with torch.enable_grad():
                at.requires_grad_()
                value = objective(at)
                (slope,) = torch.autograd.grad(value.sum(), at)
            best, most = _better(at.detach(), value.detach(), best, most)
            moved = at.detach() + length * _direction(slope, norm, most.ndim)
            at = _project(moved, x, eps, norm, most.ndim, box)
        best, most = _better(at, _values(objective, at), best, most)
    return best


def cross_entropy(model: Model, y: Tensor) -> Objective:
    """Objective: cross-entropy of the true classes. ``model`` gives logits (..., k), y is (...)."""

    def value(x: Tensor) -> Tensor:
        h = model(x)
        return F.cross_entropy(h.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)

    return value


def margin(model: Model, y: Tensor) -> Objective:
    r"""Objective: $\max_{k\ne y}h_k - h_y$, positive where the model errs; does not saturate."""

    def value(x: Tensor) -> Tensor:
        h = model(x)
        true = F.one_hot(y, h.shape[-1]).bool()
        return h.masked_fill(true, -torch.inf).amax(-1) - h.gather(-1, y[..., None])[..., 0]

    return value


def survives(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 20,
    norm: str = "linf",
    restarts: int = 2,
    step_size: float | None = None,
    box: tuple[float, float] | None = None,
    objectives: Sequence[Callable[[Model, Tensor], Objective]] = (cross_entropy, margin),
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Samples that are classified correctly at ``x`` and at every point the attacks find.

    Args:
        model: inputs (..., d) -> logits (..., k).
        x: inputs.
        y: classes (...).
        eps, steps, norm, restarts, step_size, box, generator: of `pgd`.
        objectives: each is attacked with all restarts.

    Returns:
        Booleans of the shape of ``y``; their mean is the robust accuracy, from above.
    """
    random = checks.as_generator(generator, device=x.device)
    with torch.no_grad(), evaluating(model):
        kept = model(x).argmax(-1) == y
        for objective in objectives:
            found = pgd(
                objective(model, y), x, eps=eps, steps=steps, norm=norm, restarts=restarts,
                step_size=step_size, box=box, generator=random,
            )  # fmt: skip
            kept &= model(found).argmax(-1) == y
    return kept


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """A module in evaluation mode inside the block: an attack must not move running statistics."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _values(objective: Objective, at: Tensor) -> Tensor:
    with torch.no_grad():
        values = objective(at)
    if values.ndim == 0 or values.shape != at.shape[: values.ndim]:
        raise ValueError(
            f"objective: expected one value a sample of {tuple(at.shape)}, "
            f"got shape {tuple(values.shape)}"
        )
    return values


def _better(at: Tensor, value: Tensor, best: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    wins = value > most
    return torch.where(_wide(wins, at), at, best), torch.where(wins, value, most)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim))


def _length(move: Tensor, lead: int) -> Tensor:
    return _wide(move.flatten(lead).norm(dim=-1), move)


def _direction(slope: Tensor, norm: str, lead: int) -> Tensor:
    return slope.sign() if norm == "linf" else slope / _length(slope, lead).clamp(min=1e-12)


def _project(
    at: Tensor, x: Tensor, eps: float, norm: str, lead: int, box: tuple[float, float] | None
) -> Tensor:
    """Nearest point of the ball, then of the box; x lies in both, so the second keeps the first."""
    move = at - x
    if norm == "linf":
        move = move.clamp(-eps, eps)
    else:
        move = move * (eps / _length(move, lead).clamp(min=1e-12)).clamp(max=1)
    moved = x + move
    return moved if box is None else moved.clamp(*box)


def _uniform(x: Tensor, eps: float, norm: str, lead: int, random: torch.Generator) -> Tensor:
    if norm == "linf":
        u = torch.rand(x.shape, generator=random, device=x.device, dtype=x.dtype)
        return x + eps * (2 * u - 1)
    move = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
    u = torch.rand(x.shape[:lead], generator=random, device=x.device, dtype=x.dtype)
    size = u ** (1 / max(1, x[(0,) * lead].numel()))
    return x + eps * _wide(size, x) * move / _length(move, lead)
