"""Offline tasks with a known truth, and surrogates of many kinds trained on them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from workbench.lab import seeded
from workbench.loss_landscapes.experiments.ignite_tasks import OfflineTask, offline_task
from workbench.loss_landscapes.ignite import (
    DUAL,
    FIXED,
    GaussianMLP,
    ascend,
    dual_step,
    first_output,
    gaussian_nll,
    ignite_grad_stacked,
    score,
)

TEST = ("branin5", "hartmann6", "rbf8", "airfoil")
DEVELOPMENT = ("styblinski5", "rbf6")
ALL = (*TEST, "rbf16", "winequality_white", "compactiv", "kmer8")

SETTINGS: dict[str, list[dict[str, float]]] = {
    "plain": [{"share": 1.0}, {"share": 2 / 3}, {"share": 1 / 3}],
    "decay": [{"decay": 0.01}, {"decay": 0.1}, {"decay": 1.0}],
    "sam": [{"sam": 0.05}, {"sam": 0.01}, {"sam": 0.2}],
    "dual": [{**DUAL}, {**DUAL, "eta": 0.04}, {**DUAL, "eta": 1.0}],
    "fixed": [{**FIXED}, {**FIXED, "lam": 0.1}, {**FIXED, "lam": 1.0}],
}
"""Three settings for each method; the first is the released or customary one.

The second step of the multiplier is the released one for as much shorter a training: 600 steps
here, about 25,000 there.
"""

LR = 3e-3
_PLAIN = {"share": 1.0, "decay": 0.0, "sam": 0.0, "lam": 0.0, "rho": 0.05, "r": 0.05, "eps": 0.1,
          "eta": 0.0, "clip": 1.0}  # fmt: skip


# --- surrogates side by side ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Normalised offline data of several tasks, padded to one shape; (t, rows, d)."""

    tasks: list[OfflineTask]
    x: Tensor
    y: Tensor
    rows: list[int]
    middle: np.ndarray
    spread: np.ndarray
    y_middle: np.ndarray
    y_spread: np.ndarray

    @classmethod
    def of(cls, tasks: list[OfflineTask], device: str) -> _Batch:
        d = max(task.x.shape[1] for task in tasks)
        rows = [len(task.seen) for task in tasks]
        x, y = np.zeros((len(tasks), max(rows), d)), np.zeros((len(tasks), max(rows)))
        middle, spread = np.zeros((len(tasks), d)), np.ones((len(tasks), d))
        for i, task in enumerate(tasks):
            seen, width = task.x[task.seen], task.x.shape[1]
            middle[i, :width], spread[i, :width] = seen.mean(0), np.maximum(seen.std(0), 1e-9)
            x[i, : rows[i]] = (_padded(seen, d) - middle[i]) / spread[i]
            y[i, : rows[i]] = task.y[task.seen]
        y_middle = np.array([y[i, :n].mean() for i, n in enumerate(rows)])
        y_spread = np.array([y[i, :n].std() for i, n in enumerate(rows)])
        y = (y - y_middle[:, None]) / y_spread[:, None]
        inputs = torch.tensor(x, dtype=torch.float32, device=device)
        values = torch.tensor(y, dtype=torch.float32, device=device)
        return cls(tasks, inputs, values, rows, middle, spread, y_middle, y_spread)

    def orders(self, seed: int, draws: int) -> Tensor:
        """Rows in the order of training, epoch after epoch, (t, draws)."""
        generator = torch.Generator().manual_seed(seed)
        streams = []
        for n in self.rows:
            epochs = [torch.randperm(n, generator=generator) for _ in range(-(-draws // n))]
            streams.append(torch.cat(epochs)[:draws])
        return torch.stack(streams).to(self.x.device)

    def box(self) -> tuple[Tensor, Tensor]:
        """Bounds in normalised units, (t, d); padded columns stay at 0."""
        low, high = (
            (np.stack([_padded(task.bounds[end][None], self.x.shape[2])[0] for task in self.tasks])
             - self.middle) / self.spread
            for end in range(2)
        )  # fmt: skip
        device = self.x.device
        return torch.tensor(low).float().to(device), torch.tensor(high).float().to(device)

    def true_values(self, i: int, z: np.ndarray) -> np.ndarray:
        """Truth of task i at normalised designs (b, d)."""
        task = self.tasks[i]
        x = (z * self.spread[i] + self.middle[i])[:, : task.x.shape[1]]
        return task.truth(x)


def _padded(x: np.ndarray, d: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, d - x.shape[1])))


def compare(
    seed: int,
    members: Mapping[str, Mapping[str, float]],
    *,
    tasks: Sequence[str] = TEST,
    points: int = 1000,
    width: int = 64,
    steps: int = 600,
    batch_size: int = 64,
    designs: int = 128,
    ascent: int = 200,
    marks: int = 10,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train surrogates on the lower half of every task's data, ascend them, ask the truth.

    All members of a task start from the same weights and see the same batches; all searches start
    from the same designs, take the same number of steps and stay in the box of valid designs.

    Args:
        seed: of data, weights and batches.
        members: settings by name; see `SETTINGS` for the keys.
        tasks: names for `offline_task`.
        points: measured designs a task, half of which are shown.
        width: of both hidden layers.
        steps: of training, Adam at 0.001.
        batch_size: designs a step.
        designs: how many a search starts from and proposes.
        ascent: steps of a search.
        marks: parts of the search at whose ends truth and promise are recorded.
        device: where surrogates live.

    Returns:
        For every member the means over tasks: ``p100_``, ``p50_`` (normalised score of the best
        and the median design), ``gap_`` (promise minus truth of the mean design, same units),
        ``miss_`` (absolute gap), ``norm_`` (of the gradient of h over the offline data), ``lam_``
        and ``lowest_`` (last and lowest multiplier), and ``true_``, ``promised_`` along the search.
        The first three also by task: ``p100_x@task``. With ``free_`` before the name: of the same
        search without the box, as in the paper, where it may leave the valid designs.
    """
    batch = _Batch.of([offline_task(name, seed, points) for name in tasks], device)
    names = list(members)
    rows = [{**_PLAIN, **members[name]} for name in names] * len(tasks)
    settings = _settings(rows, device)
    models = _initial(batch, len(names), width, seed)
    params, lam = _train(batch, models, settings, len(names), steps, batch_size, seed)
    norms = np.array(_norms(batch, models[0], params, len(names)))
    search = batch, models[0], params, len(names), designs, ascent
    inside, outside = _search(*search, marks, boxed=True), _search(*search, 1, boxed=False)
    out: dict[str, Any] = {}
    for j, name in enumerate(names):
        here = [i * len(names) + j for i in range(len(tasks))]
        for member, found in ((name, inside), (f"free_{name}", outside)):
            for key in ("p100", "p50", "gap"):
                values = np.array([found[i][key] for i in here])
                out[f"{key}_{member}"] = float(values.mean())
                each = zip(tasks, values, strict=True)
                out |= {f"{key}_{member}@{t}": float(v) for t, v in each}
            out[f"miss_{member}"] = float(np.mean([abs(found[i]["gap"]) for i in here]))
        for key in ("true", "promised"):
            out[f"{key}_{name}"] = np.mean([inside[i][key] for i in here], 0)
        out[f"norm_{name}"] = float(norms[here].mean())
        out[f"lam_{name}"], out[f"lowest_{name}"] = (float(v[here].mean()) for v in lam)
    return out


def _settings(rows: Sequence[Mapping[str, float]], device: str) -> dict[str, Tensor]:
    return {
        key: torch.tensor([row[key] for row in rows], dtype=torch.float32, device=device)
        for key in _PLAIN
    }


class _Flat(nn.Module):
    """A surrogate whose parameters are one vector: far fewer operations a step for small ones."""

    def __init__(self, net: GaussianMLP) -> None:
        super().__init__()
        self.nets = [net]  # in a list, so that its own parameters do not count
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))

    def parameters_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The surrogate's parameters as parts of the vector."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    def forward(self, x: Tensor) -> Tensor:
        """Output of the surrogate."""
        out: Tensor = functional_call(self.nets[0], self.parameters_of(self.flat), (x,))
        return out


def _initial(batch: _Batch, members: int, width: int, seed: int) -> list[_Flat]:
    """Surrogates, task by task; weights of padded columns are 0 and stay so."""
    models = []
    for i, task in enumerate(batch.tasks):
        used = task.x.shape[1]
        for _ in range(members):
            with seeded(1000 * seed + i):
                small = GaussianMLP(used, width).state_dict()
                model = GaussianMLP(batch.x.shape[2], width)
            first = "net.body.1.weight"
            small[first] = torch.nn.functional.pad(small[first], (0, batch.x.shape[2] - used))
            model.load_state_dict(small)
            models.append(_Flat(model.to(batch.x.device)))
    return models


def _train(
    batch: _Batch,
    models: list[_Flat],
    settings: dict[str, Tensor],
    members: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Tensor], list[np.ndarray]]:
    """Trained parameters, last and lowest multipliers; plain, SAM, IGNITE each in one batch."""
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    result = {name: p.detach().clone() for name, p in stacked.items()}
    lam, lowest = settings["lam"].clone(), settings["lam"].clone()
    orders = batch.orders(seed, steps * batch_size).split(batch_size, 1)
    task = torch.arange(len(batch.tasks), device=batch.x.device).repeat_interleave(members)
    sam, ignite = settings["sam"] > 0, (settings["lam"] > 0) | (settings["eta"] > 0)
    for group in (sam, ignite, ~(sam | ignite)):
        here = group.nonzero()[:, 0]
        if not len(here):
            continue
        own = {key: values[here] for key, values in settings.items()}
        params = {name: p[here].detach().clone().requires_grad_() for name, p in stacked.items()}
        optimizer = torch.optim.Adam(params.values(), lr=LR)
        stops, rows = (own["share"] * steps).round().long(), task[here]
        for step, order in enumerate(orders, 1):
            x, y = batch.x[rows[:, None], order[rows]], batch.y[rows[:, None], order[rows]]
            if group is ignite:
                grads, _, norm = ignite_grad_stacked(
                    models[0], params, gaussian_nll, x, y, lam=lam[here], rho=own["rho"], r=own["r"]
                )
                limits = {key: own[key] for key in ("rho", "eps", "eta")}
                free = dual_step(lam[here], norm, **limits, clip=False)
                lam[here] = torch.where(own["clip"] > 0, free.clamp(min=0), free)
                lowest = torch.minimum(lowest, lam)
            else:
                grads = loss_grad_stacked(models[0], params, x, y, own["sam"])
            for p, g in zip(params.values(), grads, strict=True):
                p.data.mul_(1 - LR * _leading(own["decay"], p))
                p.grad = g
            optimizer.step()
            if bool((stops == step).any()):
                for name, p in params.items():
                    result[name][here[stops == step]] = p.detach()[stops == step]
    return result, [lam.cpu().numpy(), lowest.cpu().numpy()]


def loss_grad_stacked(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, rho: Tensor
) -> list[Tensor]:
    """Gradients of the members' losses; where rho > 0 at weights moved by it uphill (SAM)."""
    forward = torch.vmap(lambda p, inputs: functional_call(model, p, (inputs,)))

    def gradients(at: list[Tensor]) -> list[Tensor]:
        loss = torch.vmap(gaussian_nll)(forward(dict(zip(params, at, strict=True)), x), y)
        return list(torch.autograd.grad(loss.sum(), at))

    first = gradients(list(params.values()))
    if not bool((rho > 0).any()):
        return first
    norm = torch.stack([g.reshape(len(rho), -1).square().sum(1) for g in first]).sum(0).sqrt()
    scale = rho / norm.clamp(min=1e-12)
    return gradients(
        [
            (p + _leading(scale, g) * g).detach().requires_grad_()
            for p, g in zip(params.values(), first, strict=True)
        ]
    )


def _leading(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _norms(batch: _Batch, model: _Flat, params: dict[str, Tensor], members: int) -> list[float]:
    """Norm of the gradient of h over all offline data of a task, for every surrogate."""
    out = []
    for k in range(len(batch.tasks) * members):
        rows = slice(0, batch.rows[k // members])
        one = {name: p[k : k + 1].clone().requires_grad_() for name, p in params.items()}
        x, y = batch.x[k // members, rows][None], batch.y[k // members, rows][None]
        out.append(float(ignite_grad_stacked(model, one, gaussian_nll, x, y, lam=0.0).norm))
    return out


def _search(
    batch: _Batch,
    model: _Flat,
    params: dict[str, Tensor],
    members: int,
    designs: int,
    ascent: int,
    marks: int,
    *,
    boxed: bool,
) -> list[dict[str, Any]]:
    """Ascend every surrogate from its task's best designs and score where it ends."""
    forward = torch.vmap(lambda p, z: first_output(functional_call(model, p, (z,))))
    best = torch.stack(
        [batch.x[i, batch.y[i, :n].topk(min(designs, min(batch.rows))).indices] for i, n in
         enumerate(batch.rows)]
    )  # fmt: skip
    spread = [task.x.shape[1] / batch.x.shape[2] for task in batch.tasks]
    size = 0.01 * torch.tensor(spread, device=batch.x.device).sqrt()
    low, high = (end.repeat_interleave(members, 0)[:, None] for end in batch.box())
    path = ascend(
        lambda z: forward(params, z), best.repeat_interleave(members, 0), steps=ascent,
        lr=size.repeat_interleave(members)[:, None, None], bounds=(low, high) if boxed else None,
    )  # fmt: skip
    chosen = np.linspace(0, ascent, marks + 1).round().astype(int)
    with torch.no_grad():
        promised = torch.stack([forward(params, path[t]).mean(1) for t in chosen]).cpu().numpy()
    stops = path[chosen].cpu().numpy()
    out = []
    for k in range(stops.shape[1]):
        i = k // members
        task = batch.tasks[i]
        flat = stops[:, k].reshape(-1, stops.shape[-1])
        true = batch.true_values(i, flat).reshape(len(chosen), -1)
        size_of = task.high - task.low
        promise = (promised[:, k] * batch.y_spread[i] + batch.y_middle[i] - task.low) / size_of
        truth = (true.mean(1) - task.low) / size_of
        found = score(true[-1], task.low, task.high)
        out.append({"p100": found[100], "p50": found[50], "gap": promise[-1] - truth[-1],
                    "true": truth, "promised": promise})  # fmt: skip
    return out


# --- one task of two dimensions, for the eye -----------------------------------------------------


def playground(
    seed: int,
    task: OfflineTask | str = "branin2",
    *,
    points: int = 200,
    width: int = 32,
    steps: int = 600,
    strengths: Sequence[float] = (0.0, 0.1, 1.0, 10.0),
    radii: Sequence[float] = (0.05, 0.2, 0.8),
    designs: int = 64,
    ascent: int = 200,
    marks: int = 10,
    side: int = 13,
    device: str = "cpu",
) -> dict[str, Any]:
    """Surrogates of a task with two inputs over a grid of multipliers and radii, and searches.

    Args:
        seed: of data, weights and batches.
        task: name for `offline_task`, or a task of your own with two inputs.
        points: measured designs where a name was given.
        width: of both hidden layers.
        steps: of training with a fixed multiplier and r = rho.
        strengths: multipliers; 0 is the plain fit.
        radii: values of rho.
        designs: how many a search starts from.
        ascent: steps of a search.
        marks: parts of it that are recorded.
        side: points of a contour grid along each input.
        device: where surrogates live.

    Returns:
        ``lam``, ``rho``; ``x``, ``y`` (axes); ``truth`` (side, side) and ``surrogate`` (lam, rho,
        side, side) in units of the score; ``seen`` (rows, 2); ``step`` (marks + 1,); ``path`` (lam,
        rho, marks + 1, 3, 2) of three designs; ``promised`` and ``true`` (lam, rho, marks + 1),
        means over the designs; ``norm`` (lam, rho).
    """
    known = offline_task(task, seed, points) if isinstance(task, str) else task
    if known.x.shape[1] != 2:
        raise ValueError(f"task: expected two inputs to draw, got {known.x.shape[1]}")
    batch = _Batch.of([known], device)
    rows = [{**_PLAIN, "lam": a, "rho": b, "r": b} for a in strengths for b in radii]
    settings = _settings(rows, device)
    models = _initial(batch, len(rows), width, seed)
    params, _ = _train(batch, models, settings, len(rows), steps, 64, seed)
    forward = torch.vmap(lambda p, z: first_output(functional_call(models[0], p, (z,))))
    best = batch.y[0].topk(min(designs, batch.rows[0])).indices
    low, high = batch.box()
    path = ascend(
        lambda z: forward(params, z), batch.x[0, best].expand(len(rows), -1, -1), steps=ascent,
        bounds=(low, high),
    )[np.linspace(0, ascent, marks + 1).round().astype(int)]  # fmt: skip
    axes = np.linspace(*known.bounds, side)
    grid = np.stack(np.meshgrid(*axes.T), -1).reshape(-1, 2)
    inputs = torch.tensor((grid - batch.middle[0]) / batch.spread[0], dtype=torch.float32)
    with torch.no_grad():
        surface = forward(params, inputs.to(device).expand(len(rows), -1, -1))
        promised = torch.stack([forward(params, z).mean(1) for z in path], 1)

    def in_score(values: Any) -> np.ndarray:
        return (np.asarray(values) - known.low) / (known.high - known.low)

    def predicted(values: Tensor) -> np.ndarray:
        return in_score(values.cpu().numpy() * batch.y_spread[0] + batch.y_middle[0])

    z = path.cpu().numpy()
    true = known.truth((z * batch.spread[0] + batch.middle[0]).reshape(-1, 2)).reshape(z.shape[:3])
    shape = len(strengths), len(radii)
    shown = np.linspace(0, len(best) - 1, 3).round().astype(int)
    drawn = z[:, :, shown] * batch.spread[0] + batch.middle[0]
    return {
        "lam": np.array(strengths, float),
        "rho": np.array(radii, float),
        "x": axes[:, 0],
        "y": axes[:, 1],
        "truth": in_score(known.truth(grid)).reshape(side, side),
        "surrogate": predicted(surface).reshape(*shape, side, side),
        "seen": known.x[known.seen],
        "step": np.linspace(0, ascent, marks + 1).round().astype(int),
        "path": drawn.transpose(1, 0, 2, 3).reshape(*shape, marks + 1, 3, 2),
        "promised": predicted(promised).reshape(*shape, -1),
        "true": in_score(true.mean(2)).T.reshape(*shape, -1),
        "norm": np.array(_norms(batch, models[0], params, len(rows))).reshape(shape),
    }


# --- tuning on other tasks -----------------------------------------------------------------------


def candidates() -> dict[str, dict[str, float]]:
    """Every setting of every method by name, ``method.index``."""
    return {f"{m}.{k}": s for m, found in SETTINGS.items() for k, s in enumerate(found)}


def chosen_settings(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Per method the setting with the highest mean ``p100`` over rows of `compare`.

    ``unclipped`` is the chosen dual setting with the multiplier free to become negative.
    """
    best = {}
    for method, found in SETTINGS.items():
        means = [frame[f"p100_{method}.{k}"].mean() for k in range(len(found))]
        best[method] = dict(found[int(np.argmax(means))])
    return {**best, "unclipped": {**best["dual"], "clip": 0.0}}
