r"""The law of loss, size, steps and batch in which the loss stands on both sides.

$$L = \Big(\frac{N_c}{N}\Big)^{\alpha_N}
  + \Big(\frac{S_c}{S}\Big)^{\alpha_S}\Big(1 + \frac{B_*}{B}\,L^{-1/\alpha_B}\Big)^{\alpha_S}$$

With $u = \ln L$ it reads $g(u) = u - R(u) = 0$, where

$$R(u) = \mathrm{logaddexp}\big(\alpha_N \ln\tfrac{N_c}{N},\;
  \alpha_S[\ln\tfrac{S_c}{S} + \mathrm{softplus}(\ln\tfrac{B_*}{B} - u/\alpha_B)]\big)$$

is convex and falls in $u$ for positive exponents. So $g$ is concave and rises at least as steeply
as $u$: there is one root, and Newton's steps from any point below climb to it without passing it.
The loss at an infinite batch, $R(\infty)$, is such a point. No bracket is needed, and derivatives
follow from the implicit function theorem, $du/d\theta = (\partial R/\partial\theta) / g'(u)$.

Reference: Kaplan et al. (2020), arXiv 2001.08361, the law of loss, size and steps with its critical
batch size; put together in Su, Tian, Shen and Cai (2024), arXiv 2403.06563.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_STEPS = 60  # about 10 are needed over exponents from 0.03 to 3
_TOLERANCE = 1e-14

Value = Tensor | float


def kaplan_loss(
    N: Value,
    S: Value,
    B: Value,
    *,
    N_c: Value,
    a_N: Value,
    S_c: Value,
    a_S: Value,
    B_star: Value,
    a_B: Value,
) -> Tensor:
    r"""Loss after ``S`` steps at batch size ``B`` of a model with ``N`` parameters, in float64.

    Everything broadcasts, so that many laws can be evaluated at many points at once.

    Args:
        N: parameters without embeddings; inf for a model without limit.
        S: steps; inf for the end of training.
        B: tokens a step; inf where noise in the gradient no longer counts.
        N_c, a_N: the first term, parameters at which it is one and its exponent.
        S_c, a_S: the second term, steps at which it is one and its exponent.
        B_star, a_B: critical batch size $B_* L^{-1/\alpha_B}$, in the unit of ``B``.

    Returns:
        The only root, differentiable once in every argument; NaN where ``a_S`` or ``a_B`` is not
        positive (the root need not be one) or a size is not.

    Reference: Kaplan et al. (2020), arXiv 2001.08361, L(N, S_min) with S_min at batch size B.
    """
    arguments = _double(N, S, B, N_c, a_N, S_c, a_S, B_star, a_B)
    with torch.no_grad():
        u = _root(*arguments)
        right, _, _, slope, _ = _parts(u, *arguments)
        at_root = u - (u - right) / slope
    # A last step of Newton with a fixed slope: it moves nothing and carries the derivative.
    right = _parts(at_root, *arguments)[0]
    return (at_root + (right - at_root) / slope).exp()


def kaplan_gradient(
    N: Value,
    S: Value,
    B: Value,
    *,
    N_c: Value,
    a_N: Value,
    S_c: Value,
    a_S: Value,
    B_star: Value,
    a_B: Value,
) -> Tensor:
    r"""Derivative of ln L in (ln N_c, a_N, ln S_c, a_S, ln B_star, a_B), on a last axis of six.

    With the shares $w$ of the second term in $L$ and $v$ of the critical batch in $1 + B_{crit}/B$,
    $g' = 1 + w v \alpha_S / \alpha_B$ and for instance
    $\partial R / \partial\alpha_B = w v \alpha_S u / \alpha_B^2$.

    Args: as for `kaplan_loss`.

    Returns:
        Shape (\*broadcast, 6).
    """
    arguments = _double(N, S, B, N_c, a_N, S_c, a_S, B_star, a_B)
    n, _, _, nc, an, _, as_, _, ab = arguments
    u = _root(*arguments)
    right, first, second, slope, v = _parts(u, *arguments)
    size, steps = (first - right).exp(), (second - right).exp()
    partials = (
        size * an,
        size * (nc.log() - n.log()),
        steps * as_,
        steps * (second / as_),
        steps * as_ * v,
        steps * as_ * v * u / ab.square(),
    )
    return torch.stack(torch.broadcast_tensors(*(q / slope for q in partials)), -1)


def _double(*values: Value) -> list[Tensor]:
    return [torch.as_tensor(v, dtype=torch.float64) for v in values]


def _parts(
    u: Tensor | float,
    n: Tensor,
    s: Tensor,
    b: Tensor,
    nc: Tensor,
    an: Tensor,
    sc: Tensor,
    as_: Tensor,
    bs: Tensor,
    ab: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """R, the logarithms of its two terms, g' and the share of the critical batch, at u."""
    noise = bs.log() - b.log() - u / ab
    first = an * (nc.log() - n.log())
    second = as_ * (sc.log() - s.log() + F.softplus(noise, threshold=40.0))
    right = torch.logaddexp(first, second)
    v = noise.sigmoid()
    slope = 1 + (second - right).exp() * v * as_ / ab
    return right, first, second, slope, v


def _root(*arguments: Tensor) -> Tensor:
    """ln L, from below."""
    *_, as_, _, ab = arguments
    u = _parts(torch.inf, *arguments)[0]
    u = torch.where((as_ > 0) & (ab > 0), u, torch.nan)
    for _ in range(_MAX_STEPS):
        right, _, _, slope, _ = _parts(u, *arguments)
        step = (right - u) / slope
        u = u + step
        if not bool((step.abs() > _TOLERANCE * (1 + u.abs())).any()):
            break
    return u
