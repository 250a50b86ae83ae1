r"""Loss of over-trained models from five cheap runs, and downstream error from the loss.

A model of $N$ parameters trained on $D$ tokens has the token multiplier $M = D/N$ and costs about
$C = 6ND = 6MN^2$ FLOP. If the two terms of Chinchilla's law have one exponent, $\alpha = \beta =
2\eta$, then

$$L(C, M) = E + (a M^\eta + b M^{-\eta})\, C^{-\eta}
          = E + 2\sqrt{ab}\,\cosh\!\big(\eta \ln (M/M_*)\big)\, C^{-\eta},
  \qquad M_* = (b/a)^{1/2\eta}.$$

Lines of constant $M$ are parallel in $\ln(L - E)$ against $\ln C$: over-training shifts a line and
does not bend it, so runs of small models say how large over-trained ones will do. $M_*$ is the
compute-optimal multiplier, the same at every scale. `LAWS["over_training"]` of the shared core is
the same law in $(N, M)$, with $A = a 6^{-\eta}$, $B = b 6^{-\eta}$ and $\alpha = 2\eta$.

The second law links the loss to the average top-1 error over downstream tasks,

$$\mathrm{Err}(L) = \epsilon - k e^{-\gamma L},$$

a power law in the perplexity $e^L$. Put together they give error from compute.

Reference: Gadre, Smyrnis, Shankar et al. (2024), "Language models scale reliably with over-training
and on downstream tasks", arXiv 2403.08540, equations 4 and 5.

*Not included*: training the paper's 104 models (their released losses and errors are read by
`experiments.overtraining_laws`), and the search for hyper-parameters before them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.law import Law
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.solve import best_of

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LossLaw:
    """Constants of $L(C, M)$; all positive, C in FLOP, loss in nats a token.

    Attributes:
        a: of the term that grows with M.
        b: of the term that falls with M.
        eta: exponent of compute.
        E: irreducible loss.
    """

    a: float
    b: float
    eta: float
    E: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            checks.positive(value, name)

    @property
    def best_multiplier(self) -> float:
        r"""Compute-optimal tokens per parameter, $M_* = (b/a)^{1/2\eta}$."""
        u = 0.5 / self.eta * (np.log(self.b) - np.log(self.a))
        return float(np.exp(np.clip(u, -700.0, 700.0)))


@dataclass(frozen=True)
class ErrorLaw:
    """Constants of $Err(L)$.

    Attributes:
        k: how much is to be learnt; 0 when the errors do not fall with the loss.
        gamma: exponent of the perplexity.
        eps: error of a model that knows nothing.
    """

    k: float
    gamma: float
    eps: float

    def __post_init__(self) -> None:
        checks.positive(self.k, "k", zero=True)
        checks.positive(self.gamma, "gamma")
        checks.positive(self.eps, "eps")


REDPAJAMA = LossLaw(a=212.2, b=366.7, eta=0.13645, E=1.8366)
"""Trained on RedPajama, loss on C4, over the five runs below."""

REDPAJAMA_RUNS: dict[str, list[float]] = {
    "N": [10_569_312, 78_914_048, 153_677_376, 411_616_256, 10_569_312],
    "M": [20, 20, 20, 20, 320],
    "loss": [5.38702, 3.89994, 3.53115, 3.14977, 4.57229],
}
"""The five runs the paper fits for RedPajama, from its released results."""

GAMMAS = (0.02, 20.0)  # below, the law is a straight line in the loss; above, a step
EXPONENTS = (0.01, 3.0)
LOGARITHMS = (-50.0, 100.0)  # of coefficients


# --- the two laws ---------------------------------------------------------------------------------


def compute(N: Any, M: Any) -> Array:
    """Training FLOP of ``N`` parameters with ``M`` tokens each, $C = 6MN^2$."""
    return 6.0 * _positive(M, "M") * _positive(N, "N") ** 2


def parameters(C: Any, M: Any) -> Array:
    r"""Parameters that ``C`` FLOP train with ``M`` tokens each, $N = \sqrt{C/6M}$."""
    return np.asarray(np.sqrt(_positive(C, "C") / (6.0 * _positive(M, "M"))))


def predict_loss(C: Any, M: Any, law: LossLaw) -> Array:
    r"""Loss at compute and token multiplier, $E + (aM^\eta + bM^{-\eta})C^{-\eta}$.

    Args:
        C: training FLOP; broadcasts with M.
        M: tokens per parameter.
        law: the constants.

    Raises:
        ValueError: a size is not positive.

    Reference: Gadre et al. (2024), arXiv 2403.08540, equation 4.
    """
    C, M = _positive(C, "C"), _positive(M, "M")
    return law.E + (law.a * M**law.eta + law.b * M**-law.eta) * C**-law.eta


def predict_error(loss: Any, law: ErrorLaw) -> Array:
    r"""Average top-1 error at a loss, $\epsilon - k e^{-\gamma L}$.

    Compose with `predict_loss` for the error at compute and token multiplier.

    Reference: Gadre et al. (2024), arXiv 2403.08540, equation 5.
    """
    return law.eps - law.k * np.exp(-law.gamma * _positive(loss, "loss"))


def over_training_cost(M: Any, law: LossLaw) -> Array:
    r"""Compute an over-trained model needs for the loss of a compute-optimal one, as a ratio.

    The reducible loss is larger by $\cosh(\eta\ln(M/M_*))$, which $C^{-\eta}$ makes up for at
    $\cosh^{1/\eta}$ times the compute: 1 at $M_*$, and the same for M times too many tokens and M
    times too few.
    """
    return np.cosh(law.eta * np.log(_positive(M, "M") / law.best_multiplier)) ** (1 / law.eta)


# --- fits -----------------------------------------------------------------------------------------


def fit_overtrain(N: Any, M: Any, loss: Any) -> LossLaw:
    """Fit the law to runs by least squares of the loss, from 128 starting points at once.

    Args:
        N: parameters, all of them counted, (n,) with n >= 4.
        M: tokens per parameter, (n,).
        loss: nats a token, (n,).

    Raises:
        ValueError: a value is not positive, the lengths differ, there are fewer than four different
            runs, or all have one size or one multiplier.

    Reference: Gadre et al. (2024), arXiv 2403.08540, equation 4, with the same objective.
    """
    N, M, loss = _columns(N=N, M=M, loss=loss)
    _varied(N, M)
    return fit_overtrain_each(N, M, loss, np.ones((1, len(N))))[0]


def fit_error(loss: Any, error: Any) -> ErrorLaw:
    """Fit error against loss by least squares; see `fit_error_each`.

    Args:
        loss: nats a token, (n,) with n >= 3 different values.
        error: average top-1 error of the same models, (n,).

    Raises:
        ValueError: a value is not positive, the lengths differ, or losses are too few.

    Reference: Gadre et al. (2024), arXiv 2403.08540, equation 5.
    """
    loss, error = _columns(loss=loss, error=error)
    if len(np.unique(loss)) < 3:
        raise ValueError("loss: three parameters need three different losses at least")
    return fit_error_each(loss, error, np.ones((1, len(loss))))[0]


def fit_error_each(
    loss: Float[Array, " n"], error: Float[Array, " n"], subsets: Float[Array, "Q n"]
) -> list[ErrorLaw]:
    r"""The error law on several subsets of the same models.

    For a given $\gamma$ the law is a straight line in $e^{-\gamma L}$, so its best $\epsilon$ and
    $k \ge 0$ are known; what is left is one search in $\gamma$, on a grid that narrows around its
    best point. Nothing depends on starting values.

    Args:
        loss: nats a token.
        error: average top-1 error.
        subsets: weights of the models, 0 for those left out.
    """
    weights = np.asarray(subsets, float)[:, None, :]
    weights = weights / weights.sum(-1, keepdims=True)
    middle = float(np.mean(loss))  # e^(-gamma (L - middle)) stays within range
    low, high = (np.full(len(weights), np.log(end)) for end in GAMMAS)
    mean = weights @ error
    for _ in range(12):
        u = np.linspace(low, high, 41, axis=1)
        basis = np.exp(-np.exp(u)[..., None] * (loss - middle))
        centre = (weights * basis).sum(-1)
        spread = (weights * basis**2).sum(-1) - centre**2
        slope = (weights * basis * error).sum(-1) - centre * mean
        k = np.maximum(-slope / np.maximum(spread, 1e-300), 0.0)
        eps = mean + k * centre
        risk = (weights * (eps[..., None] - k[..., None] * basis - error) ** 2).sum(-1)
        best = np.arange(len(u)), risk.argmin(1)
        step = u[:, 1] - u[:, 0]
        low, high = (np.clip(u[best] + d * step, *np.log(GAMMAS)) for d in (-1, 1))
    gamma = np.exp(u[best])
    k, eps = k[best] * np.exp(gamma * middle), eps[best]
    return [ErrorLaw(*map(float, row)) for row in zip(k, gamma, eps, strict=True)]


def fit_overtrain_each(
    N: Float[Array, " n"], M: Float[Array, " n"], loss: Float[Array, " n"], subsets: Any
) -> list[LossLaw]:
    """The law on several subsets of the same runs, all subsets and starts in one batch.

    Args:
        N: parameters.
        M: tokens per parameter.
        loss: nats a token.
        subsets: (Q, n), weights of the runs, 0 or false for those left out.
    """
    law = LAWS["over_training"]
    inputs = {"N": torch.tensor(N), "M": torch.tensor(M)}
    weights = torch.tensor(np.asarray(subsets, float))
    lower, upper = box(law)
    found = best_of(
        law, inputs, torch.tensor(loss), law.grid(), weights=weights, objective="lsq",
        lower=lower, upper=upper,
    )  # fmt: skip
    return [as_loss_law(theta) for theta in found.theta]


def box(law: Law) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Bounds of a fit: exponents from 0.01 to 3, so that the law falls with size."""
    ends = [LOGARITHMS if log else EXPONENTS for log in law.logs]
    lower, upper = torch.tensor(ends, dtype=torch.float64).T
    return lower, upper


def as_loss_law(theta: Float[Tensor, " 4"]) -> LossLaw:
    r"""The paper's constants from the core's: $\eta = \alpha/2$, $a = A 6^\eta$, $b = B 6^\eta$."""
    A, B, E, alpha = LAWS["over_training"].natural(theta).tolist()
    return LossLaw(a=A * 6 ** (alpha / 2), b=B * 6 ** (alpha / 2), eta=alpha / 2, E=E)


def leave_one_out(N: Any, M: Any, loss: Any) -> dict[int, LossLaw]:
    """The law fitted without one run, by that run's position, for each run that can be spared.

    A run without which the rest have only one size or one multiplier cannot: nothing tells ``a``
    from ``b`` then. Of the paper's five runs that is the only over-trained one.

    Raises:
        ValueError: as `fit_overtrain`, or there are fewer than five runs.
    """
    N, M, loss = _columns(N=N, M=M, loss=loss)
    _varied(N, M)
    if len(N) < 5:
        raise ValueError(f"N: leaving one out needs five runs at least, got {len(N)}")
    left = {i: np.arange(len(N)) != i for i in range(len(N))}
    left = {i: kept for i, kept in left.items() if _lacking(N[kept], M[kept]) is None}
    laws = fit_overtrain_each(N, M, loss, np.stack(list(left.values())))
    return dict(zip(left, laws, strict=True))


def _positive(values: Any, name: str) -> Array:
    array = np.asarray(values, float)
    if not (array > 0).all():
        raise ValueError(f"{name}: expected numbers above zero")
    return array


def _columns(**named: Any) -> list[Array]:
    columns = {k: _positive(checks.as_floats(v, k, ndim=1), k) for k, v in named.items()}
    checks.same_length(**columns)
    return list(columns.values())


def _lacking(N: Array, M: Array) -> str | None:
    """Why these runs leave the law undetermined, or None."""
    if len(np.unique(np.stack([N, M], 1), axis=0)) < 4:
        return "N and M: four parameters need four different runs at least"
    if len(np.unique(N)) < 2:
        return "N: all runs have one size; add one of another"
    if len(np.unique(M)) < 2:
        return "M: all runs have one multiplier; add one over-trained run"
    return None


def _varied(N: Array, M: Array) -> None:
    if lacking := _lacking(N, M):
        raise ValueError(lacking)
