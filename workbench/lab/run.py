"""One run of a notebook: its scale, its device, its seeds, its claims."""

from __future__ import annotations

import inspect
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.lab import cache, claims, digest
from workbench.lab.progress import Progress, live
from workbench.lab.seeding import seeded

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

__all__ = ["SCALES", "Run", "seeded", "start"]

SCALES = ("smoke", "laptop", "gpu")
T = TypeVar("T")


def start(
    scale: str = "laptop",
    device: str = "auto",
    seed: int = 0,
    *,
    jobs: int | None = None,
    executor: str | None = None,
) -> Run:
    """Begin a run; every notebook's set-up cell calls this once.

    Args:
        scale: ``smoke`` (tests, seconds), ``laptop`` (published verdicts, minutes) or ``gpu``.
        device: ``auto`` takes cuda, then mps, then cpu; or the name of a torch device.
        seed: the first seed; ``run.seeds(fn, n=5)`` uses ``seed`` .. ``seed + 4``.
        jobs: parallel workers; default ``WORKBENCH_JOBS``, else one a core (one on a GPU and at
            scale ``smoke``).
        executor: ``loky`` (processes), ``sequential``, ``threading``, ``dask`` (the cluster of the
            current ``dask.distributed.Client``, or a new local one), or the address of a Dask
            scheduler (``tcp://host:port``); default ``WORKBENCH_EXECUTOR``, else ``loky``.

    Raises:
        ValueError: an argument has no such value; the message says which there are.
    """
    import torch

    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used here ({reason})") from None
    if jobs is None and scale != "smoke" and "WORKBENCH_JOBS" in os.environ:
        jobs = int(os.environ["WORKBENCH_JOBS"])
    if jobs is None:  # at smoke scale, starting workers costs more than they save
        jobs = 1 if chosen.type != "cpu" or scale == "smoke" else os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    executor = executor or os.environ.get("WORKBENCH_EXECUTOR") or "loky"
    return Run(scale, chosen, seed, jobs, executor)


class Run:
    """Scale, device and seed of a run, and what is done with them. Made by ``lab.start``."""

    def __init__(
        self, scale: str, device: torch.device, seed: int, jobs: int, executor: str
    ) -> None:
        self.scale, self.device, self.seed = scale, device, seed
        self.jobs, self.executor = jobs, executor
        self.claims: list[claims.Claim] = []

    def __repr__(self) -> str:
        return f"Run(scale={self.scale!r}, device={str(self.device)!r}, seed={self.seed})"

    @property
    def live(self) -> bool:
        """Whether a person watches this notebook."""
        return live()

    @property
    def rng(self) -> np.random.Generator:
        """A fresh numpy generator with this run's seed."""
        import numpy as np

        return np.random.default_rng(self.seed)

    def pick(self, *, smoke: T, laptop: T, gpu: T) -> T:
        """The size that belongs to this run's scale."""
        return {"smoke": smoke, "laptop": laptop, "gpu": gpu}[self.scale]

    def seeds(
        self,
        fn: Callable[..., Mapping[str, Any]],
        n: int = 5,
        *,
        grid: Mapping[str, Sequence[Any]] | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Run an experiment over seeds, in parallel, remembering what was computed.

        Each call ``fn(seed=s, **settings)`` runs with one thread and with the global generators
        seeded by ``s``, so the frame is the same with one worker, many, or a cluster. A result is
        stored as soon as it is there, under a key of the function, its source and all it imports
        from this package, its arguments and the library versions.

        Args:
            fn: a module-level function (or one typed in the notebook that uses no global variable)
                returning a dictionary of numbers, strings and arrays. If it has an argument
                ``device``, it is given this run's.
            n: number of seeds.
            grid: further arguments to vary; all combinations are run and become columns.
            **settings: passed on unchanged.

        Returns:
            One row a combination and seed, in that order: the grid's columns, ``seed``, and what
            ``fn`` returned. ``frame.attrs`` holds ``digest`` (of the code that made it), ``new``
            (calls computed now) and ``seconds``.

        Raises:
            ValueError: ``n`` is not positive, or a key of ``grid`` is already a setting.
            RuntimeError: a call failed; finished ones stay stored.
        """
        import pandas as pd

        if n < 1:
            raise ValueError(f"n: expected at least one seed, got {n}")
        grid = dict(grid or {})
        if doubled := (set(grid) & set(settings)) | (set(grid) & {"seed"}):
            raise ValueError(f"grid: {sorted(doubled)[0]!r} is given twice")
        if "device" in inspect.signature(fn).parameters and "device" not in settings:
            settings["device"] = str(self.device)
        points = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        calls = [{**p, "seed": self.seed + i} for p in points for i in range(n)]

        started, name = time.monotonic(), f"{fn.__module__}.{fn.__qualname__}"
        code = cache.key(name, digest.source(fn), repr(sorted(digest.versions().items())))
        keys = [cache.key(code, digest.arguments({**settings, **call})) for call in calls]
        results = [cache.load(name, k) for k in keys]
        missing = [i for i, result in enumerate(results) if result is None]
        if missing:
            with Progress(fn.__name__.replace("_", " "), len(missing)) as bar:
                todo = [(i, {**settings, **calls[i]}) for i in missing]
                for i, result in self._parallel(fn, todo):
                    plain = cache.plain(result, f"{name}(seed={calls[i]['seed']})")
                    cache.store(name, keys[i], plain)
                    results[i] = plain
                    bar.step()
        frame = pd.DataFrame([{**c, **(r or {})} for c, r in zip(calls, results, strict=True)])
        frame.attrs = {
            "digest": code[:16],
            "new": len(missing),
            "seconds": time.monotonic() - started,
        }
        return frame

    def _parallel(
        self, fn: Callable[..., Any], todo: list[tuple[int, dict[str, Any]]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield ``(i, fn(**arguments))`` as they are finished."""
        import joblib

        jobs = min(self.jobs, len(todo))
        if self.executor == "sequential" or (jobs == 1 and self.executor == "loky"):
            for i, arguments in todo:
                yield _call(fn, i, arguments)
            return
        with _backend(self.executor, jobs) as options:
            pool = joblib.Parallel(return_as="generator_unordered", **options)
            yield from pool(joblib.delayed(_call)(fn, i, arguments) for i, arguments in todo)

    def claim(self, slug: str, statement: str, frame: pd.DataFrame, **details: Any) -> claims.Claim:
        """Judge a paper's claim on paired runs and show the card; see ``claims.judge``."""
        return self._emit(claims.judge(slug, statement, frame, **details))

    def identity(
        self, slug: str, statement: str, lhs: Any, rhs: Any, tol: float = 1e-6, **details: Any
    ) -> claims.Claim:
        """Check an equality proved in the paper and show the card; see ``claims.equal``."""
        return self._emit(claims.equal(slug, statement, lhs, rhs, tol, **details))

    def _emit(self, claim: claims.Claim) -> claims.Claim:
        claim = claim.at(scale=self.scale, device=self.device.type, seed=self.seed)
        self.claims.append(claim)
        claim.show()
        return claim


def _call(fn: Callable[..., Any], i: int, arguments: dict[str, Any]) -> tuple[int, Any]:
    """One call of an experiment, with one thread and seeded generators."""
    import threadpoolctl
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpoolctl.threadpool_limits(1), seeded(arguments["seed"]):
            return i, fn(**arguments)
    except Exception as error:
        shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if len(repr(v)) < 60)
        raise RuntimeError(f"{fn.__qualname__}({shown}) failed: {error!r}") from error
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _backend(executor: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Options for ``joblib.Parallel`` with the named executor."""
    import joblib

    if executor in ("loky", "threading"):
        with warnings.catch_warnings():
            # A worker whose memory grew is replaced and its call repeated: nothing to explain away.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            yield {"n_jobs": jobs, "backend": executor}
        return
    if executor != "dask" and "://" not in executor:
        known = "loky, sequential, threading, dask or the address of a Dask scheduler"
        raise ValueError(f"executor: expected {known}, got {executor!r}")
    from dask.distributed import Client, LocalCluster, get_client

    with ExitStack() as owned:
        if executor != "dask":
            client = owned.enter_context(Client(executor, timeout=20, set_as_default=False))
        else:
            try:
                client = get_client()
            except ValueError:
                local = LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
                cluster = owned.enter_context(local)
                client = owned.enter_context(Client(cluster, set_as_default=False))
        with joblib.parallel_config(backend="dask", client=client):
            yield {"n_jobs": -1}
