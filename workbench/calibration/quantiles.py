r"""Quantile predictions: scores, order and conformal correction.

Throughout, `q` of shape (n, m) holds predictions of n targets at m rising levels u_1 < ... < u_m.

* pinball loss :math:`\rho_u(e) = \max(u e, (u - 1) e)` of :math:`e = y - q`
* weighted interval score: with :math:`\alpha_k = 2 u_k` the level of the k-th central interval
  :math:`[l_k, r_k]`,
  :math:`IS_k = (r_k - l_k) + \frac{2}{\alpha_k} (l_k - y)_+ + \frac{2}{\alpha_k} (y - r_k)_+` and
  :math:`WIS = \frac{2}{m} \big[ \frac12 |y - median| + \sum_k \frac{\alpha_k}{2} IS_k \big]`,
  which is twice the mean pinball loss.

NumPy in, NumPy out; tensors stay tensors (device, dtype, graph).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks

_CELLS = 4_000_000  # largest block of the isotonic projection's (rows, m, m) work array


def as_tensor(values: Any, name: str, ndim: int | tuple[int, ...]) -> Tensor:
    """Finite numbers as a tensor, in their own precision; an array's view is copied."""
    values = checks.as_floats(values, name, ndim=ndim)
    return values if checks.is_tensor(values) else torch.as_tensor(values.copy())


def as_levels(levels: Any, m: int | None = None) -> Tensor:
    """Levels as a float64 tensor (m,): rising, strictly between 0 and 1."""
    u = as_tensor(levels, "levels", 1).double().cpu()
    if u[0] <= 0 or u[-1] >= 1 or (u.diff() <= 0).any():
        raise ValueError("levels: expected rising numbers strictly between 0 and 1")
    if m is not None and len(u) != m:
        raise ValueError(f"levels: expected {m}, one a column of q, got {len(u)}")
    return u


def pairs(levels: Tensor) -> int:
    """Number of central intervals of symmetric levels; ValueError when they are not symmetric."""
    if not torch.allclose(levels + levels.flip(0), torch.ones_like(levels), atol=1e-6, rtol=0):
        raise ValueError("levels: expected symmetric ones, u and 1 - u both present")
    return len(levels) // 2


def pinball(
    q: Float[Tensor, "n m"], y: Float[Tensor, " n"], levels: Float[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """Pinball loss of every prediction at every level; the mean over levels is half the WIS.

    Args:
        q: predictions. y: targets. levels: rising, in (0, 1).
    """
    q, y, u, back = _given(q, y, levels)
    return back(_pinball(q, y, u))


def wis(
    q: Float[Tensor, "n m"], y: Float[Tensor, " n"], levels: Float[Tensor, " m"]
) -> Float[Tensor, " n"]:
    """Weighted interval score of each row, from the intervals (levels must be symmetric)."""
    q, y, u, back = _given(q, y, levels)
    k = pairs(as_levels(levels))
    low, high, half_alpha, y = q[:, :k], q.flip(1)[:, :k], u[:k], y[:, None]
    outside = (low - y).clamp_min(0) + (y - high).clamp_min(0)
    score = (half_alpha * (high - low) + outside).sum(1)
    if q.shape[1] % 2:
        score = score + (y - q[:, k : k + 1]).abs().sum(1) / 2
    return back(2 / q.shape[1] * score)


def crossing_penalty(q: Float[Tensor, "n m"], margin: Any = 1e-3) -> Float[Tensor, ""]:
    r"""How far quantiles are out of order, averaged over rows and over all pairs of levels.

    .. math:: \frac{2}{m(m-1)} \sum_{u < v} \big(q_u - q_v + \delta_{uv}\big)_+

    Args:
        margin: :math:`\delta`: one number for all pairs, or (m,) rising offsets d whose
            differences :math:`\delta_{uv} = d_v - d_u` are the margins (the released code takes
            quantiles of the residuals, times a scale).
    """
    back = _back(q)
    q = as_tensor(q, "q", 2)
    margin = as_tensor(margin, "margin", (0, 1)).to(q)
    if margin.ndim and len(margin) != q.shape[1]:
        raise ValueError(f"margin: expected a number or {q.shape[1]} of them, got {len(margin)}")
    if q.shape[1] < 2:
        raise ValueError("q: has one column; expected at least two levels")
    return back(_crossing(q, margin))


def isotonize(
    q: Float[Tensor, "n m"], how: str = "pava", *, strength: float = 0.1
) -> Float[Tensor, "n m"]:
    """Rows in rising order; differentiable, so it can stand inside a training loss.

    Args:
        q: predictions, possibly crossing.
        how: ``pava`` is the isotonic (least squares) projection, block means of q;
            ``sort`` sorts each row; ``minmax`` runs a maximum up and a minimum down from the
            median; ``soft`` is the soft sort, the projection of (1..m) / strength on the
            permutahedron of q, whose gradient mixes neighbours.
        strength: of the soft sort; 0 is the hard sort, infinity the mean.

    Returns:
        (n, m), for ``pava`` and ``sort`` with a WIS never above that of q.
    """
    back = _back(q)
    q = as_tensor(q, "q", 2)
    checks.one_of(how, _ORDERS, "how")
    strength = checks.positive(strength, "strength")
    return back(_soft_sort(q, strength) if how == "soft" else _ORDERS[how](q))


def cqr(
    q_calibration: Float[Tensor, "c m"],
    y_calibration: Float[Tensor, " c"],
    q: Float[Tensor, "n m"],
    levels: Float[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    r"""Conformalised quantile regression, one correction for each symmetric pair of levels.

    With scores :math:`E_i = \max(l(x_i) - y_i, y_i - r(x_i))` on calibration rows and
    :math:`Q` their :math:`\lceil (1 - \alpha)(c + 1) \rceil`-th smallest, the interval
    :math:`[l - Q, r + Q]` covers with probability at least :math:`1 - \alpha`. A median stays.

    Returns:
        (n, m) corrected predictions; they can cross: `isotonize` them.

    Raises:
        ValueError: too few calibration rows for the widest interval.
    """
    back = _back(q)
    qc, yc, u, _ = _given(q_calibration, y_calibration, levels, "q_calibration", "y_calibration")
    q = as_tensor(q, "q", 2).to(qc)
    if q.shape[1] != qc.shape[1]:
        raise ValueError(f"q: expected {qc.shape[1]} columns as q_calibration, got {q.shape[1]}")
    k = pairs(as_levels(levels))
    scores = _scores(qc, yc, k).sort(0).values
    rank = [_rank(1 - 2 * float(v), len(yc), "q_calibration") for v in u[:k].double()]
    shift = scores[torch.tensor(rank, dtype=torch.long), torch.arange(k)]
    full = torch.cat([-shift, q.new_zeros(q.shape[1] % 2), shift.flip(0)])
    return back(q + full)


def cv_plus(
    q_oof: Float[Tensor, "c m"],
    y: Float[Tensor, " c"],
    fold: Any,
    q_folds: Float[Tensor, "f n m"],
    levels: Float[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    r"""CV+ for each symmetric pair of levels: calibration without rows of its own.

    The lower end is the :math:`\lfloor \alpha (c + 1) \rfloor`-th smallest of
    :math:`l_{-k(i)}(x) - E_i` over training rows i, where :math:`l_{-k(i)}` was fitted without
    i's fold; the upper end mirrors it. Coverage is at least :math:`1 - 2\alpha` (nearly).

    Args:
        q_oof: out-of-fold predictions of the c training rows. y: their targets.
        fold: (c,) the fold each row was left out of, 0..f-1.
        q_folds: predictions of n new rows by the f models.

    Returns:
        (n, m); a median is the mean over the models.
    """
    back = _back(q_folds)
    qc, yc, u, _ = _given(q_oof, y, levels, "q_oof", "y")
    q = as_tensor(q_folds, "q_folds", 3).to(qc)
    fold = torch.as_tensor(checks.as_labels(fold, q.shape[0], "fold")).to(q.device)
    checks.same_length(q_oof=qc, fold=fold)
    if q.shape[2] != qc.shape[1]:
        raise ValueError(f"q_folds: expected {qc.shape[1]} levels as q_oof, got {q.shape[2]}")
    k, columns = pairs(as_levels(levels)), []
    scores = _scores(qc, yc, k)
    for i in range(k):
        rank = _rank(1 - 2 * float(u[i]), len(yc), "q_oof")
        low = (q[fold, :, i] - scores[:, i, None]).sort(0, descending=True).values[rank]
        high = (q[fold, :, -1 - i] + scores[:, i, None]).sort(0).values[rank]
        columns.append((low, high))
    middle = [q[:, :, k].mean(0)] if q.shape[2] % 2 else []
    low, high = [c[0] for c in columns], [c[1] for c in columns[::-1]]
    return back(torch.stack([*low, *middle, *high], 1))


# without checks, for loops that have checked already


def _pinball(q: Tensor, y: Tensor, u: Tensor) -> Tensor:
    error = y[:, None] - q
    return torch.maximum(u * error, (u - 1) * error)


def _crossing(q: Tensor, margin: Tensor) -> Tensor:
    low, high = torch.triu_indices(q.shape[1], q.shape[1], 1, device=q.device)
    delta = margin[high] - margin[low] if margin.ndim else margin
    return (q[:, low] - q[:, high] + delta).clamp_min(0).mean()


def _pava(q: Tensor) -> Tensor:
    """Isotonic projection by the minimax formula, max over j <= i of min over k >= i of mean(j..k).

    All rows and blocks at once; the gradient is the block mean's, because both extrema select.
    """
    n, m = q.shape
    crossing = (q.diff(dim=1) < 0).any(1)
    if not crossing.all():
        return q.index_put((crossing,), _pava(q[crossing])) if crossing.any() else q
    rows = max(1, _CELLS // m**2)
    if n > rows:
        return torch.cat([_pava(part) for part in q.split(rows)])
    centre = q.detach().mean(1, keepdim=True)  # keeps the running sums short
    total = torch.nn.functional.pad((q - centre).cumsum(1), (1, 0))
    i = torch.arange(m, device=q.device)
    length = i - i[:, None] + 1  # of the block j..k, row j, column k
    mean = (total[:, None, 1:] - total[:, :-1, None]) / length.clamp_min(1)
    mean = mean.masked_fill(length < 1, torch.inf)
    least = mean.flip(2).cummin(2).values.flip(2)  # over k >= i
    fit = least.masked_fill(length < 1, -torch.inf).amax(1) + centre
    return fit.cummax(1).values  # repairs the last bit of rounding


def _sort(q: Tensor) -> Tensor:
    return q.sort(1).values


def _minmax(q: Tensor) -> Tensor:
    middle = q.shape[1] // 2
    low = q[:, : middle + 1].flip(1).cummin(1).values.flip(1)
    return torch.cat([low[:, :-1], q[:, middle:].cummax(1).values], 1)


def _soft_sort(q: Tensor, strength: float = 0.1) -> Tensor:
    """Blondel et al. 2020: z - isotonic(z - sort(q)) with z = (1..m) / strength."""
    z = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.float64) / strength
    return (z - _pava(z - q.sort(1).values)).to(q.dtype)  # z dwarfs q: float32 would lose digits


_ORDERS: dict[str, Callable[..., Tensor]] = {
    "pava": _pava,
    "sort": _sort,
    "minmax": _minmax,
    "soft": _soft_sort,
}


def _scores(q: Tensor, y: Tensor, k: int) -> Tensor:
    return torch.maximum(q[:, :k] - y[:, None], y[:, None] - q.flip(1)[:, :k])


def _rank(coverage: float, n: int, name: str) -> int:
    """Index of the ceil(coverage (n + 1))-th smallest of n."""
    rank = math.ceil(coverage * (n + 1) - 1e-9)
    if rank > n:
        least = math.ceil(coverage / (1 - coverage))
        raise ValueError(
            f"{name}: {n} rows are too few for {coverage:.0%} coverage; expected at least {least}"
        )
    return rank - 1


def _back(given: Any) -> Callable[[Tensor], Any]:
    return (lambda t: t) if checks.is_tensor(given) else (lambda t: t.numpy())


def _given(
    q: Any, y: Any, levels: Any, q_name: str = "q", y_name: str = "y"
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Any]]:
    """Checked predictions, targets and levels as tensors of one kind, and the way back."""
    back = _back(q)
    q = as_tensor(q, q_name, 2)
    y = as_tensor(y, y_name, 1).to(q)
    checks.same_length(**{q_name: q, y_name: y})
    return q, y, as_levels(levels, q.shape[1]).to(q), back
