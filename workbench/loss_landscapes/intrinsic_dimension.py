r"""Train a network along a few random directions and count how many it needs.

All $D$ parameters are moved by only $d$ numbers,

$$\theta^{(D)} = \theta^{(D)}_0 + P\,\theta^{(d)}, \qquad
  \nabla_{\theta^{(d)}} L = P^\top \nabla_{\theta^{(D)}} L,$$

where $\theta_0$ is an ordinary initialisation and $P$ (D x d, columns of about unit length, about
orthogonal) is drawn once; both stay as they are, $\theta^{(d)}$ starts at 0. If the solutions form
a set of dimension $s$, a random flat of dimension $d$ meets it as soon as $d \ge D - s$: this
number is the *intrinsic dimension* of the problem. For networks the paper takes the smallest $d$
that reaches 90% of the accuracy of ordinary training, $d_{int90}$.

Three kinds of $P$: ``dense`` (Gaussian, columns divided by their length; $Dd$ numbers), ``sparse``
(signs at a fraction $1/\sqrt D$ of the places, columns divided by their length; $d\sqrt D$
numbers) and ``fastfood``,

$$P x = \frac{\big[\,H\,G\,\Pi\,H\,B\,\mathrm{pad}(x)\,\big]_{1..D}}
  {\sqrt{L \sum_i G_{ii}^2}\,\sqrt{D/L}}, \qquad L = 2^{\lceil \log_2 D\rceil},$$

with random signs $B$, a permutation $\Pi$, Gaussian $G$ and the Walsh-Hadamard matrix $H$ (all
L x L): $O(D \log D)$ time and $O(D)$ memory, whatever $d$ (`random_projections`). The first columns
of $P$ do not depend on $d$ (fastfood, dense): subspaces of one seed are nested.

Reference: Li, Farkhoor, Liu and Yosinski (2018), "Measuring the Intrinsic Dimension of Objective
Landscapes", arXiv 1804.08838; fastfood: Le, Sarlos and Smola (2013), arXiv 1408.3060.

*Not included*: reinforcement learning (their DQN and evolution runs need environments), ImageNet,
and the penalties on direct parameters of the authors' scripts (1e-4 or 1e-5), which act on the
projected weights and change no definition. The authors' sparse matrix takes its density from the
size of each layer's tensor; here it is $1/\sqrt D$ of the whole, as the paper says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import pad_sequence

from workbench.lab import checks, seeded
from workbench.loss_landscapes.random_projections import projection

# --- a network in a subspace ----------------------------------------------------------------------


class SubspaceModule(nn.Module):
    r"""Any network, trained along d fixed random directions; called like the network itself.

    ``parameters()`` is one vector ``theta`` (d,), so every optimiser and loop works unchanged. Tied
    parameters move together and count once; frozen ones (``requires_grad=False``) stay; batch-norm
    scales and shifts go through P like all others, running statistics are kept as buffers. The
    given module is copied, not changed.

    The state dict holds theta, the module's own buffers and a note of kind, D, d, seed and a digest
    of the initial weights: with `build` and `restore` a network is (seed, theta).

    Args:
        module: its present parameters are theta_0.
        d: directions, at most the number D of trainable parameters.
        kind: as of `projection`.
        seed: of P.

    Raises:
        ValueError: nothing to train, d above D, or a parameter is complex; the message names it.

    Reference: Li et al. (2018), arXiv 1804.08838, the subspace equation of section 2.
    """

    theta_0: Tensor

    def __init__(self, module: nn.Module, d: int, *, kind: str = "fastfood", seed: int = 0) -> None:
        super().__init__()
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("module: has no parameter with requires_grad=True")
        for name, p in trained.items():
            if not p.is_floating_point():
                raise ValueError(f"module: {name} is {p.dtype}; expected real floating point")
        wide = any(p.dtype == torch.float64 for p in trained.values())
        dtype = torch.float64 if wide else torch.float32
        device = next(iter(trained.values())).device
        self.kind, self.seed = kind, seed
        self.shapes = {n: (p.shape, p.dtype) for n, p in trained.items()}
        self.aliases = {
            alias: next(n for n, own in trained.items() if own is p)
            for alias, p in module.named_parameters(remove_duplicate=False)
            if p.requires_grad
        }
        flat = torch.cat([p.detach().flatten().to(dtype) for p in trained.values()])
        self.P = projection(len(flat), d, kind, seed, dtype=dtype).to(device)
        self.theta = nn.Parameter(torch.zeros(d, dtype=dtype, device=device))
        self.register_buffer("theta_0", flat, persistent=False)
        self.module = copy.deepcopy(module)
        for name, p in list(self.module.named_parameters(remove_duplicate=False)):
            owner, leaf = _owner(self.module, name)
            delattr(owner, leaf)
            owner.register_buffer(leaf, p.detach(), persistent=False)
        self.origin = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def build(
        cls, make: Callable[[], nn.Module], d: int, *, kind: str = "fastfood", seed: int = 0
    ) -> SubspaceModule:
        """The subspace of ``make()``, initialised and projected with one seed."""
        with seeded(seed):
            module = make()
        return cls(module, d, kind=kind, seed=seed)

    @classmethod
    def restore(cls, make: Callable[[], nn.Module], state: Mapping[str, Any]) -> SubspaceModule:
        """The network that `build` made, from its state dict; ``make`` as it was then.

        Raises:
            ValueError: ``make`` gives other initial weights than at the time.
        """
        note = _decode(state["_extra_state"])
        found = cls.build(make, note["d"], kind=note["kind"], seed=note["seed"])
        found.load_state_dict(state)
        return found

    def weights(self) -> dict[str, Tensor]:
        """The parameters at the present theta, by name, in their own dtypes; differentiable."""
        flat = self.theta_0 + self.P(self.theta)
        parts = flat.split([shape.numel() for shape, _ in self.shapes.values()])
        named = {
            name: part.view(shape).to(dtype)
            for (name, (shape, dtype)), part in zip(self.shapes.items(), parts, strict=True)
        }
        return {alias: named[name] for alias, name in self.aliases.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network answers with its parameters at the present theta."""
        return functional_call(self.module, self.weights(), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """An ordinary network with the present parameters, to use without this class."""
        module = copy.deepcopy(self.module)
        made: dict[str, nn.Parameter] = {}
        for alias, value in self.weights().items():
            own = self.aliases[alias]
            made.setdefault(own, nn.Parameter(value.clone()))
            owner, leaf = _owner(module, alias)
            delattr(owner, leaf)
            setattr(owner, leaf, made[own])
        return module

    def get_extra_state(self) -> Tensor:
        """What theta alone does not say, as bytes in a tensor, so that safetensors can hold it."""
        note = {"kind": self.kind, "D": self.P.D, "d": self.P.d, "seed": self.seed}
        text = json.dumps(note | {"origin": self.origin})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a theta that belongs to other weights or another P."""
        own, other = _decode(self.get_extra_state()), _decode(state)
        for key in own:
            if own[key] != other.get(key):
                raise ValueError(f"state: its {key} is {other.get(key)!r}, here it is {own[key]!r}")


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _decode(state: Tensor) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(bytes(state.tolist())))


# --- measuring ------------------------------------------------------------------------------------


def d_int(
    accs: Mapping[int, float], baseline: float, frac: float = 0.9, *, between: bool = False
) -> float:
    r"""Smallest d that reaches ``frac`` of the baseline, $\min\{d : a(d) \ge f\,a_{base}\}$.

    Args:
        accs: accuracy by number of directions.
        baseline: accuracy of ordinary training.
        frac: share of it that counts as a solution; the paper's 0.9.
        between: interpolate linearly in log d between the two neighbours of the crossing, for a
            grid that is coarser than the answer wanted.

    Returns:
        The dimension; inf when no d of the grid reaches it.

    Raises:
        ValueError: ``accs`` is empty or holds no numbers, ``baseline`` or ``frac`` is not positive.

    Reference: Li et al. (2018), arXiv 1804.08838, section 3, d_int90.
    """
    if not accs:
        raise ValueError("accs: is empty; expected an accuracy for at least one d")
    target = checks.positive(baseline, "baseline") * checks.positive(frac, "frac")
    dims = sorted(checks.count(d, "d") for d in accs)
    values = [checks.number(accs[d], f"accs[{d}]") for d in dims]
    first = next((i for i, value in enumerate(values) if value >= target), None)
    if first is None:
        return math.inf
    if first == 0 or not between:
        return float(dims[first])
    share = (target - values[first - 1]) / (values[first] - values[first - 1])
    return float(dims[first - 1] * (dims[first] / dims[first - 1]) ** share)


@dataclass(frozen=True)
class Toy:
    """A problem whose solutions are known: D numbers in equal groups, group g must sum to g.

    Attributes:
        A: (groups, D) membership; the loss of theta is ``|A theta - target|^2``.
        target: (groups,) the sums wanted, 1, 2, ...
    """

    A: Float[Tensor, "groups D"]
    target: Float[Tensor, " groups"]

    @property
    def dimension(self) -> int:
        """Dimension of the set of solutions, D less the number of independent equations."""
        return self.A.shape[1] - int(torch.linalg.matrix_rank(self.A))

    def loss(self, theta: Float[Tensor, "*k D"]) -> Float[Tensor, "*k"]:
        """Sum over groups of (g - sum of the group)^2."""
        return (theta @ self.A.T - self.target).square().sum(-1)

    def lowest(self, P: Float[Tensor, "D d"], theta_0: Float[Tensor, " D"]) -> float:
        """Lowest loss on the flat ``theta_0 + P x``, by least squares."""
        x = torch.linalg.lstsq(self.A @ P, self.target - self.A @ theta_0, driver="gelsd").solution
        return float(self.loss(theta_0 + P @ x))


def toy_quadratic(D: int = 1000, groups: int = 10) -> Toy:
    r"""The paper's first example: intrinsic dimension exactly ``groups``.

    From a Gaussian start the residual is cut down by a random d-dimensional subspace of the
    ``groups``-dimensional space of sums, so $E[\min L] = (1 - d/\text{groups})\,L(\theta_0)$ for
    $d < \text{groups}$, and 0 from there on.

    Args:
        D: parameters, a multiple of ``groups``.
        groups: equations.

    Raises:
        ValueError: D is not a multiple of ``groups``.

    Reference: Li et al. (2018), arXiv 1804.08838, section 2.
    """
    D, groups = checks.count(D, "D"), checks.count(groups, "groups")
    if D % groups:
        raise ValueError(f"D: expected a multiple of groups = {groups}, got {D}")
    A = torch.eye(groups, dtype=torch.float64).repeat_interleave(D // groups, 1)
    return Toy(A, torch.arange(1, groups + 1, dtype=torch.float64))


# --- training a whole sweep at once ---------------------------------------------------------------


def train_subspaces(
    module: nn.Module,
    dims: Sequence[int],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    kind: str = "fastfood",
    seed: int = 0,
    lr: float | Mapping[int, float] = 0.03,
    steps: int = 400,
    batch_size: int = 128,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[int, float]:
    """Train one network in nested subspaces of several dimensions, side by side.

    All members start at the module's present parameters and see the same batches. One transform
    with a batch axis serves them all: the subspace of d is spanned by the first d columns. Adam
    with the authors' betas (.9, .99); the learning rate falls linearly to zero.

    Args:
        module: classifier without batch statistics or dropout (those: `SubspaceModule`).
        dims: directions of each member; ``[D]`` with ``kind="full"`` is ordinary training.
        train: inputs and labels.
        test: inputs and labels of the accuracy.
        kind: as of `projection`.
        seed: of P and of the order of the batches.
        lr: of all members, or by dimension.
        steps: updates.
        batch_size: rows an update.
        loss_fn: of logits and labels.

    Returns:
        Test accuracy by dimension.

    Raises:
        ValueError: the module has batch statistics or dropout, or an argument is out of range.
    """
    _refuse_state(module)
    steps = checks.count(steps, "steps")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    start = torch.cat([p.detach().flatten() for p in trained.values()])
    dims = [checks.count(d, "dims") for d in dims]
    P = projection(len(start), max(dims), kind, seed, dtype=start.dtype).to(start.device)
    thetas = [start.new_zeros(d).requires_grad_() for d in dims]
    rates = [lr[d] if isinstance(lr, Mapping) else lr for d in dims]
    groups = [{"params": [t], "lr": r} for t, r in zip(thetas, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def answers(flat: Tensor, x: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in trained.values()])
        named = {n: v.view(p.shape) for (n, p), v in zip(trained.items(), parts, strict=True)}
        return cast(Tensor, functional_call(module, named, (x,)))

    def members() -> Tensor:
        return start + P(pad_sequence(thetas, batch_first=True))

    x, y = train
    n = checks.same_length(x=x, y=y)
    generator = torch.Generator().manual_seed(seed)
    size, order = min(batch_size, n), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator).to(x.device)
        rows, order = order[:size], order[size:]
        logits = vmap(answers, (0, None))(members(), x[rows])
        loss = vmap(loss_fn, (0, None))(logits, y[rows]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        flat = members()
        right = sum(
            (vmap(answers, (0, None))(flat, part).argmax(-1) == label).sum(1)
            for part, label in zip(test[0].split(1024), test[1].split(1024), strict=True)
        )
    return dict(zip(dims, (cast(Tensor, right) / len(test[1])).tolist(), strict=True))


def _refuse_state(module: nn.Module) -> None:
    for name, part in module.named_modules():
        statistics = isinstance(part, _NormBase) and part.track_running_stats
        if statistics or (isinstance(part, _DropoutNd) and part.p > 0):
            raise ValueError(
                f"module: {name or type(part).__name__} keeps running statistics or drops units, "
                "which members cannot share; train a SubspaceModule for each dimension"
            )


def sweep(
    train: Callable[[int], float],
    dims: Sequence[int],
    file: str | Path,
    *,
    baseline: float | None = None,
    frac: float = 0.9,
    note: str = "",
) -> dict[int, float]:
    """Train upward in d and write each accuracy as soon as it is there; a killed sweep resumes.

    Args:
        train: accuracy of a training in d directions.
        dims: dimensions to try, in rising order.
        file: JSON file, replaced as a whole after each training; what it holds is not repeated.
        baseline: with it the sweep ends at the first d that reaches ``frac`` of it.
        frac: as of `d_int`.
        note: what is being trained; a file with another note is refused.

    Returns:
        Accuracy by dimension, as far as trained.

    Raises:
        ValueError: the file belongs to another sweep.
    """
    file = Path(file)
    kept: dict[str, Any] = {"note": note, "accs": {}}
    if file.exists():
        kept = json.loads(file.read_text("utf8"))
    if kept["note"] != note:
        raise ValueError(f"file: {file} is of another sweep ({kept['note']!r}, not {note!r})")
    accs = {int(d): float(acc) for d, acc in kept["accs"].items()}
    for d in sorted(dims):
        if d not in accs:
            accs[d] = float(train(d))
            part = file.with_name(file.name + ".part")
            part.write_text(json.dumps({"note": note, "accs": accs}), "utf8")
            os.replace(part, file)
        if baseline is not None and accs[d] >= frac * baseline:
            break
    return {d: accs[d] for d in sorted(accs)}
