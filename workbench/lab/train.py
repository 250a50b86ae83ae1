"""The one training loop, and batched prediction.

A run is a function of its arguments: the order of batches comes from a generator of its own, and
dropout from a seeded scope that leaves torch's global state as it found it. With ``checkpoint`` a
killed run goes on where it was, on CPU to the bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from workbench.lab.checks import count, one_of, positive, same_length
from workbench.lab.progress import Progress
from workbench.lab.seeding import seeded

if TYPE_CHECKING:
    import pandas as pd

Batch: TypeAlias = tuple[Tensor, ...]
Batches: TypeAlias = Callable[[int], Iterable[Any]]  # from the epoch's number
OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Report: TypeAlias = Callable[[int, int, float], None]  # step, steps, loss


@dataclass
class History:
    """What happened: a row of ``frame`` per report (step, epoch, lr, loss, norm, validation)."""

    frame: pd.DataFrame
    best: float  # lowest validation value; without validation, the last loss
    best_step: int
    stopped: str  # "done", "early" or "diverged"


def fit(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: str | OptimizerFactory = "adamw",
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup: int = 0,
    clip: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    validation: Any = None,
    early_stop: int | None = None,
    every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    bf16: bool = True,
    compile: bool = False,
    progress: Report | None = None,
) -> History:
    """Train ``model`` in place; it is left in evaluation mode.

    Args:
        model: any module; the first entry of a batch is its input.
        loss_fn: ``loss_fn(model(x), *rest)`` for a batch ``(x, *rest)`` gives a scalar.
        data: tensors or arrays ``(x, y, ...)`` of one length, an object with ``x`` and ``y``, or a
            function from the epoch's number, and nothing else, to an iterable of batches. Tensors
            are shuffled each epoch; rows that fill no whole batch wait for the next epoch.
        steps: optimizer steps; or give ``epochs``, passes over tensors.
        epochs: see ``steps``.
        batch_size: rows of tensors that make a batch.
        lr: learning rate of a named optimizer.
        optimizer: "adamw", "adam", "sgd" (momentum 0.9), or a function from parameters to an
            optimizer. Steps pass a closure, so LBFGS and two-step methods work as well.
        weight_decay: of a named optimizer.
        schedule: "constant" or "cosine" (falling to zero).
        warmup: steps over which the learning rate first rises linearly.
        clip: largest allowed norm of the gradient.
        seed: of the order of batches and of dropout.
        device: where to train; by default where the model is.
        validation: data like ``data`` (its mean loss is taken) or a function of the model to a
            number; lower is better.
        early_stop: end after this many reports without improvement; the best weights are restored.
        every: steps between reports; by default an epoch of tensors, else 100.
        checkpoint: safetensors file to write, and to resume from if it exists.
        checkpoint_every: steps between checkpoints.
        bf16: autocast to bfloat16, on CUDA only.
        compile: use ``torch.compile``, on CUDA only.
        progress: called about a hundred times with (step, steps, loss); see ``watch``.

    Raises:
        ValueError: an argument is out of range, or the checkpoint belongs to another run.
    """
    if early_stop is not None and validation is None:
        raise ValueError("early_stop: needs validation data to watch")
    place = torch.device(device) if device is not None else _device(model)
    batches, per_epoch = _batches(data, count(batch_size, "batch_size"), seed, place)
    if (steps is None) == (epochs is None) or (steps is None and per_epoch is None):
        raise ValueError("steps: expected steps or epochs, not both; epochs need tensors as data")
    total = count(steps, "steps") if steps else count(epochs, "epochs") * (per_epoch or 0)
    model.to(place)
    if isinstance(optimizer, str):
        optimizer = _named(
            optimizer, positive(lr, "lr"), positive(weight_decay, "weight_decay", zero=True)
        )
    loop = _Loop(
        model=model,
        forward=torch.compile(model) if compile and place.type == "cuda" else model,
        loss_fn=loss_fn,
        optimizer=optimizer(p for p in model.parameters() if p.requires_grad),
        place=place,
        bf16=bf16 and place.type == "cuda",
        validate=_validator(validation, loss_fn, batch_size, place),
        plan=_Plan(
            steps=total,
            schedule=one_of(schedule, ("constant", "cosine"), "schedule"),
            warmup=count(warmup, "warmup", minimum=0),
            clip=None if clip is None else positive(clip, "clip"),
            every=count(every or per_epoch or 100, "every"),
            early_stop=None if early_stop is None else count(early_stop, "early_stop"),
            seed=seed,
            batch_size=batch_size,
        ),
    )
    file = None if checkpoint is None else Path(checkpoint)
    with seeded(seed):
        if file is not None and file.exists():
            loop.resume(file)
        model.train()
        for batch in loop.stream(batches):
            loss = loop.step(batch)
            done = loop.state.step
            if progress is not None and (done % max(1, total // 100) == 0 or done == total):
                progress(done, total, float(loss))
            if done % loop.plan.every == 0 or done == total:
                loop.report()
            if file and (done % count(checkpoint_every, "checkpoint_every") == 0 or loop.stopped):
                loop.save(file)
    return loop.finish()


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Any,
    *,
    batch_size: int = 1024,
    device: torch.device | str | None = None,
) -> Tensor:
    """``model(x)`` in evaluation mode, computed in batches and returned on the CPU."""
    place = torch.device(device) if device is not None else _device(model)
    training = model.training
    model.to(place).eval()
    rows = torch.as_tensor(x).split(count(batch_size, "batch_size"))
    out = torch.cat([model(part.to(place)).cpu() for part in rows])
    model.train(training)
    return out


@contextlib.contextmanager
def watch(label: str = "training") -> Iterator[Report]:
    """``with watch() as report: fit(..., progress=report)``: a bar, silent where nobody watches."""
    with contextlib.ExitStack() as scope:
        bars: list[Progress] = []

        def report(step: int, steps: int, loss: float) -> None:
            if not bars:
                bars.append(scope.enter_context(Progress(label, steps)))
            bars[0].step(step - bars[0].done)

        yield report


# --- the loop -----------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What must agree between a checkpoint and the run that resumes it."""

    steps: int
    schedule: str
    warmup: int
    clip: float | None
    every: int
    early_stop: int | None
    seed: int
    batch_size: int

    def rate(self, step: int) -> float:
        """Factor of the learning rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@dataclass
class _State:
    """Where a run is, apart from weights and optimizer."""

    step: int = 0
    epoch: int = 0
    offset: int = 0  # batches of this epoch already seen
    rows: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    stopped: str = ""


@dataclass
class _Loop:
    model: nn.Module
    forward: Callable[..., Any]
    loss_fn: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    place: torch.device
    bf16: bool
    validate: Callable[[nn.Module], float] | None
    plan: _Plan
    state: _State = field(default_factory=_State)
    norm: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)  # best weights

    def __post_init__(self) -> None:
        self.base = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.running = torch.zeros(2, device=self.place)  # sum of losses, their number

    @property
    def stopped(self) -> str:
        return self.state.stopped

    def stream(self, batches: Batches) -> Iterator[Batch]:
        """Batches from where the run is until it stops."""
        state = self.state
        while not state.stopped:
            before = state.step
            for batch in islice(batches(state.epoch), state.offset, None):
                yield tuple(torch.as_tensor(part).to(self.place) for part in batch)
                if state.stopped:
                    return
            if state.step == before and not state.offset:
                raise ValueError("data: the function gave an epoch without batches")
            state.epoch, state.offset = state.epoch + 1, 0

    def step(self, batch: Batch) -> Tensor:
        rate = self.plan.rate(self.state.step)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * rate

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
                loss = self.loss_fn(self.forward(batch[0]), *batch[1:])
            loss.backward()  # type: ignore[no-untyped-call]
            if self.plan.clip is not None:
                self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
            return loss

        loss: Tensor = self.optimizer.step(closure).detach()  # type: ignore[arg-type, attr-defined]
        self.running[0] += loss
        self.running[1] += 1
        self.state.step += 1
        self.state.offset += 1
        return loss

    def report(self) -> None:
        state, plan = self.state, self.plan
        loss = float(self.running[0] / self.running[1])
        self.running.zero_()
        row = {"step": state.step, "epoch": state.epoch, "lr": self.base[0], "loss": loss}
        row["lr"] *= plan.rate(state.step - 1)
        if self.norm is not None:
            row["norm"] = float(self.norm)
        if self.validate is not None:
            self.model.eval()
            row["validation"] = self.validate(self.model)
            self.model.train()
        state.rows.append(row)
        value = row.get("validation", loss)
        if self.validate is None or value < state.best:
            state.best, state.best_step = value, state.step
            if plan.early_stop:
                self.kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if not math.isfinite(loss):
            state.stopped = "diverged"
        elif state.step >= plan.steps:
            state.stopped = "done"
        elif plan.early_stop and state.step - state.best_step >= plan.early_stop * plan.every:
            state.stopped = "early"

    def finish(self) -> History:
        import pandas as pd

        if self.kept:
            self.model.load_state_dict(self.kept)
        self.model.eval()
        s = self.state
        return History(pd.DataFrame(s.rows), s.best, s.best_step, s.stopped)

    # A checkpoint is one safetensors file: tensors by prefix, everything else as JSON beside them.

    def save(self, file: Path) -> None:
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"kept.{k}": v for k, v in self.kept.items()}
        tensors |= {"loop.running": self.running, "loop.rng": torch.get_rng_state()}
        if self.place.type == "cuda":
            tensors["loop.cuda_rng"] = torch.cuda.get_rng_state(self.place)
        plain: dict[str, Any] = {"plan": self._identity(), "state": asdict(self.state)}
        plain["optimizer"] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    plain["optimizer"][f"{index}.{name}"] = value
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(whole, part, metadata={"run": json.dumps(plain)})
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)

    def resume(self, file: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file

        tensors = load_file(file)
        with safe_open(file, "pt") as archive:
            plain = json.loads((archive.metadata() or {}).get("run", "{}"))
        found, expected = plain.get("plan"), self._identity()
        if found != expected:
            raise ValueError(f"checkpoint: {file} is of another run: {found}, expected {expected}")

        def under(prefix: str) -> dict[str, Any]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(under("model."))
        self.kept = under("kept.")
        slots: dict[int, dict[str, Any]] = {}
        for key, value in (under("optimizer.") | plain["optimizer"]).items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.state = _State(**plain["state"])
        self.running = tensors["loop.running"].to(self.place)
        torch.set_rng_state(tensors["loop.rng"])
        if self.place.type == "cuda":
            torch.cuda.set_rng_state(tensors["loop.cuda_rng"], self.place)

    def _identity(self) -> dict[str, Any]:
        return asdict(self.plan) | {"optimizer": type(self.optimizer).__name__, "lr": self.base}


# --- what fit is given --------------------------------------------------------------------------


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _named(name: str, lr: float, weight_decay: float) -> OptimizerFactory:
    one_of(name, ("adamw", "adam", "sgd"), "optimizer")
    if name == "sgd":
        return lambda p: torch.optim.SGD(p, lr=lr, weight_decay=weight_decay, momentum=0.9)
    make = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return lambda p: make(p, lr=lr, weight_decay=weight_decay)


def _tensors(data: Any, place: torch.device) -> Batch:
    parts = (data.x, data.y) if hasattr(data, "x") and hasattr(data, "y") else data
    parts = (parts,) if isinstance(parts, Tensor) else tuple(parts)
    tensors = tuple(torch.as_tensor(part).to(place) for part in parts)
    same_length(**{f"data[{i}]": tensor for i, tensor in enumerate(tensors)})
    return tensors


def _batches(data: Any, size: int, seed: int, place: torch.device) -> tuple[Batches, int | None]:
    """A function from the epoch to its batches, and for tensors the number of batches."""
    if callable(data):
        return data, None
    tensors = _tensors(data, place)
    n = len(tensors[0])
    if n == 0:
        raise ValueError("data: is empty; expected at least one row")
    size = min(size, n)

    def epoch(number: int) -> Iterator[Batch]:
        order = torch.randperm(
            n, generator=torch.Generator().manual_seed(seed + 1_000_003 * number)
        )
        for rows in order.to(place).split(size):
            if len(rows) == size:
                yield tuple(tensor[rows] for tensor in tensors)

    return epoch, n // size


def _validator(
    validation: Any, loss_fn: Callable[..., Tensor], size: int, place: torch.device
) -> Callable[[nn.Module], float] | None:
    if validation is None:
        return None
    if callable(validation):
        return lambda model: float(validation(model))
    tensors = _tensors(validation, place)
    n = len(tensors[0])

    @torch.no_grad()
    def mean_loss(model: nn.Module) -> float:
        total = 0.0
        for batch in zip(*(tensor.split(max(size, 1024)) for tensor in tensors), strict=True):
            total += float(loss_fn(model(batch[0]), *batch[1:])) * len(batch[0])
        return total / n

    return mean_loss
