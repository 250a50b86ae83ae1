r"""Calibration measures without bins: KS, MMCE, smooth ECE, KDE-ECE.

Each is a function of confidences $c_i$ and residuals $r_i = a_i - c_i$ (correctness minus
confidence), given as *points*: sorted positions with the residual mass and the row count at each.
Masses may carry leading axes, one per bootstrap replicate, and all are computed together.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.fft import dct, idct, irfft, next_fast_len, rfft

WIDTH = 0.4  # of the Laplacian kernel in Kumar, Sarawagi, Jain 2018

Points = Float[np.ndarray, " m"]
Mass = Float[np.ndarray, "*r m"]


def ks(residual: Mass, n: float) -> Float[np.ndarray, "*r"]:
    r"""$\max_j \frac1n |\sum_{i \le j} r_{(i)}|$ over positions in rising order."""
    return np.abs(np.cumsum(residual, axis=-1)).max(-1) / n


def mmce(positions: Points, residual: Mass, n: float, width: float) -> Float[np.ndarray, "*r"]:
    r"""$\big[\frac1{n^2}\sum_{ij} r_i r_j e^{-|c_i-c_j|/w}\big]^{1/2}$, exactly, without n x n.

    For $c_j < c_i$ the kernel factors into $e^{-c_i/w} e^{c_j/w}$, so the inner sum is a prefix
    sum. Positions are cut into stretches short enough for the factors not to overflow; a stretch
    passes on to the next what reaches it from the left.
    """
    total = np.square(residual).sum(-1)
    carry = np.zeros(residual.shape[:-1])
    left_end = positions[0]
    cuts = np.flatnonzero(np.diff(np.floor((positions - positions[0]) / (300 * width)))) + 1
    for stretch in np.split(np.arange(len(positions)), cuts):
        c, r = positions[stretch], residual[..., stretch]
        carry = carry * np.exp(-(c[0] - left_end) / width)
        left_end = c[0]
        grow = np.exp((c - c[0]) / width)
        before = np.cumsum(r * grow, axis=-1) - r * grow + carry[..., None]
        total = total + 2 * (r * before / grow).sum(-1)
        carry = carry + (r * grow).sum(-1)
    return np.sqrt(np.maximum(total, 0.0)) / n


def spread(positions: Points, mass: Mass, cells: int) -> Float[np.ndarray, "*r cells"]:
    """Mass moved to the centres of `cells` equal cells of [0, 1], shared linearly by neighbours."""
    place = np.clip(positions * cells - 0.5, 0.0, cells - 1.0)
    left = np.minimum(place.astype(np.int64), cells - 2)
    share = place - left
    flat = mass.reshape(-1, len(positions))
    index = left + cells * np.arange(len(flat))[:, None]
    size = cells * len(flat)
    grid = np.bincount(index.ravel(), (flat * (1 - share)).ravel(), minlength=size)
    grid += np.bincount(index.ravel() + 1, (flat * share).ravel(), minlength=size + 1)[:size]
    return grid.reshape(*mass.shape[:-1], cells)


def smooth_ece(
    positions: Points, residual: Mass, n: float, *, cells: int = 4096
) -> Float[np.ndarray, "*r"]:
    r"""smECE: $\sigma^*$ with $\int_0^1 |\hat r_{\sigma^*}(t)|\,dt = \sigma^*$.

    $\hat r_\sigma$ is the residual smoothed by a Gaussian reflected at 0 and 1, that is the heat
    kernel on [0, 1]: in the cosine basis it multiplies mode $k$ by $e^{-(\pi k\sigma)^2/2}$. The
    integral falls as $\sigma$ grows, so the fixed point is bracketed and bisected.
    """
    modes = dct(spread(positions, residual, cells) / n, type=2, norm="ortho")
    decay = -0.5 * np.square(np.pi * np.arange(cells))
    low, high = np.zeros(modes.shape[:-1]), np.ones(modes.shape[:-1])
    for _ in range(24):
        sigma = (low + high) / 2
        damped = modes * np.exp(decay * np.square(sigma)[..., None])
        above = np.abs(idct(damped, type=2, norm="ortho")).sum(-1) > sigma
        low, high = np.where(above, sigma, low), np.where(above, high, sigma)
    return (low + high) / 2


def kde_ece(
    positions: Points, hits: Mass, count: Mass, bandwidth: float, *, cells: int = 4096
) -> Float[np.ndarray, "*r"]:
    r"""$\int |x - \hat a(x)| \hat f(x) dx / \int \hat f$ with densities by a triweight kernel.

    $\hat f$ is the density of the confidences and $\hat a$ the ratio of the density of right
    predictions to it, at most 1. Both kernels are mirrored at 0 and 1. `bandwidth` is the
    kernel's standard deviation (a third of its half-width).
    """
    x = (np.arange(cells) + 0.5) / cells
    reach = max(1, int(3 * bandwidth * cells))
    offset = np.arange(-reach, reach + 1) / (3 * bandwidth * cells)
    kernel = np.maximum(1 - np.square(offset), 0.0) ** 3
    right = _mirrored(spread(positions, hits, cells), kernel)
    everything = _mirrored(spread(positions, count, cells), kernel)
    share = np.divide(right, everything, out=np.zeros_like(right), where=everything > 1e-12)
    weighted = np.abs(x - np.minimum(share, 1.0)) * everything
    return weighted.sum(-1) / everything.sum(-1)


def _mirrored(mass: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    cells, reach = mass.shape[-1], min(len(kernel) // 2, mass.shape[-1])
    kernel = kernel[len(kernel) // 2 - reach : len(kernel) // 2 + reach + 1]
    sides = (mass[..., :reach][..., ::-1], mass, mass[..., cells - reach :][..., ::-1])
    wide = np.concatenate(sides, axis=-1)
    size = next_fast_len(wide.shape[-1] + len(kernel) - 1, real=True)
    product = rfft(wide, size) * rfft(kernel, size)
    smoothed = irfft(product, size)[..., 2 * reach : 2 * reach + cells]
    return np.maximum(smoothed, 0.0)
