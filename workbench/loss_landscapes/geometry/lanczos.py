r"""Lanczos: an orthonormal basis in which a large symmetric matrix is tridiagonal.

From a start $q_1$, $\beta_jq_{j+1}=Hq_j-\alpha_jq_j-\beta_{j-1}q_{j-1}$ builds $HQ=QT+\beta_m
q_{m+1}e_m^T$. Eigenpairs $(\theta,s)$ of T give Ritz pairs $(\theta,Qs)$ of H, and what is wrong
with one is known for nothing: $\|HQs-\theta Qs\|=\beta_m|s_m|$. The squared first components of
the s are the weights of Gauss quadrature for the spectral measure of the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from workbench.loss_landscapes.geometry.operators import Operator

Key = Callable[[np.ndarray], np.ndarray]
_CHUNK = 65_536  # coordinates rotated together at a restart


class Lanczos:
    """One run: the basis, the matrix of H in it (float64), and the vector that comes next.

    Every new vector is orthogonalised against all earlier ones, so that rounding does not produce
    copies of eigenvalues. Where the Krylov space closes (the remainder is rounding), the
    run is `closed`: its Ritz pairs are eigenpairs. `open` then starts in the complement.

    Args:
        H: the matrix.
        start: first vector (D,), any length but zero.
        room: vectors to hold in memory, at most D.

    Attributes:
        used: vectors whose product is known; T is (used, used).
        locked: how many of them span closed spaces found earlier.
        products: products made so far.
    """

    def __init__(self, H: Operator, start: Tensor, room: int) -> None:
        self.H = H
        self.room = min(room, H.size)
        self.basis = torch.empty(self.room, H.size, dtype=H.dtype, device=H.device)
        self._T = np.zeros((self.room, self.room))
        self._next = start / _norm(start)
        self._coupling = np.zeros(0)  # of the next vector with those before it
        self._beta = 1.0
        self._scale = 0.0
        self._eps = max(100 * torch.finfo(H.dtype).eps, 1e-10)
        self.used = self.locked = self.products = 0

    @property
    def T(self) -> np.ndarray:
        """H in the basis: tridiagonal, after a restart with an arrowhead."""
        return self._T[: self.used, : self.used]

    @property
    def closed(self) -> bool:
        """Whether the basis spans an invariant space."""
        return self._beta == 0

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.used == self.room

    @property
    def noise(self) -> float:
        """Rounding, as a length: what is smaller counts as zero."""
        return self._eps * self._scale

    def step(self) -> None:
        """One more basis vector, at the price of one product."""
        j, q = self.used, self._next
        self.basis[j] = q
        w = self.H(q)
        alpha = float(q.double() @ w.double())
        # What theory says is there goes first; the pass over the basis then removes rounding only.
        w = w - alpha * q
        for i in np.flatnonzero(self._coupling):
            w = torch.sub(w, self.basis[i], alpha=float(self._coupling[i]))
        w = self._orthogonal(w, j + 1)
        beta = _norm(w)
        scale = max(self._scale, abs(alpha), beta)
        if beta <= self._eps * scale or j + 1 == self.H.size:
            beta = 0.0
        self._T[j, j] = alpha
        self._T[j, :j] = self._T[:j, j] = self._coupling
        coupling = np.zeros(j + 1)
        coupling[j] = beta
        following = w / beta if beta else w
        # Assigned together: an interruption before this line leaves the run as it was.
        self._coupling, self._next, self._beta, self._scale = coupling, following, beta, scale
        self.used = j + 1
        self.products += 1

    def open(self, generator: torch.Generator) -> None:
        """After a closed space: continue with a random vector that is orthogonal to it."""
        while True:
            w = self._orthogonal(self.H.normal(generator), self.used)
            if _norm(w) > self._eps * self.H.size**0.5:
                break
        self._coupling = np.zeros(self.used)
        self._next, self._beta, self.locked = w / _norm(w), 1.0, self.used

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues of T, its eigenvectors as columns, and the residual norm of each pair."""
        values, vectors = np.linalg.eigh(self.T)
        return values, vectors, self._beta * np.abs(vectors[-1])

    def fresh(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values found since the last closed space, and their residual norms."""
        values, vectors = np.linalg.eigh(self.T[self.locked :, self.locked :])
        return values, self._beta * np.abs(vectors[-1])

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights of the start's spectral measure; only before `open` and `restart`."""
        values, vectors, _ = self.ritz()
        return values, vectors[0] ** 2

    def vectors(self, coefficients: np.ndarray) -> Tensor:
        """Columns of coefficients (used, k) as unit vectors (k, D)."""
        out = self._tensor(coefficients.T) @ self.basis[: self.used]
        return out / torch.linalg.vector_norm(out, dim=1, keepdim=True)

    def restart(self, keep: int, key: Key) -> None:
        """Make room: keep the Ritz vectors with the largest key (thick restart).

        Up to ``keep`` of the closed spaces, and as many of the present one.

        Reference: K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue
        problems, SIAM J. Matrix Anal. Appl. 22 (2000).
        """
        values, vectors = [], []
        for low, high in ((0, self.locked), (self.locked, self.used)):
            found, inside = np.linalg.eigh(self._T[low:high, low:high])
            best = np.argsort(-key(found), kind="stable")[:keep]
            padded = np.zeros((self.used, len(best)))
            padded[low:high] = inside[:, best]
            values.append(found[best])
            vectors.append(padded)
        turn = np.concatenate(vectors, axis=1)
        kept = turn.shape[1]
        rows = self._tensor(turn.T)
        for start in range(0, self.H.size, _CHUNK):
            part = self.basis[:, start : start + _CHUNK]
            part[:kept] = rows @ part[: self.used]
        self._T[:] = 0
        self._T[:kept, :kept] = np.diag(np.concatenate(values))
        self._coupling = self._beta * turn[-1]
        self.used, self.locked = kept, len(values[0])

    def _orthogonal(self, w: Tensor, count: int) -> Tensor:
        """Without its components along the first basis vectors.

        Where little was removed one pass has left nothing but rounding; else twice is enough.
        """
        Q = self.basis[:count]
        for _ in range(2):
            before = w.norm()
            w = torch.addmv(w, Q.T, Q @ w, alpha=-1)
            if w.norm() > 0.7 * before:
                break
        return w

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=self.H.dtype, device=self.H.device)


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))
