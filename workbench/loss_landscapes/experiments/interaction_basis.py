"""How many interactions a trained network needs, in four bases; planted modules; other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab.models import MLP
from workbench.loss_landscapes import interaction_basis as ib

BASES = ("neurons", "pca", "output", "next")
TASKS = ("addition", "split", "digits")

RELEASED = {
    "pca": [(167, 114, 682), (76, 53, 734), (99, 71, 598), (115, 71, 547), (130, 117, 752)],
    "next": [(133, 82, 633), (80, 75, 699), (71, 71, 610), (58, 60, 535), (91, 82, 694)],
}
"""Edges needed by the authors' five transformers for addition modulo 113 (accuracy may fall by
0.001), per pair of layers: ``n_edges_required`` in their repository, commit 7a6199f, files
``modular_arithmetic_{pca,rib}_seed*_edge_ablation_results.json`` of the folder
``rib_scripts/rib_build/sample_configs_modadd/out``."""


@dataclass(frozen=True)
class Task:
    """A trained network with data for the basis and data to score on.

    Attributes:
        model: in evaluation mode.
        X: rows the basis and the edges are computed from.
        X_test: rows the ablated network answers.
        score: accuracy of outputs on those rows.
        layers: modules whose inputs are the layers.
    """

    model: nn.Module
    X: Tensor
    X_test: Tensor
    score: Callable[[Tensor], float]
    layers: tuple[str, ...]


class Addition(nn.Module):
    """Two summands, one embedding, one hidden layer: a + b modulo p."""

    def __init__(self, p: int, d: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(p, d)
        self.mlp = nn.Sequential(nn.Linear(2 * d, width), nn.ReLU(), nn.Linear(width, p))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, p) of summands (n, 2)."""
        scores: Tensor = self.mlp(self.embed(x).flatten(1))
        return scores


def addition(seed: int, *, p: int = 11, d: int = 8, width: int = 48, steps: int = 1500) -> Task:
    """All p^2 sums, learned by heart; no sum is held out, the function itself is the subject."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    sums = pairs.sum(1) % p
    with lab.seeded(seed):
        model = Addition(p, d, width)
    lab.train.fit(
        model, F.cross_entropy, (pairs, sums), steps=steps, batch_size=p * p, lr=1e-2,
        weight_decay=0.1, schedule="cosine", seed=seed,
    )  # fmt: skip
    return Task(model, pairs, pairs, _accuracy(sums), ("mlp.0", "mlp.2"))


def digits(seed: int, *, width: int = 24, steps: int = 600, rows: int = 500) -> Task:
    """8 x 8 digits, two hidden layers."""
    images = lab.data.digits().flat.split(seed, train=0.7, test=0.3)
    with lab.seeded(seed):
        model = MLP([64, width, width, 10])
    _fit(model, images["train"].tensors(), steps, seed)
    x, y = images["test"].tensors()
    X = images["train"].tensors()[0][:rows]
    return Task(model, X, x[:rows], _accuracy(y[:rows]), ("body.1", "body.3", "head"))


def split(
    seed: int,
    *,
    width: int = 24,
    narrow: int = 8,
    steps: int = 900,
    rows: int = 500,
) -> Task:
    """Two digits at once (4 x 4 each), two networks that share nothing, written as one.

    Args:
        seed: of the networks and of the pairing of images.
        width: hidden units of each network.
        narrow: units of the layer between two ``nn.Linear`` without activation function.
        steps: of training each.
        rows: pairs for the basis, and to score on.
    """
    images = lab.data.digits().split(seed, train=0.7, test=0.3)
    rng = np.random.default_rng(seed)
    parts, xs, tests, answers = [], [], [], []
    for half in range(2):
        x, y = images["train"].tensors()
        small = F.avg_pool2d(x, 2).flatten(1)
        with lab.seeded(2 * seed + half):
            one = nn.Sequential(
                nn.Linear(16, width), nn.ReLU(), nn.Linear(width, narrow),
                nn.Linear(narrow, width), nn.ReLU(), nn.Linear(width, 10),
            )  # fmt: skip
        _fit(one, (small, y), steps, 2 * seed + half)
        parts.append(one)
        xs.append(small[rng.permutation(len(small))[:rows]])
        x, y = images["test"].tensors()
        chosen = rng.permutation(len(x))[:rows]
        tests.append(F.avg_pool2d(x[chosen], 2).flatten(1))
        answers.append(y[chosen])
    first, second = (_accuracy(y) for y in answers)
    return Task(
        side_by_side(parts),
        torch.cat(xs, 1),
        torch.cat(tests, 1),
        lambda out: (first(out[:, :10]) + second(out[:, 10:])) / 2,
        ("0", "2", "3", "5"),
    )


def side_by_side(parts: list[nn.Sequential]) -> nn.Sequential:
    """Networks of one architecture as one, with block-diagonal weights."""
    layers: list[nn.Module] = []
    for same in zip(*parts, strict=True):
        if isinstance(same[0], nn.Linear):
            weight = torch.block_diag(*(m.weight.detach() for m in same))
            layer = nn.Linear(*weight.T.shape)
            layer.weight.data = weight
            layer.bias.data = torch.cat([m.bias.detach() for m in same])
            layers.append(layer)
        else:
            layers.append(same[0])
    return nn.Sequential(*layers)


def reparametrised(model: nn.Sequential, where: int, A: Tensor) -> nn.Sequential:
    """The same function with other weights: A behind one ``nn.Linear``, its inverse in the next."""
    first, second = model[where], model[where + 1]
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        raise ValueError(f"where: expected two nn.Linear in a row at {where}")
    one, two = (nn.Linear(m.in_features, m.out_features).double() for m in (first, second))
    one.weight.data = A @ first.weight.detach().double()
    one.bias.data = A @ first.bias.detach().double()
    two.weight.data = second.weight.detach().double() @ torch.linalg.inv(A)
    two.bias.data = second.bias.detach().double()
    layers = list(copy.deepcopy(model))
    layers[where : where + 2] = [one, two]
    return nn.Sequential(*layers).double()


def disguised(plain: Task, seed: int, stretch: float = 3.0) -> Task:
    """A split network whose two halves cannot be seen in the weights; it answers as before.

    Args:
        plain: from `split`.
        seed: of the mixing.
        stretch: coordinates of the layer between two ``nn.Linear`` are mixed by a random matrix
            with singular values between 1 / stretch and stretch.
    """
    model = plain.model
    if not isinstance(model, nn.Sequential) or not isinstance(model[2], nn.Linear):
        raise ValueError("plain: expected a split network")
    rng, size = np.random.default_rng(seed), model[2].out_features
    turns = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2)]
    A = turns[0] * stretch ** rng.uniform(-1, 1, size) @ turns[1]
    return replace(plain, model=reparametrised(model, 2, torch.as_tensor(A)))


def make(task: str, seed: int, **options: Any) -> Task:
    """One of the tasks by name."""
    makers: dict[str, Callable[..., Task]] = {
        "addition": addition, "split": split, "digits": digits,
    }  # fmt: skip
    return makers[task](seed, **options)


def bases_of(net: ib.Chain) -> dict[str, list[ib.Basis]]:
    """The four bases, all with the constant unit apart and the outputs left as they are."""
    return {
        "neurons": ib.neuron_basis(net),
        "pca": ib.pca_basis(net, rotate_output=False),
        "output": ib.interaction_basis(net, target="output", rotate_output=False),
        "next": ib.interaction_basis(net, target="next", rotate_output=False),
    }


def turned(bases: list[ib.Basis], seed: int) -> list[ib.Basis]:
    """The same directions in every layer but the last, turned at random into one another."""
    rng = np.random.default_rng(seed)
    found = []
    for basis in bases[:-1]:
        k = len(basis.values)
        Q = torch.as_tensor(np.linalg.qr(rng.standard_normal((k, k)))[0])
        values = (Q.T * basis.values @ Q).diag()
        found.append(
            replace(basis, kind="turned", C=basis.C @ Q, inverse=Q.T @ basis.inverse, values=values)
        )
    return [*found, bases[-1]]


def scaled(net: ib.Chain, bases: list[ib.Basis]) -> list[ib.Basis]:
    """Features in units of their effect: the mean squared gradient of the output becomes 1."""
    found = []
    for start, basis in enumerate(bases[:-1]):
        f, turn = net.activations[start], torch.eye(net.outputs.shape[1]).double()
        blocks = net.jacobians(start, net.last, f, turn)
        total = sum((J @ basis.inverse[:, :-1].T).square().sum((0, 1)) for J in blocks)
        effect = torch.as_tensor(total / len(f)).sqrt()
        s = effect.clamp(min=1e-9 * float(effect.max()))
        found.append(
            replace(
                basis, kind="scaled", C=basis.C * s, inverse=basis.inverse / s[:, None],
                values=basis.values * s**2,
            )
        )  # fmt: skip
    return [*found, bases[-1]]


def sparsity(
    seed: int, *, task: str, allowed: float = 0.005, kind: str = "jacobian", **options: Any
) -> dict[str, Any]:
    """Interactions a trained network needs to stay within ``allowed`` of its accuracy.

    Edges are counted in per cent of the weights of the network: one for each pair of units of
    neighbouring layers, the same for all bases. Two more bases take the gain apart: ``scaled``
    are principal components in units of their effect on the output, so that edges into what does
    not matter rank low; ``turned`` is the interaction basis turned at random within each layer, so
    that only what it dropped is left.

    Args:
        seed: of the network.
        task: "addition", "split" or "digits".
        allowed: how far the accuracy may fall.
        kind: of edges.
        options: of the task.
    """
    made = make(task, seed, **options)
    net = ib.cut(made.model, made.X, made.layers)
    test = ib.cut(made.model, made.X_test, made.layers)
    widths = [f.shape[1] for f in net.activations]
    possible = int(np.dot(widths[:-1], widths[1:]))
    row: dict[str, Any] = {
        "accuracy": made.score(test.outputs),
        "possible": possible,
        "missing": sum(ib.degeneracy(net).activation.values()),
    }
    choices = bases_of(net)
    choices["turned"] = turned(choices["output"], seed)
    choices["scaled"] = scaled(net, choices["pca"])
    for name, bases in choices.items():
        strengths = ib.edges(net, bases, kind=kind)
        needed = ib.edges_needed(test, bases, strengths, made.score, allowed=allowed)
        row[f"edges_{name}"] = 100 * sum(needed) / possible
        row[f"needed_{name}"] = np.array(needed)
    return row


def modules(
    seed: int, *, stretch: float = 3.0, allowed: float = 0.005, **options: Any
) -> dict[str, Any]:
    """Whether the interaction graph of a disguised split network shows its two halves.

    A feature belongs to the half that accounts for more of its variance (``pure``: that share,
    averaged with the features' variances); ``rand`` is the adjusted Rand index between halves and
    modules, ``layers`` the same layer by layer. The weakest edges that are needed set the scale of
    the graph's weights.

    Args:
        seed: of the network.
        stretch: of the mixing, see `disguised`.
        allowed: how far the accuracy may fall.
        options: of the network.
    """
    plain = split(seed, **options)
    made = disguised(plain, seed, stretch)
    net = ib.cut(made.model, made.X, made.layers)
    test = ib.cut(made.model, made.X_test, made.layers)
    choices = bases_of(net)
    shares = first_half(plain, net, choices)
    before = ib.cut(plain.model, plain.X, plain.layers).outputs
    row: dict[str, Any] = {"change": float((net.outputs - before).abs().max())}
    for name, bases in choices.items():
        strengths = ib.edges(net, bases)
        needed = ib.edges_needed(test, bases, strengths, made.score, allowed=allowed)
        eps = [
            float(s.flatten().topk(max(k, 1)).values[-1])
            for s, k in zip(strengths, needed, strict=True)
        ]
        found = ib.modularity(strengths, eps, seed=seed)
        planted = [share > 0.5 for share in shares[name]]
        pure = np.average(
            np.concatenate([np.maximum(share, 1 - share) for share in shares[name][1:-1]]),
            weights=np.concatenate([b.values.numpy() / float(b.values.sum()) for b in bases[1:-1]]),
        )
        row |= {
            f"rand_{name}": float(
                adjusted_rand_score(np.concatenate(planted), np.concatenate(found.labels))
            ),
            f"layers_{name}": np.array(
                [adjusted_rand_score(*both) for both in zip(planted, found.labels, strict=True)]
            ),
            f"pure_{name}": float(pure),
            f"count_{name}": found.count,
            f"edges_{name}": sum(needed),
        }
    return row


def first_half(
    plain: Task, net: ib.Chain, choices: dict[str, list[ib.Basis]]
) -> dict[str, list[np.ndarray]]:
    """How much of each feature's variance the first half of a split network explains.

    Args:
        plain: from `split`; the units of its layers belong to one half or the other.
        net: the same network or a disguised one, cut.
        choices: bases by name.

    Returns:
        Per basis and layer a share of the variance that both halves explain, in [0, 1].
    """
    units = ib.cut(plain.model, plain.X, plain.layers).activations
    return {
        name: [
            _share(b.features(f), g) for b, f, g in zip(bases, net.activations, units, strict=True)
        ]
        for name, bases in choices.items()
    }


def _share(features: Tensor, units: Tensor) -> np.ndarray:
    target, explained = features - features.mean(0), []
    for half in units.chunk(2, 1):
        centred = half - half.mean(0)
        fitted = centred @ torch.linalg.lstsq(centred, target, driver="gelsd").solution
        explained.append(fitted.square().sum(0))
    return (explained[0] / (explained[0] + explained[1]).clamp(min=1e-300)).numpy()


def _fit(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    lab.train.fit(
        model, F.cross_entropy, data, steps=steps, batch_size=128, lr=1e-2, weight_decay=0.01,
        schedule="cosine", seed=seed,
    )  # fmt: skip


def _accuracy(y: Tensor) -> Callable[[Tensor], float]:
    return lambda out: float((out.argmax(1) == y).double().mean())
