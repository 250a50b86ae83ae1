"""Sharpness-aware minimisation as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from workbench.lab import checks


class SAM(torch.optim.Optimizer):
    r"""Steps from $\theta$ with the gradient taken at the worst nearby point, to first order.

    $$\hat\epsilon=\rho\,\frac{T^2g}{\|Tg\|},\qquad
    \theta\leftarrow\mathrm{base}\bigl(\theta,\ \nabla L(\theta+\hat\epsilon)\bigr),\qquad
    g=\nabla L(\theta)$$

    with $T=I$, or $T=\mathrm{diag}|\theta|$ for ``adaptive=True`` (ASAM). Norms run over all
    parameters together. Each step calls the closure twice; $\theta$ itself is put back bit by bit
    in between, also when the second call fails or is interrupted.

    Args:
        params: parameters or parameter groups; ``rho`` and ``adaptive`` may differ by group.
        base: class of the optimizer that makes the step, or a function of (groups, **options).
        rho: radius; 0 gives the base optimizer at twice the price.
        adaptive: scale the radius of each weight by its size.
        **options: for the base optimizer (``lr``, ``momentum``, ...).

    Raises:
        TypeError: ``base`` makes no optimizer, ``step`` has no closure, or a gradient is sparse.
        ValueError: ``rho`` is negative, or the base optimizer refuses an option.

    Not included: batch norm's running statistics are updated by both passes, as by any two forward
    passes; the authors' code for ASAM adds 0.01 to |theta| and leaves biases unscaled.

    Reference:
        P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur, 2020, arXiv:2010.01412, Algorithm 1;
        J. Kwon, J. Kim, H. Park, I. Choi, 2021, arXiv:2102.11600, Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if not callable(base) or base is torch.optim.LBFGS:
            raise TypeError(
                "base: expected the class of an optimizer that steps by one gradient (LBFGS "
                f"evaluates the closure itself), got {base!r}"
            )
        checks.positive(rho, "rho", zero=True)
        super().__init__(params, {"rho": rho, "adaptive": bool(adaptive), **options})
        for group in self.param_groups:
            checks.positive(group["rho"], "rho", zero=True)
        self.base = base(self.param_groups, **options)
        if not isinstance(self.base, torch.optim.Optimizer):
            raise TypeError(f"base: expected an optimizer, made {type(self.base).__name__}")
        self.defaults = {**self.base.defaults, **self.defaults}
        self._share()

    def _share(self) -> None:
        """Groups and state are the base optimizer's, so schedulers and checkpoints see both."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` clears the gradients, runs backward and returns the loss.

        Returns:
            The closure's loss at theta (before the step).
        """
        if closure is None:
            raise TypeError("closure: SAM needs one, as it evaluates the gradient twice")
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        parameters, rises = self._climb()
        before = [parameter.clone() for parameter in parameters]
        try:
            if parameters:
                torch._foreach_add_(parameters, rises)
                evaluate()
        finally:
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
        self.base.step()
        return loss

    def _climb(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the way from each to the worst point."""
        parameters, scaled, factors, radii = [], [], [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise TypeError("params: SAM does not take sparse gradients")
                factor = parameter.abs() if group["adaptive"] else None
                parameters.append(parameter)
                factors.append(factor)
                scaled.append(gradient if factor is None else gradient * factor)
                radii.append(group["rho"])
        if not parameters:
            return [], []
        norms = [n.to(parameters[0].device, torch.float32) for n in torch._foreach_norm(scaled)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        rises = []
        for part, factor, radius in zip(scaled, factors, radii, strict=True):
            length = torch.where(norm > 0, radius / norm, 0.0).to(part)
            rises.append(part * length if factor is None else part * factor * length)
        return parameters, rises

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer; its groups also hold ``rho`` and ``adaptive``."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.base.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}  # type: ignore[no-untyped-call]
