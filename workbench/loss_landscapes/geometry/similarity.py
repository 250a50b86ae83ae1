"""Similarity of two sets of features of the same rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks

_NUMBERS = 2**22  # of a chunk that is widened to float64


def linear_cka(
    X: Float[Tensor, "n p"], Y: Float[Tensor, "n q"], *, unbiased: bool = False
) -> float:
    r"""Centred kernel alignment of two feature matrices with linear kernels.

    $$\mathrm{CKA}=\frac{\|Y_c^TX_c\|_F^2}{\|X_c^TX_c\|_F\,\|Y_c^TY_c\|_F}
    =\frac{\langle K,L\rangle}{\|K\|_F\|L\|_F},\qquad K=X_cX_c^T,\ L=Y_cY_c^T$$

    1 if one is the other rotated, scaled by one factor and shifted. Both forms are equal; the one
    with the smaller matrices is taken (n x n, or p x q and its kin), in float64.

    Args:
        X: features of n rows, array or tensor.
        Y: other features of the same rows.
        unbiased: replace each inner product by its unbiased estimate (zero diagonals), which is
            near 0 for independent features however many there are; may fall slightly below 0. The
            plain form approaches 1 with p, q >> n. Needs n >= 4.

    Returns:
        Similarity, in [0, 1] unless ``unbiased``.

    Raises:
        TypeError, ValueError: shapes differ in n, values are not finite, or all rows of one matrix
            are equal.

    Reference:
        S. Kornblith et al., 2019, arXiv:1905.00414, equation 4; T. Nguyen, M. Raghu, S. Kornblith,
        2020, arXiv:2010.15327 (unbiased).
    """
    A, B = _centred(X, "X"), _centred(Y, "Y")
    n, least = checks.same_length(X=A, Y=B), 4 if unbiased else 2
    if n < least:
        raise ValueError(f"X: has {n} row(s); expected at least {least}")
    p, q = A.shape[1], B.shape[1]
    if n * n < p * p + q * q:
        K, L = _gram(A), _gram(B)
        inner = [float((S * T).sum()) for S, T in ((K, L), (K, K), (L, L))]
    else:
        inner = [_cross(S, T) for S, T in ((A, B), (A, A), (B, B))]
    if unbiased:
        k, m = _diagonal(A), _diagonal(B)
        pairs = ((k, m), (k, k), (m, m))
        inner = [_without_bias(value, S, T) for value, (S, T) in zip(inner, pairs, strict=True)]
    for name, own in (("X", inner[1]), ("Y", inner[2])):
        if own <= 0:
            raise ValueError(f"{name}: does not vary (enough) over its rows to be compared")
    return inner[0] / (inner[1] * inner[2]) ** 0.5


def _centred(values: Any, name: str) -> Tensor:
    values = torch.as_tensor(checks.as_floats(values, name, ndim=2)).detach()
    mean = values.mean(0, dtype=torch.float64)
    centred = values - mean.to(values.dtype)
    # Rounding of equal rows is no variation.
    floor = 8 * torch.finfo(values.dtype).eps * mean.abs()
    return torch.where(centred.abs().amax(0) > floor, centred, 0.0)


def _gram(A: Tensor) -> Tensor:
    """K = A A^T, summed over blocks of columns."""
    K = torch.zeros(len(A), len(A), dtype=torch.float64, device=A.device)
    for part in A.split(max(1, _NUMBERS // len(A)), dim=1):
        wide = part.double()
        K.addmm_(wide, wide.T)
    return K


def _cross(A: Tensor, B: Tensor) -> float:
    """Squared norm of A^T B, summed over blocks of rows."""
    p, q = A.shape[1], B.shape[1]
    C = torch.zeros(p, q, dtype=torch.float64, device=A.device)
    rows = max(1, _NUMBERS // max(p, q))
    for a, b in zip(A.split(rows), B.split(rows), strict=True):
        C.addmm_(a.double().T, b.double())
    return float((C * C).sum())


def _diagonal(A: Tensor) -> Tensor:
    """Squared norms of the rows."""
    return torch.linalg.vector_norm(A, dim=1, dtype=torch.float64) ** 2


def _without_bias(value: float, k: Tensor, m: Tensor) -> float:
    """n (n - 3) times the unbiased HSIC, from <K, L> and the diagonals of centred K and L.

    Rows of a centred K sum to 0, so that without its diagonal they sum to -k.
    """
    n = len(k)
    both = float(k.sum() * m.sum()) / ((n - 1) * (n - 2))
    return value - float(k @ m) * n / (n - 2) + both
