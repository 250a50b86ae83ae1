r"""Chinchilla's fit the ordinary way, and where it stops.

`lbfgsb` minimises the objective of Hoffmann et al. with SciPy's optimiser and its stopping rules.
These are absolute: a mean of terms as small as Huber's function of log residuals with threshold
$10^{-3}$ meets them far from the minimum. The published constants (`HOFFMANN`) come from such a
stop; Besiroglu et al. found the minimum. To fit, use `fit_law`.

References: Hoffmann et al. (2022), arXiv 2203.15556, approach 3; Besiroglu, Erdil, Barnett and You
(2024), "Chinchilla Scaling: A replication attempt", arXiv 2404.10102.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.lab import checks
from workbench.scaling_laws.laws import LAWS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LAW = LAWS["chinchilla"]
NAMES = LAW.parameters  # A, B, E, alpha, beta

HOFFMANN = dict(
    zip(
        NAMES,
        (*np.exp([6.0073404, 6.0179186, 0.5267228]).tolist(), 0.33917084, 0.2849083),
        strict=True,
    )
)
"""Chinchilla's published law before rounding (A, B, E are exponentials of the fitted a, b, e)."""


@dataclass(frozen=True)
class Stopped:
    """Where `lbfgsb` stopped.

    Attributes:
        params: natural parameters there.
        objective: the unscaled **sum** of Huber's function there.
        iterations: until it stopped.
        success: whether the optimiser reported convergence.
        path: (iterations + 1, 5) parameters ``theta`` along the way.
        values: (iterations + 1,) unscaled sums along the way.
    """

    params: dict[str, float]
    objective: float
    iterations: int
    success: bool
    path: np.ndarray
    values: np.ndarray


def lbfgsb(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    start: Mapping[str, float],
    *,
    scale: float = 1.0,
    ftol: float = 2.220446049250313e-09,
    gtol: float = 1e-05,
    delta: float = 1e-3,
    maxiter: int = 15_000,
) -> Stopped:
    r"""Chinchilla's fit by SciPy's L-BFGS-B: $\min_\theta s \sum_i \mathrm{Huber}_\delta(r_i)$.

    The residual is $r_i = \ln \hat L_i - \ln L_i$. With $\delta = 10^{-3}$ a term is about $\delta
    |r| \approx 10^{-5}$, its gradient no larger; the stopping rules (largest gradient below
    ``gtol``, decrease below ``ftol`` times $\max(1, \text{objective})$) are absolute. A mean
    ($s = 1/n$) of such terms meets them far from the minimum.

    Args:
        N, D, loss: (n,) each.
        start: natural parameters.
        scale: s; 1 is the sum, 1/n the mean.
        ftol, gtol, maxiter: of ``scipy.optimize.minimize``, here with its defaults.
        delta: threshold of Huber's function.

    Raises:
        ValueError: the columns differ in length.

    Reference: Besiroglu et al. (2024), arXiv 2404.10102, section 3 and appendix.
    """
    from scipy.optimize import minimize

    columns = {"N": N, "D": D, "loss": loss}
    arrays = {
        q: torch.tensor(checks.to_numpy(checks.as_floats(v, q, ndim=1)), dtype=torch.float64)
        for q, v in columns.items()
    }
    checks.same_length(**arrays)
    bound = LAW.bind(arrays, arrays["loss"].log())
    row = torch.zeros(1, dtype=torch.long)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(x)[None]
        r, memo = bound.evaluate(theta, row)
        slope = r.clamp(-delta, delta)
        cost = (slope * (r - 0.5 * slope)).sum()
        gradient, _ = bound.normal(theta, memo, row, slope, torch.zeros_like(slope))
        return scale * float(cost), scale * gradient[0].numpy()

    path = [LAW.internal(start).numpy()]
    found = minimize(
        value, path[0], jac=True, method="L-BFGS-B",
        callback=lambda x: path.append(np.array(x)),
        options={"ftol": ftol, "gtol": gtol, "maxiter": maxiter, "maxfun": 10 * maxiter},
    )  # fmt: skip
    natural = LAW.natural(torch.tensor(found.x)).tolist()
    values = np.array([value(x)[0] / scale for x in path])
    return Stopped(
        dict(zip(NAMES, natural, strict=True)), float(found.fun / scale), int(found.nit),
        bool(found.success), np.array(path), values,
    )  # fmt: skip
