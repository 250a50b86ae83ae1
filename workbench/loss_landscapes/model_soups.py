r"""Average the weights of several fine-tunings of one start: one model, often better than the best.

Fine-tune one $\theta_0$ under k settings to $\theta_1\dots\theta_k$. A soup is
$f(x;\sum_i\alpha_i\theta_i)$ with $\sum_i\alpha_i=1$; it costs as much to run as one model.

* **Uniform**: $\alpha_i=1/k$.
* **Greedy**: sort by held-out score, begin with the best, keep each next model if the average of
  what is in the pot with it scores higher, $S\leftarrow\frac m{m+1}S+\frac1{m+1}\theta_i$.
* **Learned**: minimise the held-out cross-entropy of $\beta f(\sum_i\alpha_i\theta_i)$ over
  $\alpha=\mathrm{softmax}(a)$ and $\beta$, with one $\alpha$ for all tensors or one for each.

Against the ensemble of logits on the way $\theta_\alpha=(1-\alpha)\theta_0+\alpha\theta_1$ between
two models, to leading order in their distance,

$$L^{soup}_\alpha-L^{ens}_\alpha\approx\frac{\alpha(1-\alpha)}2\Big(
  -\frac{d^2}{d\alpha^2}L^{soup}_\alpha
  +\beta^2\,E_x\mathrm{Var}_{Y\sim p(\beta f(x;\theta_\alpha))}[\Delta f_Y(x)]\Big),
  \qquad\Delta f=f(\theta_1)-f(\theta_0).$$

A ``state`` is a ``state_dict``. States may be a lazy sequence that reads each from a file: only
the learned soup needs all at once.

Reference: Wortsman et al. (2022), arXiv 2203.05482; the learned soup's options follow the authors'
code (mlfoundations/model-soups).

*Not included*: soups of models fine-tuned from zero-shot heads built from text (no text tower
here), and the combination with robust fine-tuning that interpolates back to the start; the latter
is ``average([start, soup])``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import update_bn

from workbench.lab import checks
from workbench.loss_landscapes.geometry import Objective, Plane

State = Mapping[str, Tensor]
Weights = Sequence[float] | Tensor


# --- averages


def average(states: Iterable[State], weights: Weights | None = None) -> dict[str, Tensor]:
    r"""Weighted mean $\sum_i\alpha_i\theta_i$ of states, read one after the other.

    Half precision is summed in float32. Counters and flags (integer or boolean buffers, such as
    the number of batches that a batch norm has seen) have no mean and come from the first state.

    Args:
        states: state dicts of one architecture.
        weights: (k,), default 1 / k; used as given, so that they may extrapolate.

    Raises:
        ValueError: no state, another number of weights, or a state with other names or shapes.
    """
    if weights is None:
        states = states if isinstance(states, Sequence) else list(states)
        weights = [1 / max(1, len(states))] * len(states)
    shares = [checks.number(w, "weights") for w in weights]
    total: dict[str, Tensor] = {}
    first: State = {}
    seen = 0
    for i, state in enumerate(states):
        if i >= len(shares):
            raise ValueError(f"weights: expected one for each state, got {len(shares)}")
        if i == 0:
            first = state
            total = {name: _wide(t) * shares[0] for name, t in state.items() if _averaged(t)}
        else:
            _same(first, state, f"states[{i}]")
            for name, tensor in total.items():
                tensor.add_(_wide(state[name].detach().to(tensor.device)), alpha=shares[i])
        seen += 1
    if seen == 0 or seen != len(shares):
        raise ValueError(f"weights: expected one for each state, got {len(shares)} for {seen}")
    return {
        name: total[name].to(t.dtype) if name in total else t.detach().clone()
        for name, t in first.items()
    }


def uniform_soup(states: Iterable[State]) -> dict[str, Tensor]:
    """The plain mean of all states; see `average`."""
    return average(states)


@dataclass(frozen=True)
class GreedySoup:
    """A greedy soup and how it was made.

    Attributes:
        state: the soup.
        kept: indices of its ingredients, in the order in which they went in.
        order: indices in the order in which they were tried.
        tried: score of the soup with each candidate in it, in that order.
        scores: score of the pot after each decision; never falls.
    """

    state: dict[str, Tensor] = field(repr=False)
    kept: tuple[int, ...]
    order: tuple[int, ...]
    tried: tuple[float, ...]
    scores: tuple[float, ...]


def greedy_soup(
    states: Sequence[State],
    score: Callable[[dict[str, Tensor]], float],
    *,
    order: Sequence[int] | None = None,
    ties: bool = False,
) -> GreedySoup:
    """Add states to the average one at a time, each only if the held-out score rises.

    The result is at least as good on the held-out data as the best single state.

    Args:
        states: state dicts of one architecture, possibly read lazily.
        score: function of a state to a number, higher is better; evaluate it on data that neither
            trained a member nor will report the result.
        order: indices to try, the first one is where the soup begins; default by falling score.
        ties: also add a state that leaves the score as it is. The paper's Recipe 1 does; the
            authors' code, and this default, ask for more.

    Raises:
        ValueError: no states, an order that names one twice or not at all, or a score that is NaN.

    Reference: Wortsman et al. (2022), arXiv 2203.05482, Recipe 1.
    """
    if len(states) == 0:
        raise ValueError("states: is empty; expected at least one")
    if order is None:
        alone = [_scored(score, dict(states[i])) for i in range(len(states))]
        order = sorted(range(len(states)), key=lambda i: -alone[i])
        best = alone[order[0]]
    else:
        order = [checks.count(i, "order", minimum=0) for i in order]
        if not order or len(set(order)) < len(order) or max(order) >= len(states):
            raise ValueError(f"order: expected different indices below {len(states)}, got {order}")
        best = _scored(score, dict(states[order[0]]))
    kept, tried, scores = [order[0]], [best], [best]
    first = states[order[0]]
    pot = {name: _wide(tensor) for name, tensor in first.items()}
    for i in order[1:]:
        new, share = states[i], 1 / (len(kept) + 1)
        _same(first, new, f"states[{i}]")
        candidate = {
            name: torch.lerp(t, _wide(new[name].to(t.device)), share) if _averaged(t) else t
            for name, t in pot.items()
        }
        value = _scored(score, {name: t.to(first[name].dtype) for name, t in candidate.items()})
        if value > best or (ties and value == best):
            pot, best = candidate, value
            kept.append(i)
        tried.append(value)
        scores.append(best)
    soup = {name: tensor.to(first[name].dtype).clone() for name, tensor in pot.items()}
    return GreedySoup(soup, tuple(kept), tuple(order), tuple(tried), tuple(scores))


# --- models


def soup_model(model: nn.Module, state: State, data: Any = None) -> nn.Module:
    """A copy of the model that holds a soup, in evaluation mode.

    Args:
        model: of the architecture; is left as it is.
        state: the soup.
        data: inputs (n, ...), or a loader of batches whose first entry they are. Batch-norm
            statistics are re-estimated on them: the averages that the soup holds were never seen
            by the averaged weights. A model without batch norm needs none.
    """
    served = copy.deepcopy(model)
    served.load_state_dict(dict(state))
    if data is not None:
        loader = data.split(1024) if isinstance(data, Tensor) else data
        update_bn(loader, served, device=next(served.parameters()).device)
    return served.eval()


def accuracy_on(
    model: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, data: Any = None
) -> Callable[[State], float]:
    """Share of rows that a state classifies correctly: a score for `greedy_soup`.

    Args:
        model: of the architecture.
        x: inputs (n, ...).
        y: classes.
        data: where batch-norm statistics are re-estimated, see `soup_model`.
    """
    checks.same_length(x=x, y=y)

    @torch.no_grad()
    def score(state: State) -> float:
        served = soup_model(model, state, data)
        return float((served(x).argmax(-1) == y).float().mean())

    return score


@torch.no_grad()
def logit_ensemble(
    model: nn.Module, states: Sequence[State], x: Tensor, weights: Weights | None = None
) -> Float[Tensor, "n c"]:
    r"""$\sum_i\alpha_if(x;\theta_i)$: every member is run, then logits are averaged.

    Args:
        model: of the architecture; evaluated without dropout.
        states: state dicts.
        x: inputs (n, ...).
        weights: (k,), default 1 / k.
    """
    shares = (
        [1 / max(1, len(states))] * len(states) if weights is None else [float(w) for w in weights]
    )
    if len(shares) != len(states) or not shares:
        raise ValueError(f"weights: expected one for each of {len(states)} states")
    served = copy.deepcopy(model).eval()
    pairs = zip(shares, states, strict=True)
    return torch.stack([w * functional_call(served, dict(s), (x,)) for w, s in pairs]).sum(0)


@dataclass(frozen=True)
class LearnedSoup:
    r"""A learned soup.

    Attributes:
        state: the averaged weights; multiply their logits by ``beta``.
        weights: (tensors, k), rows sum to 1; one row if all tensors share it.
        names: of the tensors.
        beta: the temperature factor $\beta$ of the logits.
        losses: held-out cross-entropy of each batch.
    """

    state: dict[str, Tensor] = field(repr=False)
    weights: Float[Tensor, "t k"]
    names: tuple[str, ...]
    beta: float
    losses: tuple[float, ...] = field(repr=False)


def learned_soup(
    model: nn.Module,
    states: Sequence[State],
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    by_layer: bool = False,
    lr: float = 0.05,
    epochs: int = 5,
    batch_size: int = 256,
    generator: torch.Generator | int | None = 0,
) -> LearnedSoup:
    r"""Mixing weights and temperature by gradient descent on held-out cross-entropy.

    Starts at the uniform soup with $\beta=1$ and takes AdamW steps without weight decay.

    Args:
        model: of the architecture; evaluated without dropout.
        states: state dicts, all in memory.
        x: held-out inputs (n, ...).
        y: their classes.
        by_layer: a weight for each model and parameter tensor, as the authors' code does, in place
            of one for each model.
        lr: learning rate.
        epochs: passes over the held-out data.
        batch_size: rows a step.
        generator: of the order of rows; a seed will do.

    Reference: Wortsman et al. (2022), arXiv 2203.05482, the learned soup and its appendix.
    """
    checks.same_length(x=x, y=y)
    source = checks.as_generator(generator)
    served = copy.deepcopy(model).eval().requires_grad_(False)
    for i, state in enumerate(states):
        _same(states[0], state, f"states[{i}]")
    every = list(served.named_parameters(remove_duplicate=False))
    names = tuple(name for name, _ in served.named_parameters())
    stacked = {name: torch.stack([state[name].detach() for state in states]) for name in names}
    device = stacked[names[0]].device
    raw = torch.zeros(len(names) if by_layer else 1, len(states), device=device)
    beta = torch.ones((), device=device)
    optimizer = torch.optim.AdamW(
        [raw.requires_grad_(), beta.requires_grad_()], lr=checks.positive(lr, "lr"), weight_decay=0
    )

    def mixed() -> dict[str, Tensor]:
        alpha = raw.softmax(1).expand(len(names), -1)
        return {
            name: torch.tensordot(a.to(stacked[name].dtype), stacked[name], 1)
            for name, a in zip(names, alpha, strict=True)
        }

    losses = []
    for _ in range(checks.count(epochs, "epochs")):
        shuffled = torch.randperm(len(x), generator=source).to(x.device)
        for rows in shuffled.split(checks.count(batch_size, "batch_size")):
            loss = F.cross_entropy(beta * functional_call(served, mixed(), (x[rows],)), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        alpha, own = raw.softmax(1), mixed()
    state = average(states, alpha.mean(0).tolist())  # for buffers
    holder = {id(p): name for name, p in served.named_parameters()}
    state |= {name: own[holder[id(p)]] for name, p in every}  # tied ones share a tensor
    return LearnedSoup(state, alpha, names, float(beta.detach()), tuple(losses))


# --- why it works


class Gap(NamedTuple):
    """Loss of the soup minus loss of the logit ensemble, and what explains it.

    Attributes:
        true: the difference itself.
        approx: its leading term.
        curvature: second derivative of the soup's loss along the way.
        variance: mean variance of the change of logits under the soup's own predictions.
        soup, ensemble: the two losses.
    """

    true: float
    approx: float
    curvature: float
    variance: float
    soup: float
    ensemble: float


@torch.no_grad()
def soup_gap(
    model: nn.Module,
    s0: State,
    s1: State,
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    alpha: float = 0.5,
    beta: float = 1.0,
    step: float | None = None,
) -> Gap:
    r"""Soup minus ensemble between two states, true and approximate.

    The error of the approximation is of third order in the distance of the states, and of fourth
    at $\alpha=1/2$, where the odd terms cancel.

    Args:
        model: smooth in its parameters, evaluated without dropout.
        s0: state at $\alpha=0$.
        s1: state at $\alpha=1$.
        x: inputs (n, ...).
        y: their classes.
        alpha: between 0 and 1.
        beta: factor of the logits.
        step: None takes the second derivative exactly. A number takes a central difference of that
            step: for networks with kinks, such as ReLU ones, whose
            derivative at a point does not see the kinks near it.

    Reference: Wortsman et al. (2022), arXiv 2203.05482, the comparison of soups and ensembles.
    """
    _same(s0, s1, "s1")
    a, b = checks.fraction(alpha, "alpha"), checks.positive(beta, "beta")
    checks.same_length(x=x, y=y)
    served = copy.deepcopy(model).eval().requires_grad_(False)

    ends = [(k, v.detach(), s1[k].detach()) for k, v in s0.items()]

    def logits(t: Tensor) -> Tensor:
        at = {k: torch.lerp(v, w, t.to(v.dtype)) if _averaged(v) else v for k, v, w in ends}
        out: Tensor = functional_call(served, at, (x,))
        return out

    def loss(t: Tensor) -> Tensor:
        return F.cross_entropy(b * logits(t), y)

    kind = next(v for v in s0.values() if _averaged(v))
    here = torch.tensor(a, dtype=kind.dtype, device=kind.device)
    soup, first, last = (logits(t) for t in (here, torch.zeros_like(here), torch.ones_like(here)))
    if step is None:
        along = here.clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention derives once
            slope = torch.autograd.grad(loss(along), along, create_graph=True)[0]
            curvature = float(torch.autograd.grad(slope, along)[0])
    else:
        h = checks.positive(step, "step")
        curvature = float((loss(here + h) - 2 * loss(here) + loss(here - h)) / h**2)
    change, p = last - first, (b * soup).softmax(-1)
    variance = float(((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean())
    values = [F.cross_entropy(b * f, y).item() for f in (soup, torch.lerp(first, last, here))]
    approx = a * (1 - a) / 2 * (-curvature + b**2 * variance)
    return Gap(values[0] - values[1], approx, curvature, variance, *values)


def angles(
    states: Sequence[State], start: State, *, names: Iterable[str] | None = None
) -> Float[Tensor, "k k"]:
    r"""Angles between the ways $\theta_i-\theta_0$ that the members went, in degrees.

    Args:
        states: state dicts of the members.
        start: where they began.
        names: entries that count; default all floating-point ones. Name the parameters to leave
            running statistics out.

    Raises:
        ValueError: a member has not moved.
    """
    for i, state in enumerate(states):
        _same(start, state, f"states[{i}]")
    names = [n for n, t in start.items() if _averaged(t)] if names is None else list(names)
    ways = torch.stack(
        [
            torch.cat([(s[n] - start[n]).detach().cpu().double().flatten() for n in names])
            for s in states
        ]
    )
    lengths = torch.linalg.vector_norm(ways, dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(f"states[{int(lengths.argmin())}]: is the start itself; it has no angle")
    ways = ways / lengths[:, None]
    # atan2 of |u - v| and |u + v| keeps small angles, which the cosine rounds away
    apart, along = (torch.linalg.vector_norm(ways[:, None] - s * ways, dim=2) for s in (1, -1))
    return torch.rad2deg(2 * torch.atan2(apart, along))


def triangle(objective: Objective, states: Sequence[State]) -> Plane:
    """The plane through three states, its origin at their uniform soup.

    Args:
        objective: whose parameters the states hold.
        states: exactly three.

    Returns:
        The plane, with the corners as ``coordinates`` (3, 2); the first one lies on the first axis.
    """
    if len(states) != 3:
        raise ValueError(f"states: expected three, got {len(states)}")
    corners = torch.stack([objective.flatten(dict(s)) for s in states]).cpu().double()
    ways = corners - (origin := corners.mean(0))
    d1 = ways[0] / torch.linalg.vector_norm(ways[0])
    rest = ways[1] - (ways[1] @ d1) * d1
    length = torch.linalg.vector_norm(rest)
    if not float(length) > 1e-9 * float(torch.linalg.vector_norm(ways[1])):
        raise ValueError("states: lie on a line (or do not differ); expected a triangle")
    d2 = rest / length
    coordinates = torch.stack([ways @ d1, ways @ d2], 1)
    spread, kind = coordinates.square().sum(0), objective.theta
    return Plane(
        origin.to(kind), d1.to(kind), d2.to(kind), coordinates.numpy(),
        (spread / spread.sum()).numpy(),
    )  # fmt: skip


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> Tensor:
    """Detached, and in float32 if half precision."""
    half = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.detach().float() if half else tensor.detach()


def _same(first: State, state: State, name: str) -> None:
    if first.keys() != state.keys():
        odd = sorted(first.keys() ^ state.keys())[0]
        raise ValueError(f"{name}: has other entries than the first state, such as {odd!r}")
    for key, tensor in first.items():
        if tensor.shape != state[key].shape:
            raise ValueError(
                f"{name}: {key!r} has shape {tuple(state[key].shape)}, expected "
                f"{tuple(tensor.shape)}; soups need one architecture"
            )


def _scored(score: Callable[[dict[str, Tensor]], float], state: dict[str, Tensor]) -> float:
    value = float(score(state))
    if math.isnan(value):
        raise ValueError("score: gave NaN; expected a number, higher is better")
    return value
