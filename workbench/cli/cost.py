"""What a run will cost on this machine, before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table

from workbench.cli import kernels, recording
from workbench.cli.runner import INDEX, Job
from workbench.lab import paths

# The bounds that a notebook must keep at each scale: seconds, MB of memory, MB on disk.
BUDGET = {
    "smoke": (45.0, 2000.0, 50.0),
    "laptop": (720.0, 4000.0, 200.0),
    "gpu": (1800.0, 16000.0, 500.0),
}


@dataclass(frozen=True)
class Cost:
    """Of one notebook."""

    family: str
    seconds: float
    peak_mb: float
    disk_mb: float
    source: str


def estimate(jobs: list[Job], device: str) -> list[Cost]:
    """Cost of each notebook as last recorded at its scale and device, otherwise its budget."""
    known = recording.timings()
    found = []
    for job in jobs:
        same = (known["family"] == job.family) & (known["device"] == device)
        if job.scale:
            same &= known["scale"] == job.scale
        if same.any():
            row = known[same].iloc[-1]
            plural = "core" if row["cores"] == 1 else "cores"
            told = f"measured {row['date']} with {row['cores']} {plural}"
            found.append(Cost(job.family, row["seconds"], row["peak_mb"], row["disk_mb"], told))
        else:
            scale = "smoke" if job.family == INDEX else job.scale
            budget = BUDGET.get(scale, BUDGET["laptop"])
            found.append(Cost(job.family, *budget, "not measured yet: its budget"))
    return found


def total_seconds(costs: list[Cost], workers: int) -> float:
    """Time until the last notebook is done, when each free worker takes the longest one left."""
    busy = [0.0] * workers
    for cost in sorted(costs, key=lambda c: -c.seconds):
        busy[busy.index(min(busy))] += cost.seconds
    return max(busy)


def show(console: Console, jobs: list[Job], device: str, workers: int) -> None:
    """Print the estimate, what this machine has, and a warning where that is not enough."""
    costs = estimate(jobs, device)
    table = Table(box=None, pad_edge=False)
    for name in ("notebook", "time", "memory", "disk"):
        table.add_column(name, justify="left" if name == "notebook" else "right")
    table.add_column("where the numbers come from", style="dim")
    for cost in costs:
        table.add_row(
            cost.family, _clock(cost.seconds), f"{cost.peak_mb:.0f} MB", f"{cost.disk_mb:.0f} MB",
            cost.source,
        )  # fmt: skip
    memory = sum(sorted((c.peak_mb for c in costs), reverse=True)[:workers])
    disk = sum(c.disk_mb for c in costs)
    table.add_section()
    table.add_row(
        "at most" if workers == 1 else f"at most, {workers} at once",
        _clock(total_seconds(costs, workers)), f"{memory:.0f} MB", f"{disk:.0f} MB",
        "results in the cache cost nothing",
    )  # fmt: skip
    console.print(table)
    free_memory = psutil.virtual_memory().available / 2**20
    free_disk = shutil.disk_usage(paths.root()).free / 2**20
    console.print(
        f"This machine: {kernels.cores()} cores, device {device}, {free_memory:.0f} MB of memory "
        f"and {free_disk:.0f} MB of disk free."
    )
    for name, needed, free in (("memory", memory, free_memory), ("disk", disk, free_disk)):
        if needed > free:
            console.print(f"[bold yellow]Not enough {name}:[/] {needed:.0f} MB needed.")


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
