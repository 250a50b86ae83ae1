"""The laws: what a formula must offer to be fitted in batches, and the ones the papers use.

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
from typing import NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.implicit import kaplan_gradient, kaplan_loss

Inputs: TypeAlias = Mapping[str, Tensor]  # (n,) for all problems, or (P, n)
Curvature: TypeAlias = Callable[[Tensor], Tensor]  # weights (P, n) -> sum_i w_i Hessian_i (P, p, p)


class Expansion(NamedTuple):
    """ln L near ``theta``: its Hessian in row i is ``second_i - gram J_i J_i^T``."""

    ell: Tensor  # (P, n)
    gradient: Tensor  # J, (P, p, n)
    second: Curvature  # weights (P, n) -> sum_i weights_i second_i, (P, p, p)
    gram: float


class Bound(Protocol):
    """A law tied to its inputs; ``rows`` picks problems where inputs differ between them."""

    def log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Predicted ln L, (P, n), for parameters (P, p)."""

    def expand(self, theta: Tensor, rows: Tensor) -> Expansion:
        """Value, gradient and curvature of ln L."""


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

    def bind(self, inputs: Inputs) -> Bound:
        """This law at given inputs."""
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
        out = self.bind(inputs).log_loss(many, rows).exp()
        return out if theta.ndim == 2 else out[0]


# --- sums of power-law terms --------------------------------------------------------------------


@dataclass(frozen=True)
class TermLaw(Law):
    """ln L = logsumexp_k(F_k . theta), with ``features(inputs)`` -> F of shape (..., K, n, p)."""

    features: Callable[..., Tensor] = field(kw_only=True)

    def bind(self, inputs: Inputs) -> Bound:
        """This law at given inputs."""
        return _BoundTerms(self.features(*(inputs[name] for name in self.inputs)))


class _BoundTerms:
    """Terms share inputs: products with the features are plain matrix products."""

    def __init__(self, features: Tensor) -> None:
        *_, self.k, self.n, self.p = features.shape
        self.shared = features.ndim == 3
        self.features = features
        self.flat = features.reshape(*features.shape[:-3], self.k * self.n, self.p)
        self.outer = (self.flat[..., :, None] * self.flat[..., None, :]).flatten(-2)
        present = (features != 0).flatten(0, -4).any(0).any(1) if features.ndim > 3 else None
        present = (features != 0).any(1) if present is None else present
        self.pairs = present.nonzero().tolist()  # (term, parameter) that occur together

    def _terms(self, theta: Tensor, rows: Tensor) -> Tensor:
        if self.shared:
            return (theta @ self.flat.T).view(-1, self.k, self.n)
        return torch.einsum("pmq,pq->pm", self.flat[rows], theta).view(-1, self.k, self.n)

    def log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        return self._terms(theta, rows).logsumexp(1)

    def expand(self, theta: Tensor, rows: Tensor) -> Expansion:
        share = self._terms(theta, rows)
        largest = share.amax(1)
        total = share.sub_(largest[:, None]).exp_().sum(1)
        ell = largest + total.log()
        share /= total[:, None]
        features = self.features if self.shared else self.features[rows]
        gradient = theta.new_zeros(len(theta), self.p, self.n)
        for k, j in self.pairs:
            gradient[:, j].addcmul_(share[:, k], features[..., k, :, j])

        def second(weights: Tensor) -> Tensor:
            weighted = (share * weights[:, None]).flatten(1)
            if self.shared:
                total = weighted @ self.outer
            else:
                total = torch.einsum("pm,pmq->pq", weighted, self.outer[rows])
            return total.view(-1, self.p, self.p)

        return Expansion(ell, gradient, second, 1.0)


# --- any function -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionLaw(Law):
    """L = function(*inputs, **natural parameters), differentiated by torch.func."""

    function: Callable[..., Tensor] = field(kw_only=True)

    def bind(self, inputs: Inputs) -> Bound:
        """This law at given inputs."""
        return _BoundFunction(self, [inputs[name] for name in self.inputs])


class _BoundFunction:
    def __init__(self, law: FunctionLaw, inputs: list[Tensor]) -> None:
        self.law, self.inputs = law, inputs

    def log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        natural = self.law.natural(theta)
        named = {q: natural[:, j, None] for j, q in enumerate(self.law.parameters)}
        columns = [x if x.ndim == 1 else x[rows] for x in self.inputs]
        value = self.law.function(*columns, **named)
        return value.expand(len(theta), columns[0].shape[-1]).log()

    def expand(self, theta: Tensor, rows: Tensor) -> Expansion:
        def f(t: Tensor) -> Tensor:
            return self.log_loss(t, rows)

        basis = [torch.zeros_like(theta) for _ in range(self.law.p)]
        for j, direction in enumerate(basis):
            direction[:, j] = 1.0
        pairs = [torch.func.jvp(f, (theta,), (direction,))[:2] for direction in basis]

        def second(weights: Tensor) -> Tensor:
            total = torch.func.grad(lambda t: (f(t) * weights).sum())
            return torch.stack([torch.func.jvp(total, (theta,), (b,))[1] for b in basis], -1)

        gradient = torch.stack([tangent for _, tangent in pairs], 1)
        return Expansion(pairs[0][0], gradient, second, 0.0)


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


# --- the laws of the papers ---------------------------------------------------------------------


def _features(*terms: Mapping[int, Tensor | float], like: Tensor, p: int) -> Tensor:
    """F from, for each term, the coefficient of each parameter that occurs in it."""
    out = like.new_zeros(*like.shape[:-1], len(terms), like.shape[-1], p)
    for k, term in enumerate(terms):
        for j, value in term.items():
            out[..., k, :, j] = value
    return out


def _chinchilla(N: Tensor, D: Tensor) -> Tensor:
    return _features({0: 1.0, 3: -N.log()}, {1: 1.0, 4: -D.log()}, {2: 1.0}, like=N + D, p=5)


def _over_training(N: Tensor, M: Tensor) -> Tensor:
    return _features({0: 1.0, 3: -N.log()}, {1: 1.0, 3: -(M * N).log()}, {2: 1.0}, like=N + M, p=4)


def _nmt(Ne: Tensor, Nd: Tensor) -> Tensor:
    return _features({0: 1.0, 2: -Ne.log(), 3: -Nd.log()}, {1: 1.0}, like=Ne + Nd, p=4)


def _power(x: Tensor) -> Tensor:
    return _features({0: 1.0, 2: -x.log()}, {1: 1.0}, like=x, p=3)


def _data_constrained(
    N: Tensor,
    D: Tensor,
    U: Tensor,
    *,
    A: Tensor,
    B: Tensor,
    E: Tensor,
    alpha: Tensor,
    beta: Tensor,
    R_N: Tensor,
    R_D: Tensor,
) -> Tensor:
    """Repeated tokens and excess parameters decay in worth; without either it is Chinchilla."""
    unique = torch.minimum(U, D)
    # Parameters that are compute-optimal for so many unique tokens.
    enough = ((alpha * A / (beta * B)) * unique**beta) ** (1 / alpha)
    base = torch.minimum(N, enough)
    tokens = unique * (1 + R_D * -torch.expm1(-(D / unique - 1) / R_D))
    size = base * (1 + R_N * -torch.expm1(-(N / base - 1) / R_N))
    return E + A * size**-alpha + B * tokens**-beta


@dataclass(frozen=True)
class _KaplanLaw(Law):
    """The implicit law of loss, steps and batch; derivatives by the implicit function theorem."""

    def bind(self, inputs: Inputs) -> Bound:
        return _BoundKaplan(self, [inputs[name] for name in self.inputs])


class _BoundKaplan:
    def __init__(self, law: Law, inputs: list[Tensor]) -> None:
        self.law, self.inputs = law, inputs

    def _arguments(self, theta: Tensor, rows: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        natural = self.law.natural(theta)
        columns = [x if x.ndim == 1 else x[rows] for x in self.inputs]
        return columns, {q: natural[:, j, None] for j, q in enumerate(self.law.parameters)}

    def log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        columns, named = self._arguments(theta, rows)
        return kaplan_loss(*columns, **named).log()

    def expand(self, theta: Tensor, rows: Tensor) -> Expansion:
        columns, named = self._arguments(theta, rows)
        ell = kaplan_loss(*columns, **named).log()
        gradient = kaplan_gradient(*columns, **named).mT

        def second(weights: Tensor) -> Tensor:  # Gauss-Newton: the law's own is left out
            return theta.new_zeros(len(theta), self.law.p, self.law.p)

        return Expansion(ell, gradient, second, 0.0)


def _logs(*values: float) -> tuple[float, ...]:
    return tuple(math.log(v) for v in values)


_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
_COEFFICIENTS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)  # already logarithms
_FLOORS = (-1.0, -0.5, 0.0, 0.5, 1.0)

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        TermLaw(
            "chinchilla",
            ("N", "D"),
            ("A", "B", "E", "alpha", "beta"),
            (True, True, True, False, False),
            {
                "A": _COEFFICIENTS,
                "B": _COEFFICIENTS,
                "E": _FLOORS,
                "alpha": _EXPONENTS,
                "beta": _EXPONENTS,
            },
            r"L(N, D) = E + A N^{-\alpha} + B D^{-\beta}",
            ("N", "D"),
            features=_chinchilla,
        ),
        TermLaw(
            "over_training",
            ("N", "M"),
            ("A", "B", "E", "alpha"),
            (True, True, True, False),
            {
                "A": _logs(100, 300, 1000, 3000),
                "B": _logs(100, 300, 1000, 3000),
                "E": _logs(0.1, 1, 2, 10),
                "alpha": (0.1, 0.3),
            },
            r"L(N, M) = E + A N^{-\alpha} + B (M N)^{-\alpha}",
            ("N",),
            features=_over_training,
        ),
        TermLaw(
            "nmt",
            ("Ne", "Nd"),
            ("A", "E", "p_e", "p_d"),
            (True, True, False, False),
            {
                "A": (-2.0, 0.0, 2.0, 5.0, 10.0),
                "E": _FLOORS,
                "p_e": (0.05, 0.2, 0.5, 1.0),
                "p_d": (0.05, 0.2, 0.5, 1.0),
            },
            r"L(N_e, N_d) = E + A N_e^{-p_e} N_d^{-p_d}",
            ("Ne", "Nd"),
            features=_nmt,
        ),
        TermLaw(
            "power",
            ("x",),
            ("A", "E", "alpha"),
            (True, True, False),
            {
                "A": (-2.0, 0.0, 2.0, 5.0, 10.0, 20.0),
                "E": (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0),
                "alpha": (0.05, 0.1, 0.3, 0.5, 1.0, 2.0),
            },
            r"L(x) = E + A x^{-\alpha}",
            ("x",),
            features=_power,
        ),
        _KaplanLaw(
            "kaplan",
            ("N", "S", "B"),
            ("N_c", "a_N", "S_c", "a_S", "B_star", "a_B"),
            (True, False, True, False, True, False),
            {
                "N_c": _logs(1e4, 1e8, 1e14),
                "a_N": (0.05, 0.1, 0.3),
                "S_c": _logs(10, 1e3),
                "a_S": (0.4, 0.8),
                "B_star": _logs(1e3, 1e5, 1e8),
                "a_B": (0.2, 0.5),
            },
            r"L = (N_c / N)^{\alpha_N} + (S_c / S_{\min})^{\alpha_S},\quad "
            r"S_{\min} = S / (1 + B_* L^{-1 / \alpha_B} / B)",
            ("N", "S", "B"),
        ),
        FunctionLaw(
            "data_constrained",
            ("N", "D", "U"),
            ("A", "B", "E", "alpha", "beta", "R_N", "R_D"),
            (True, True, True, False, False, True, True),
            {
                "A": _logs(100, 1000),
                "B": _logs(100, 1000),
                "E": _logs(0.5, 2),
                "alpha": (0.3, 0.5),
                "beta": (0.3, 0.5),
                "R_N": _logs(1, 10),
                "R_D": _logs(1, 10),
            },
            r"L(N, D, U) = E + A \hat{N}^{-\alpha} + B \hat{D}^{-\beta},\quad "
            r"\hat{D} = U + U R_D (1 - e^{-(D / U - 1) / R_D})",
            ("N", "D", "U"),
            function=_data_constrained,
        ),
    )
}


def get(law: str | Law) -> Law:
    """A law by its name, or the law itself.

    Raises:
        ValueError: there is no law of that name.
    """
    if isinstance(law, Law):
        return law
    return LAWS[checks.one_of(law, LAWS, "law")]
