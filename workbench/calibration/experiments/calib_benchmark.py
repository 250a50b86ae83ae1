"""Experiments of `calib_benchmark`: a small search space, trained whole, and released outputs.

The space is NATS-Bench's in miniature. A cell has four nodes and six edges; each edge carries one
of five operations (nothing, skip, 1x1 convolution, 3x3 convolution, 3x3 average). The size space is
the number of channels. An image of 28 x 28 is cut into 4 x 4 patches by the stem; the cell works on
that grid. All cells of one size are trained side by side as one batched network: their parameters
have a leading axis, their losses are added, so each learns as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.special import softmax
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.calibration import measures
from workbench.calibration.calib_benchmark import (
    Predictions,
    metric_table,
    rank_correlations,
)
from workbench.calibration.recalibrate import RECALIBRATORS
from workbench.calibration.released import load
from workbench.lab import data

OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")
LETTERS = "-s13p"  # one for each operation, in a cell's name
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
SIDE = 4  # patches per side
CHANNELS = (4, 8, 16)
AGREEING = ("ece_em_15", "ks", "kde_ece", "mmce")


# ---- the space


def sample_cells(count: int, rng: np.random.Generator) -> Int[np.ndarray, "m 6"]:
    """Different random cells in which a path leads from the first node to the last."""
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        cell = tuple(int(op) for op in rng.integers(len(OPERATIONS), size=len(EDGES)))
        if _connected(cell):
            found[cell] = None
    return np.array(list(found))


def _connected(cell: Sequence[int]) -> bool:
    reached = {0}
    for (start, end), op in zip(EDGES, cell, strict=True):
        if op and start in reached:
            reached.add(end)
    return 3 in reached


def _neighbours() -> Float[torch.Tensor, "9 p p"]:
    """`[t, p, q]` is 1 where patch q lies at tap t of the 3x3 window round patch p."""
    taps = torch.zeros(9, SIDE * SIDE, SIDE * SIDE)
    for row in range(SIDE):
        for col in range(SIDE):
            for t in range(9):
                r, c = row + t // 3 - 1, col + t % 3 - 1
                if 0 <= r < SIDE and 0 <= c < SIDE:
                    taps[t, row * SIDE + col, r * SIDE + c] = 1
    return taps


class Cells(nn.Module):
    """Many cells of the same number of channels, evaluated and trained together."""

    def __init__(self, cells: Int[np.ndarray, "m 6"], channels: int, classes: int = 10) -> None:
        super().__init__()
        m, patch, c = len(cells), (28 // SIDE) ** 2, channels
        self.stem = nn.Parameter(torch.randn(m, patch, c) * math.sqrt(2 / patch))
        self.head = nn.Parameter(torch.randn(m, SIDE * SIDE * c, classes) / math.sqrt(16 * c))
        self.bias = nn.Parameter(torch.zeros(m, 1, classes))
        self.kernels = nn.ParameterDict()
        for edge in range(len(EDGES)):
            for code, op in enumerate(OPERATIONS):
                users = torch.from_numpy(np.flatnonzero(cells[:, edge] == code))
                if op == "none" or not len(users):
                    continue
                self.register_buffer(f"users_{op}_{edge}", users)
                if op in ("conv1", "conv3"):
                    taps = 1 if op == "conv1" else 9
                    scale = math.sqrt(2 / (taps * c))
                    self.kernels[f"{op}_{edge}"] = nn.Parameter(
                        torch.randn(len(users), taps, c, c) * scale
                    )
        taps = _neighbours()
        self.register_buffer("taps", taps)
        self.register_buffer("mean", taps.sum(0) / taps.sum((0, 2))[:, None])

    def forward(self, images: Float[torch.Tensor, "b 1 28 28"]) -> Float[torch.Tensor, "m b k"]:
        """Logits of every cell for every image."""
        b, m, c = len(images), *self.stem.shape[::2]
        patches = F.unfold(images, 28 // SIDE, stride=28 // SIDE).transpose(1, 2)
        stem = self.stem.permute(1, 0, 2).reshape(-1, m * c)
        first = (patches.reshape(-1, stem.shape[0]) @ stem).reshape(b, SIDE * SIDE, m, c)
        nodes = [first.permute(2, 0, 1, 3)]
        for end in (1, 2, 3):
            total = torch.zeros_like(nodes[0])
            for edge, (start, stop) in enumerate(EDGES):
                if stop == end:
                    for op in OPERATIONS[1:]:
                        if (users := self.users(edge, op)) is not None:
                            done = self._operate(nodes[start].index_select(0, users), edge, op)
                            total.index_add_(0, users, done)
            nodes.append(total)
        return torch.bmm(nodes[3].relu().reshape(m, b, -1), self.head) + self.bias

    def users(self, edge: int, op: str) -> torch.Tensor | None:
        """Which cells have this operation on this edge; None if none has."""
        return getattr(self, f"users_{op}_{edge}", None)

    def _operate(self, h: torch.Tensor, edge: int, op: str) -> torch.Tensor:
        a, b, p, c = h.shape
        if op == "skip":
            return h
        if op == "pool":
            return self.mean @ h
        kernel, h = self.kernels[f"{op}_{edge}"], h.relu()
        if op == "conv1":
            return torch.bmm(h.reshape(a, b * p, c), kernel[:, 0]).reshape(a, b, p, c)
        dense = torch.einsum("atcd,tpq->aqcpd", kernel, self.taps).reshape(a, p * c, p * c)
        return torch.bmm(h.reshape(a, b, p * c), dense).reshape(a, b, p, c)


def train(
    model: Cells,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 5e-3,
    generator: torch.Generator,
) -> None:
    """AdamW with a cosine schedule, the same for every cell."""
    steps = epochs * math.ceil(len(x) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            logits = model(x[rows])
            target = y[rows].repeat(len(logits))
            loss = F.cross_entropy(logits.flatten(0, 1), target) * len(logits)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


# ---- the population study


def population(
    seed: int,
    *,
    networks: int = 60,
    epochs: int = 16,
    source: str = "mnist-5000",
    least_accuracy: float = 0.5,
    device: str = "cpu",
) -> dict[str, float | int | np.ndarray]:
    """Train random cells, measure them before and after scaling, correlate the rankings.

    A seed draws its own cells, split and initial weights. Networks below `least_accuracy` are left
    out: models near chance would dominate every correlation.
    """
    models = trained_population(
        seed, networks=networks, epochs=epochs, source=source, device=device
    )
    table = metric_table(models)
    table = table[table["acc"] >= least_accuracy]
    halves = on_halves({name: models[name] for name in table.index}, table["temperature"])
    tau = rank_correlations(table)
    agreeing = [f"pre_{name}" for name in AGREEING]
    top = table.nlargest(max(10, len(table) // 2), "acc")
    accurate = rank_correlations(top[["acc", "pre_ece_15"]])
    return {
        "networks": len(table),
        "rows": len(next(iter(models.values())).labels),
        "accuracy": float(table["acc"].mean()),
        "temperature": float(table["temperature"].median()),
        "ece_agrees": float(tau.loc["pre_ece_15", agreeing].mean()),
        "mce_agrees": float(tau.loc["pre_mce_15", agreeing].mean()),
        "cwce_em_agrees": float(tau.loc["pre_cwce_em_15", agreeing].mean()),
        "pre_post": float(tau.loc["pre_ece_15", "post_ece_15"]),
        "bins_pre": float(tau.loc["pre_ece_5", "pre_ece_100"]),
        "bins_post": float(tau.loc["post_ece_5", "post_ece_100"]),
        "halves_pre": float(rank_correlations(halves[["pre_0", "pre_1"]]).iloc[0, 1]),
        "halves_post": float(rank_correlations(halves[["post_0", "post_1"]]).iloc[0, 1]),
        "accuracy_all": float(tau.loc["acc", "pre_ece_15"]),
        "accuracy_top": float(accurate.iloc[0, 1]),
        "inflation_pre": float(table["pre_ece_500"].mean() / table["pre_ece_5"].mean()),
        "inflation_post": float(table["post_ece_500"].mean() / table["post_ece_5"].mean()),
        "acc": table["acc"].to_numpy(),
        **{
            f"{stage}_{bins}": table[f"{stage}_ece_{bins}"].to_numpy()
            for stage in ("pre", "post")
            for bins in (5, 15, 100, 500)
        },
    }


def on_halves(models: Mapping[str, Predictions], temperatures: pd.Series) -> pd.DataFrame:
    """ECE of each network on either half of its test rows, before and after scaling."""
    rows = {}
    for name, model in models.items():
        half = len(model.labels) // 2
        rows[name] = {
            f"{stage}_{part}": measures.ece(
                softmax(model.logits[chosen] / t, axis=1), model.labels[chosen]
            )
            for stage, t in (("pre", 1.0), ("post", temperatures[name]))
            for part, chosen in enumerate((slice(None, half), slice(half, None)))
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def trained_population(
    seed: int,
    *,
    networks: int,
    epochs: int,
    source: str = "mnist-5000",
    device: str = "cpu",
) -> dict[str, Predictions]:
    """Outputs of random trained cells on validation, test and two kinds of foreign images.

    A name gives the channels and the six edges in the order of `EDGES`, as in "8ch 3s1p-3".
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    arrays = _images(source)
    parts = arrays.split(seed, train=0.2, calibration=0.2, test=0.6)
    x, y = parts["train"].tensors(device)
    inputs = {
        "test": torch.from_numpy(parts["test"].x),
        "calibration": torch.from_numpy(parts["calibration"].x),
    }
    noise = torch.randn(inputs["test"].shape, generator=generator)
    inputs["noise"] = (inputs["test"] + 0.3 * noise).clamp(0, 1)
    other = "digits" if source == "mnist-5000" else "mnist-5000"
    inputs["other"] = torch.from_numpy(_images(other).sample(1000, seed).x)
    found = {}
    cells = sample_cells(networks, rng)
    for channels, group in zip(CHANNELS, np.array_split(cells, len(CHANNELS)), strict=True):
        with lab.seeded(seed):
            model = Cells(group, channels).to(device)
        train(model, x, y, epochs=epochs, generator=generator)
        with torch.no_grad():
            logits = {k: _logits(model, v.to(device)) for k, v in inputs.items()}
        for i, cell in enumerate(group):
            name = f"{channels}ch " + "".join(LETTERS[op] for op in cell)
            found[name] = Predictions(
                logits["test"][i],
                parts["test"].y,
                logits["calibration"][i],
                parts["calibration"].y,
                {k: logits[k][i] for k in ("noise", "other")},
            )
    return found


def _logits(model: Cells, images: torch.Tensor) -> Float[np.ndarray, "m n k"]:
    parts = [model(part).double().cpu() for part in images.split(250)]
    return torch.cat(parts, dim=1).numpy()


def _images(source: str) -> data.Arrays:
    """Images of 28 x 28; the 8 x 8 digits are enlarged."""
    arrays = data.digits() if source == "digits" else data.mnist5000()
    if arrays.x.shape[-1] == 28:
        return arrays
    x = F.interpolate(torch.from_numpy(arrays.x), size=28, mode="bilinear").numpy()
    return data.Arrays(x, arrays.y, arrays.name, arrays.digest)


# ---- recalibrators on real predictions

OWN = "own network"
COMPARED = ("temperature", "vector", "platt", "beta", "isotonic", "histogram")


def predictions_of(
    dataset: str, seed: int
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    """Probabilities and labels: released ones, or those of a small network trained here."""
    if dataset != OWN:
        return load(dataset)
    model = list(trained_population(seed, networks=3, epochs=8).values())[-1]
    return softmax(model.logits, axis=1), model.labels


def recalibrated_halves(
    seed: int, *, dataset: str, recalibrators: Sequence[str] = COMPARED, bins: int = 15
) -> dict[str, float]:
    """Fit recalibrators on a random half of the predictions, measure on the other half."""
    probs, labels = predictions_of(dataset, seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    outputs = {"none": probs[test]}
    for name in recalibrators:
        recalibrator = RECALIBRATORS[name](inputs="probs", floor=1e-6)
        outputs[name] = recalibrator.fit(probs[fit], labels[fit]).transform(probs[test])
    found = {}
    for name, output in outputs.items():
        found[f"ece_{name}"] = measures.ece(output, labels[test], bins=bins)
        found[f"nll_{name}"] = measures.nll(np.maximum(output, 1e-6), labels[test])
        found[f"brier_{name}"] = measures.brier(output, labels[test])
    return found
