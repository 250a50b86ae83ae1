"""``workbench run``: from what was typed to an exit code."""

from __future__ import annotations

import datetime
import difflib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from workbench.cli import outputs, parameters, runner
from workbench.cli.runner import Job, Settings
from workbench.lab import catalogue, ledger, paths

if TYPE_CHECKING:
    import pandas as pd

OK, BROKEN, USAGE, DISAGREES, INTERRUPTED = 0, 1, 2, 3, 130
SCALES = ("smoke", "laptop", "gpu")


class Usage(Exception):
    """What was typed cannot be run; the message says why."""


@dataclass(frozen=True)
class Order:
    """What ``workbench run`` was asked to do."""

    families: list[str] = field(default_factory=list)
    scale: str = "laptop"
    device: str = "auto"
    seed: int = 0
    typed: list[tuple[str, str]] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    record: bool = False
    strict: bool = False
    out: Path | None = None


def plan(order: Order) -> list[Job]:
    """The notebooks to run, with the parameters each is given.

    Raises:
        Usage: a family, parameter or value is not there; nothing has been started.
    """
    import nbformat

    known = runner.notebooks()
    wanted = list(dict.fromkeys(order.families)) or list(known)
    for family in wanted:
        if family not in known:
            near = difflib.get_close_matches(family, known, n=3) or list(known)
            raise Usage(f"no notebook is called {family!r}; there is {', '.join(near) or 'none'}")
    if not wanted:
        raise Usage(f"no notebook in {paths.root() / 'notebooks'}")
    added = order.record and order.scale == "laptop" and runner.INDEX not in wanted
    if added and runner.INDEX in known:
        wanted.append(runner.INDEX)  # it shows what is recorded now
    folder = order.out or _new_folder()
    options = {"scale": order.scale, "device": order.device, "seed": order.seed}
    jobs = []
    for family in (name for name in known if name in wanted):
        notebook = nbformat.read(known[family], as_version=4)
        typed = [] if added and family == runner.INDEX else order.typed
        try:
            values = parameters.settle(parameters.read(notebook), options, typed)
        except ValueError as error:
            raise Usage(f"{family}: {error}") from None
        if values.get("scale", SCALES[0]) not in SCALES:
            raise Usage(f"{family}: scale: expected {', '.join(SCALES)}, got {values['scale']!r}")
        cells = len(notebook.cells) + bool(values)
        jobs.append(Job(family, known[family], folder / f"{family}.ipynb", values, cells=cells))
    check_device(str(jobs[0].parameters.get("device", order.device)))
    return jobs


def _new_folder() -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder, extra = paths.root() / "runs" / stamp, 1
    while folder.exists():
        extra += 1
        folder = folder.with_name(f"{stamp}-{extra}")
    return folder


def check_device(name: str) -> None:
    """Refuse a device that this machine lacks before any kernel is started.

    Raises:
        Usage: there is no such device here.
    """
    if name in ("auto", "cpu"):
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Usage(f"device: {name!r} cannot be used here ({reason})") from None


def execute(order: Order, jobs: list[Job], console: Console) -> int:
    """Run the planned notebooks, report, and return the exit code."""
    recorded, remarks, stopped = ledger.read(), list[str](), False
    with _progress(console, jobs) as on_change, _terminate_like_interrupt():
        try:
            for job in runner.run(jobs, order.settings, on_change):
                if job.state == "ok":
                    remarks += _accept(order, job)
        except KeyboardInterrupt:
            stopped = True
            for job in jobs:
                if job.state in ("waiting", "running"):
                    job.state = "interrupted"
    changes = _changes(jobs, recorded)
    folder = jobs[0].output.parent
    outputs.write(folder, jobs, changes)
    outputs.report(console, jobs, changes, folder)
    for remark in remarks:
        console.print(f"[yellow]note[/] {escape(remark)}")
    if stopped:
        console.print("[yellow]Interrupted.[/] What was finished is kept.")
        return INTERRUPTED
    if any(job.broken for job in jobs):
        return BROKEN
    flipped = bool((changes["change"] == "flipped").any())
    return DISAGREES if outputs.failed_identities(jobs) or (order.strict and flipped) else OK


def _accept(order: Order, job: Job) -> list[str]:
    """Check a finished notebook's claims and, where asked, write them down."""
    try:
        ledger.rows(job.claims)
    except ValueError as error:
        job.state, job.error, job.claims = "failed", str(error), []
        return []
    if not order.record:
        return []
    from workbench.cli import recording

    remarks = recording.record(job, device=device_of(job), fresh=order.settings.fresh)
    catalogue.update()
    return remarks


def device_of(job: Job) -> str:
    """Device that a finished notebook ran on."""
    if job.claims:
        return str(job.claims[0].get("device", "cpu"))
    given = str(job.parameters.get("device", "auto"))
    return "cpu" if given == "auto" else given.partition(":")[0]


def automatic_device() -> str:
    """The device that ``auto`` stands for on this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _changes(jobs: list[Job], recorded: pd.DataFrame) -> pd.DataFrame:
    """What the finished notebooks say beside the ledger as it was before the run."""
    done = [job for job in jobs if job.state == "ok"]
    families = {job.family for job in done}
    frame = catalogue.papers()
    about = set(frame.loc[frame["family"].isin(families), "slug"])
    return ledger.compare(ledger.rows(c for job in done for c in job.claims), recorded, about)


@contextmanager
def _progress(console: Console, jobs: list[Job]) -> Iterator[Any]:
    """A live table in a terminal; elsewhere one line whenever a notebook begins or ends."""
    if console.is_terminal:
        with Live(
            get_renderable=lambda: outputs.board(jobs), console=console, refresh_per_second=4
        ):
            yield lambda job: None
        return
    told: dict[str, str] = {}
    lock = threading.Lock()

    def on_change(job: Job) -> None:
        with lock:
            if told.get(job.family) == job.state:
                return
            told[job.family] = job.state
        clock = f" after {job.seconds:.1f} s" if job.seconds else ""
        console.print(f"{job.family}: {job.state}{clock}", markup=False, highlight=False)

    yield on_change


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """A request to terminate ends the run as Ctrl-C does: reports written, kernels stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
