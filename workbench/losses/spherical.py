r"""Spherical losses: exact training of an output layer at a cost that does not know its width.

The output layer is $O = HW^\top$ with $W$ of shape $D \times d$. A loss is *spherical* if a row $o$
enters only through the target's entry, the sum and the sum of squares,

$$\ell(o_c, s, q), \qquad s = \sum_k o_k = \bar w^\top h, \quad q = \sum_k o_k^2 = h^\top Qh, \qquad
  \bar w = W^\top 1, \quad Q = W^\top W .$$

With $\ell_s, \ell_q, \ell_c$ for the slopes of a batch's loss in its rows' $s$, $q$ and $o_c$ (n
numbers each) and $E$ for the one-hot targets, both gradients are short:

$$\nabla_H = \ell_s \bar w^\top + 2\,\mathrm{diag}(\ell_q)HQ + \mathrm{diag}(\ell_c)W_c,$$
$$\nabla_W = 1(H^\top\ell_s)^\top + 2WH^\top\mathrm{diag}(\ell_q)H
  + E^\top\mathrm{diag}(\ell_c)H .$$

$\nabla_W$ changes all $D$ rows, but those outside the batch all in the same way: by a $d \times d$
matrix and a shift. So $W = VU + 1\omega^\top$ is kept, and a step of size $\eta$ is, with
$A = I - 2\eta H^\top\mathrm{diag}(\ell_q)H$,

$$U \leftarrow UA, \qquad \omega \leftarrow A\omega - \eta H^\top\ell_s, \qquad
  V_c \leftarrow V_c - \eta\,\ell_c\,HU^{-1} .$$

$U^{-1}$, $\bar w$ and $Q$ follow by products of $n \times d$ matrices and, for $U^{-1}$, one
$n \times n$ solve (Woodbury). A step costs $O(nd^2 + n^2d + n^3)$ operations whatever $D$ is, and
leaves the weights that a dense step of gradient descent leaves.

Reference: Vincent, de Brébisson and Bouthillier (2015), "Efficient exact gradient update for
training deep networks with very large sparse targets", arXiv 1412.7091.

*Not included*: momentum and adaptive step sizes, whose state is one number per weight and would be
changed in all of them; targets with several non-zero entries; the correction of single singular
values of $U$, where this module multiplies $U$ into $V$ and starts again from $U = I$.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from workbench.lab import checks
from workbench.losses.conventions import floating, in_range, reduced, single

Form = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # o_c, s, q (n,) and D -> losses (n,)
BLOCK = 1 << 21  # numbers of V that are folded at once

_STRETCH = {torch.float32: 1e2, torch.float64: 1e5}


# --- losses in terms of o_c, s and q --------------------------------------------------------------


def z_form(target: Tensor, total: Tensor, squares: Tensor, classes: int, *, a: float = 1.0,
           b: float = 2.0) -> Tensor:  # fmt: skip
    r"""Z-loss $\frac1a\log(1+e^{a(b-z_c)})$ of $z_c=(o_c-\mu)/\sigma$.

    $\mu=s/D$ and $\sigma^2=q/D-\mu^2$. A row of equal outputs has no $z_c$; it counts as 0, with
    gradient 0.
    """
    mean = total / classes
    floor = mean**2 * 8 * torch.finfo(mean.dtype).eps
    return z_curve(standardised(target - mean, squares / classes - mean**2, floor), a, b)


def taylor_form(target: Tensor, total: Tensor, squares: Tensor, classes: int) -> Tensor:
    r"""Taylor softmax $-\log\frac{1+o_c+o_c^2/2}{D+s+q/2}$."""
    return torch.log(classes + total + squares / 2) - torch.log(1 + target + target**2 / 2)


def squared_form(target: Tensor, total: Tensor, squares: Tensor, classes: int) -> Tensor:
    r"""Squared error to the one-hot target, $q-2o_c+1$."""
    return squares - 2 * target + 1


def z_curve(z: Tensor, a: float, b: float) -> Tensor:
    r"""$\frac1a\log(1+e^{a(b-z)})$: nearly linear for small a, a hinge at b for large a."""
    return F.softplus(a * (b - z)) / a


def standardised(centred: Tensor, variance: Tensor, floor: Tensor) -> Tensor:
    """``centred / sqrt(variance)``, 0 where the variance is no more than its rounding error."""
    spread = variance > floor.clamp_min(torch.finfo(variance.dtype).tiny)
    return torch.where(spread, centred * torch.where(spread, variance, 1).rsqrt(), 0)


# --- the output layer ----------------------------------------------------------------------------


class FactoredOutput(nn.Module):
    r"""Output layer $o = Wh$ trained by exact gradient descent in $O(d^2)$ a row.

    Call it like a loss, ``layer(h, y)``: gradients reach ``h`` by autograd. ``layer.update(lr)``
    then takes the step of its own weights, as an optimiser would. ``layer.step(h, y, lr)`` does
    all of it. The weights are buffers; no optimiser sees them. For a bias, append a constant to h.

    The d x d matrices are float64 by default: they hold sums over all D rows, and cost nothing.

    Args:
        classes: D, rows of W.
        features: d, length of h.
        loss: of (o_c, s, q, D), one number a row; default the Z-loss with a = 1, b = 2. Give
            ``functools.partial(z_form, a=.1, b=20)``, `taylor_form`, `squared_form`, or your own.
        stretch: V takes in U as soon as the 1-norm of U or of its inverse is above this; default
            100 for float32 and 1e5 for float64. That pass costs O(D d^2).
        generator: of the initial weights, uniform within ``1 / sqrt(d)`` as in ``nn.Linear``.
        device, dtype: of V; default float32.
        state_dtype: of the d x d matrices; take float32 where the device has no float64.

    Raises:
        ValueError: a size or ``stretch`` is out of range.

    Reference: Vincent, de Brébisson and Bouthillier (2015), arXiv 1412.7091.
    """

    V: Tensor
    U: Tensor
    U_inv: Tensor
    omega: Tensor
    Q: Tensor
    w_bar: Tensor

    def __init__(
        self,
        classes: int,
        features: int,
        *,
        loss: Form = z_form,
        stretch: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if dtype not in _STRETCH:
            raise ValueError(f"dtype: expected float32 or float64, got {dtype}")
        self.classes = checks.count(classes, "classes", minimum=2)
        self.features = checks.count(features, "features")
        self.loss = loss
        self.stretch = _STRETCH[dtype] if stretch is None else checks.number(stretch, "stretch")
        if self.stretch < 1:
            raise ValueError(f"stretch: expected at least 1, got {self.stretch:g}")
        self.folds = self._steps = 0
        self._pending: list[tuple[Tensor, ...]] = []
        V = torch.empty(self.classes, self.features, device=device, dtype=dtype)
        self.register_buffer("V", V.uniform_(-1, 1, generator=generator).mul_(features**-0.5))
        for name, shape in (("U", 2), ("U_inv", 2), ("omega", 1), ("Q", 2), ("w_bar", 1)):
            empty = torch.zeros((self.features,) * shape, device=device, dtype=state_dtype)
            self.register_buffer(name, empty)
        self._start()

    @classmethod
    def from_weight(cls, weight: Tensor, **options: Any) -> FactoredOutput:
        """The layer whose W is a copy of ``weight`` (D, d)."""
        floating(weight, "weight")
        if weight.ndim != 2:
            raise ValueError(f"weight: expected (D, d), got shape {tuple(weight.shape)}")
        layer = cls(*weight.shape, device=weight.device, dtype=weight.dtype, **options)
        layer.V.copy_(weight)
        layer._start()
        return layer

    def forward(self, h: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Loss of a batch, without its outputs.

        Args:
            h: (n, d).
            y: (n,) classes 0..D-1.
            reduction: ``mean``, ``sum`` or ``none``.

        Raises:
            ValueError: shapes disagree, ``h`` holds NaN or infinity, or a class is out of range.
        """
        h = checks.as_floats(floating(h, "h"), "h", ndim=2)
        if h.shape[1] != self.features or y.shape != h.shape[:1]:
            raise ValueError(
                f"h and y: expected (n, {self.features}) and (n,), got {tuple(h.shape)} and "
                f"{tuple(y.shape)}"
            )
        in_range(y, self.classes, "y")
        with single(h):
            at, total, squares = _Moments.apply(h.to(self.U.dtype), y, self, self.training)
            values = self.loss(at, total, squares, self.classes)
        return reduced(values.to(torch.promote_types(h.dtype, self.V.dtype)), reduction)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Gradient step of W from the batches that were back-propagated since the last one.

        Args:
            lr: step size, on the loss as it was reduced.

        Raises:
            RuntimeError: nothing was back-propagated (in training mode).
            ValueError: ``lr`` is not positive.
        """
        lr = checks.positive(lr, "lr")
        if not self._pending:
            raise RuntimeError("update: no gradient; call layer(h, y).backward() first")
        batches, self._pending = self._pending, []
        self._steps += 1
        H, y, lc, ls, lq = (torch.cat(parts) for parts in zip(*batches, strict=True))
        HQ, Wc, K = H @ self.Q, self.rows(y), H @ H.T
        Z = torch.outer(ls, self.w_bar) + lc[:, None] * Wc
        G = 2 * lq[:, None] * HQ + Z  # gradient of h

        # Gram matrix of the gradients of the outputs, n x n
        R = 2 * lq[:, None] * (H @ Z.T)
        M = torch.outer(ls, self.classes * ls + lc) + torch.outer(lc, ls) + R + R.T
        M += torch.outer(lc, lc) * (y[:, None] == y) + torch.outer(2 * lq, 2 * lq) * (HQ @ H.T)
        half = H.T @ (lr**2 / 2 * (M @ H) - lr * G)

        shrink = (2 * lr * lq)[:, None]  # A = I - H' diag(shrink) H
        U = self.U - (self.U @ H.T) @ (shrink * H)
        moved, U_inv = _inverse(self.U_inv, H, K, shrink)
        self.omega -= H.T @ (shrink[:, 0] * (H @ self.omega) + lr * ls)
        self.w_bar -= H.T @ (shrink[:, 0] * (H @ self.w_bar) + lr * (self.classes * ls + lc))
        self.Q += half + half.T
        if self._stretched(U, U_inv):
            self._fold(U)
            moved = H
        else:
            self.U.copy_(U)
            self.U_inv.copy_(U_inv)
        self.V.index_add_(0, y, (-lr * lc[:, None] * moved).to(self.V.dtype))

    def step(self, h: Tensor, y: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step of gradient descent on the mean loss; one row at a time is the paper's own form.

        Args:
            h: (n, d).
            y: (n,) classes.
            lr: step size.

        Returns:
            The loss before the step, and its gradient (n, d) at ``h``.
        """
        self._pending.clear()
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            loss = self.train()(h, y)
            (grad,) = torch.autograd.grad(loss, h)
        self.update(lr)
        return loss.detach(), grad

    @torch.no_grad()
    def scale_(self, factor: float) -> FactoredOutput:
        """Multiply W by a positive number, for weight decay or against the drift of its norm.

        Do it after `update`: gradients that wait for one belong to the old W and are dropped.
        """
        factor = checks.positive(factor, "factor")
        self._pending.clear()
        self._steps += 1
        for name, power in (("U", 1), ("U_inv", -1), ("omega", 1), ("w_bar", 1), ("Q", 2)):
            getattr(self, name).mul_(factor**power)
        if self._stretched(self.U, self.U_inv):
            self._fold(self.U.clone())
        return self

    @torch.no_grad()
    def refactor(self) -> FactoredOutput:
        """Fold U and omega into V and sum Q and w_bar afresh; W stays. O(D d^2), in blocks."""
        self._fold(self.U.clone())
        self._start()
        return self

    @torch.no_grad()
    def rows(self, y: Tensor) -> Tensor:
        """Rows of W, (n, d) in the precision of the d x d matrices."""
        return self.V[y].to(self.U.dtype) @ self.U + self.omega

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """All outputs (n, D), for prediction."""
        inner, shift = h.to(self.U.dtype) @ self.U.T, h.to(self.U.dtype) @ self.omega
        return inner.to(self.V.dtype) @ self.V.T + shift.to(self.V.dtype)[:, None]

    @torch.no_grad()
    def weight(self) -> Tensor:
        """W, (D, d)."""
        return self.V @ self.U.to(self.V.dtype) + self.omega.to(self.V.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"classes={self.classes}, features={self.features}, folds={self.folds}"

    def _stretched(self, U: Tensor, U_inv: Tensor) -> bool:
        norms = torch.stack([torch.linalg.matrix_norm(U, 1), torch.linalg.matrix_norm(U_inv, 1)])
        return not bool((norms <= self.stretch).all())  # also where a norm is NaN

    def _fold(self, U: Tensor) -> None:
        """``V <- V U + 1 omega'``, then ``U = I`` and ``omega = 0``."""
        U, omega = U.to(self.V.dtype), self.omega.to(self.V.dtype)
        for part in self.V.split(max(1, BLOCK // self.features)):
            part.copy_(torch.addmm(omega, part, U))
        self.folds += 1
        self._identity()

    def _identity(self) -> None:
        self.U.zero_().fill_diagonal_(1)
        self.U_inv.zero_().fill_diagonal_(1)
        self.omega.zero_()

    @torch.no_grad()
    def _start(self) -> None:
        """Q and w_bar of the rows of V, with U = I and omega = 0."""
        self._identity()
        self.Q.zero_()
        self.w_bar.zero_()
        for part in self.V.split(max(1, BLOCK // self.features)):
            part = part.to(self.Q.dtype)
            self.Q.addmm_(part.T, part)
            self.w_bar += part.sum(0)


def _inverse(U_inv: Tensor, H: Tensor, K: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
    r"""$HU'^{-1}$ and $U'^{-1} = A^{-1}U^{-1}$; by an n x n solve, or d x d where n is larger.

    $HA^{-1} = (I - HH^\top C)^{-1}H$ and $A^{-1} = I + H^\top C\,(HA^{-1})$, $C$ the diagonal of
    ``shrink``. A singular A gives infinities, which the caller sees in the norm.
    """
    n, d = H.shape
    if n <= d:
        system = torch.eye(n, dtype=H.dtype, device=H.device) - K * shrink[:, 0]
        moved = torch.linalg.solve_ex(system, H @ U_inv).result
        return moved, U_inv + H.T @ (shrink * moved)
    system = torch.eye(d, dtype=H.dtype, device=H.device) - H.T @ (shrink * H)
    inverse = torch.linalg.solve_ex(system, U_inv).result
    return H @ inverse, inverse


class _Moments(torch.autograd.Function):
    """o_c, s and q of a batch; backward leaves their slopes with the layer."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, y: Tensor, layer: FactoredOutput, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        Wc, HQ = layer.rows(y), h @ layer.Q
        ctx.layer, ctx.keep, ctx.at, ctx.w_bar = layer, keep, layer._steps, layer.w_bar.clone()
        ctx.save_for_backward(h, y, Wc, HQ)
        return (h * Wc).sum(1), h @ layer.w_bar, (h * HQ).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        lc, ls, lq = slopes
        h, y, Wc, HQ = ctx.saved_tensors
        if ctx.at != ctx.layer._steps:
            raise RuntimeError("backward: the layer was updated since this batch went forward")
        if ctx.keep:
            ctx.layer._pending.append((h.detach(), y, lc, ls, lq))
        grad = torch.outer(ls, ctx.w_bar) + 2 * lq[:, None] * HQ + lc[:, None] * Wc
        return grad, None, None, None


__all__ = ["FactoredOutput", "squared_form", "taylor_form", "z_form"]
