"""Losses over planes through parameter space, evaluated coarse to fine behind the explorer's back.

A `Landscape` holds planes that are made when first looked at, and for each a grid of losses that
always has a value everywhere: exact where it was evaluated, interpolated elsewhere. One worker
thread evaluates what is being looked at, in order of what the eye misses first.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.lab.progress import Progress
from workbench.loss_landscapes.figures_grid import Grid, Track, level, strides
from workbench.loss_landscapes.figures_resample import FINER, Square, line, stations, window

Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]
KEPT = 12  # zoomed views and lines remembered
CHUNK = 0.08  # seconds of evaluations between two looks at what is wanted
QUIET = 0.04  # seconds after a move that belong to its drawing
REDRAW = 0.25  # seconds between two redrawings while numbers arrive
FIRST = 0.4  # seconds that the first picture may take to evaluate
ZOOMED = 0.6  # share of the plane's radius below which the zoomed view gets a grid of its own


@dataclass(frozen=True)
class Slice:
    """A plane through parameter space, in units in which all that is looked at has radius R.

    Attributes:
        title: what spans it.
        evaluate: losses at points (a, b), each of shape (m,).
        gram: inner products of its directions, (d1 d1, d1 d2, d2 d2).
        path: (t, 2), a training trajectory projected onto it; (0, 2) without.
    """

    title: str
    evaluate: Evaluate
    gram: tuple[float, float, float] = (1.0, 0.0, 1.0)
    path: Float[np.ndarray, "t 2"] = field(default_factory=lambda: np.empty((0, 2)))


@dataclass(frozen=True)
class Wanted:
    """What is being looked at: a plane, a zoomed view (a, b, radius), a line (a0, b0, a1, b1)."""

    plane: str
    view: tuple[float, float, float]
    line: tuple[float, float, float, float]


class Landscape:
    """Planes and their losses, and the thread that evaluates them.

    Args:
        makers: a function for each plane that makes it, called once, when it is first looked at.
        radius: half the side of the square that can be looked at.
        points: nodes a side of each plane's grid.
        background: evaluate in a thread; otherwise only `finish` evaluates.
        changed: called from the thread when there is something new to draw, with what went wrong or
            None; False ends the thread until something is wanted again.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Slice]],
        *,
        radius: float,
        points: int,
        background: bool,
        changed: Callable[[Exception | None], bool] = lambda error: True,
    ) -> None:
        self.makers, self.radius, self.n = dict(makers), radius, points
        self.background, self.changed = background, changed
        self.here = 0.0  # the loss at the middle, where a plane is still unknown
        self.slices: dict[str, Slice] = {}
        self.grids: dict[str, Grid] = {}
        self.views: OrderedDict[Any, Grid] = OrderedDict()
        self.tracks: OrderedDict[Any, Track] = OrderedDict()
        self.failed: dict[str, Exception] = {}
        self.wanted: Wanted | None = None
        self.closed = False
        self._coarsest = 8
        self._seconds = 0.01  # for one evaluation
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._drawn = self._moved = 0.0
        _alive.add(self)

    # ---- at once

    def begin(self, plane: str) -> None:
        """The first picture of a plane, with as many points as there is time for."""
        made = self._make(plane)
        self.here = float(made.evaluate(np.zeros(1), np.zeros(1))[0])
        start = time.perf_counter()
        made.evaluate(np.zeros(1), np.zeros(1))
        self._seconds = max(1e-5, time.perf_counter() - start)
        steps = strides(self.n)
        cheap = [s for s in steps if len(level(self.n, s)) ** 2 * self._seconds <= FIRST]
        self._coarsest = max(4, min(cheap, default=steps[0]))
        self.grids[plane] = grid = self._new_grid()
        while not self._advance(made, grid):
            pass

    def finish(self) -> None:
        """Evaluate every plane completely, here and now; Ctrl-C keeps what there is."""
        total = len(self.makers) * self.n**2 - sum(g.evaluated for g in self.grids.values())
        with Progress("loss landscape", total) as bar:
            try:
                for plane in self.makers:
                    made = self._make(plane)
                    grid = self.grids.setdefault(plane, self._new_grid())
                    while not grid.done:
                        before = grid.evaluated
                        self._advance(made, grid)
                        bar.step(grid.evaluated - before)
            except KeyboardInterrupt:
                return

    # ---- what there is

    def want(self, wanted: Wanted) -> None:
        """Look at something: the worker turns to it."""
        with self._lock:
            self.wanted, self._moved = wanted, time.monotonic()
            if self.background and self._thread is None and not self.closed and self._task():
                self._thread = threading.Thread(
                    target=self._work, name="loss landscape", daemon=True
                )
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None

    def square(self, plane: str) -> Square:
        """What is known of a plane; flat at the present loss before anything is."""
        grid = self.grids.get(plane)
        loss = np.full((3, 3), self.here) if grid is None else grid.shown
        return Square(loss, self.radius)

    def near(self, wanted: Wanted) -> np.ndarray | None:
        """Losses of the zoomed view from a grid of its own, if it has one."""
        grid = self.views.get((wanted.plane, wanted.view))
        return None if grid is None or not grid.evaluated else grid.shown

    def along(self, wanted: Wanted) -> np.ndarray | None:
        """Losses along the line, if all of them were evaluated."""
        track = self.tracks.get((wanted.plane, wanted.view[:2], wanted.line))
        return None if track is None else track.values

    def describe(self, plane: str) -> dict[str, Any]:
        """Title, path, metric and progress of a plane."""
        made, grid = self.slices.get(plane), self.grids.get(plane)
        path = np.empty((0, 2)) if made is None else made.path
        count, total = (0 if grid is None else grid.evaluated), self.n**2
        return {
            "title": "directions that are being computed" if made is None else made.title,
            "gram": (1.0, 0.0, 1.0) if made is None else made.gram,
            "path_a": path[:, 0], "path_b": path[:, 1],
            "evaluated": self._progress(plane, count, total),
        }  # fmt: skip

    def _progress(self, plane: str, count: int, total: int) -> str:
        if plane in self.failed:
            return f"{count:,}, then {type(self.failed[plane]).__name__}"
        return f"{count:,}" if count == total else f"{count:,} of {total:,} …"

    def rows(self) -> Iterator[tuple[str, float, float, float]]:
        """(plane, a, b, loss) of every node evaluated, of planes and zoomed views, each once."""
        with self._lock:
            held = [*self.grids.items(), *((key[0], view) for key, view in self.views.items())]
        seen = set()
        for plane, grid in held:
            for i, j in np.argwhere(grid.known):
                point = plane, float(grid.a[j]), float(grid.b[i])
                if point not in seen:
                    seen.add(point)
                    yield (*point, float(grid.loss[i, j]))

    def close(self) -> None:
        """End the worker; what is known stays."""
        with self._lock:
            self.closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(10)

    # ---- the worker

    def _work(self) -> None:
        untold = False
        while True:
            with self._lock:
                task = None if self.closed else self._task()
                if task is None:
                    self._thread = None
                    break
            pause = self._moved + QUIET - time.monotonic()
            if pause > 0:  # what is wanted may change before it is over
                time.sleep(pause)
                continue
            plane, run = task
            try:
                complete = run()
            except Exception as error:
                self.failed[plane] = error
                self.changed(error)
                untold = False
                continue
            untold = True
            if complete or time.monotonic() - self._drawn > REDRAW:
                untold = False
                if not self._tell():
                    with self._lock:
                        self._thread = None
                    return
        if untold and not self.closed:
            self._tell()

    def _tell(self) -> bool:
        self._drawn = time.monotonic()
        return self.changed(None)

    def _task(self) -> tuple[str, Callable[[], bool]] | None:
        """What the eye misses most: the plane, its first picture, the line, the view, the rest."""
        wanted = self.wanted
        if wanted is None or wanted.plane in self.failed:
            return None
        plane = wanted.plane
        if plane not in self.slices:
            return plane, lambda: bool(self._make(plane))
        made, grid = self.slices[plane], self.grids.setdefault(plane, self._new_grid())
        first = [grid] if grid.levels[:1] == [self._coarsest] else []
        for part in (*first, self._track(wanted), self._view(wanted), grid):
            if part is not None and not part.done:
                return plane, functools.partial(self._advance, made, part)
        return None

    def _make(self, plane: str) -> Slice:
        if plane not in self.slices:
            self.slices[plane] = self.makers[plane]()
        return self.slices[plane]

    def _new_grid(self) -> Grid:
        nodes = np.linspace(-self.radius, self.radius, self.n)
        return Grid(nodes, nodes, self.here, self._coarsest)

    def _track(self, wanted: Wanted) -> Track:
        """The line's points, then just before, at and just after its foot, then the centre."""
        key = (wanted.plane, wanted.view[:2], wanted.line)
        if key not in self.tracks:
            a, b, _ = wanted.view
            gap = 2 * self.radius / (self.n - 1)
            s, foot, h = stations(gap, a, b, *wanted.line)
            h /= FINER
            at, bt = line(*wanted.line, np.concatenate([s, [foot - h, foot, foot + h]]))
            _keep(self.tracks, key, Track(np.append(at, a), np.append(bt, b)))
        return self.tracks[key]

    def _view(self, wanted: Wanted) -> Grid | None:
        """The zoomed view's own grid, where the plane's is too coarse for it."""
        a, b, radius = wanted.view
        if radius > ZOOMED * self.radius:
            return None
        key = (wanted.plane, wanted.view)
        if key not in self.views:
            at, bt = window(a, radius, self.radius), window(b, radius, self.radius)
            guess = self.square(wanted.plane).mesh(at, bt)
            _keep(self.views, key, Grid(at, bt, guess, coarsest=4))
        return self.views[key]

    def _advance(self, made: Slice, part: Grid | Track) -> bool:
        """Evaluate the next points; True when something is complete."""
        a, b = part.points(int(np.clip(CHUNK / self._seconds, 1, 256)))
        start = time.perf_counter()
        losses = np.asarray(made.evaluate(a, b), float)
        self._seconds = max(1e-5, (time.perf_counter() - start) / len(a))
        return part.put(losses)


def _close_all() -> None:
    """Let threads end before the interpreter takes torch away from under them."""
    for landscape in list(_alive):
        landscape.close()


_alive: weakref.WeakSet[Landscape] = weakref.WeakSet()
atexit.register(_close_all)


def _keep(held: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Add, and forget what was added first when there are too many."""
    held[key] = value
    while len(held) > KEPT:
        held.popitem(last=False)
