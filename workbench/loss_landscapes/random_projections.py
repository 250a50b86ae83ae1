r"""Fixed random D x d matrices of orthonormal columns, nearly, without holding them.

Each `projection` is applied to the last axis of a tensor and knows its transpose. ``dense``:
Gaussian, columns divided by their length; Dd numbers. ``sparse`` (Li, Hastie and Church, 2006):
signs at a fraction 1 / sqrt(D) of the places, columns divided by their length. ``fastfood`` (Le,
Sarlos and Smola, 2013, arXiv 1408.3060): a product of signs, Walsh-Hadamard transforms, a
permutation and a Gaussian diagonal; O(D log D) time and O(D) memory whatever d is.

The first columns of ``dense`` and ``fastfood`` do not depend on d: with one seed, subspaces of
several dimensions are nested.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from sklearn.random_projection import SparseRandomProjection
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks

KINDS = ("fastfood", "dense", "sparse", "full")
_RADIX = 32  # largest Hadamard factor: a pass is a matrix product whose blocks stay in cache

Linear = Callable[[Tensor], Tensor]


# --- Walsh-Hadamard -------------------------------------------------------------------------------


class _Map(torch.autograd.Function):
    """A fixed linear map of the last axis; its derivative is the adjoint, given beside it."""

    @staticmethod
    def forward(x: Tensor, apply: Linear, adjoint: Linear) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.map, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Map.apply(gradient, ctx.adjoint, ctx.map), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, apply: Linear, adjoint: Linear) -> tuple[Tensor, int]:
        return _Map.apply(x.movedim(dims[0], 0), apply, adjoint), 0  # type: ignore[no-untyped-call]


def fwht(x: Float[Tensor, "*k L"]) -> Float[Tensor, "*k L"]:
    r"""Walsh-Hadamard transform of the last axis, $H x$ with $H_{2n} = H_2 \otimes H_n$.

    Not normalised: ``fwht(fwht(x)) = L x``. Differentiable as often as you like. $H$ is applied as
    a Kronecker product of factors of up to 32, one matrix product each, which takes a third of the
    time of the $\log_2 L$ butterflies.

    Args:
        x: any leading axes; L must be a power of two.

    Raises:
        ValueError: L is not a power of two.
    """
    size = x.shape[-1] if x.ndim else 0
    if size < 1 or size & (size - 1):
        raise ValueError(f"x: expected a last axis of a power of two, got shape {tuple(x.shape)}")
    return cast(Tensor, _Map.apply(x, _transform, _transform))  # type: ignore[no-untyped-call]


def _transform(x: Tensor) -> Tensor:
    bits = x.shape[-1].bit_length() - 1
    passes = max(1, math.ceil(bits / (_RADIX.bit_length() - 1)))
    y, inner = x.contiguous(), 1
    for i in range(passes):
        factor = 2 ** (bits // passes + (i < bits % passes))
        matrix = _hadamard(factor, x.dtype, x.device)
        if inner == 1:
            y = y.reshape(-1, factor) @ matrix
        else:
            y = torch.matmul(matrix, y.reshape(-1, factor, inner))
        inner *= factor
    return y.reshape(x.shape)


@lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(size)
    shared = index[:, None] & index[None, :]
    parity = sum((shared >> bit) & 1 for bit in range(max(1, size.bit_length() - 1))) % 2
    return (1 - 2 * cast(Tensor, parity)).to(device, dtype)


# --- projections ----------------------------------------------------------------------------------


class Projection(nn.Module):
    """A fixed D x d matrix: ``P(x)`` is P x, differentiable, and ``P.adjoint(g)`` is its transpose.

    Both act on the last axis of a tensor with any leading axes. Its numbers follow from the seed,
    so they are buffers that no state dict holds.
    """

    def __init__(self, D: int, d: int) -> None:
        super().__init__()
        self.D, self.d = checks.count(D, "D"), checks.count(d, "d")
        if self.d > self.D:
            raise ValueError(f"d: expected at most D = {D} directions, got {d}")

    def forward(self, x: Float[Tensor, "*k d"]) -> Float[Tensor, "*k D"]:
        """P x."""
        return cast(Tensor, _Map.apply(x, self._apply_to, self._adjoint_to))  # type: ignore[no-untyped-call]

    def adjoint(self, g: Float[Tensor, "*k D"]) -> Float[Tensor, "*k d"]:
        """The transpose of P, times g."""
        return cast(Tensor, _Map.apply(g, self._adjoint_to, self._apply_to))  # type: ignore[no-untyped-call]

    def matrix(self) -> Float[Tensor, "D d"]:
        """All of P, for small sizes."""
        scale = next(self.buffers(), torch.empty(()))
        dtype = scale.dtype if scale.is_floating_point() else torch.float32
        return self(torch.eye(self.d, dtype=dtype, device=scale.device)).T

    def _apply_to(self, x: Tensor) -> Tensor:
        return x

    def _adjoint_to(self, g: Tensor) -> Tensor:
        return g


class Dense(Projection):
    """Gaussian entries, each column divided by its length."""

    def __init__(self, D: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__(D, d)
        rows = torch.randn(self.d, self.D, generator=generator, dtype=dtype)
        self.register_buffer("rows", rows / rows.norm(dim=1, keepdim=True), persistent=False)

    def _apply_to(self, x: Tensor) -> Tensor:
        return x @ cast(Tensor, self.rows)

    def _adjoint_to(self, g: Tensor) -> Tensor:
        return g @ cast(Tensor, self.rows).T


class Sparse(Projection):
    """Random signs at a fraction 1 / sqrt(D) of the places, columns divided by their length."""

    def __init__(self, D: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__(D, d)
        state = int(torch.randint(2**31 - 1, (), generator=generator))
        drawn = SparseRandomProjection(self.d, density=self.D**-0.5, random_state=state)
        drawn.fit(sparse.csr_matrix((1, self.D), dtype=np.float64))
        rows = drawn.components_.tocoo()
        places = torch.from_numpy(np.stack([rows.row, rows.col]).astype(np.int64))
        norms = np.sqrt(np.bincount(rows.row, rows.data**2, minlength=self.d))
        values = torch.from_numpy(rows.data / norms[rows.row]).to(dtype)
        size = (self.d, self.D)
        across = torch.sparse_coo_tensor(places, values, size, check_invariants=True).coalesce()
        self.register_buffer("rows", _compressed(across), persistent=False)
        self.register_buffer("columns", _compressed(across.t().coalesce()), persistent=False)

    def _apply_to(self, x: Tensor) -> Tensor:
        return _sparse_times(cast(Tensor, self.columns), x)

    def _adjoint_to(self, g: Tensor) -> Tensor:
        return _sparse_times(cast(Tensor, self.rows), g)


def _compressed(matrix: Tensor) -> Tensor:
    """Compressed rows: ten times faster products than coordinates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


def _sparse_times(matrix: Tensor, x: Tensor) -> Tensor:
    product = (matrix @ x.reshape(-1, x.shape[-1]).T).T
    return product.reshape(*x.shape[:-1], len(matrix))


class Fastfood(Projection):
    r"""The authors' $P x = [H G \Pi H B\,\mathrm{pad}(x)]_{1..D} / \sqrt{L \sum G^2\, D/L}$.

    Three vectors of length L, the power of two from D on, and no matrix. The first H acts on a
    vector of which only the first b places are in use, b the power of two from d on. As
    $H_L = H_{L/b} \otimes H_b$, it is the short transform $H_b$ repeated L/b times: half of the
    work falls away, and of the permutation only its remainder modulo b is needed.
    """

    def __init__(self, D: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__(D, d)
        self.long, self.short = _power(self.D), _power(self.d)
        signs = torch.randint(2, (self.long,), generator=generator, dtype=torch.int8) * 2 - 1
        order = torch.randperm(self.long, generator=generator)
        gauss = torch.randn(self.long, generator=generator, dtype=dtype)
        # sqrt(L sum G^2) sqrt(D / L): the length of a whole column, of which D of L places are kept
        gauss /= torch.sqrt(gauss.square().sum() * self.D)
        self.register_buffer("signs", signs[: self.d].to(dtype), persistent=False)
        self.register_buffer("gauss", gauss, persistent=False)
        self.register_buffer("source", (order % self.short).int(), persistent=False)
        self.register_buffer("place", order.argsort().int(), persistent=False)

    def _apply_to(self, x: Tensor) -> Tensor:
        start = F.pad(x * cast(Tensor, self.signs), (0, self.short - self.d))
        spread = _transform(start).index_select(-1, cast(Tensor, self.source))
        return _transform(spread.mul_(cast(Tensor, self.gauss)))[..., : self.D]

    def _adjoint_to(self, g: Tensor) -> Tensor:
        mixed = _transform(F.pad(g, (0, self.long - self.D))).mul_(cast(Tensor, self.gauss))
        blocks = mixed.index_select(-1, cast(Tensor, self.place))
        short = blocks.reshape(*g.shape[:-1], -1, self.short).sum(-2)
        return _transform(short)[..., : self.d] * cast(Tensor, self.signs)


def _power(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def projection(
    D: int,
    d: int,
    kind: str = "fastfood",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Projection:
    """The fixed matrix of a subspace.

    Args:
        D: parameters of the network.
        d: directions.
        kind: ``fastfood``, ``dense``, ``sparse``, or ``full`` (the identity, d = D).
        seed: of the matrix; drawn on the CPU, so it is the same on every device. Independent of
            weights that were initialised with the same seed.
        dtype: float32 or float64.

    Raises:
        ValueError: d exceeds D, the kind is unknown, or ``full`` with d < D.
    """
    checks.one_of(kind, KINDS, "kind")
    if kind == "full":
        if d != D:
            raise ValueError(f"d: kind 'full' needs d = D = {D}, got {d}")
        return Projection(D, d)
    # not the stream of manual_seed(seed): weights initialised with the same seed would lie along P
    state = np.random.SeedSequence([checks.count(seed, "seed", minimum=0), 0x1804_08838])
    generator = torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))
    made = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}[kind]
    return made(D, d, generator, dtype)
