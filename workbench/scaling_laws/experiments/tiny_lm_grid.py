"""Make ``data/tiny_lm_grid.csv``: train byte-level GPTs over sizes, batches, seeds and budgets.

``python -m workbench.scaling_laws.experiments.tiny_lm_grid [--scale laptop|gpu] [--jobs 2]`` adds
the runs that the table does not hold yet; interrupted, it goes on where it was. At scale laptop the
whole grid takes about 45 minutes of one core.

The recipe is the same everywhere: AdamW (0.9, 0.95) without weight decay, gradients clipped to 1,
learning rate 0.19 / d (of 1.5e-3 to 2.4e-2 near the best for d = 16 and d = 64, at the smallest and
the largest batch) after a short warm-up, context of 128 bytes. Blocks of the text that no model
trains on are held out throughout the library, not at its end.
"""

from __future__ import annotations

import copy
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from workbench import lab
from workbench.lab import models, paths
from workbench.scaling_laws.tiny_lm import COLUMNS

CONTEXT = 128
BLOCK = 16_384
HELD_OUT = 25  # every so many blocks, one is held out
COOL_DOWN = 0.2  # share of a budget over which the learning rate falls to zero
GRIDS: dict[str, dict[str, Any]] = {
    "smoke": {
        "shapes": ((1, 16),),
        "sequences": (4,),
        "seeds": (0,),
        "budgets": (10_000, 20_000),
        "windows": 8,
    },
    "laptop": {
        "shapes": ((1, 16), (1, 24), (2, 32), (2, 48), (3, 64), (3, 96)),
        "sequences": (4, 12, 36),
        "seeds": (0, 1),
        "budgets": (300_000, 600_000, 1_200_000, 2_400_000),
        "windows": 128,
    },
    "gpu": {
        "shapes": ((3, 96), (4, 128), (6, 192), (8, 256), (8, 384), (12, 512)),
        "sequences": (64, 256, 1024),
        "seeds": (0, 1, 2),
        "budgets": (10_000_000, 40_000_000, 160_000_000, 640_000_000),
        "windows": 1024,
    },
}


def split_text() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library to train on, and held-out ones, as uint8."""
    raw = np.frombuffer(lab.data.text("stdlib").encode(), dtype=np.uint8)
    held_out = (np.arange(len(raw)) // BLOCK) % HELD_OUT == HELD_OUT // 2
    return torch.from_numpy(raw[~held_out].copy()), torch.from_numpy(raw[held_out].copy())


def windows(text: Tensor, n: int) -> Tensor:
    """``n`` windows of context + 1 bytes, evenly spread over the text."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, n).long()
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def run(
    seed: int,
    layers: int,
    d: int,
    sequences: int,
    budgets: tuple[int, ...],
    held_out: int,
    device: str = "cpu",
    checkpoints: int = 28,
) -> dict[str, np.ndarray]:
    """One constant run and its cool-downs; columns of the table as arrays."""
    train_text, test_text = split_text()
    train_text, test = train_text.to(device), windows(test_text, held_out).to(device)
    with lab.seeded(seed):
        model = models.GPT(256, d, layers, max(2, d // 32), CONTEXT).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, betas=(0.9, 0.95), weight_decay=0.0)
    batch = sequences * CONTEXT
    steps = [round(budget / batch) for budget in budgets]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        0, len(train_text) - CONTEXT - 1, (steps[-1], sequences), generator=generator
    )
    peak, warmup = 0.19 / d, max(10, steps[0] // 20)
    branch_at = {n - round(COOL_DOWN * n): n for n in steps}
    first = max(2 * warmup, round(20_000 / batch))
    report_at = set(np.geomspace(first, steps[-1], checkpoints).round().astype(int).tolist())

    def step(net: nn.Module, opt: torch.optim.Optimizer, i: int, factor: float) -> None:
        rows = train_text[(starts[i][:, None] + torch.arange(CONTEXT + 1)).to(device)].long()
        for group in opt.param_groups:
            group["lr"] = peak * factor
        loss = F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()

    @torch.no_grad()
    def evaluate(net: nn.Module) -> float:
        parts = [
            F.cross_entropy(net(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum")
            for w in test.split(128)
        ]
        return float(torch.stack(parts).sum()) / test[:, 1:].numel()

    rows: list[tuple[str, float, int, float]] = []
    for i in range(steps[-1]):
        if i in branch_at:
            end = branch_at[i]
            net = copy.deepcopy(model)
            opt = torch.optim.AdamW(net.parameters(), 1.0, betas=(0.9, 0.95), weight_decay=0.0)
            opt.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for j in range(i, end):
                step(net, opt, j, (end - j) / (end - i))
            rows.append(("decayed", budgets[steps.index(end)], end, evaluate(net)))
        step(model, optimizer, i, min(1.0, (i + 1) / warmup))
        if i + 1 in report_at:
            rows.append(("constant", float("nan"), i + 1, evaluate(model)))
    phase, budget, count, loss = zip(*rows, strict=True)
    return {
        "phase": np.array(phase),
        "budget": np.array(budget, float),
        "step": np.array(count),
        "tokens": np.array(count) * batch,
        "loss": np.array(loss).round(5),
        "N": np.full(len(rows), sum(q.numel() for q in model.blocks.parameters())),
        "N_total": np.full(len(rows), sum(q.numel() for q in model.parameters())),
    }


def todo(scale: str, done: pd.DataFrame) -> list[dict[str, int]]:
    """Constant runs of the grid that the table does not hold, the largest models first."""
    grid = GRIDS[scale]
    mine = done[done.made == scale]
    have = set(zip(mine.layers, mine.d, mine.batch, mine.seed, strict=True))
    return [
        {"seed": seed, "layers": layers, "d": d, "sequences": sequences}
        for seed in grid["seeds"]
        for layers, d in reversed(grid["shapes"])
        for sequences in grid["sequences"]
        if (layers, d, sequences * CONTEXT, seed) not in have
    ]


def write(file: Path, frame: pd.DataFrame) -> None:
    """The whole table, in the grid's order, replaced at once."""
    order = ["made", "N", "batch", "seed", "phase", "tokens"]
    frame = frame.sort_values(order, kind="stable")[list(COLUMNS)]
    frame = frame.assign(budget=frame.budget.astype("Int64"))
    part = file.with_suffix(".part")
    head = (
        "# Byte-level GPTs on the source of Python's standard library (its text changes with the "
        f"version: {platform.python_version()}); see scaling_laws/experiments/tiny_lm_grid.py\n"
    )
    part.write_text(head + frame.to_csv(index=False), encoding="utf8")
    os.replace(part, file)


def main(
    scale: Annotated[str, typer.Option(help="laptop or gpu (smoke: two short runs).")] = "laptop",
    jobs: Annotated[int, typer.Option(help="Runs trained side by side.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    file: Annotated[Path | None, typer.Option(help="Table to add to.")] = None,
) -> None:
    """Train what is missing from the grid and add it to the table."""
    import joblib

    if scale not in GRIDS:
        raise typer.BadParameter(f"scale: expected one of {', '.join(GRIDS)}, got {scale!r}")
    file = file or paths.root() / "data" / "tiny_lm_grid.csv"
    table = pd.read_csv(file, comment="#") if file.exists() else pd.DataFrame(columns=COLUMNS)
    left, grid = todo(scale, table), GRIDS[scale]
    shared: dict[str, Any] = {"budgets": grid["budgets"], "held_out": grid["windows"]}

    def one(settings: dict[str, Any]) -> pd.DataFrame:
        torch.set_num_threads(1)
        rows = pd.DataFrame(run(**settings, **shared, device=device))
        rows["made"], rows["batch"] = scale, settings["sequences"] * CONTEXT
        for name in ("layers", "d", "seed"):
            rows[name] = settings[name]
        return rows

    pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for i, rows in enumerate(pool(joblib.delayed(one)(settings) for settings in left), 1):
        table = pd.concat([table, rows]) if len(table) else rows
        write(file, table)
        typer.echo(f"{i} of {len(left)}: d = {rows.d.iloc[0]}, batch = {rows.batch.iloc[0]}")


if __name__ == "__main__":
    typer.run(main)
