"""What a formula must offer to be fitted in batches.

Most laws of the field are sums of power-law terms, so their logarithm is a log-sum-exp of
expressions linear in the parameters, ``ln L = ln sum_k exp(F_k . theta)``: value, gradient and
curvature follow from the weights ``softmax_k(F_k . theta)`` (`TermLaw`). Any other law is one
function of columns and parameters (`FunctionLaw`), differentiated by `torch.func`.

Parameters are kept in the coordinates the solver works in (``theta``): logarithms for those that
must be positive, in the order of ``Law.parameters``. `Law.natural` gives them as papers print them.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks

Inputs: TypeAlias = Mapping[str, Tensor]  # (n,) for all problems, or (P, n)


class Bound(Protocol):
    """A law tied to its inputs and to observed losses.

    ``rows`` says which problems the rows of ``theta`` are, where inputs or losses differ between
    problems. A residual is ``r = ln L_hat - ln L``.
    """

    def evaluate(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (P, n), and what `normal` needs to know again, (m, P, n)."""

    def normal(
        self, theta: Tensor, memo: Tensor, rows: Tensor, slope: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``sum_i slope_i J_i`` (P, p) and ``sum_i weight_i J_i J_i^T + slope_i Hessian_i``.

        J is the gradient and Hessian the second derivative of r; slope and weight are (P, n).
        """

    def gram(self, theta: Tensor, memo: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """``sum_i weight_i J_i J_i^T``, (P, p, p)."""


@dataclass(frozen=True)
class Law:
    """A scaling law L(inputs; theta); subclasses say how it is computed.

    Attributes:
        name: how `fit_law` knows it.
        inputs: the columns it reads, by their names in the formula.
        parameters: names of its natural parameters, in the order of ``theta``.
        logs: for each, whether ``theta`` holds its logarithm.
        starts: for each, values of ``theta`` whose product is the grid of starting points.
        tex: the formula.
        sizes: inputs that set the loss by growing (the rest, such as a token multiplier, may be
            anything positive).
    """

    name: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    logs: tuple[bool, ...]
    starts: Mapping[str, tuple[float, ...]]
    tex: str
    sizes: tuple[str, ...] = ()

    @property
    def p(self) -> int:
        """Number of parameters."""
        return len(self.parameters)

    def bind(self, inputs: Inputs, log_loss: Tensor) -> Bound:
        """This law at given inputs, beside observed ln L, (n,) or (P, n)."""
        raise TypeError(f"{type(self).__name__}: a law needs a way to bind its inputs")

    def grid(self) -> Float[Tensor, "m p"]:
        """All starting points."""
        values = (self.starts[name] for name in self.parameters)
        return torch.tensor(list(itertools.product(*values)), dtype=torch.float64)

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n p"]:
        """``n`` starting points drawn uniformly from the grid's box."""
        low = torch.tensor([min(self.starts[q]) for q in self.parameters], dtype=torch.float64)
        high = torch.tensor([max(self.starts[q]) for q in self.parameters], dtype=torch.float64)
        share = torch.rand(n, self.p, dtype=torch.float64, generator=generator)
        return low + share * (high - low)

    def natural(self, theta: Float[Tensor, "... p"]) -> Float[Tensor, "... p"]:
        """Parameters as papers print them."""
        mask = torch.tensor(self.logs, device=theta.device)
        return torch.where(mask, theta.exp(), theta)

    def internal(self, params: Mapping[str, float]) -> Float[Tensor, " p"]:
        """``theta`` for natural parameters; the inverse of ``natural``.

        Raises:
            ValueError: a parameter is missing, unknown, or not positive where it must be.
        """
        if set(params) != set(self.parameters):
            raise ValueError(
                f"params: {self.name} has {', '.join(self.parameters)}; got {', '.join(params)}"
            )
        for name, log in zip(self.parameters, self.logs, strict=True):
            checks.positive(params[name], name) if log else checks.number(params[name], name)
        values = [
            math.log(params[q]) if log else float(params[q])
            for q, log in zip(self.parameters, self.logs, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    def loss(self, theta: Float[Tensor, "*P p"], **inputs: Tensor) -> Tensor:
        """Predicted loss: (n,) for one ``theta``, (P, n) for several."""
        many = theta if theta.ndim == 2 else theta[None]
        rows = torch.arange(len(many), device=many.device)
        zero = many.new_zeros(torch.broadcast_shapes(*(x.shape for x in inputs.values()))[-1])
        out = self.bind(inputs, zero).evaluate(many, rows)[0].exp()
        return out if theta.ndim == 2 else out[0]


# --- sums of power-law terms --------------------------------------------------------------------


@dataclass(frozen=True)
class TermLaw(Law):
    """ln L = ln sum_k exp(F_k . theta), with ``features(inputs)`` -> F of shape (..., K, n, p)."""

    features: Callable[..., Tensor] = field(kw_only=True)

    def bind(self, inputs: Inputs, log_loss: Tensor) -> Bound:
        """This law at given inputs."""
        return _BoundTerms(self.features(*(inputs[name] for name in self.inputs)), log_loss)


class _BoundTerms:
    """Terms contribute by their shares of L_hat; each holds few of the parameters.

    With share s_k of term k, J = sum_k s_k F_k and Hessian = sum_k s_k F_k F_k^T - J J^T. The sums
    over rows are products of (P, n) shares with (n, few) features, made once, for each term and
    each pair of terms: less work than forming J.
    """

    def __init__(self, features: Tensor, log_loss: Tensor) -> None:
        self.k, self.n, self.p = features.shape[-3:]
        self.offset = log_loss
        self.by_term = features.movedim(-3, 0)  # (K, n, p) or (K, P, n, p)
        self.shared = features.ndim == 3
        there = (features != 0).any(-2).reshape(-1, self.k, self.p).any(0)
        members = [row.nonzero()[:, 0] for row in there]
        terms = [self.by_term[k][..., j] for k, j in enumerate(members)]
        self.first = self._stack(terms)
        self.into_gradient = self._assembly([[j] for j in members], self.p)
        self.pairs = [(k, m) for k in range(self.k) for m in range(k, self.k)]
        products = [
            (terms[k][..., :, None] * terms[m][..., None, :]).flatten(-2) for k, m in self.pairs
        ]
        self.second = self._stack(products)
        both = [(members[k], members[m]) for k, m in self.pairs]
        there_and_back = [
            [(i[:, None] * self.p + j).flatten(), (j[None] * self.p + i[:, None]).flatten()]
            if k != m
            else [(i[:, None] * self.p + j).flatten()]
            for (k, m), (i, j) in zip(self.pairs, both, strict=True)
        ]
        self.into_matrix = self._assembly(there_and_back, self.p * self.p)
        self.own = [self.pairs.index((k, k)) for k in range(self.k)]

    @staticmethod
    def _stack(blocks: list[Tensor]) -> Tensor:
        """Blocks (..., n, few), filled up with zeros to one width: (Q, ..., n, width)."""
        width = max(block.shape[-1] for block in blocks)
        return torch.stack([F.pad(block, (0, width - block.shape[-1])) for block in blocks])

    def _assembly(self, places: list[list[Tensor]], size: int) -> Tensor:
        """(Q width, size) counts: where each entry of each block goes."""
        width = max(len(lists[0]) for lists in places)
        out = self.offset.new_zeros(len(places), width, size)
        for q, lists in enumerate(places):
            for target in lists:
                out[q, torch.arange(len(target)), target] += 1.0
        return out.flatten(0, 1)

    def _gather(self, values: Tensor, features: Tensor, into: Tensor, rows: Tensor) -> Tensor:
        """Sums over rows of values (Q, P, n) times features, put in their places: (P, size)."""
        if self.shared:
            blocks = values @ features
        else:
            blocks = (values[:, :, None] @ features[:, rows])[:, :, 0]
        return blocks.movedim(0, 1).flatten(1) @ into

    def evaluate(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared:
            share = theta @ self.by_term.mT
        else:
            share = (self.by_term[:, rows] @ theta[:, :, None])[..., 0]
        share -= self.offset if self.offset.ndim == 1 else self.offset[rows]
        share.exp_()
        total = share.sum(0)
        share /= total
        return total.log_(), share

    def normal(
        self, theta: Tensor, memo: Tensor, rows: Tensor, slope: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        pull = memo * slope
        products = self._products(memo, weight - slope)
        for k, q in enumerate(self.own):
            products[q] += pull[k]
        gradient = self._gather(pull, self.first, self.into_gradient, rows)
        hessian = self._gather(products, self.second, self.into_matrix, rows)
        return gradient, hessian.view(-1, self.p, self.p)

    def gram(self, theta: Tensor, memo: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        products = self._products(memo, weight)
        matrix = self._gather(products, self.second, self.into_matrix, rows)
        return matrix.view(-1, self.p, self.p)

    def _products(self, memo: Tensor, weight: Tensor) -> Tensor:
        weighted = memo * weight
        out = memo.new_empty(len(self.pairs), *weight.shape)
        for q, (k, m) in enumerate(self.pairs):
            torch.mul(weighted[k], memo[m], out=out[q])
        return out


# --- any function -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionLaw(Law):
    """L = function(*inputs, **natural parameters), differentiated by torch.func."""

    function: Callable[..., Tensor] = field(kw_only=True)

    def bind(self, inputs: Inputs, log_loss: Tensor) -> Bound:
        """This law at given inputs."""
        return _BoundFunction(self, [inputs[name] for name in self.inputs], log_loss)


class BoundLaw:
    """What laws that are no sum of terms share: gradients are computed anew where needed."""

    def __init__(self, law: Law, inputs: list[Tensor], log_loss: Tensor) -> None:
        self.law, self.inputs, self.offset = law, inputs, log_loss

    def _arguments(self, theta: Tensor, rows: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        natural = self.law.natural(theta)
        columns = [x if x.ndim == 1 else x[rows] for x in self.inputs]
        return columns, {q: natural[:, j, None] for j, q in enumerate(self.law.parameters)}

    def _log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__}: needs a way to compute ln L")

    def _gradient(self, theta: Tensor, rows: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__}: needs a gradient (P, p, n)")

    def evaluate(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals; nothing is kept."""
        observed = self.offset if self.offset.ndim == 1 else self.offset[rows]
        ell = self._log_loss(theta, rows).expand(len(theta), observed.shape[-1])
        return ell - observed, ell.new_zeros(0, *ell.shape)

    def normal(
        self, theta: Tensor, memo: Tensor, rows: Tensor, slope: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over rows of gradients, and of their products with the curvature."""
        gradient = self._gradient(theta, rows)
        gram = (gradient * weight[:, None]) @ gradient.mT
        return (gradient @ slope[..., None])[..., 0], gram + self._curvature(theta, rows, slope)

    def _curvature(self, theta: Tensor, rows: Tensor, slope: Tensor) -> Tensor:
        """``sum_i slope_i Hessian_i``; zero is Gauss and Newton's approximation."""
        return theta.new_zeros(len(theta), self.law.p, self.law.p)

    def gram(self, theta: Tensor, memo: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum over rows of products of gradients."""
        gradient = self._gradient(theta, rows)
        return (gradient * weight[:, None]) @ gradient.mT


class _BoundFunction(BoundLaw):
    law: FunctionLaw

    def _log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        columns, named = self._arguments(theta, rows)
        value = self.law.function(*columns, **named)
        return value.expand(len(theta), columns[0].shape[-1]).log()

    def _basis(self, theta: Tensor) -> list[Tensor]:
        eye = torch.eye(self.law.p).to(theta)
        return [row.expand(len(theta), -1) for row in eye]

    def _gradient(self, theta: Tensor, rows: Tensor) -> Tensor:
        def f(t: Tensor) -> Tensor:
            return self._log_loss(t, rows)

        return torch.stack([torch.func.jvp(f, (theta,), (b,))[1] for b in self._basis(theta)], 1)

    def _curvature(self, theta: Tensor, rows: Tensor, slope: Tensor) -> Tensor:
        total = torch.func.grad(lambda t: (self._log_loss(t, rows) * slope).sum())
        return torch.stack(
            [torch.func.jvp(total, (theta,), (b,))[1] for b in self._basis(theta)], -1
        )


def from_function(
    function: Callable[..., Tensor],
    starts: Mapping[str, float | Sequence[float]],
    *,
    name: str | None = None,
    tex: str = "",
) -> FunctionLaw:
    r"""A law of your own: ``def law(N, D, *, E, A, alpha): return E + A * N**-alpha``.

    Args:
        function: of tensors. Its positional parameters name the columns it reads, its keyword-only
            ones the law's parameters; written with torch operations, so that it broadcasts and can
            be differentiated.
        starts: natural starting values of each parameter, one or several; their product is the
            grid. A parameter whose starting values are all positive is kept positive.
        name: defaults to the function's.
        tex: formula for `LawFit.latex`.

    Raises:
        ValueError: the function has no columns or no parameters, or ``starts`` does not name
            exactly its parameters.
    """
    signature = inspect.signature(function).parameters.values()
    columns = tuple(q.name for q in signature if q.kind is not q.KEYWORD_ONLY)
    parameters = tuple(q.name for q in signature if q.kind is q.KEYWORD_ONLY)
    if not columns or not parameters:
        raise ValueError("law: expected a function like f(N, D, *, E, A, alpha): columns, then '*'")
    if set(starts) != set(parameters):
        raise ValueError(
            f"starts: expected values for {', '.join(parameters)}, "
            f"got {', '.join(starts) or 'none'}"
        )
    values = {}
    for q in parameters:
        given = starts[q]
        several = [float(given)] if isinstance(given, int | float) else [float(v) for v in given]
        values[q] = several
        if not several or not all(map(math.isfinite, several)):
            raise ValueError(f"starts: {q} needs at least one finite value, got {given!r}")
    logs = tuple(all(v > 0 for v in values[q]) for q in parameters)
    internal = {
        q: tuple(math.log(v) if log else v for v in values[q])
        for q, log in zip(parameters, logs, strict=True)
    }
    label = name or str(getattr(function, "__name__", "law"))
    return FunctionLaw(
        label, columns, parameters, logs, internal, tex, sizes=columns, function=function
    )
