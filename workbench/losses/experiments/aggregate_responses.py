"""Bag means in place of responses: networks on tables, linear models and their limit, privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.lab import data, members, models
from workbench.losses.aggregate_responses import (
    best_bag_size,
    interpolated_loss,
    interpolated_ols,
    limiting_risk,
    noise_variance,
    private_bags,
    random_bags,
)

TABLES = (
    "diabetes", "autompg", "airfoil", "winequality_red", "winequality_white", "puma32h",
    "compactiv", "randhie",
)  # fmt: skip
RHOS = (0.0, 0.03, 0.1, 0.3, 1.0)


class PerInstance(nn.Module):
    """One network applied to each of the k examples of a bag: (b, k, d) -> (b, k)."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.net = models.MLP([d, width, 1], act="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (b, k)."""
        out: Tensor = self.net(x.flatten(0, -2)).view(x.shape[:-1])
        return out


def on_table(
    seed: int,
    table: str,
    *,
    k: int = 8,
    width: int = 32,
    epochs: int = 100,
    rows: int = 2000,
    rhos: Sequence[float] = RHOS,
    rates: Sequence[float] = (0.003, 0.01, 0.03),
) -> dict[str, Any]:
    """Networks trained on bag means of a regression table with the bag, instance and mixed loss.

    60% of the rows train and 20% choose, both in bags of k of which only means are used; 20% test
    with their own responses. The learning rate of each loss, and the rho of the interpolated one,
    are those with the least bag loss on the bags that choose. Responses are standardised: 1 is the
    error of predicting the mean.

    Args:
        seed: of rows, split, bags, weights and batches.
        table: one of `TABLES`.
        k: bag size.
        width: of the hidden layer.
        epochs: over the training bags.
        rows: at most, drawn from the table.
        rhos: 0 is the bag loss, 1 the instance loss.
        rates: learning rates of Adam to choose from.

    Returns:
        Root mean squared test errors ``bag``, ``instance`` and ``mixed``, the ``chosen`` rho, and
        ``rmse`` of all (rhos, rates).
    """
    x, y = _regression(table, rows, seed)
    n = len(y)
    cut = [round(0.6 * n), round(0.8 * n)]
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=source)
    train, valid, test = (order[a:b] for a, b in zip([0, *cut], [*cut, n], strict=True))
    bags = train[random_bags(len(train), k, source)]
    held = valid[random_bags(len(valid), k, source)]
    m = len(rhos) * len(rates)
    each = torch.tensor(rhos).repeat_interleave(len(rates))
    model, states = members.start(lambda: PerInstance(x.shape[1], width), [seed] * m)
    states = members.train(
        model, states, x[bags], y[bags].mean(-1),
        lambda pred, ybar, index: interpolated_loss(pred, ybar, each),
        seeds=[seed] * m, epochs=epochs, batch_size=16, schedule="cosine",
        lr=torch.tensor(rates).repeat(len(rhos)),
    )  # fmt: skip
    grid = (len(rhos), len(rates))
    seen = members.outputs(model, states, x[held]).mean(-1) - y[held].mean(-1)
    tuned = seen.square().mean(-1).view(grid)
    error = members.outputs(model, states, x[test][:, None])[..., 0] - y[test]
    rmse = error.square().mean(-1).sqrt().view(grid)
    best = rmse.gather(1, tuned.argmin(1, keepdim=True))[:, 0]
    chosen = int(tuned.min(1).values.argmin())
    return {
        "bags": len(bags),
        "bag": float(best[0]),
        "instance": float(best[-1]),
        "mixed": float(best[chosen]),
        "chosen": float(rhos[chosen]),
        "by_rho": best.numpy(),
        "rmse": rmse.numpy(),
    }


def _regression(table: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standardised inputs and responses of a sample of a table."""
    source = data.table(table)
    x = pd.get_dummies(source.X, dtype=float).to_numpy(np.float64)
    y = source.y.to_numpy(np.float64)
    kept = np.random.default_rng(seed).permutation(len(y))[:rows]
    x, y = x[kept], y[kept]
    x = x[:, x.std(0) > 0]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def simulate(
    seed: int, *, d: int, k: int, m: int, sigma: float, rhos: Any = RHOS, draws: int = 100
) -> dict[str, Any]:
    """Measured risk of the linear estimator on Gaussian inputs, theta of norm 1.

    Args:
        seed: of the draws.
        d, k, m: inputs, bag size, bags.
        sigma: standard deviation of a response given its input.
        rhos: interpolations.
        draws: data sets.

    Returns:
        ``risk`` and the part of theta ``kept``, per rho, with the ``limit`` of the risk; of these
        ``at_best``, where the limit is least, and the better of both ``ends``; the settings.
    """
    source = torch.Generator().manual_seed(seed)
    rho = torch.as_tensor(np.asarray(rhos, float))
    found = []
    for _ in range(draws):
        x = torch.randn(m * k, d, generator=source, dtype=torch.float64)
        noise = torch.randn(m * k, generator=source, dtype=torch.float64)
        bags = random_bags(m * k, k, source)
        means = (x[:, 0] + sigma * noise)[bags].mean(-1)
        found.append(interpolated_ols(x, means, bags, rho))
    theta = torch.stack(found)
    target = torch.zeros(d, dtype=torch.float64)
    target[0] = 1
    risk = (theta - target).square().sum(-1).mean(0).numpy()
    limit = limiting_risk(m / d, k, rho.numpy(), noise=sigma**2).risk
    return {
        "d": d, "k": k, "m": m, "sigma": sigma, "rhos": rho.numpy(), "risk": risk, "limit": limit,
        "kept": theta[..., 0].mean(0).numpy(), "at_best": float(risk[limit.argmin()]),
        "best_rho": float(rho[int(limit.argmin())]), "ends": float(min(risk[0], risk[-1])),
    }  # fmt: skip


def private(
    seed: int, *, n: int = 2000, d: int = 20, sigma: float = 1.0, eps: float = 1.0, draws: int = 40
) -> dict[str, Any]:
    """Risk with label privacy at the predicted bag size and rho, and with a bag for each response.

    Responses are clipped at three standard deviations.

    Args:
        seed: of the draws.
        n, d: examples and inputs.
        sigma: standard deviation of a response given its input; theta has norm 1.
        eps: privacy budget.
        draws: data sets.

    Returns:
        ``best`` and ``single`` measured risk, ``instance`` and ``bag`` at the chosen size, and the
        ``predicted`` one with its ``k`` and ``rho``.
    """
    bound = 3 * float(np.sqrt(1 + sigma**2))
    k, rho, predicted = best_bag_size(n, d, sigma=sigma, eps=eps, C=bound)
    source = torch.Generator().manual_seed(seed)
    target = torch.zeros(d, dtype=torch.float64)
    target[0] = 1
    risks = []
    for _ in range(draws):
        x = torch.randn(n, d, generator=source, dtype=torch.float64)
        y = x[:, 0] + sigma * torch.randn(n, generator=source, dtype=torch.float64)
        row = []
        for size, rhos in ((k, [rho, 0.0, 1.0]), (1, [1.0])):
            bags, means = private_bags(y, size, eps, bound, source)
            theta = interpolated_ols(x, means, bags, rhos)
            row += (theta - target).square().sum(-1).tolist()
        risks.append(row)
    best, bag, instance, single = np.mean(risks, 0)
    flat = limiting_risk(n / d, 1, 1.0, noise=noise_variance(sigma, 1, eps, bound)).risk
    return {
        "k": k, "rho": rho, "predicted": predicted, "predicted_single": float(flat),
        "best": float(best), "single": float(single), "bag": float(bag),
        "instance": float(instance),
    }  # fmt: skip
