"""Running notebooks: several at once, each on its own, none able to take the others down."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.lab import catalogue, paths
from workbench.lab.show import CLAIM

INDEX = "index"
CELL_SECONDS = {"smoke": 300, "laptop": 3600, "gpu": 14400}  # patience with a single cell
_ANCHOR = re.compile(r"""<a\s+id=["'](\w+)["']""")
_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Job:
    """One notebook to run, and how it went."""

    family: str
    source: Path
    output: Path
    parameters: dict[str, Any]
    state: str = "waiting"  # running, ok, failed, died, interrupted
    cores: int = 1
    cells: int = 0
    cell: int = 0
    cell_id: str = ""
    paper: str = ""
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    disk_mb: float = 0.0
    claims: list[dict[str, Any]] = field(default_factory=list)
    started: float = 0.0
    kernel: Any = None
    last_words: str = ""

    @property
    def scale(self) -> str:
        """Scale that the notebook is given; "" if it has no such parameter."""
        return str(self.parameters.get("scale", ""))

    @property
    def broken(self) -> bool:
        """Whether something went wrong that is not the user's doing."""
        return self.state in ("failed", "died")

    def elapsed(self) -> float:
        """Seconds since the notebook was begun, or that it took."""
        return self.seconds or (time.monotonic() - self.started if self.started else 0.0)


@dataclass(frozen=True)
class Settings:
    """How notebooks are run."""

    jobs: int = 1
    executor: str | None = None
    fresh: bool = False
    timeout: int | None = None


def notebooks() -> dict[str, Path]:
    """The repository's notebooks by family, in reading order; the index comes last."""
    found = {file.stem: file for file in sorted((paths.root() / "notebooks").glob("*.ipynb"))}
    ordered = [slug for slug in catalogue.families()["slug"] if slug in found]
    ordered += [name for name in found if name not in ordered and name != INDEX]
    ordered += [INDEX] if INDEX in found else []
    return {name: found[name] for name in ordered}


def claims_in(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Claims that an executed notebook holds."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            stored = output.get("data", {}).get(CLAIM)
            if stored is not None:
                found.append(json.loads(stored) if isinstance(stored, str) else dict(stored))
    return found


def run(jobs: list[Job], settings: Settings, on_change: Callable[[Job], None]) -> Iterator[Job]:
    """Run notebooks and yield each as it is finished; the index waits for all others.

    On Ctrl-C the running kernels are interrupted, what was executed so far stays in the run's
    folder, and ``KeyboardInterrupt`` goes on to the caller.
    """
    from workbench.cli import kernels

    logging.getLogger("papermill").setLevel(logging.ERROR)
    for stage in ([j for j in jobs if j.family != INDEX], [j for j in jobs if j.family == INDEX]):
        if not stage:
            continue
        stop, workers = threading.Event(), min(settings.jobs, len(stage))
        for job in stage:
            job.cores = max(1, kernels.cores() // workers)
        with ThreadPoolExecutor(workers, "notebook") as pool:
            todo = {pool.submit(_run_one, job, settings, stop, on_change) for job in stage}
            try:
                yield from _finished(todo, stage)
            except BaseException:
                _stop(todo, stage, stop)
                raise


def _finished(todo: set[Future[Job]], stage: Iterable[Job]) -> Iterator[Job]:
    while todo:
        done, todo = wait(todo, timeout=0.5, return_when=FIRST_COMPLETED)
        for job in stage:
            if job.kernel is not None:
                job.kernel.sample()
        for future in done:
            yield future.result()


def _stop(todo: set[Future[Job]], stage: list[Job], stop: threading.Event) -> None:
    """Interrupt politely, then, or at the second Ctrl-C, kill what does not answer."""
    stop.set()
    for future in todo:
        future.cancel()
    for now in (False, True):
        for job in stage:
            if job.kernel is not None:
                job.kernel.stop(now=now)
        try:
            if not wait(todo, timeout=8).not_done:
                return
        except KeyboardInterrupt:
            continue


def _run_one(
    job: Job,
    settings: Settings,
    stop: threading.Event,
    on_change: Callable[[Job], None],
) -> Job:
    """Run one notebook; whatever goes wrong becomes the job's state."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if stop.is_set():
        job.state = "interrupted"
        return job
    job.state, job.started = "running", time.monotonic()
    on_change(job)
    try:
        _execute(job, settings, on_change)
        job.state = "ok"
    except PapermillExecutionError as error:
        job.state, job.error = "failed", f"{error.ename}: {error.evalue}"
        job.traceback = _COLOUR_CODES.sub("", "\n".join(error.traceback))
    except DeadKernelError:
        job.state, job.traceback = "died", job.last_words
        job.error = f"the kernel died (out of memory?); it had used up to {job.peak_mb:.0f} MB"
    except CellTimeoutError:
        job.state, job.error = "failed", f"one cell took more than {_patience(job, settings)} s"
    except Exception as error:  # a broken notebook must not end the run of the others
        job.state, job.error = "failed", f"{type(error).__name__}: {error}"
    if stop.is_set() and job.state != "ok":
        job.state, job.error = "interrupted", ""
    job.seconds = time.monotonic() - job.started
    on_change(job)
    return job


def _patience(job: Job, settings: Settings) -> int:
    return settings.timeout or CELL_SECONDS.get(job.scale, CELL_SECONDS["laptop"])


def _execute(job: Job, settings: Settings, on_change: Callable[[Job], None]) -> None:
    """Execute one notebook with papermill, in a kernel of its own, and collect its claims."""
    import nbformat
    import papermill

    from workbench.cli import kernels

    job.output.parent.mkdir(parents=True, exist_ok=True)
    cache = job.output.parent / f".cache-{job.family}" if settings.fresh else None
    store = cache or paths.cache()
    before = folder_mb(store)

    def on_cell(cell: Mapping[str, Any], cell_index: int) -> None:
        job.cell, job.cell_id = cell_index + 1, cell.get("id", "")
        if cell["cell_type"] == "markdown" and (found := _ANCHOR.search(cell["source"])):
            job.paper = found[1]
        on_change(job)

    try:
        for attempt in (1, 2):
            with kernels.kernel(share=job.cores, executor=settings.executor, cache=cache) as own:
                job.kernel = own
                options = kernels.engine_options(own, job.source.parent, on_cell)
                try:
                    papermill.execute_notebook(
                        job.source, job.output, job.parameters, progress_bar=False,
                        execution_timeout=_patience(job, settings), **options,
                    )  # fmt: skip
                    break
                except RuntimeError:
                    # Over TCP two kernels may race for a port: one dies before its first cell.
                    if attempt == 2 or job.cell or own.config:
                        raise
                finally:
                    own.sample()
                    job.peak_mb, job.kernel, job.last_words = own.peak_mb, None, own.last_words()
        notebook = nbformat.read(job.output, as_version=4)
        job.claims = claims_in(notebook)
    finally:
        written = job.output.stat().st_size / 2**20 if job.output.exists() else 0.0
        job.disk_mb = max(0.0, folder_mb(store) - before) + written
        if cache:
            shutil.rmtree(cache, ignore_errors=True)


def folder_mb(folder: Path) -> float:
    """Size of all files below a folder, in MB (2**20 bytes)."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total / 2**20
