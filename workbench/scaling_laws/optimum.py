"""The compute-optimal point of a law: the lowest loss for C = 6 N D training FLOP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.law import Law

_STEPS = 60  # golden-section steps: the bracket shrinks to 1e-11 of its width
_GOLDEN = 0.6180339887498949


def compute_optimal(
    law: Law,
    theta: Float[Tensor, "P p"],
    budgets: Float[Tensor, " c"],
    held: Mapping[str, float],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""N, D and loss, each (P, c), that minimise the law on every iso-FLOP curve.

    For Chinchilla's law in closed form, with $G = (\alpha A / \beta B)^{1/(\alpha+\beta)}$:
    $N^* = G (C/6)^{\beta/(\alpha+\beta)}$ and $D^* = C / 6 N^*$ (Hoffmann et al. 2022, equation 4);
    the law of over-training is Chinchilla's with one exponent for both. For other laws by golden
    section in ln N between 1 parameter and C / 6, where the loss has one minimum.

    Raises:
        ValueError: the law has no N with D or M, or ``held`` does not name its other inputs.
    """
    pair = "D" if "D" in law.inputs else "M"
    if not {"N", pair} <= set(law.inputs):
        raise ValueError(f"law: {law.name} has no parameters N and tokens D to trade for compute")
    others = [q for q in law.inputs if q not in ("N", pair)]
    if set(held) != set(others):
        raise ValueError(
            f"optimal: {law.name} needs values for {', '.join(others) or 'no other input'}; "
            f"got {', '.join(held) or 'none'}"
        )
    fixed = {q: checks.positive(v, q) for q, v in held.items()}

    def loss(log_N: Tensor) -> Tensor:
        N = log_N.exp()
        D = budgets / (6 * N)
        inputs = {"N": N, pair: D if pair == "D" else D / N}
        inputs |= {q: torch.full_like(N, v) for q, v in fixed.items()}
        return law.loss(theta, **inputs)

    if law.name in ("chinchilla", "over_training"):
        A, B, _, alpha, *rest = law.natural(theta)[:, :, None].unbind(1)
        beta = rest[0] if rest else alpha
        G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        log_N = (G * (budgets / 6) ** (beta / (alpha + beta))).log()
        return log_N.exp(), budgets / 6 / log_N.exp(), loss(log_N)
    low = torch.zeros(len(theta), len(budgets)).to(theta)
    high = (budgets / 6).log().expand_as(low).clone()
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        down = loss(left) <= loss(right)
        low, high = torch.where(down, low, left), torch.where(down, right, high)
    middle = (low + high) / 2
    return middle.exp(), budgets / 6 / middle.exp(), loss(middle)
