"""Kernels that do not disturb one another: own socket, own folders, own share of the cores."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

ENGINE = "workbench"
# Idle threads sleep instead of spinning. Where another process wants the second core, spinning
# made a loop of small products forty times slower (66 s against 1.5 s).
PATIENT = ("OMP_WAIT_POLICY", "PASSIVE")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
SOCKET_LENGTH = 90  # a Unix socket's path may have about 100 characters
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _ThisPython(KernelSpecManager):
    """Finds one kernel whatever its name: the Python that runs the command line."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class _Manager(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return _ThisPython(parent=self)


class Kernel:
    """What one notebook's kernel is started with, and a hand on its process while it runs."""

    def __init__(self, folder: Path, config: Config, environment: dict[str, str]) -> None:
        self.folder, self.config, self.environment = folder, config, environment
        self.client: PapermillNotebookClient | None = None
        self.peak_mb = 0.0
        self.complaints = folder / "stderr.txt"  # what the process itself says, such as its end

    @property
    def pid(self) -> int | None:
        """Process id while the kernel runs."""
        manager = self.client.km if self.client else None
        return getattr(getattr(manager, "provisioner", None), "pid", None)

    def last_words(self) -> str:
        """The end of what the process wrote to stderr outside any cell."""
        if not self.complaints.exists():
            return ""
        return self.complaints.read_text(encoding="utf8", errors="replace")[-4000:].strip()

    def sample(self) -> None:
        """Note the memory of the kernel and of its workers, if it is the most so far."""
        pid = self.pid
        if pid is None:
            return
        with suppress(psutil.Error):
            top = psutil.Process(pid)
            used = 0
            for process in [top, *top.children(recursive=True)]:
                with suppress(psutil.Error):
                    used += process.memory_info().rss
            self.peak_mb = max(self.peak_mb, used / 2**20)

    def stop(self, *, now: bool = False) -> None:
        """Interrupt the kernel and its workers, or kill them."""
        pid = self.pid
        if pid is None:
            return
        with suppress(OSError, psutil.Error):
            if sys.platform == "win32":
                for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
                    process.kill()
            else:
                os.killpg(os.getpgid(pid), signal.SIGKILL if now else signal.SIGINT)


@contextmanager
def kernel(
    *, share: int, executor: str | None = None, cache: Path | None = None
) -> Iterator[Kernel]:
    """Prepare one kernel's folders; they are removed afterwards.

    Args:
        share: cores that this kernel and its workers may use.
        executor: where ``lab`` runs experiments; None leaves the environment's choice.
        cache: another result cache than the environment's.
    """
    folder = Path(tempfile.mkdtemp(prefix="wb-"))
    try:
        yield Kernel(folder, _config(folder), environment(folder, share, executor, cache))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(folder: Path) -> Config:
    """A socket of its own in the file system; TCP on Windows or where the path is too long."""
    socket = str(folder / "s")
    if sys.platform == "win32" or len(socket) > SOCKET_LENGTH:
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": socket}})


def environment(
    folder: Path, share: int, executor: str | None, cache: Path | None
) -> dict[str, str]:
    """Environment of a headless kernel."""
    out = dict(os.environ)
    for name, limit in {**dict.fromkeys(THREADS, share), "WORKBENCH_JOBS": share}.items():
        given = out.get(name, "")
        out[name] = str(min(int(given), limit) if given.isdigit() and int(given) else limit)
    out["LOKY_MAX_CPU_COUNT"] = str(share)
    out.setdefault(*PATIENT)
    out["WORKBENCH_HEADLESS"] = "1"
    out["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), out.get("PYTHONPATH")]))
    for name, sub in (("IPYTHONDIR", "ipython"), ("MPLCONFIGDIR", "matplotlib")):
        (folder / sub).mkdir()
        out[name] = str(folder / sub)
    out.pop("MPLBACKEND", None)  # the kernel draws inline
    if executor:
        out["WORKBENCH_EXECUTOR"] = executor
    if cache:
        out["WORKBENCH_CACHE"] = str(cache)
    return out


@contextmanager
def _saving_sparingly(nb_man: Any) -> Iterator[None]:
    """Keep saving to a twentieth of the time; papermill writes the whole notebook twice a cell.

    However it ends, the notebook is saved once more.
    """
    save, again = nb_man.save, time.monotonic()

    def sparingly(**_: Any) -> None:
        nonlocal again
        start = time.monotonic()
        if start >= again:
            save()
            again = time.monotonic() + 20 * (time.monotonic() - start)

    nb_man.save = sparingly
    try:
        yield
    finally:
        nb_man.save = save
        save()


class _Engine(NBClientEngine):
    """papermill's engine, with the kernel's environment and without waiting for others."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        log_output: bool = False,
        stdout_file: Any = None,
        stderr_file: Any = None,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        **kwargs: Any,
    ) -> Any:
        own: Kernel = kwargs["kernel"]
        on_cell: Callable[..., None] = kwargs["on_cell"]
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=_Manager,
            config=own.config,
            resources={"metadata": {"path": kwargs["folder"]}},
            store_widget_state=False,
            timeout=execution_timeout,
            startup_timeout=start_timeout,
            iopub_timeout=kwargs["iopub_timeout"],
            raise_on_iopub_timeout=True,
            on_cell_start=on_cell,
        )
        own.client = client
        try:
            with own.complaints.open("wb") as stderr, _saving_sparingly(nb_man):
                return client.execute(env=own.environment, stderr=stderr)
        finally:
            own.client = None


papermill_engines.register(ENGINE, _Engine)


def engine_options(own: Kernel, folder: Path, on_cell: Callable[..., None]) -> Mapping[str, Any]:
    """Keyword arguments that ``papermill.execute_notebook`` hands to this engine."""
    return {
        "engine_name": ENGINE, "kernel": own, "folder": str(folder), "on_cell": on_cell,
        "iopub_timeout": 60, "start_timeout": 120,
    }  # fmt: skip
