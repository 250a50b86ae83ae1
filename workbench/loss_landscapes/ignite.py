r"""Offline optimisation with a surrogate whose prediction does not depend on a lucky weight.

You hold designs $x_i$ with measured values $y_i$ and may not measure any more. A surrogate
$g_\omega$ is fitted to them and its input is moved uphill. The surrogate is least reliable where it
promises most, so IGNITE asks for one more thing while fitting: its mean prediction on a batch,

$$h(\omega) = \frac1{|B|}\sum_{x\in B} g_\omega(x),$$

must not rise much when the weights are perturbed,

$$\max_{\|\delta\|\le\rho} h(\omega+\delta) - h(\omega)
  \approx \rho\,\|\nabla h(\omega)\| \le \epsilon.$$

With a multiplier $\lambda\ge0$ the fit descends $L(\omega) + \lambda(\rho\|\nabla h\| - \epsilon)$.
The gradient of the norm is $\nabla^2 h\,\nabla h / \|\nabla h\|$, a derivative of $\nabla h$ along
itself, which one more gradient of $h$ gives to first order in $r$:

$$\nabla L + \lambda\,\frac\rho r\Bigl[\nabla h\Bigl(\omega + r\,\frac{\nabla h}{\|\nabla h\|}\Bigr)
  - \nabla h(\omega)\Bigr].$$

**IGNITE** moves the multiplier after every batch,
$\lambda \leftarrow \lambda + \eta_\lambda(\rho\|\nabla h\| - \epsilon)$; **IGNITE-2** keeps it.
It is not SAM: SAM perturbs the weights to raise the *loss*, IGNITE to raise the *prediction*.

A multiplier of an inequality is not negative, and `clip=True` keeps it so; the released code does
not, and where the constraint is slack it ends up rewarding sharpness (`clip=False`). The output
bias alone has derivative 1 in $h$, so $\|\nabla h\|\ge1$ and no surrogate with a free output bias
meets $\epsilon < \rho$.

Reference: Dao, Nguyen, Truong and Hoang (2024), "Incorporating Surrogate Gradient Norm to Improve
Offline Optimization Techniques", NeurIPS, arXiv 2503.04242; values marked *released* are those of
the authors' scripts for gradient ascent.

*Not included*: the generalisation bound for the surrogate's sharpness, a statement about unseen
data with nothing to compute; the other optimisers that the paper equips (COMs, CbAS, MINs,
REINFORCE, CMA-ES, BO-qEI), which take the same gradient: fit their model with `Ignite`; ensembles
of surrogates, whose released "mean" takes the minimum: `ascend` climbs whichever you write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from workbench.lab import checks, models

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Mean: TypeAlias = Callable[[Tensor], Tensor]

DUAL = {"lam": 1e-3, "rho": 0.05, "r": 0.05, "eps": 0.1, "eta": 1e-3}
"""Released values of IGNITE for gradient ascent."""

FIXED = {"lam": 1e-2, "rho": 0.2, "r": 0.2, "eta": 0.0}
"""Released values of IGNITE-2 for gradient ascent."""


class GaussianMLP(nn.Module):
    """The paper's surrogate: two hidden layers and a normal distribution as output.

    The logarithm of the standard deviation is squeezed softly between two learned bounds, which
    start at ``std``. The activation is a leaky ReLU of slope 0.3 and the initialisation that of
    the authors' framework (Glorot, biases 0).

    Args:
        inputs: numbers of a design.
        width: units of a hidden layer.
        depth: hidden layers.
        std: lower and upper bound of the standard deviation at the start, in units of y.

    Reference: Dao et al. (2024), arXiv 2503.04242, released surrogate.
    """

    def __init__(
        self, inputs: int, width: int = 2048, depth: int = 2, std: tuple[float, float] = (0.1, 0.2)
    ) -> None:
        super().__init__()
        sizes = [checks.count(inputs, "inputs"), *[checks.count(width, "width")] * depth, 2]
        self.net = models.MLP(sizes, act=lambda: nn.LeakyReLU(0.3))
        for layer in self.net.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        low, high = (float(np.log(checks.positive(s, "std"))) for s in std)
        if not low < high:
            raise ValueError(f"std: expected a lower and an upper bound, got {std}")
        self.low, self.high = nn.Parameter(torch.tensor(low)), nn.Parameter(torch.tensor(high))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """Mean and logarithm of the standard deviation."""
        mean, log_std = self.net(x).unbind(-1)
        log_std = self.high - F.softplus(self.high - log_std)
        log_std = self.low + F.softplus(log_std - self.low)
        return torch.stack([mean, log_std], -1)


def gaussian_nll(output: Float[Tensor, "b 2"], y: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    r"""Mean of $\tfrac12((y-\mu)/\sigma)^2 + \ln\sigma + \tfrac12\ln2\pi$, from (mu, ln sigma)."""
    mean, log_std = output.unbind(-1)
    return (0.5 * ((y - mean) * (-log_std).exp()) ** 2 + log_std).mean() + 0.5 * np.log(2 * np.pi)


def first_output(output: Tensor) -> Tensor:
    """The predicted value of scalar heads, (b,) or (b, 1), and of heads that put the mean first."""
    return output[..., 0] if output.ndim > 1 else output


class IgniteGrad(NamedTuple):
    """Gradients in the order of the trainable parameters; loss and norm of the gradient of h."""

    grads: list[Tensor]
    loss: Tensor
    norm: Tensor


def ignite_grad(
    model: nn.Module,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    *,
    lam: float,
    rho: float = 0.05,
    r: float | None = None,
    mean: Mean = first_output,
) -> IgniteGrad:
    r"""Gradient of the fit with the sharpness of the prediction held down.

    $$\nabla L + \lambda\frac\rho r\bigl[\nabla h(\omega + r\nabla h/\|\nabla h\|)
      - \nabla h(\omega)\bigr]$$

    The model's parameters are never written to: its second evaluation takes the perturbed weights
    as arguments, with the same dropout masks and with copies of the buffers.

    Args:
        model: surrogate; parameters that do not require a gradient stay out, tied ones count once.
        loss_fn: ``loss_fn(model(x), y)``, a scalar.
        x: designs, shape (b, \*d).
        y: values, shape (b,) or what ``loss_fn`` takes.
        lam: multiplier; 0 gives the gradient of the loss, bit for bit.
        rho: radius of the perturbation that the constraint speaks of.
        r: length of the step of the finite difference; ``rho`` by default, as released.
        mean: predicted values (b,) from the model's output.

    Returns:
        Gradients, loss and $\|\nabla h\|$.

    Raises:
        ValueError: nothing is trainable, a number is out of range, or ``mean`` returns another
            shape.

    Reference: Dao et al. (2024), arXiv 2503.04242, the gradient of the Lagrangian.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model: has no trainable parameter")
    checks.positive(rho, "rho")
    r = checks.positive(rho if r is None else r, "r")
    noise = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    output = model(x)
    loss = loss_fn(output, y)
    if loss.ndim:
        raise ValueError(f"loss_fn: expected a scalar, got shape {tuple(loss.shape)}")

    def shifted(moved: list[Tensor]) -> Tensor:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.set_rng_state(noise[0])
            if noise[1] is not None:
                torch.cuda.set_rng_state(noise[1], x.device)
            state = dict(zip(named, moved, strict=True)) | buffers
            return _average(mean(functional_call(model, state, (x,))), x)

    return _penalised(list(named.values()), loss, _average(mean(output), x), shifted, lam, rho, r)


def ignite_grad_stacked(
    model: nn.Module,
    params: dict[str, Tensor],
    loss_fn: Loss,
    x: Float[Tensor, "m b *d"],
    y: Float[Tensor, "m b"],
    *,
    lam: float | Float[Tensor, " m"],
    rho: float | Float[Tensor, " m"] = 0.05,
    r: float | Float[Tensor, " m"] | None = None,
    mean: Mean = first_output,
) -> IgniteGrad:
    """`ignite_grad` of many surrogates of one architecture at once, each on its own batch.

    Args:
        model: the architecture; its own parameters are not used.
        params: from `torch.func.stack_module_state`, one leading axis of m surrogates.
        loss_fn: as for `ignite_grad`, of one surrogate.
        x: designs, shape (m, b, \\*d).
        y: values, shape (m, b).
        lam, rho, r: one each or one for all; ``r`` is ``rho`` by default.
        mean: as for `ignite_grad`.

    Returns:
        Gradients in the order of ``params``, losses (m,), norms (m,).
    """
    forward = torch.vmap(lambda state, inputs: functional_call(model, state, (inputs,)))
    output = forward(params, x)
    loss = torch.vmap(loss_fn)(output, y)

    def shifted(moved: list[Tensor]) -> Tensor:
        return torch.vmap(mean)(forward(dict(zip(params, moved, strict=True)), x)).mean(1)

    h = torch.vmap(mean)(output).mean(1)
    return _penalised(list(params.values()), loss, h, shifted, lam, rho, rho if r is None else r)


def _penalised(
    params: list[Tensor],
    loss: Tensor,
    h: Tensor,
    shifted: Callable[[list[Tensor]], Tensor],
    lam: Any,
    rho: Any,
    r: Any,
) -> IgniteGrad:
    """The gradient; with a leading axis of members the gradient of a sum is each member's own."""
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    of_loss = torch.autograd.grad(loss.sum(), params, retain_graph=True, **options)
    of_h = torch.autograd.grad(h.sum(), params, **options)
    norm = sum(g.reshape(*h.shape, -1).square().sum(-1) for g in of_h).sqrt()  # type: ignore[union-attr]
    step = r / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    moved = [
        (p + _leading(step, g) * g).detach().requires_grad_()
        for p, g in zip(params, of_h, strict=True)
    ]
    of_moved = torch.autograd.grad(shifted(moved).sum(), moved, **options)
    factor = torch.as_tensor(lam * rho / r, dtype=norm.dtype, device=norm.device)
    grads = [
        a + _leading(factor, a) * (c - b) for a, b, c in zip(of_loss, of_h, of_moved, strict=True)
    ]
    return IgniteGrad(grads, loss.detach(), norm.detach())


def _leading(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of the members, to be multiplied with one of their parameters."""
    return values.to(like.dtype).reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _average(prediction: Tensor, x: Tensor) -> Tensor:
    if prediction.shape != x.shape[:1]:
        raise ValueError(
            f"mean: expected one value a design, shape ({len(x)},), got {tuple(prediction.shape)}"
        )
    return prediction.mean()


def dual_step(lam: Any, norm: Any, *, rho: Any, eps: Any, eta: Any, clip: bool = True) -> Any:
    r"""$\lambda + \eta_\lambda(\rho\|\nabla h\| - \epsilon)$, not below 0 with ``clip``.

    Takes numbers or tensors of many multipliers. ``clip=False`` is the released code.

    Reference: Dao et al. (2024), arXiv 2503.04242, dual step of the algorithm.
    """
    moved = lam + eta * (rho * norm - eps)
    if not clip:
        return moved
    return moved.clamp(min=0) if isinstance(moved, Tensor) else max(moved, 0.0)


class Ignite:
    """One step of training at a time, in your own loop and with your own optimiser.

    Args:
        model: surrogate.
        optimizer: over its parameters.
        loss_fn: ``loss_fn(model(x), y)``, a scalar.
        lam: multiplier at the start.
        rho, r, mean: as for `ignite_grad`.
        eps: allowed rise of the mean prediction, in units of y.
        eta: step of the multiplier; 0 keeps it, which is IGNITE-2.
        clip: keep the multiplier at 0 or above; the released code does not.

    Attributes:
        lam: the present multiplier.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss = gaussian_nll,
        *,
        lam: float = 1e-3,
        rho: float = 0.05,
        r: float | None = None,
        eps: float = 0.1,
        eta: float = 1e-3,
        clip: bool = True,
        mean: Mean = first_output,
    ) -> None:
        self.model, self.optimizer, self.loss_fn, self.mean = model, optimizer, loss_fn, mean
        self.lam = checks.number(lam, "lam")
        self.rho = checks.positive(rho, "rho")
        self.r = checks.positive(rho if r is None else r, "r")
        self.eps = checks.positive(eps, "eps")
        self.eta = checks.positive(eta, "eta", zero=True)
        self.clip = clip

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Fit one batch, move the multiplier; returns ``loss``, ``sharpness``, ``lam`` used."""
        found = ignite_grad(
            self.model, self.loss_fn, x, y, lam=self.lam, rho=self.rho, r=self.r, mean=self.mean
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p, g in zip(trained, found.grads, strict=True):
            p.grad = g
        self.optimizer.step()
        norm, used = float(found.norm), self.lam
        self.lam = dual_step(used, norm, rho=self.rho, eps=self.eps, eta=self.eta, clip=self.clip)
        return {"loss": float(found.loss), "sharpness": self.rho * norm, "lam": used}


def train_surrogate(
    model: nn.Module,
    x: Float[Tensor, " b *d"],
    y: Float[Tensor, " b"],
    *,
    ignite: str | None = "dual",
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    loss_fn: Loss = gaussian_nll,
    generator: torch.Generator | int | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Fit a surrogate in place with Adam, plainly or with either form of IGNITE.

    Args:
        model: surrogate; left in evaluation mode.
        x: designs, normalised.
        y: values, normalised.
        ignite: "dual" (`DUAL`), "fixed" (`FIXED`) or None for the plain fit.
        epochs: passes over the data, in new order each.
        batch_size: designs a batch; the last, smaller one of an epoch is used too.
        lr: step size of Adam.
        loss_fn: ``loss_fn(model(x), y)``.
        generator: of the order of the designs.
        settings: of `Ignite`, instead of the released ones.

    Returns:
        Per step ``loss``, ``sharpness`` (the norm of the gradient of h times ``rho``), ``lam``.
    """
    checks.same_length(x=x, y=y)
    kind = checks.one_of(ignite, ("dual", "fixed", None), "ignite")
    released = {"dual": DUAL, "fixed": FIXED, None: {"lam": 0.0, "eta": 0.0}}[kind]
    generator = checks.as_generator(generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    trainer = Ignite(model, optimizer, loss_fn, **{**released, **settings})
    model.train()
    rows = []
    for _ in range(checks.count(epochs, "epochs")):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        rows += [trainer.step(x[part], y[part]) for part in order.split(batch_size)]
    model.eval()
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def ascend(
    predict: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*m b d"],
    *,
    steps: int = 200,
    lr: Any = 0.01,
    bounds: tuple[Any, Any] | None = None,
) -> Float[Tensor, "t *m b d"]:
    r"""Move designs uphill on a surrogate, $x \leftarrow x + \eta\sqrt d\,\nabla_x g(x)$.

    Args:
        predict: values of designs, one each: ``lambda x: first_output(model(x))``. Leading axes
            may hold many surrogates, each with its own designs.
        x: designs to start from, normalised; the paper takes the 128 best of the offline data.
        steps: number of steps; fix it beforehand, the true function must not choose it.
        lr: step size before the factor $\sqrt d$; a tensor is broadcast against ``x``.
        bounds: lowest and highest values that a design can have, in the units of ``x``; each step
            ends inside. None, as in the paper, lets designs leave the range of the data.

    Returns:
        The designs before the first and after every step, shape (steps + 1, \*m, b, d).

    Reference: Dao et al. (2024), arXiv 2503.04242, gradient ascent as released.
    """
    size = lr * x.shape[-1] ** 0.5
    path = [x.detach()]
    for _ in range(checks.count(steps, "steps", minimum=0)):
        here = path[-1].requires_grad_()
        (gradient,) = torch.autograd.grad(predict(here).sum(), here)
        moved = here.detach() + size * gradient
        path[-1] = here.detach()
        path.append(moved if bounds is None else torch.clamp(moved, *bounds))
    return torch.stack(path)


def score(
    values: Any, low: float, high: float, percentiles: Sequence[float] = (100, 50)
) -> dict[float, float]:
    r"""Percentiles of $(y - y_{\min})/(y_{\max} - y_{\min})$ over the proposed designs.

    Args:
        values: true values of the designs, shape (b,).
        low: lowest value of the whole data set, the hidden part included.
        high: highest value of it; a score above 1 is better than anything measured.
        percentiles: 100 is the best design, 50 the median one.

    Reference: Dao et al. (2024), arXiv 2503.04242, evaluation.
    """
    values = checks.to_numpy(checks.as_floats(values, "values", ndim=1))
    if not high > low:
        raise ValueError(f"low and high: expected low < high, got {low:g} and {high:g}")
    return {p: float((np.percentile(values, p) - low) / (high - low)) for p in percentiles}


@dataclass(frozen=True)
class Proposal:
    """Designs found by `propose`.

    Attributes:
        x: designs, in your units, shape (b, d).
        predicted: what the surrogate promises for them, in your units, shape (b,).
        history: of training, from `train_surrogate`.
    """

    x: np.ndarray
    predicted: np.ndarray
    history: dict[str, np.ndarray]


def propose(
    x: Any,
    y: Any,
    *,
    designs: int = 128,
    steps: int = 200,
    lr: float = 0.01,
    bounds: tuple[Any, Any] | None = None,
    width: int = 2048,
    generator: torch.Generator | int | None = None,
    **training: Any,
) -> Proposal:
    """Better designs from a table of designs and values, by the paper's recipe from end to end.

    Normalises both to mean 0 and deviation 1, fits a `GaussianMLP` and ascends.

    Args:
        x: designs, shape (b, d).
        y: values to be raised, shape (b,).
        designs: rows to start from.
        steps, lr: of `ascend`.
        bounds: lowest and highest designs, numbers or shape (d,), in your units.
        width: of the surrogate.
        generator: of initial weights and batches.
        training: more of `train_surrogate`, such as ``ignite`` and ``epochs``.

    Raises:
        ValueError: shapes differ, or a column of x does not vary.
    """
    X = np.asarray(checks.to_numpy(checks.as_floats(x, "x", ndim=2)), np.float32)
    Y = np.asarray(checks.to_numpy(checks.as_floats(y, "y", ndim=1)), np.float32)
    checks.same_length(x=X, y=Y)
    middle, spread = X.mean(0), X.std(0)
    if not (spread > 0).all():
        raise ValueError(f"x: column {int((spread == 0).argmax())} does not vary; leave it out")
    if not Y.std() > 0:
        raise ValueError("y: does not vary, so that no design is better than another")
    generator = checks.as_generator(generator)
    inputs = torch.from_numpy((X - middle) / spread)
    targets = torch.from_numpy((Y - Y.mean()) / Y.std())
    with torch.random.fork_rng([]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model = GaussianMLP(X.shape[1], width)
    history = train_surrogate(model, inputs, targets, generator=generator, **training)
    box = None
    if bounds is not None:
        low, high = (torch.as_tensor((np.asarray(b, np.float32) - middle) / spread) for b in bounds)
        box = low, high
    best = targets.topk(min(checks.count(designs, "designs"), len(Y))).indices

    def predict(z: Tensor) -> Tensor:
        return first_output(model(z))

    path = ascend(predict, inputs[best], steps=steps, lr=lr, bounds=box)
    with torch.no_grad():
        promised = predict(path[-1]).numpy() * Y.std() + Y.mean()
    return Proposal(path[-1].numpy() * spread + middle, promised, history)
