"""Intrinsic dimensions of digits: by width, by projection, with shuffled labels, shuffled pixels.

Every function trains ordinary networks and members of nested subspaces with the same batches,
number of updates and optimiser. Learning rates were chosen on seed 1000, which no experiment uses:
ordinary training from 0.003, 0.01 and 0.03; subspaces ``c / sqrt(d)`` with c from 1.5, 3 and 6, so
that a step of Adam is about c long in the network's own space, whatever d is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks, data, models, seeded
from workbench.loss_landscapes.intrinsic_dimension import d_int, toy_quadratic, train_subspaces
from workbench.loss_landscapes.random_projections import projection

Pair = tuple[Tensor, Tensor]


class Patches(nn.Module):
    """A convolution without padding, as a linear map of patches.

    ``torch.vmap`` turns it into one batched product; a convolution whose weights differ between
    members would become a grouped one, many times slower on a CPU.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.linear = nn.Linear(inputs * size * size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h', w')."""
        patches = x.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        b, _, h, w, _, _ = patches.shape
        y = self.linear(patches.permute(0, 2, 3, 1, 4, 5).reshape(b, h * w, -1))
        return cast(Tensor, y.transpose(1, 2).reshape(b, -1, h, w))


def network(kind: str, seed: int, *, inputs: int = 196, width: int = 50) -> nn.Module:
    """An MLP of two hidden layers, or a convnet for 14 x 14 images: two layers, then two dense."""
    checks.one_of(kind, ("mlp", "conv"), "kind")
    with seeded(seed):
        if kind == "mlp":
            return models.MLP([inputs, width, width, 10])
        return nn.Sequential(
            Patches(1, 8, 4, 2), nn.ReLU(), Patches(8, 16, 4, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 10),
        )  # fmt: skip


def measure(
    module: nn.Module,
    train: Pair,
    test: Pair,
    dims: Sequence[int],
    *,
    seed: int,
    steps: int,
    lr: float,
    c: float = 3.0,
    kind: str = "fastfood",
) -> dict[str, Any]:
    """Baseline, accuracies and d_int90 of one network; a d that is never enough counts as D."""
    D = sum(p.numel() for p in module.parameters())
    baseline = train_subspaces(
        module, [D], train, test, kind="full", seed=seed, lr=lr, steps=steps
    )[D]
    rates = {d: c / d**0.5 for d in dims}
    accs = train_subspaces(module, dims, train, test, kind=kind, seed=seed, lr=rates, steps=steps)
    return {
        "D": D,
        "baseline": baseline,
        "dims": np.array(list(accs)),
        "accs": np.array(list(accs.values())),
        "d_int": min(d_int(accs, baseline, between=True), float(D)),
        "d_grid": min(d_int(accs, baseline), float(D)),
    }


def toy(seed: int, *, D: int = 1000, groups: int = 10, most: int = 15) -> dict[str, Any]:
    """Lowest loss of the toy by d, as a share of the loss at the start, for each kind of P."""
    problem = toy_quadratic(D, groups)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(D, dtype=torch.float64, generator=generator)
    first = float(problem.loss(start))
    found = {}
    for kind in ("dense", "sparse", "fastfood"):
        P = projection(D, most, kind, seed, dtype=torch.float64).matrix()
        found[kind] = (
            np.array([problem.lowest(P[:, :d], start) for d in range(1, most + 1)]) / first
        )
    return found


def widths(
    seed: int,
    *,
    width: int = 200,
    dims: Sequence[int] = (200, 400, 566, 800, 1131),
    steps: int = 250,
    lr: float = 0.01,
    device: str = "cpu",
) -> dict[str, Any]:
    """d_int90 of an MLP 784-width-width-10 on 4,000 images of MNIST, tested on 1,000."""
    split = data.mnist5000().flat.split(seed, train=0.8, test=0.2)
    train, test = split.train.tensors(device), split.test.tensors(device)
    module = network("mlp", seed, inputs=784, width=width).to(device)
    return measure(module, train, test, dims, seed=seed, steps=steps, lr=lr)


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """Narrowest against widest network of each seed: change of d_int90 and growth of D.

    ``change`` is in per cent of the smaller of the two, whichever that is; ``elasticity`` is the
    exponent e of d_int90 ~ D^e, with its sign.
    """
    low, high = frame.width.min(), frame.width.max()
    wide = frame.pivot(index="seed", columns="width", values=["d_int", "D"]).astype(float)
    log_d = np.log(wide["d_int"][high] / wide["d_int"][low])
    log_D = np.log(wide["D"][high] / wide["D"][low])
    out = pd.DataFrame({
        "change": 100 * np.expm1(log_d.abs()), "growth": np.exp(log_D),
        "elasticity": log_d / log_D,
    }).reset_index()  # fmt: skip
    out.attrs = dict(frame.attrs)
    return out


def kinds(
    seed: int,
    *,
    dims: Sequence[int] = (50, 100, 200),
    steps: int = 200,
    device: str = "cpu",
) -> dict[str, Any]:
    """d_int90 of an MLP 64-50-50-10 on digits, for the three kinds of P."""
    split = data.digits().flat.split(seed, train=0.8, test=0.2)
    train, test = split.train.tensors(device), split.test.tensors(device)
    module = network("mlp", seed, inputs=64).to(device)
    found = {
        kind: measure(module, train, test, dims, seed=seed, steps=steps, lr=0.01, kind=kind)
        for kind in ("dense", "sparse", "fastfood")
    }
    return {
        f"{what}_{kind}": value[what] for kind, value in found.items() for what in ("d_int", "accs")
    } | {"baseline": found["dense"]["baseline"], "dims": np.array(dims)}


def labels(
    seed: int,
    *,
    rows: int = 300,
    dims: Sequence[int] = (25, 50, 100, 200),
    shuffled_dims: Sequence[int] = (200, 400, 566, 800, 1131),
    steps: int = 400,
    device: str = "cpu",
) -> dict[str, Any]:
    """d_int90 of fitting true and shuffled labels of the same digits, by training accuracy."""
    x, y = data.digits().flat.sample(rows, seed).tensors(device)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    module = network("mlp", seed, inputs=64).to(device)
    found = {}
    for name, target, grid in (("true", y, dims), ("shuffled", y[order], shuffled_dims)):
        pair = (x, target)
        found[name] = measure(module, pair, pair, grid, seed=seed, steps=steps, lr=0.01)
    return _flat(found) | {"ratio": found["shuffled"]["d_int"] / found["true"]["d_int"]}


def pixels(
    seed: int,
    *,
    dims: Sequence[int] = (100, 200, 400, 800),
    steps: int = 200,
    device: str = "cpu",
) -> dict[str, Any]:
    """What one fixed shuffling of the pixels does to d_int90 of an MLP and of a convnet.

    MNIST averaged down to 14 x 14 (4,000 images, tested on 1,000); baselines are trained on the
    same images as the subspaces. ``change_*`` is d_int90 shuffled / plain.
    """
    split = data.mnist5000().split(seed, train=0.8, test=0.2)
    order = torch.randperm(196, generator=torch.Generator().manual_seed(seed))

    def shrink(part: Any, shuffle: bool) -> Pair:
        x, y = part.tensors(device)
        x = F.avg_pool2d(x, 2).flatten(1)
        return (x[:, order] if shuffle else x).reshape(-1, 1, 14, 14), y

    found = {}
    for kind in ("mlp", "conv"):
        module = network(kind, seed).to(device)
        for name, shuffle in (("plain", False), ("shuffled", True)):
            found[f"{kind}_{name}"] = measure(
                module, shrink(split.train, shuffle), shrink(split.test, shuffle), dims,
                seed=seed, steps=steps, lr=0.03,
            )  # fmt: skip
    return _flat(found) | {
        f"change_{kind}": found[f"{kind}_shuffled"]["d_int"] / found[f"{kind}_plain"]["d_int"]
        for kind in ("mlp", "conv")
    }


def _flat(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{what}_{name}": v for name, values in found.items() for what, v in values.items()}
