r"""Matching of hidden units: one of the many equal orders of a network's units, chosen to fit.

A network computes the same function after its hidden units have been renumbered, if the weights
that read them are renumbered too. Two networks trained apart are compared after undoing this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from workbench.lab import checks
from workbench.lab.progress import Progress
from workbench.loss_landscapes.geometry.parameters import eager
from workbench.loss_landscapes.geometry.units import Spec, chain_spec, sizes

__all__ = ["activation_permutations", "chain_spec", "match_units", "permute", "weight_permutations"]

Permutations = dict[str, Tensor]


def match_units(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: Spec | None = None,
    *,
    starts: int = 1,
    generator: torch.Generator | int | None = None,
) -> dict[str, Tensor]:
    """Model b's parameters and buffers with its hidden units renumbered to fit model a's weights.

    Args:
        model_a: the model that stays as it is.
        model_b: one of the same architecture; it is not changed.
        spec: which axes count which units, needed for anything but a chain (see `chain_spec`).
        starts: see `weight_permutations`.
        generator: see `weight_permutations`.

    Returns:
        A state dict: for ``load_state_dict`` or ``Objective.flatten``.

    Raises:
        TypeError, ValueError: the models differ, or their architecture is none that is known.

    Reference:
        S. Ainsworth, J. Hayase, S. Srinivasa, Git Re-Basin, 2022, arXiv:2209.04836, Algorithm 1.
    """
    spec = chain_spec(model_a) if spec is None else spec
    found = weight_permutations(model_a, model_b, spec, starts=starts, generator=generator)
    return permute(_state(model_b), spec, found)


def weight_permutations(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: Spec | None = None,
    *,
    starts: int = 1,
    sweeps: int = 100,
    generator: torch.Generator | int | None = None,
) -> Permutations:
    r"""Permutations of model b's hidden units under which its weights are nearest to model a's.

    $$\max_{\pi}\ \langle\theta_A,\pi(\theta_B)\rangle,$$
    which is to minimise $\|\theta_A-\pi(\theta_B)\|^2$. With all groups of units but one held
    fixed this is a linear assignment problem; groups are solved in random order until none gains.

    Args:
        model_a: the model that stays as it is.
        model_b: one of the same architecture.
        spec: which axes count which units; default `chain_spec`.
        starts: times to go through it all: first from the given order of units, then from random
            ones; the best end is taken (the problem is NP-hard, each run ends in a local optimum).
        sweeps: most rounds over the groups.
        generator: of orders and starts.

    Returns:
        For each group the order (n,) of model b's units: unit i of a is unit ``order[i]`` of b.

    Raises:
        TypeError, ValueError: see `match_units`.
    """
    spec = chain_spec(model_a) if spec is None else spec
    rng = checks.as_generator(generator)
    starts, sweeps = checks.count(starts, "starts"), checks.count(sweeps, "sweeps")
    a, b = _weights(model_a, spec), _weights(model_b, spec)
    units = _checked(spec, _state(model_a), _state(model_b))
    best: tuple[float, Permutations] = (-np.inf, {})
    with Progress("matching", starts) as bar:
        for start in range(starts):
            orders = {
                group: torch.randperm(n, generator=rng) if start else torch.arange(n)
                for group, n in units.items()
            }
            _descend(a, b, spec, units, orders, sweeps, rng)
            score = sum(float((a[name] * w).sum()) for name, w in permute(b, spec, orders).items())
            if score > best[0]:
                best = score, orders
            bar.step()
    return best[1]


@torch.no_grad()
def activation_permutations(
    model_a: nn.Module, model_b: nn.Module, x: Tensor, *, batch_size: int = 256
) -> Permutations:
    r"""Permutations of model b's hidden units that respond most as model a's do, in a chain.

    $$\max_\pi\sum_i\mathrm{corr}\bigl(z^A_i,z^B_{\pi(i)}\bigr)$$ over rows (and places, for
    channels), each group by itself: the optimum, found by one assignment problem. Both models are
    run in evaluation mode. z is the output of the layer that makes the units, before its
    activation.

    Args:
        model_a: the model that stays as it is.
        model_b: one of the same architecture.
        x: inputs (n, ...).
        batch_size: rows taken at once.

    Returns:
        As `weight_permutations`, for `permute` with ``chain_spec(model_a)``.

    Raises:
        TypeError, ValueError: see `match_units`.

    Reference:
        Y. Li et al., Convergent learning, 2015, arXiv:1511.07543 (matching by correlation);
        S. Ainsworth, J. Hayase, S. Srinivasa, 2022, arXiv:2209.04836, section 3.1.
    """
    spec = chain_spec(model_a)
    units = _checked(spec, _state(model_a), _state(model_b))
    moments = {group: torch.zeros(n, n, dtype=torch.float64) for group, n in units.items()}
    sums = {group: torch.zeros(2, 2, n, dtype=torch.float64) for group, n in units.items()}
    rows = dict.fromkeys(units, 0)
    for part in x.split(checks.count(batch_size, "batch_size")):
        first, second = _responses(model_a, part, units), _responses(model_b, part, units)
        for group in units:
            z, w = first[group], second[group]
            moments[group] += (z.T @ w).cpu()
            sums[group] += torch.stack(
                [torch.stack([u.sum(0), (u * u).sum(0)]) for u in (z, w)]
            ).cpu()
            rows[group] += len(z)
    found = {}
    for group, n in rows.items():
        means, squares = sums[group].unbind(1)
        deviations = (squares / n - (means / n) ** 2).clamp_min(0).sqrt()
        covariance = moments[group] / n - torch.outer(means[0] / n, means[1] / n)
        scale = torch.outer(deviations[0], deviations[1])
        correlation = torch.where(scale > 1e-12, covariance / scale.clamp_min(1e-300), 0.0)
        found[group] = _assign(correlation)
    return found


def permute(
    state: Mapping[str, Tensor], spec: Spec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict with units renumbered; the function it stands for is the same.

    Args:
        state: tensors by name; names without an entry in ``spec`` are copied.
        spec: which axes count which units.
        permutations: for each group the order of its units (n,); missing groups stay.

    Returns:
        Copies of the tensors.
    """
    out = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        for axis, group in enumerate(spec.get(name, ())):
            if group is not None and group in permutations:
                tensor = _take(tensor, axis, permutations[group])
        out[name] = tensor.clone()
    return out


# ---- inside


def _descend(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: Spec,
    units: Mapping[str, int],
    orders: Permutations,
    sweeps: int,
    generator: torch.Generator,
) -> None:
    """Improve ``orders`` in place until no group gains."""
    groups = list(units)
    places = {
        group: [
            (name, axis)
            for name in a
            for axis, label in enumerate(spec.get(name, ()))
            if label == group
        ]
        for group in groups
    }
    for _ in range(sweeps):
        gained = False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[index]
            n = units[group]
            gain = torch.zeros(n, n, dtype=torch.float64)
            for name, axis in places[group]:
                moved = b[name]
                for other, label in enumerate(spec[name]):
                    if label is not None and other != axis:
                        moved = _take(moved, other, orders[label])
                gain += _rows(a[name], axis, n) @ _rows(moved, axis, n).T
            order = _assign(gain)
            at = torch.arange(n)
            before, after = gain[at, orders[group]].sum(), gain[at, order].sum()
            if after > before + 1e-12 * gain.abs().max() * n:
                orders[group], gained = order, True
        if not gained:
            return


def _assign(gain: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def _rows(tensor: Tensor, axis: int, n: int) -> Tensor:
    """One row for each unit; an axis may hold several entries of a unit, next to each other."""
    return tensor.movedim(axis, 0).reshape(n, -1)


def _take(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    n = len(order)
    if tensor.shape[axis] == n:
        return tensor.index_select(axis, order.to(tensor.device))
    blocks = tensor.unflatten(axis, (n, -1)).index_select(axis, order.to(tensor.device))
    return blocks.flatten(axis, axis + 1)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(eager(model).state_dict())


def _weights(model: nn.Module, spec: Spec) -> dict[str, Tensor]:
    """The parameters that are matched: those with units, as float64 on the CPU."""
    return {
        name: parameter.detach().double().cpu()
        for name, parameter in eager(model).named_parameters()
        if any(spec.get(name, ()))
    }


def _checked(spec: Spec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of the groups, once both models are seen to have the same tensors."""
    for name in [*a, *b]:
        if name not in a or name not in b:
            raise ValueError(f"model_b: {name} is in one model only; expected the same layers")
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"model_b: {name} has shape {tuple(b[name].shape)}; expected "
                f"{tuple(a[name].shape)} as in model_a"
            )
    return sizes(spec, a)


def _responses(model: nn.Module, x: Tensor, layers: Sequence[str] | Any) -> dict[str, Tensor]:
    """Outputs of the named layers, a row for each input (and place), float64."""
    plain, seen = eager(model), {}
    hooks = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            seen[name] = out.movedim(1, -1).reshape(-1, out.shape[1]).double()

        return hook

    training = {module: module.training for module in plain.modules()}
    try:
        hooks = [plain.get_submodule(name).register_forward_hook(note(name)) for name in layers]
        plain.eval()
        plain(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    return seen
