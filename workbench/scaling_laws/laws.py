"""The laws the papers use, by name; a law of your own is `from_function`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.implicit import kaplan_gradient, kaplan_loss
from workbench.scaling_laws.law import (
    Bound,
    BoundLaw,
    FunctionLaw,
    Inputs,
    Law,
    TermLaw,
    from_function,
)

__all__ = ["LAWS", "Bound", "FunctionLaw", "Inputs", "Law", "TermLaw", "from_function", "get"]


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

    def bind(self, inputs: Inputs, log_loss: Tensor) -> Bound:
        return _BoundKaplan(self, [inputs[name] for name in self.inputs], log_loss)


class _BoundKaplan(BoundLaw):
    def _log_loss(self, theta: Tensor, rows: Tensor) -> Tensor:
        columns, named = self._arguments(theta, rows)
        return kaplan_loss(*columns, **named).log()

    def _gradient(self, theta: Tensor, rows: Tensor) -> Tensor:
        columns, named = self._arguments(theta, rows)
        return kaplan_gradient(*columns, **named).mT


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
