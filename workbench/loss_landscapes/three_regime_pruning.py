r"""Three regimes of pruning: which way to turn a training knob before magnitude pruning.

A dense network is trained at some *temperature* (fewer epochs, a smaller batch or a larger SAM
radius are hotter), pruned by magnitude to a *load* (the density that is kept: a low density is a
heavy load), and retrained from the pruned weights with several seeds. Two numbers of a pair of
retrained networks place the cell (temperature, density) in a regime: their linear mode connectivity
on the training error $e$,

$$mc=\tfrac12(e_0+e_1)-e(t^*),\qquad t^*=\arg\max_t\big|\tfrac12(e_0+e_1)-e(t)\big|,$$

and the linear CKA of their outputs. Regime I: a barrier, $mc\ll0$; II-A: connected but dissimilar;
II-B: connected and similar. The prediction: in Regime I a *higher* temperature lowers the test
error after pruning, in Regime II a *lower* one does. Its three uses: which way to move a
hyper-parameter from one measured pair (`advice`), which dense model to prune, and which SAM radius
to train with (`choose_dense` for both).

All networks of a grid are trained together: their parameters are stacked and the model is
vectorised over them (`train_members`). `retrain`, `mode_connectivity` and `output_cka` take your
own modules one by one.

Reference: Zhou, Yang, Chang and Mahoney (2023), "A Three-regime Model of Network Pruning", arXiv
2305.18383. As in the authors' code, biases, norms and the last layer are never pruned, retraining
begins the learning-rate schedule anew, batch sizes are compared at an equal number of steps, and
connectivity is measured on the training data without augmentation, batch norm re-estimated at each
point. That code records the CKA of logits and of class probabilities and plots the second;
`output_cka` measures either. The thresholds of `regime` are ours: the paper reads the borders off
its figures.

*Not included*: layer-adaptive densities (masks from elsewhere can be given to `retrain`) and
iterative pruning, as the authors prune once; data augmentation, for which the data must be given
augmented.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lab import checks
from workbench.lab.members import States, member, outputs, stack
from workbench.loss_landscapes.geometry import Objective, Path, linear_cka, linear_path
from workbench.loss_landscapes.members import (
    Array,
    Data,
    Recipe,
    errors,
    profiles,
    restate,
    train_members,
)
from workbench.loss_landscapes.regimes import (
    CKA_TOL,
    MC_TOL,
    advice,
    border,
    border_table,
    choose_dense,
    regime,
    score_advice,
    signed_connectivity,
)

__all__ = [
    "CKA_TOL", "KNOBS", "MC_TOL", "PhaseGrid", "Recipe", "advice", "border", "border_table",
    "choose_dense", "error_rate", "hottest_first", "magnitude_masks", "mode_connectivity",
    "output_cka", "phase_grid", "prunable", "regime", "retrain", "score_advice",
    "signed_connectivity", "train_dense",
]  # fmt: skip

KNOBS = {"epochs": +1, "batch_size": +1, "rho": -1}
"""Temperature knobs; +1 where a larger value is colder."""


# --- pruning ---------------------------------------------------------------------------------


def prunable(model: nn.Module, *, head: bool = False) -> list[str]:
    """Names of the weights that are pruned: of linear and convolutional layers, without the last.

    Args:
        model: any module.
        head: also prune the last of these layers.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [f"{n}.weight" if n else "weight" for n, m in model.named_modules()
             if isinstance(m, kinds)]  # fmt: skip
    found = found if head else found[:-1]
    if not found:
        raise ValueError("model: has no layer to prune; head=True also prunes the last one")
    return found


def magnitude_masks(
    model: nn.Module,
    density: float,
    *,
    mode: str = "uniform",
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    r"""Masks that keep the weights of largest magnitude.

    Of $n$ weights $n-\mathrm{round}((1-\rho)n)$ are kept, the very ones that
    ``torch.nn.utils.prune.l1_unstructured`` (or ``global_unstructured``) keeps.

    Args:
        model: holds the weights.
        density: rho in (0, 1], the share that is kept.
        mode: "uniform", the same density in each layer, or "global", over all of them together.
        names: which parameters; by default those of `prunable`.

    Returns:
        Boolean tensors by parameter name, True where a weight stays.

    Raises:
        ValueError: the density lies outside (0, 1], or a name is unknown.
    """
    density = checks.fraction(density, "density", zero=False)
    checks.one_of(mode, ("uniform", "global"), "mode")
    parameters = dict(model.named_parameters())
    chosen = list(prunable(model) if names is None else names)
    for name in chosen:
        checks.one_of(name, parameters, "names")
    sizes = {name: parameters[name].detach().abs() for name in chosen}
    if mode == "uniform":
        return {name: _largest(size, density) for name, size in sizes.items()}
    kept = _largest(torch.cat([size.flatten() for size in sizes.values()]), density)
    parts = kept.split([size.numel() for size in sizes.values()])
    return {
        name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)
    }


def _largest(size: Tensor, density: float) -> Tensor:
    flat = size.flatten()
    smallest = flat.topk(round((1 - density) * flat.numel()), largest=False).indices
    return torch.ones_like(flat, dtype=torch.bool).index_fill_(0, smallest, False).view_as(size)


# --- your own networks, one pair at a time -----------------------------------------------------


def retrain(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    data: Data,
    seeds: Sequence[int] = (0, 1),
    recipe: Recipe | None = None,
) -> list[nn.Module]:
    """Retrain a pruned network once per seed, from the same weights and with the same mask.

    Args:
        model: dense network; not changed.
        masks: from `magnitude_masks`.
        data: x (n, ...) and class indices y (n,).
        seeds: of the minibatch orders.
        recipe: hyper-parameters of retraining, its schedule from the beginning.

    Returns:
        One network per seed, in evaluation mode; pruned weights are exactly 0.

    Reference: Zhou et al. (2023), arXiv 2305.18383, train-prune-retrain.
    """
    begin = stack([model.state_dict()] * len(seeds))
    ended, _ = train_members(model, begin, data, seeds, recipe, masks=masks)
    found = []
    for i in range(len(seeds)):
        network = copy.deepcopy(model).eval()
        network.load_state_dict(member(ended, i))
        found.append(network)
    return found


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong classes."""
    return (logits.argmax(-1) != labels).double().mean()


def mode_connectivity(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    metric: Callable[..., Tensor] = error_rate,
    points: int = 11,
) -> Path:
    """Training error on the straight line between two networks; ``.connectivity`` is its mc.

    Args:
        a: network; only looked at.
        b: network of the same architecture.
        data: tensors ``(x, y)`` or a loader of them, in fixed order and without augmentation.
        metric: ``metric(outputs, y)``, a mean over rows; the paper's is the error rate.
        points: along the line, both ends included.

    Returns:
        Path with ``t``, ``values``, ``connectivity`` and ``barrier``.

    Reference: Zhou et al. (2023), arXiv 2305.18383; 11 points, batch norm re-estimated.
    """
    return linear_path(Objective(a, metric, data, batch_norm="reestimate"), a, b, points=points)


@torch.no_grad()
def output_cka(a: nn.Module, b: nn.Module, x: Tensor, *, softmax: bool = True) -> float:
    """Linear CKA of two networks' outputs.

    Args:
        a: network.
        b: network.
        x: inputs (n, ...); the paper takes training data.
        softmax: of the class probabilities, as the authors' plots; False: of the logits.

    Returns:
        Similarity; 0 if one of the networks answers the same to every input.
    """
    found = []
    for network in (a, b):
        training = network.training
        found.append(network.eval()(x))
        network.train(training)
    return _similarity(found[0], found[1], softmax)


def _similarity(a: Tensor, b: Tensor, softmax: bool) -> float:
    """0 where a network answers the same to every input, as some very sparse ones do."""
    a, b = (a.softmax(-1), b.softmax(-1)) if softmax else (a, b)
    if min(float(v.std(0).amax()) for v in (a, b)) < 1e-5:
        return 0.0
    return float(linear_cka(a, b))


# --- the phase grid ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseGrid:
    """What was measured over T temperatures (hottest first) and D densities (ascending).

    Attributes:
        knob: "epochs", "batch_size" or "rho".
        values: (T,) of the knob, hottest first.
        densities: (D,) shares kept.
        error: (T, D) error on the held-out data, mean over retraining seeds.
        train_error: (T, D) the same on the training data.
        mc, cka, cka_logits: (T, D) means over pairs of retraining seeds.
        profiles: (T, D, points) training error between the two networks of a pair, mean over pairs.
        dense: (T,) held-out error of the dense networks.
        more: (T, D) errors on further data sets, by name; ``more_dense`` those of dense networks.
    """

    knob: str
    values: Array
    densities: Array
    error: Array
    train_error: Array
    mc: Array
    cka: Array
    cka_logits: Array
    profiles: Array
    dense: Array
    more: dict[str, Array] = field(default_factory=dict)
    more_dense: dict[str, Array] = field(default_factory=dict)


def hottest_first(knob: str, values: Sequence[float]) -> list[float]:
    """The knob's values from the hottest to the coldest."""
    colder = KNOBS[checks.one_of(knob, KNOBS, "knob")]
    if not len(values) or len(set(values)) < len(values):
        raise ValueError(f"values: expected different values of {knob}, got {list(values)}")
    return sorted(values, reverse=colder < 0)


def train_dense(
    model: nn.Module,
    data: Data,
    *,
    knob: str = "epochs",
    values: Sequence[float],
    recipe: Recipe | None = None,
    seed: int = 0,
) -> States:
    """Dense networks from one initialisation, one per temperature, stacked hottest first.

    "epochs" stops one run early; "batch_size" keeps the number of steps fixed, as the authors do;
    "rho" is SAM's radius.

    Args:
        model: holds the initial parameters; not changed.
        data: x (n, ...) and y (n,).
        knob: what plays the temperature.
        values: of the knob.
        recipe: everything else.
        seed: of the minibatch order.
    """
    recipe, ordered = recipe or Recipe(), hottest_first(knob, values)
    one, rows = stack([model.state_dict()]), len(data[0])
    if knob == "epochs":
        each = recipe.steps(rows) // recipe.epochs
        stops = [checks.count(v, "values") * each for v in ordered]
        parts = train_members(model, one, data, [seed], recipe, stops=stops)[1]
    elif knob == "batch_size":
        parts = [
            train_members(
                model, one, data, [seed], Recipe(**{**vars(recipe), "batch_size": int(value)}),
                steps=recipe.steps(rows),
            )[0]
            for value in ordered
        ]  # fmt: skip
    else:
        begin = stack([model.state_dict()] * len(ordered))
        rho = torch.tensor([checks.positive(v, "values", zero=True) for v in ordered])
        return train_members(model, begin, data, [seed] * len(ordered), recipe, rho=rho)[0]
    return {name: torch.cat([part[name] for part in parts]) for name in one}


def phase_grid(
    model: nn.Module,
    data: Data,
    held_out: Data,
    *,
    densities: Sequence[float],
    knob: str = "epochs",
    values: Sequence[float],
    recipe: Recipe | None = None,
    seed: int = 0,
    retrain_seeds: Sequence[int] = (0, 1),
    mode: str = "uniform",
    points: int = 11,
    more: Mapping[str, Data] | None = None,
    chunk: int | None = None,
) -> PhaseGrid:
    """Train, prune and retrain over all temperatures and densities; measure error, mc and CKA.

    Args:
        model: classifier that holds the initial parameters; not changed.
        data: training x (n, ...) and y (n,).
        held_out: data on which ``error`` is measured.
        densities: shares kept, in (0, 1].
        knob: "epochs", "batch_size" or "rho" (SAM).
        values: of the knob, within the recipe's schedule.
        recipe: of training and of retraining.
        seed: of the dense minibatch order.
        retrain_seeds: at least two; every pair of them is measured.
        mode: of `magnitude_masks`.
        points: along each line.
        more: further data sets whose errors are wanted, by name.
        chunk: cells trained together; by default all.

    Returns:
        The grid, temperatures hottest first.

    Raises:
        ValueError: fewer than two retraining seeds, or a value out of range.
    """
    if len(retrain_seeds) < 2:
        raise ValueError(f"retrain_seeds: expected at least two, got {list(retrain_seeds)}")
    recipe, ordered, kept = recipe or Recipe(), hottest_first(knob, values), sorted(densities)
    dense = train_dense(model, data, knob=knob, values=values, recipe=recipe, seed=seed)
    shape, r, extra = (len(ordered), len(kept)), len(retrain_seeds), dict(more or {})
    carrier, masks = copy.deepcopy(model), []
    for t in range(shape[0]):
        carrier.load_state_dict(member(dense, t))
        masks += [magnitude_masks(carrier, d, mode=mode) for d in kept]
    cells = [(t, i) for t in range(shape[0]) for i in range(shape[1])]
    columns: dict[str, list[Any]] = {k: [] for k in ("error", "train_error", "mc", "cka",
                                                     "cka_logits", "profiles", *extra)}  # fmt: skip
    size = len(cells) if chunk is None else checks.count(chunk, "chunk")
    orders = [1_000_003 * (seed + 1) + int(s) for s in retrain_seeds]
    for first in range(0, len(cells), size):
        part = cells[first : first + size]
        begin = stack([member(dense, t) for t, _ in part for _ in orders])
        chosen = {
            name: torch.stack([masks[first + j][name] for j in range(len(part)) for _ in orders])
            for name in masks[0]
        }
        ended, _ = train_members(model, begin, data, orders * len(part), recipe, masks=chosen)
        for name, where in {"error": held_out, "train_error": data, **extra}.items():
            columns[name] += list(errors(model, ended, where).reshape(-1, r).mean(1))
        for key, value in _pairs(model, ended, data, r, points).items():
            columns[key] += list(value)
    grids = {key: np.array(column).reshape(*shape, *np.shape(column[0]))
             for key, column in columns.items()}  # fmt: skip
    return PhaseGrid(
        knob=knob,
        values=np.array(ordered),
        densities=np.array(kept),
        dense=errors(model, dense, held_out),
        more={name: grids.pop(name) for name in extra},
        more_dense={name: errors(model, dense, where) for name, where in extra.items()},
        **grids,
    )


def _pairs(
    model: nn.Module, states: Mapping[str, Tensor], data: Data, r: int, points: int
) -> dict[str, Array]:
    """Means over pairs of retraining seeds, for cells whose r members follow each other."""
    seeds = [{name: values[i::r] for name, values in states.items()} for i in range(r)]
    seen = [outputs(model, restate(model, part, data[0]), data[0]) for part in seeds]
    found: dict[str, list[Array]] = {"profiles": [], "mc": [], "cka": [], "cka_logits": []}
    for i, j in combinations(range(r), 2):
        lines = profiles(model, seeds[i], seeds[j], data, points)
        found["profiles"].append(lines)
        found["mc"].append(signed_connectivity(lines))
        for key, softmax in (("cka", True), ("cka_logits", False)):
            both = zip(seen[i], seen[j], strict=True)
            found[key].append(np.array([_similarity(a, b, softmax) for a, b in both]))
    return {key: np.mean(values, 0) for key, values in found.items()}
