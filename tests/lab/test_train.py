"""The training loop: right steps, right schedule, and the same result after a kill."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab import models, train


def line() -> tuple[Tensor, Tensor, Tensor]:
    """x, y = x w and w."""
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([[1.0], [-2.0], [0.5]])
    return x, x @ w, w


def linear(seed: int = 0) -> nn.Linear:
    with lab.seeded(seed):
        return nn.Linear(3, 1, bias=False)


def noisy(seed: int = 0) -> nn.Module:
    with lab.seeded(seed):
        return models.MLP([64, 16, 10], dropout=0.3)


# --- what is computed ---------------------------------------------------------------------------


def test_one_full_batch_step_of_sgd_is_the_formula() -> None:
    x, y, _ = line()
    model = linear()
    w = model.weight.detach().clone()
    gradient = 2 * (x @ w.T - y).T @ x / len(x)
    train.fit(model, F.mse_loss, (x, y), steps=1, batch_size=256, lr=0.1, optimizer="sgd")
    torch.testing.assert_close(model.weight.detach(), w - 0.1 * gradient)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_true_weights_are_found(optimizer: str) -> None:
    x, y, w = line()
    model = linear()
    history = train.fit(
        model, F.mse_loss, (x, y), epochs=60, batch_size=32, lr=0.05, optimizer=optimizer,
        schedule="cosine",
    )  # fmt: skip
    torch.testing.assert_close(model.weight.detach(), w.T, atol=1e-3, rtol=0)
    assert history.stopped == "done" and not model.training
    assert history.frame.step.tolist() == [8 * (i + 1) for i in range(60)]
    assert history.frame.epoch.tolist() == list(range(60))


def test_an_optimizer_that_asks_for_the_loss_again_works() -> None:
    x, y, w = line()
    model = linear()

    def lbfgs(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=1.0, max_iter=20)

    train.fit(model, F.mse_loss, (x, y), steps=2, batch_size=256, optimizer=lbfgs)
    torch.testing.assert_close(model.weight.detach(), w.T, atol=1e-4, rtol=0)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    x, y, _ = line()
    history = train.fit(
        linear(), F.mse_loss, (x, y), steps=20, warmup=4, lr=0.1, schedule="cosine", every=1
    )
    rise = [0.1 * (i + 1) / 4 for i in range(4)]
    fall = [0.05 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]
    np.testing.assert_allclose(history.frame.lr, rise + fall, rtol=1e-12)


def test_weight_decay_of_adamw_alone_shrinks_weights_geometrically() -> None:
    x, y, _ = line()
    model = linear()
    w = model.weight.detach().clone()
    train.fit(model, lambda out, y: 0 * out.sum(), (x, y), steps=10, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(model.weight.detach(), w * (1 - 0.1 * 0.5) ** 10)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    x, y, _ = line()
    model = linear()
    w = model.weight.detach().clone()
    gradient = 2 * (x @ w.T - y).T @ x / len(x)
    history = train.fit(
        model, F.mse_loss, (x, y), steps=1, batch_size=256, lr=1.0, optimizer="sgd", clip=0.01
    )
    assert abs((model.weight.detach() - w).norm().item() - 0.01) < 1e-6
    assert abs(history.frame.norm[0] - gradient.norm().item()) < 1e-4


def test_an_epoch_shows_every_row_once_and_epochs_differ_in_order() -> None:
    seen: list[list[float]] = []

    def spy(out: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return out.sum()

    train.fit(linear(), spy, (torch.zeros(20, 3), torch.arange(20)), epochs=2, batch_size=5)
    first, second = (list(chain.from_iterable(seen[i : i + 4])) for i in (0, 4))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_batches_from_a_function_of_the_epoch() -> None:
    x, y, _ = line()
    asked: list[int] = []

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(epoch)
        yield from zip(x.split(64), y.split(64), strict=True)

    history = train.fit(linear(), F.mse_loss, batches, steps=10, every=5)
    assert asked == [0, 1, 2] and history.frame.epoch.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"^data: .* without batches"):
        train.fit(linear(), F.mse_loss, lambda epoch: [], steps=10)


def test_seeds_decide_everything_and_the_global_state_is_left_alone() -> None:
    data = lab.data.digits().split(0).train
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = noisy(), noisy(), noisy()
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        train.fit(model, F.cross_entropy, data, epochs=1, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_digits_are_learned() -> None:
    parts = lab.data.digits().split(0)
    model = noisy()
    train.fit(model, F.cross_entropy, parts.train, epochs=25, lr=1e-2, batch_size=64)
    logits = train.predict(model, parts.test.x, batch_size=100)
    assert logits.shape == (len(parts.test), 10) and not logits.requires_grad
    torch.testing.assert_close(logits, model(torch.from_numpy(parts.test.x)))
    assert (logits.argmax(1).numpy() == parts.test.y).mean() > 0.9


# --- validation, early stop, divergence ---------------------------------------------------------


def test_validation_is_the_mean_loss_over_all_rows() -> None:
    x, y, _ = line()
    model = linear()
    history = train.fit(
        model, F.mse_loss, (x[:100], y[:100]), steps=3, every=3, batch_size=7, validation=(x, y)
    )
    expected = F.mse_loss(model(x), y).item()
    assert abs(history.frame.validation.iloc[-1] - expected) < 1e-6 * expected


def test_early_stop_keeps_the_weights_of_the_best_report() -> None:
    x, y, _ = line()
    model, script = linear(), iter([5.0, 3.0, 4.0, 3.5, 3.0, 1.0])
    weights: list[Tensor] = []

    def validation(model: nn.Module) -> float:
        assert not model.training
        weights.append(model.weight.detach().clone())
        return next(script)

    history = train.fit(
        model, F.mse_loss, (x, y), steps=600, every=2, validation=validation, early_stop=3
    )
    assert history.stopped == "early" and history.best == 3.0 and history.best_step == 4
    assert history.frame.validation.tolist() == [5.0, 3.0, 4.0, 3.5, 3.0]
    assert torch.equal(model.weight.detach(), weights[1])


def test_a_diverging_run_stops_and_says_so() -> None:
    x, y, _ = line()
    history = train.fit(linear(), F.mse_loss, (x, y), steps=5000, every=50, lr=1e6, optimizer="sgd")
    assert history.stopped == "diverged" and history.frame.step.iloc[-1] < 5000


def test_progress_is_told_about_a_hundred_times() -> None:
    x, y, _ = line()
    told: list[tuple[int, int, float]] = []
    train.fit(linear(), F.mse_loss, (x, y), steps=1000, progress=lambda *args: told.append(args))
    assert len(told) == 100 and told[-1][:2] == (1000, 1000)
    with train.watch() as report:
        train.fit(linear(), F.mse_loss, (x, y), steps=10, progress=report)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "^steps: expected steps or epochs"),
        ({"steps": 1, "epochs": 1}, "^steps: expected steps or epochs"),
        ({"steps": -1}, "^steps: expected a whole number >= 1"),
        ({"steps": 1, "lr": 0}, "^lr: expected a number > 0"),
        ({"steps": 1, "batch_size": 0}, "^batch_size: "),
        ({"steps": 1, "schedule": "step"}, "^schedule: expected one of 'constant', 'cosine'"),
        ({"steps": 1, "optimizer": "lion"}, "^optimizer: expected one of 'adamw'"),
        ({"steps": 1, "early_stop": 2}, "^early_stop: needs validation"),
        ({"steps": 1, "clip": -1}, "^clip: "),
    ],
)
def test_bad_settings(settings: dict[str, object], says: str) -> None:
    x, y, _ = line()
    with pytest.raises(ValueError, match=says):
        train.fit(linear(), F.mse_loss, (x, y), **settings)  # type: ignore[arg-type]


def test_bad_data() -> None:
    with pytest.raises(ValueError, match=r"data\[0\] has 4, data\[1\] has 3"):
        train.fit(linear(), F.mse_loss, (torch.zeros(4, 3), torch.zeros(3, 1)), steps=1)
    with pytest.raises(ValueError, match=r"^data: is empty"):
        train.fit(linear(), F.mse_loss, (torch.zeros(0, 3), torch.zeros(0, 1)), steps=1)


# --- checkpoints --------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands in for a kill between two steps."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [13, 20, 41])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, optimizer: str, at: int) -> None:
    """Dropout, momentum, a schedule, validation and reports between checkpoints all go on."""
    parts = lab.data.digits().split(0)

    def run(model: nn.Module, loss_fn: object, file: Path | None) -> train.History:
        return train.fit(
            model, loss_fn, parts.train, steps=60, batch_size=100, lr=3e-3, schedule="cosine",
            warmup=5, clip=1.0, optimizer=optimizer, validation=parts.calibration, early_stop=9,
            every=8, checkpoint=file, checkpoint_every=5,
        )  # type: ignore[arg-type]  # fmt: skip

    whole = noisy()
    expected = run(whole, F.cross_entropy, None)
    calls = 0

    def failing(out: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls > at:
            raise Interrupted
        return F.cross_entropy(out, y)

    model = noisy()
    with pytest.raises(Interrupted):
        run(model, failing, tmp_path / "run.safetensors")
    model = noisy(seed=9)  # what it starts from does not matter: the checkpoint decides
    found = run(model, F.cross_entropy, tmp_path / "run.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    pd.testing.assert_frame_equal(found.frame, expected.frame, check_exact=True)
    assert (found.best, found.best_step) == (expected.best, expected.best_step)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


SCRIPT = """
    import sys, time, torch
    from torch.nn import functional as F
    from workbench import lab
    pause, files = float(sys.argv[1]), sys.argv[2:]

    def batches(epoch):
        g = torch.Generator().manual_seed(epoch)
        for _ in range(7):
            t = torch.randint(50, (4, 9), generator=g)
            yield t[:, :-1], t[:, 1:]

    def loss(out, y):
        time.sleep(pause)
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    for file in files:
        with lab.seeded(0):
            model = lab.models.GPT(50, 16, 1, 2, 8, dropout=0.2)
        lab.train.fit(model, loss, batches, steps=40, every=10, checkpoint=file, checkpoint_every=3)
        print(sum(p.double().sum().item() for p in model.parameters()).hex())
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def start(pause: float, *files: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(pause), *map(str, files)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    file = tmp_path / "killed.safetensors"
    killed = start(0.1, file)
    deadline = time.monotonic() + 120
    while not file.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    out = start(0.0, file, tmp_path / "whole.safetensors").communicate()[0]
    resumed, whole = out.split()
    assert resumed == whole


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    x, y, _ = line()
    file = tmp_path / "run.safetensors"
    model, again = linear(), linear(1)
    first = train.fit(model, F.mse_loss, (x, y), steps=20, checkpoint=file)

    def never(*args: Tensor) -> Tensor:
        raise AssertionError("a finished run was run again")

    second = train.fit(again, never, (x, y), steps=20, checkpoint=file)
    assert torch.equal(model.weight, again.weight)
    pd.testing.assert_frame_equal(first.frame, second.frame)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    x, y, _ = line()
    file = tmp_path / "run.safetensors"
    train.fit(linear(), F.mse_loss, (x, y), steps=20, checkpoint=file)
    with pytest.raises(ValueError, match=r"^checkpoint: .*run\.safetensors is of another run"):
        train.fit(linear(), F.mse_loss, (x, y), steps=20, seed=1, checkpoint=file)


def test_tied_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    with lab.seeded(0):
        model = models.GPT(20, 8, 1, 2, 6)
    tokens = torch.randint(20, (32, 7), generator=torch.Generator().manual_seed(0))
    data = (tokens[:, :-1], tokens[:, 1:])

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    train.fit(model, loss, data, steps=3, checkpoint=tmp_path / "run.safetensors")
    other = models.GPT(20, 8, 1, 2, 6)
    train.fit(other, loss, data, steps=3, checkpoint=tmp_path / "run.safetensors")
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)


# --- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_training_on_cuda_in_bfloat16(tmp_path: Path, compile: bool) -> None:
    parts = lab.data.digits().split(0)
    model, dtypes = noisy(), set()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        dtypes.add(out.dtype)
        return F.cross_entropy(out, y)

    train.fit(
        model, loss, parts.train, steps=200, lr=1e-2, device="cuda", compile=compile,
        checkpoint=tmp_path / "run.safetensors",
    )  # fmt: skip
    assert dtypes == {torch.bfloat16}
    assert next(model.parameters()).dtype is torch.float32
    logits = train.predict(model, parts.test.x)
    assert (logits.argmax(1).numpy() == parts.test.y).mean() > 0.85
    resumed = noisy(1)
    train.fit(
        resumed, loss, parts.train, steps=200, lr=1e-2, device="cuda",
        checkpoint=tmp_path / "run.safetensors",
    )  # fmt: skip
    assert torch.equal(resumed.head.weight, model.head.weight)
