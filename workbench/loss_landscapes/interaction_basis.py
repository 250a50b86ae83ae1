r"""A basis for each layer in which directions that the function does not need have dropped out.

Three degeneracies leave a network's function as it is: activations of a layer that are linearly
dependent, gradients passed back to a layer that are linearly dependent, and ReLUs that fire on the
same data. `degeneracy` counts them. The *interaction basis* quotients out the first two. For the
activations $f$ of a layer (with the constant unit that carries the biases) and the Jacobian $J$
from $f$ to a target,

$$G = E[ff^T] = UDU^T, \qquad M = D^{1/2}U^T\, E[J^TJ]\, UD^{1/2} = V\Lambda V^T, \qquad
  \hat f = \Lambda^{1/2}V^TD^{-1/2}U^T f ,$$

where directions with $D = 0$ or $\Lambda = 0$ are dropped. In words: whiten, turn to the
eigenvectors of the mean squared Jacobian, and scale each feature to its effect on the target,
$E[\hat f_j^2] = \Lambda_j$. The target is the network's output (`target="output"`, this paper) or
the basis of the next layer (`target="next"`, its sequel, the Local Interaction Basis), built from
the output backwards. A network with $f \to Af$ and its next layer's weights times $A^{-1}$
computes the same function, and has the same $\Lambda$ and, up to signs, the same $\hat f$; where
eigenvalues tie, features are fixed up to a rotation.

Features of neighbouring layers interact with strength (`edges`)

$$E_{ij} = E\Big[\Big(\hat f_j\int_0^1 \frac{\partial \hat f'_i}{\partial \hat f_j}(\alpha\hat f)\,
  d\alpha\Big)^2\Big],$$

by integrated gradients, or with the integrand at $\alpha = 1$. `ablate` runs the network with some
of these interactions removed, `edges_needed` counts how many must stay, and `modularity` clusters
the graph with weights $\max(0, \ln(E/\epsilon))$: each independent module has degeneracies of its
own, and those of an interaction weaker than $\epsilon$ cannot be seen.

Supported: any module that is cut by the inputs of named submodules, each called once with a tensor
of shape (n, d) that carries everything computed so far (`cut`; by default every ``nn.Linear``).
Everything runs in float64, in evaluation mode, on a copy.

Reference: Bushnaq, Mendel, Heimersheim et al. (2024), "Using Degeneracy in the Loss Landscape for
Mechanistic Interpretability", arXiv 2405.10927; for the local target, edges and ablations Bushnaq,
Heimersheim, Goldowsky-Dill et al. (2024), arXiv 2405.10928 and its code.

*Not included*: layers with a position axis (transformers), where one basis serves all positions and
edges sum over pairs of them, with stochastic sources in place of full Jacobians: that is the sequel
at the size of language models. Degeneracy of attention patterns, for the same reason. The authors'
older edge formulas ("functional", basis "(1-0)*alpha"), which they have withdrawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.lab import checks
from workbench.loss_landscapes.geometry import Objective
from workbench.loss_landscapes.layers import OUTPUT, ROWS, Chain, cut

__all__ = [
    "Basis", "Chain", "Degeneracy", "Modules", "ablate", "behavioral_loss", "cut", "degeneracy",
    "edges", "edges_needed", "effective_rank", "interaction_basis", "modularity", "neuron_basis",
    "pca_basis", "strongest",
]  # fmt: skip


# --- bases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """Features of one layer, ``([f, 1] - origin) @ C``, and the way back.

    Attributes:
        layer: its name.
        kind: "neurons", "pca", "output" or "next".
        C: (d + 1, k), the last row belongs to the constant unit.
        inverse: (k, d + 1), the pseudo-inverse.
        origin: (d + 1,): the mean and 1 (the constant unit is a feature of its own and left out) or
            zeros (the constant unit is mixed with the others).
        values: (k,), the mean square of each feature; the interaction basis calls it Lambda.
    """

    layer: str
    kind: str
    C: Float[Tensor, "d1 k"]
    inverse: Float[Tensor, "k d1"]
    origin: Float[Tensor, " d1"]
    values: Float[Tensor, " k"]

    @property
    def centered(self) -> bool:
        """Whether the constant unit is kept apart."""
        return bool(self.origin[-1] == 1)

    def features(self, f: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Activations in this basis."""
        return (_with_one(f) - self.origin) @ self.C

    def activations(self, features: Float[Tensor, "*n k"]) -> Float[Tensor, "*n d"]:
        """Features as activations."""
        return (self.origin + features @ self.inverse)[..., :-1]


def neuron_basis(net: Chain) -> list[Basis]:
    """The units as they are, less their mean: a baseline."""
    bases = []
    for name, f in zip(net.names, net.activations, strict=True):
        turn = torch.eye(f.shape[1] + 1, dtype=f.dtype, device=f.device)[:, :-1]
        bases.append(Basis(name, "neurons", turn, turn.T, _origin(f, True), f.var(0, False)))
    return bases


def pca_basis(net: Chain, *, tol: float = 1e-10, rotate_output: bool = True) -> list[Basis]:
    """Principal components of each layer: a baseline. Arguments as for `interaction_basis`."""
    bases = [
        _eigenbasis(name, "pca", f, True, tol)
        for name, f in zip(net.names, net.activations, strict=True)
    ]
    return bases if rotate_output else [*bases[:-1], neuron_basis(net)[-1]]


def interaction_basis(
    net: Chain,
    *,
    target: str = "output",
    center: bool = True,
    tol: float = 1e-10,
    rotate_output: bool = True,
) -> list[Basis]:
    """The interaction basis of every layer.

    Args:
        net: the cut network, `cut(model, X)`.
        target: what the Jacobian leads to: the "output" of the network, or the basis of the "next"
            layer (Local Interaction Basis).
        center: keep the constant unit as a feature of its own, so that the others have mean zero
            (the authors' code for their experiments); otherwise it is one more unit among the
            others. Then all parameters behind the first layer must be those of ``nn.Linear``.
        tol: directions below this share of the largest eigenvalue, of G and of M, are dropped. (The
            authors use absolute values, 1e-5 by default and 1e-15 in experiments; a share does not
            depend on the units of the activations.)
        rotate_output: take the eigenbasis of G for the output; otherwise its own units.

    Returns:
        A basis for each layer, the output last.

    Raises:
        ValueError: ``target`` is unknown, or biases cannot be folded in (``center=False``).

    Reference: Bushnaq et al. (2024), arXiv 2405.10927, the section that defines the basis; code:
    ``basis_formula="jacobian"``.
    """
    checks.one_of(target, ("output", "next"), "target")
    checks.positive(tol, "tol")
    if not center:
        net.refuse_folding()
    top = neuron_basis(net)[-1]
    if rotate_output:
        top = _eigenbasis(OUTPUT, "pca", net.outputs, True, tol)
    bases = [top]
    for start in reversed(range(net.last)):
        ahead = bases[0] if target == "next" else top
        f = net.activations[start]
        white = _eigenbasis(net.names[start], "pca", f, center, tol)
        out = white.C * white.values.rsqrt()
        back = white.values.sqrt()[:, None] * white.inverse
        squares = torch.zeros(len(out), len(out), dtype=f.dtype, device=f.device)
        for J in _jacobians(net, start, ahead, f, mixed=not center):
            squares += torch.einsum("mki,mkj->ij", J, J) / len(f)
        values, vectors = _eigh(back @ squares @ back.T, tol)
        C = out @ vectors * values.sqrt()
        inverse = values.rsqrt()[:, None] * vectors.T @ back
        bases.insert(0, Basis(white.layer, target, C, inverse, white.origin, values))
    return bases


def edges(
    net: Chain, bases: Sequence[Basis], *, kind: str = "jacobian", points: int = 20
) -> list[Float[Tensor, "k_out k_in"]]:
    """Strength of interaction between the features of neighbouring bases.

    Args:
        net: the cut network; the mean is over its data.
        bases: of the layers in order; layers may be left out (use "integrated" then).
        kind: "jacobian" takes the derivative at the data; "integrated" averages it along the line
            from the origin to the data, so that for each sample the contributions of all features
            add up to the change of the next feature.
        points: of the Gauss-Legendre rule for the integral.

    Reference: Bushnaq et al. (2024), arXiv 2405.10928; code: ``edge_formula="squared"``.
    """
    checks.one_of(kind, ("jacobian", "integrated"), "kind")
    nodes, weights = np.array([1.0]), np.array([1.0])
    if kind == "integrated":
        nodes, weights = np.polynomial.legendre.leggauss(checks.count(points, "points"))
        nodes, weights = (nodes + 1) / 2, weights / 2
    found = []
    for a, b in pairwise(bases):
        start, mean = net.position(a.layer), a.origin[:-1]
        f, features = net.activations[start], a.features(net.activations[start])
        total = torch.zeros(b.C.shape[1], a.C.shape[1], dtype=f.dtype, device=f.device)
        paths = [
            _jacobians(net, start, b, mean + t * (f - mean), mixed=not a.centered, at=float(t))
            for t in nodes
        ]
        for part, *blocks in zip(features.split(ROWS), *paths, strict=True):
            J = sum(w * block for w, block in zip(weights, blocks, strict=True)) @ a.inverse.T
            total += (J * part[:, None, :]).square().sum(0) / len(f)
        found.append(total)
    return found


# --- removing interactions -----------------------------------------------------------------------


def strongest(strengths: Float[Tensor, "k_out k_in"], keep: int) -> Bool[Tensor, "k_out k_in"]:
    """Mask of the ``keep`` strongest edges."""
    mask = torch.zeros(strengths.numel(), dtype=torch.bool, device=strengths.device)
    mask[strengths.flatten().topk(min(keep, strengths.numel())).indices] = True
    return mask.view_as(strengths)


@torch.no_grad()
def ablate(
    net: Chain, bases: Sequence[Basis], masks: Sequence[Bool[Tensor, "k_out k_in"] | None]
) -> Float[Tensor, "n c"]:
    """Outputs when each feature sees only the features that its edges lead to.

    Feature i of a layer is computed from the layer before with all features outside row i of the
    mask set to zero (centred: to their mean).

    Args:
        net: the cut network, with the data to answer on.
        bases: of the layers in order, centred, as used for the edges.
        masks: per pair of neighbouring bases the edges to keep; None leaves the pair as it is.
    """
    if not all(basis.centered for basis in bases):
        raise ValueError("bases: a constant unit mixed with others cannot be ablated; use center")
    checks.same_length(masks=list(masks), pairs_of_bases=list(pairwise(bases)))
    f = net.activations[net.position(bases[0].layer)]
    for (a, b), mask in zip(pairwise(bases), masks, strict=True):
        start, stop = net.position(a.layer), net.position(b.layer)
        if mask is None:
            f = net.run(start, stop, f)
            continue
        kept, which = mask.unique(dim=0, return_inverse=True)
        features = a.features(f)
        parts = a.activations(features[:, None, :] * kept).flatten(0, 1)
        turned = b.features(net.run(start, stop, parts)).unflatten(0, (len(f), len(kept)))
        f = b.activations(turned[:, which, torch.arange(len(which), device=f.device)])
    last = net.position(bases[-1].layer)
    return f if last == net.last else net.run(last, net.last, f)


def edges_needed(
    net: Chain,
    bases: Sequence[Basis],
    strengths: Sequence[Float[Tensor, "k_out k_in"]],
    score: Callable[[Float[Tensor, "n c"]], float],
    *,
    allowed: float = 0.0,
) -> list[int]:
    """Fewest of the strongest edges that keep the score, per pair of layers, by bisection.

    One pair is ablated at a time, as in the authors' code.

    Args:
        net: the cut network, with the data to score on.
        bases: as used for the edges.
        strengths: `edges(...)`.
        score: of outputs; higher is better.
        allowed: how far the score may fall.
    """
    target = score(net.outputs) - checks.positive(allowed, "allowed", zero=True)
    needed = []
    for pair, strength in enumerate(strengths):
        low, high = -1, strength.numel()
        while high - low > 1:
            middle = (low + high) // 2
            masks: list[Tensor | None] = [None] * len(strengths)
            masks[pair] = strongest(strength, middle)
            if score(ablate(net, bases, masks)) >= target:
                high = middle
            else:
                low = middle
        needed.append(high)
    return needed


# --- degeneracy, modules, rank -------------------------------------------------------------------


@dataclass(frozen=True)
class Degeneracy:
    """What leaves the function unchanged on the data, per layer.

    Attributes:
        activation: dimensions missing from the activations, the constant unit included.
        jacobian: dimensions missing from the gradients passed back to what the layer's weights
            give.
        relu: sizes of groups of units of a ``nn.ReLU`` that fire on the same data (units that never
            fire are left out); a group of k has k^2 free directions, k of them mere rescalings.
        parameters: directions of the layer's weights and biases in which the function does not
            change to first order because of the two deficits, (d + 1) e - rank G rank K; a lower
            bound on the zero eigenvalues of the Hessian that belong to this layer alone.
    """

    activation: dict[str, int]
    jacobian: dict[str, int]
    relu: dict[str, list[int]]
    parameters: dict[str, int]


def degeneracy(net: Chain, *, tol: float = 1e-10) -> Degeneracy:
    r"""Count the three degeneracies.

    For weights $W$ behind activations $f$, with $p = Wf$ and outputs $y$, the Hessian of
    $\tfrac12E\|y - y_*\|^2$ at $y_*$ is $E[ff^T \otimes (\partial y/\partial p)^T(\partial
    y/\partial p)]$; it vanishes wherever $G = E[ff^T]$ or $K = E[(\partial y/\partial
    p)^T(\partial y/\partial p)]$ does.

    Args:
        net: a network cut at ``nn.Linear`` modules.
        tol: eigenvalues below this share of the largest count as zero.

    Raises:
        ValueError: a layer is something else than ``nn.Linear``.

    Reference: Bushnaq et al. (2024), arXiv 2405.10927, the three internal degeneracies.
    """
    activation, jacobian, parameters = {}, {}, {}
    for start, (name, f) in enumerate(zip(net.names[:-1], net.activations, strict=False)):
        module = net.model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"layers: {name!r} is a {type(module).__name__}; expected nn.Linear")
        ones = _with_one(f) if module.bias is not None else f
        K = torch.zeros(module.out_features, module.out_features, dtype=f.dtype, device=f.device)
        for J in net.gradients(start):
            K += torch.einsum("mki,mkj->ij", J, J) / len(f)
        g, k = len(_eigh(ones.T @ ones / len(f), tol)[0]), len(_eigh(K, tol)[0])
        activation[name], jacobian[name] = ones.shape[1] - g, module.out_features - k
        parameters[name] = ones.shape[1] * module.out_features - g * k
    return Degeneracy(activation, jacobian, _firing(net), parameters)


@dataclass(frozen=True)
class Modules:
    """Clusters of the interaction graph.

    Attributes:
        labels: per layer the module of each feature.
        score: Newman's modularity of the partition, 0 for a graph without edges.
        count: modules with more than one feature.
    """

    labels: list[np.ndarray[Any, np.dtype[np.int64]]]
    score: float
    count: int


def modularity(
    strengths: Sequence[Float[Tensor, "k_out k_in"]],
    eps: float | Sequence[float],
    *,
    resolution: float = 1.0,
    seed: int = 0,
) -> Modules:
    r"""Modules of the interaction graph, with weights $\max(0, \ln(E/\epsilon))$, by Louvain.

    Args:
        strengths: `edges(...)`.
        eps: strength at which an interaction stops to matter, one or one per pair of layers (the
            authors take the weakest edge that `edges_needed` keeps).
        resolution: above 1 for more and smaller modules.
        seed: of Louvain's order of visits.

    Reference: Bushnaq et al. (2024), arXiv 2405.10927, logarithmic interaction strengths; the
    authors cluster with Leiden.
    """
    levels = np.broadcast_to(np.asarray(eps, float), len(strengths))
    for level in levels:
        checks.positive(level, "eps")
    widths = [strengths[0].shape[1], *(e.shape[0] for e in strengths)]
    graph = nx.Graph()
    graph.add_nodes_from((layer, i) for layer, width in enumerate(widths) for i in range(width))
    for layer, (strength, level) in enumerate(zip(strengths, levels, strict=True)):
        weights = (strength / level).clamp(min=1).log()
        for i, j in weights.nonzero().tolist():
            graph.add_edge((layer, j), (layer + 1, i), weight=float(weights[i, j]))
    found = nx.community.louvain_communities(graph, resolution=resolution, seed=seed)
    labels = [np.zeros(width, dtype=np.int64) for width in widths]
    for label, members in enumerate(sorted(found, key=lambda group: (-len(group), min(group)))):
        for layer, i in members:
            labels[layer][i] = label
    score = nx.community.modularity(graph, found, resolution=resolution) if graph.size() else 0.0
    return Modules(labels, float(score), sum(len(group) > 1 for group in found))


def behavioral_loss(model: nn.Module, X: Tensor) -> Objective:
    r"""The paper's behavioural loss $E\|y_\theta(x) - y_{\theta_*}(x)\|^2$, zero at present.

    Its Hessian $2E[(\partial y/\partial\theta)^T(\partial y/\partial\theta)]$ has a zero eigenvalue
    for every direction in which the function does not change.
    """
    with torch.no_grad():
        now = copy.deepcopy(model).eval()(X)
    return Objective(model, lambda y, then: (y - then).square().sum(1).mean(), (X, now))


def effective_rank(loss: Objective, params: Tensor | None = None, *, tol: float = 1e-9) -> int:
    """Eigenvalues of the Hessian that are not zero: the effective number of parameters.

    Args:
        loss: an objective, for instance `behavioral_loss(model, X)`, of a small model in float64;
            its D x D Hessian is held in memory.
        params: where, shape (D,); by default the model's present parameters.
        tol: eigenvalues below this share of the largest (in absolute value) count as zero.

    Reference: Bushnaq et al. (2024), arXiv 2405.10927: twice the learning coefficient where the
    loss is quadratic along all directions that are not flat.
    """
    checks.positive(tol, "tol")
    now = loss.theta if params is None else params
    hessian = loss.hvp(torch.eye(loss.size, dtype=now.dtype, device=now.device), params)
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2).abs()
    return int((values > tol * values.max()).sum())


# --- parts ---------------------------------------------------------------------------------------


def _with_one(f: Tensor) -> Tensor:
    return torch.cat([f, torch.ones_like(f[..., :1])], -1)


def _origin(f: Tensor, center: bool) -> Tensor:
    return _with_one(f.mean(0)) if center else torch.zeros_like(f[0, :1]).repeat(f.shape[1] + 1)


def _jacobians(
    net: Chain, start: int, to: Basis, f: Tensor, *, mixed: bool, at: float = 1.0
) -> Iterator[Tensor]:
    """Of the features ``to`` by [f, 1]; by the last only where the constant unit is mixed in."""
    stop, turn = net.position(to.layer), to.C[:-1]
    blocks = net.jacobians(start, stop, f, turn)
    if not mixed:
        yield from (nn.functional.pad(J, (0, 1)) for J in blocks)
        return
    for J, column in zip(blocks, net.by_constant(start, stop, f, turn, at), strict=True):
        yield torch.cat([J, (column + to.C[-1])[:, :, None]], 2)


def _eigh(matrix: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues above ``tol`` times the largest, falling, and their vectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > tol * values[-1]
    return values[kept].flip(0), vectors[:, kept].flip(1)


def _eigenbasis(layer: str, kind: str, f: Tensor, center: bool, tol: float) -> Basis:
    origin = _origin(f, center)
    shifted = _with_one(f) - origin
    values, vectors = _eigh(shifted.T @ shifted / len(f), tol)
    if not len(values):
        raise ValueError(f"layers: {layer!r} is constant on the data")
    return Basis(layer, kind, vectors, vectors.T, origin, values)


@torch.no_grad()
def _firing(net: Chain) -> dict[str, list[int]]:
    """Group sizes of units with the same firing pattern, largest first, per nn.ReLU."""
    found: dict[str, list[int]] = {}
    with ExitStack() as hooks:
        for name, module in net.model.named_modules():
            if isinstance(module, nn.ReLU):

                def look(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    fires = (args[0] > 0).flatten(1).T
                    _, counts = fires[fires.any(1)].unique(dim=0, return_counts=True)
                    found[name] = sorted(counts.tolist(), reverse=True)

                hooks.enter_context(module.register_forward_pre_hook(look))
        net.run(0, net.last, net.activations[0])
    return found
