r"""The temperature that minimises the negative log-likelihood.

With $\beta = 1/T$, logits $z_i$ and labels $y_i$,

$$f(\beta) = \frac1n\sum_i \Big[\log\sum_k e^{\beta z_{ik}} - \beta z_{iy_i}\Big]$$

is convex. For $p_i = \mathrm{softmax}(\beta z_i)$ its derivatives are moments of the logits under
$p_i$: $f' = \overline{E_{p_i} z_i - z_{iy_i}}$, $f'' = \overline{\mathrm{Var}_{p_i} z_i}$ and
$f''' = \overline{\mathrm{Skew}_{p_i} z_i}$ (third central moment). One pass over the table
gives all three, and Halley's step

$$\Delta\beta = -\frac{2f'f''}{2f''^2 - f'f'''}$$

triples the number of correct digits. A few steps on a fiftieth of the rows come first, so that two
passes over all rows suffice; a step that would leave the bracket is replaced by bisection, so the
search cannot fail.

Reference: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks",
arXiv 1706.04599.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int

from workbench.lab import checks

BOUNDS = (1e-2, 1e2)  # of the temperature
_BLOCK_BYTES = 1 << 19  # a block and two buffers of its size stay in the cache
_WARM_ROWS = 1024


class Slope(NamedTuple):
    """First three derivatives of the mean loss by the inverse temperature."""

    first: float
    second: float
    third: float


def fit_temperature(
    logits: Any,
    labels: Any,
    *,
    bounds: tuple[float, float] = BOUNDS,
    tol: float = 1e-9,
    max_passes: int = 60,
) -> float:
    """Temperature of least negative log-likelihood.

    Args:
        logits: (n, k) scores; NumPy, torch (any device) or pandas. Nothing of their size is
            allocated; float32 logits are processed in float32 and summed in float64.
        labels: (n,) class indices.
        bounds: least and greatest temperature. Where the likelihood still rises at a bound, as
            with perfectly separated classes (T towards 0), that bound is returned with a warning.
        tol: relative error of the temperature aimed at.
        max_passes: limit on passes over the rows (a safety; two or three are typical).

    Returns:
        The temperature; 1 with a warning if no row's logits differ.
    """
    logits = torch.as_tensor(checks.as_logits(logits)).detach()
    labels = torch.as_tensor(checks.as_labels(labels, logits.shape[1])).to(logits.device)
    n = checks.same_length(logits=logits, labels=labels)
    coolest, hottest = (checks.positive(b, "bounds") for b in bounds)
    if not coolest < hottest:
        raise ValueError(f"bounds: expected the lower one first, got {bounds}")
    bracket = (1 / hottest, 1 / coolest)
    start = min(max(1.0, bracket[0]), bracket[1])
    rows = max(_WARM_ROWS, n // 50)
    if n > 4 * rows:
        some = torch.arange(rows, device=logits.device) * (n // rows)
        start = _search(logits[some], labels[some], bracket, start, 1e-4, max_passes)[0]
    beta, reason = _search(logits, labels, bracket, start, tol, max_passes)
    if reason:
        warnings.warn(reason, stacklevel=2)
    return 1.0 / beta


def _search(
    logits: Float[torch.Tensor, "n k"],
    labels: Int[torch.Tensor, " n"],
    bracket: tuple[float, float],
    beta: float,
    tol: float,
    max_passes: int,
) -> tuple[float, str]:
    """Root of the increasing function f' within the bracket, and why it is not interior."""
    low, high = bracket
    top = logits.amax(1)
    own = logits.gather(1, labels[:, None])[:, 0] - top
    for _ in range(max_passes):
        slope = derivatives(logits, top, own, beta)
        if slope.second <= 0 and slope.first == 0:
            return 1.0, "logits: no row has logits that differ; every temperature fits equally"
        if beta == bracket[0] and slope.first >= 0:
            return beta, _at_bound(bracket, beta)
        if beta == bracket[1] and slope.first <= 0:
            return beta, _at_bound(bracket, beta)
        low, high = (low, beta) if slope.first > 0 else (beta, high)
        denominator = 2 * slope.second**2 - slope.first * slope.third
        if denominator > 0:
            proposal = beta - 2 * slope.first * slope.second / denominator
        else:
            proposal = beta - slope.first / slope.second if slope.second > 0 else math.nan
        if abs(proposal - beta) ** 3 < tol * beta**3 and low <= proposal <= high:
            return proposal, ""  # the next error is of the order of this step cubed
        beta = _inside(proposal, low, high, bracket)
        if high - low <= tol * low:
            return beta, ""
    return beta, f"fit_temperature: stopped after {max_passes} passes"


def _inside(proposal: float, low: float, high: float, bracket: tuple[float, float]) -> float:
    """The proposal; if it leaves the bracket, its untried end, or else the geometric middle."""
    if low < proposal < high:
        return proposal
    if proposal <= low == bracket[0]:
        return low
    if proposal >= high == bracket[1]:
        return high
    return math.sqrt(low * high)


def _at_bound(bracket: tuple[float, float], beta: float) -> str:
    which = "lower" if beta == bracket[1] else "upper"
    hint = "; are all rows predicted right?" if which == "lower" else ""
    return (
        f"fit_temperature: the likelihood is still rising at the {which} bound, "
        f"T = {1 / beta:.6g}{hint}"
    )


def derivatives(
    logits: Float[torch.Tensor, "n k"],
    top: Float[torch.Tensor, " n"],
    own: Float[torch.Tensor, " n"],
    beta: float,
) -> Slope:
    """Derivatives of the mean loss at `beta`, in one pass by blocks of rows.

    `top` holds each row's largest logit, `own` the label's logit minus that.
    """
    n, k = logits.shape
    wide = logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32
    step = max(1, _BLOCK_BYTES // (k * wide.itemsize)) if logits.device.type == "cpu" else 65_536
    first = second = third = torch.zeros((), dtype=torch.float64, device=logits.device)
    shifted = torch.empty((min(step, n), k), dtype=wide, device=logits.device)
    powers = torch.empty_like(shifted)
    for i in range(0, n, step):
        block, peak = logits[i : i + step], top[i : i + step, None]
        u, e = shifted[: len(block)], powers[: len(block)]
        torch.sub(block, peak, out=u)
        torch.mul(u, beta, out=e).exp_()
        mass = e.sum(1)
        m1 = e.mul_(u).sum(1) / mass
        m2 = e.mul_(u).sum(1) / mass
        m3 = e.mul_(u).sum(1) / mass
        variance = m2 - m1 * m1
        first = first + (m1 - own[i : i + step]).sum(dtype=torch.float64)
        second = second + variance.sum(dtype=torch.float64)
        third = third + (m3 - m1 * (3 * variance + m1 * m1)).sum(dtype=torch.float64)
    return Slope(*(float(total) / n for total in (first, second, third)))
