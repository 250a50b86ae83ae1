"""Accuracy over the exponent, clean and with wrong labels; robustness against TRADES; tightness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lab import data, members
from workbench.lab.models import CNN, MLP
from workbench.losses import attacks, noise
from workbench.losses.comp_sum import T, best_risk, comp_sum_loss, smooth_adv_loss, trades_loss

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0)
"""Weights tried for either robust loss, as multiples of its default (nu = 1, beta = 6)."""
DEFAULTS = {"smooth": 1.0, "trades": 6.0}


# --- accuracy over the exponent -------------------------------------------------------------------


def clean(
    seed: int,
    *,
    task: str = "digits",
    rate: float = 0.0,
    taus: Sequence[float] = TAUS,
    lrs: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    power: float = 1.0,
    epochs: int = 20,
    width: int = 64,
    size: int = 900,
    device: str = "cpu",
) -> dict[str, Any]:
    """Test accuracy of each exponent, its learning rate chosen on held-out rows of its own.

    SGD with momentum 0.9 and a cosine schedule, batches of 64; training and held-out labels are
    wrong alike, test labels are right. All networks of a seed start alike and see the same batches.

    Args:
        seed: of split, wrong labels, weights and order.
        task: ``digits``, ``mnist5000``, or ``pairs``: two digits side by side, 100 classes.
        rate: share of wrong labels, symmetric.
        taus: exponents.
        lrs: learning rates tried for cross-entropy.
        power: exponent t tries those rates times (classes)^(power (t - 1)). With 1 the first step
            of a fresh network is equally long for all exponents; with 0 the rates are the same.
        epochs: passes over the training rows.
        width: hidden units.
        size: training rows; a third as many choose the rate, all others test.
        device: where the networks are trained.
    """
    (train, check, test), classes = _parts(task, seed, size, device)
    seen, held = (
        noise.symmetric(part[1].cpu(), classes, rate, seed + i).to(device) if rate else part[1]
        for i, part in enumerate((train, check))
    )
    rates = [[lr * classes ** (power * (tau - 1)) for lr in lrs] for tau in taus]
    settings = [lr for each in rates for lr in each]
    model, states = _start(
        lambda: MLP([train[0].shape[1], width, classes]), [seed] * len(settings), device
    )

    def loss(out: Tensor, target: Tensor, index: Tensor) -> Tensor:
        each = out.unflatten(0, (len(taus), len(lrs)))
        labels = target.unflatten(0, (len(taus), len(lrs)))
        found = [
            comp_sum_loss(h.flatten(0, 1), c.flatten(), tau=tau, reduction="none")
            for h, c, tau in zip(each, labels, taus, strict=True)
        ]
        return torch.stack(found).view(target.shape).mean(1)

    states = members.train(
        model, states, train[0], seen, loss, seeds=[seed] * len(settings), epochs=epochs,
        lr=torch.tensor(settings), optimizer="sgd", schedule="cosine",
    )  # fmt: skip
    chosen = _accuracy(model, states, check[0], held).reshape(len(taus), len(lrs))
    final = _accuracy(model, states, *test).reshape(len(taus), len(lrs))
    best = chosen.argmax(1)
    return {
        **{f"acc_{tau:g}": float(final[i, best[i]]) for i, tau in enumerate(taus)},
        **{f"lr_{tau:g}": float(rates[i][best[i]]) for i, tau in enumerate(taus)},
    }


Part = tuple[Tensor, Tensor]


def _start(
    factory: Callable[[], nn.Module], seeds: Sequence[int], device: str
) -> tuple[nn.Module, members.States]:
    model, states = members.start(factory, seeds)
    return model.to(device), {name: value.to(device) for name, value in states.items()}


def _parts(task: str, seed: int, size: int, device: str) -> tuple[list[Part], int]:
    """Flat images with classes to train on, to choose by and to test on; and how many classes."""
    if task not in ("digits", "mnist5000", "pairs"):
        raise ValueError(f"task: expected 'digits', 'mnist5000' or 'pairs', got {task!r}")
    images = data.mnist5000() if task == "mnist5000" else data.digits()
    x, y = images.flat.tensors(device)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random)
    if task != "pairs":
        cuts = order.split([size, size // 3, len(x) - size - size // 3])
        return [(x[rows], y[rows]) for rows in cuts], 10
    found = []  # no digit takes part in pairs of two parts
    pools = order.split([len(x) // 2, len(x) // 5, len(x) - len(x) // 2 - len(x) // 5])
    for pool, pairs in zip(pools, (size, size // 3, 1500), strict=True):
        left, right = pool[torch.randint(len(pool), (2, pairs), generator=random)]
        found.append((torch.cat([x[left], x[right]], 1), 10 * y[left] + y[right]))
    return found, 100


def _accuracy(model: nn.Module, states: members.States, x: Tensor, y: Tensor) -> np.ndarray:
    right = members.outputs(model, states, x).argmax(-1) == y
    return right.float().mean(1).cpu().numpy()


# --- robustness -----------------------------------------------------------------------------------


def robust(
    seed: int,
    *,
    source: str = "digits",
    net: str = "mlp",
    eps: float = 0.1,
    factors: Sequence[float] = FACTORS,
    lrs: Sequence[float] = (0.05, 0.2),
    epochs: int = 15,
    width: int = 64,
    size: int = 900,
    batch_size: int = 100,
    steps: int = 10,
    restarts: int = 2,
    device: str = "cpu",
) -> dict[str, Any]:
    """Smooth adversarial loss, TRADES and plain cross-entropy under attack in an L-inf ball.

    The weight of the second term is chosen, together with the learning rate, by the accuracy under
    attack on held-out rows, from as many values for either loss. ``rho`` stays 1: with the output
    layer free, scaling the scores shows that only ``rho * nu`` matters. SGD with momentum 0.9 and a
    cosine schedule.

    Args:
        seed: of split, weights, order and attacks.
        source: ``digits`` or ``mnist5000``.
        net: ``mlp`` or ``cnn``.
        eps: radius, pixels in [0, 1].
        factors: multiples of the default weights.
        lrs: learning rates.
        epochs, width, size, batch_size: of the training; a third as many rows choose.
        steps: of the attack in training; the attack in the test takes twice as many.
        restarts: of the attack in the test, for each of two objectives.
        device: where the networks are trained.
    """
    images = data.digits() if source == "digits" else data.mnist5000()
    x, y = (images.flat if net == "mlp" else images).tensors(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, check, test = order.split([size, size // 3, len(x) - size - size // 3])
    grid = [(factor, lr) for factor in factors for lr in lrs]

    def factory() -> nn.Module:
        if net == "cnn":
            return CNN((width, 2 * width), 10, norm="group")
        return MLP([x[0].numel(), width, 10])

    found: dict[str, Any] = {}
    for name in ("smooth", "trades", "plain"):
        settings = grid if name in DEFAULTS else [(0.0, lr) for lr in lrs]
        model, states = _start(factory, [seed] * len(settings), device)
        states = _train_robustly(
            model, states, x[train], y[train], name=name, settings=settings, seed=seed, eps=eps,
            epochs=epochs, batch_size=batch_size, steps=steps,
        )  # fmt: skip
        judged: dict[str, Any] = {
            "eps": eps,
            "steps": 2 * steps,
            "restarts": restarts,
            "seed": seed,
        }
        held = _under_attack(model, states, x[check], y[check], **judged)
        accuracy, kept = _under_attack(model, states, x[test], y[test], **judged)
        best = int(held[1].argmax())
        weight = [DEFAULTS.get(name, 0.0) * factor for factor, _ in settings]
        found |= {
            f"robust_{name}": float(kept[best]), f"clean_{name}": float(accuracy[best]),
            f"weight_{name}": weight[best], f"lr_{name}": settings[best][1],
            f"all_robust_{name}": kept, f"all_clean_{name}": accuracy,
        }  # fmt: skip
    return found


def _train_robustly(
    model: nn.Module,
    states: members.States,
    x: Tensor,
    y: Tensor,
    *,
    name: str,
    settings: Sequence[tuple[float, float]],
    seed: int,
    eps: float,
    epochs: int,
    batch_size: int,
    steps: int,
) -> members.States:
    """All settings of one loss together: the attack needs the networks, not only their outputs."""
    forward, m = members.forward(model.train()), len(settings)
    weights = {key: value.clone().requires_grad_() for key, value in states.items()}
    scale = torch.tensor(
        [[DEFAULTS.get(name, 0.0) * factor] for factor, _ in settings], device=x.device
    )
    # SGD is linear in the slope, so a member's learning rate is a factor of its loss
    rates = torch.tensor([lr for _, lr in settings], device=x.device)
    sgd = torch.optim.SGD(weights.values(), lr=1.0, momentum=0.9)
    total = epochs * math.ceil(len(x) / batch_size)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)
    attacker = torch.Generator(x.device).manual_seed(seed + 1)
    options: dict[str, Any] = {
        "eps": eps, "steps": steps, "box": (0.0, 1.0), "reduction": "none", "generator": attacker
    }  # fmt: skip

    def run(points: Tensor) -> Tensor:
        return forward(weights, points)

    for epoch in range(epochs):
        for index in members.minibatches(len(x), [seed] * m, batch_size, epoch, x.device):
            a, b = x[index], y[index]
            if name == "smooth":
                losses = smooth_adv_loss(run, a, b, nu=scale, **options)
            elif name == "trades":
                losses = trades_loss(run, a, b, beta=scale, **options)
            else:
                losses = attacks.cross_entropy(run, b)(a)
            sgd.zero_grad()
            (rates * losses.mean(1)).sum().backward()
            sgd.step()
            fall.step()
    return {key: value.detach() for key, value in weights.items()}


def _under_attack(
    model: nn.Module,
    states: members.States,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    restarts: int,
    seed: int,
) -> np.ndarray:
    """Accuracy of each network, plain and under attack, (2, m)."""
    forward, m = members.forward(model.eval()), len(next(iter(states.values())))

    def run(points: Tensor) -> Tensor:
        return forward(states, points)

    inputs, labels = x.expand(m, *x.shape), y.expand(m, -1)
    with torch.no_grad():
        right = run(inputs).argmax(-1) == labels
    kept = attacks.survives(
        run, inputs, labels, eps=eps, steps=steps, restarts=restarts, box=(0.0, 1.0), generator=seed
    )
    return torch.stack([right, kept]).float().mean(-1).cpu().numpy()


# --- how tight is the bound? ----------------------------------------------------------------------


def least_regret(beta: float, tau: float, n: int, *, points: int = 200) -> float:
    r"""Least surrogate regret found among distributions and scores with zero-one regret ``beta``.

    Scores whose largest is that of class j, where $p_j = \max p - \beta$, do best by giving j the
    score of every class more likely than their common mean: pooling. Over the probabilities this
    is a search: the top class, j, several at the top's level, several at zero, the others equal.

    Args:
        beta: zero-one regret in (0, 1].
        tau: in [0, 2].
        n: number of classes.
        points: levels of the top class tried.
    """
    if not 0 <= tau <= 2:
        raise ValueError(f"tau: expected a number in [0, 2], got {tau:g}")
    top = torch.linspace(max(beta, (1 + beta) / n), (1 + beta) / 2, points, dtype=torch.float64)
    rest = (1 - 2 * top + beta).clamp(min=0)
    least = float("inf")
    for high in range(n - 1):
        for zero in range(n - 1 - high):
            free = n - 2 - high - zero
            level = (rest - high * top) / max(free, 1)
            fits = (level >= -1e-12) & (level <= top + 1e-12)
            fits &= (free > 0) | (level.abs() < 1e-12)
            if not bool(fits.any()):
                continue
            t, other = top[fits, None], level[fits, None].clamp(min=0)
            probs = torch.cat(
                [t - beta, t, t.expand(-1, high), other.expand(-1, free),
                 torch.zeros(len(t), zero, dtype=t.dtype)], 1,
            ).clamp(min=0)  # fmt: skip
            regret = best_risk(_pooled(probs), tau=tau) - best_risk(probs, tau=tau)
            least = min(least, float(regret.min()))
    return least


def _pooled(probs: Tensor) -> Tensor:
    """Class 0 and all classes above the mean that they and it have together, set to that mean."""
    ranked = torch.cat([probs[:, :1], probs[:, 1:].sort(dim=1, descending=True).values], 1)
    place = torch.arange(probs.shape[1])
    mean, last = (ranked.cumsum(1) / (place + 1)).max(1, keepdim=True)
    return torch.where(place <= last, mean, ranked)


def tightness(taus: Sequence[float], classes: Sequence[int], betas: Sequence[float]) -> np.ndarray:
    """Least regret found, as a multiple of T; shape (taus, classes, betas)."""
    return np.array(
        [
            [[least_regret(b, tau, n) / float(T(b, tau, n)) for b in betas] for n in classes]
            for tau in taus
        ]
    )
