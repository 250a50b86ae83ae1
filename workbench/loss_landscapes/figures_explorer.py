"""The explorer of a landscape: its controls and panels, what is exported, and what can be saved."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.lab import ledger
from workbench.loss_landscapes.figures_field import Landscape, Wanted
from workbench.loss_landscapes.figures_resample import (
    BEYOND,
    DRAWN,
    SCRIPT,
    STEPS,
    WINDOW,
    Square,
    view,
)
from workbench.plots import export
from workbench.plots.explorer import (
    Axis,
    Choice,
    Control,
    Draw,
    Explorer,
    Handle,
    HeatMap,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    Surface,
    Toggle,
    VLine,
)

LABELS = {
    "filter": "random, filter-normalised",
    "layer": "random, layer-normalised",
    "adaptive": "random, in the weights' scale",
    "none": "random, Gaussian",
    "given": "given",
    "trajectory": "training path",
    "eigenvectors": "sharpest",
}
ENDS = {"a0": -0.7, "b0": -0.36, "a1": 0.7, "b1": 0.36}  # of the line at the start
CELLS = 2400  # losses that the exported page may hold, all planes together


class LandscapeExplorer(Explorer):
    """The explorer of a `Landscape`: refined while it is open, saved as a table."""

    landscape: Landscape
    _shown = False

    @classmethod
    def over(cls, landscape: Landscape, surface: bool = True) -> LandscapeExplorer:
        """The explorer of `landscape`, which calls it when it has evaluated something."""
        made = cls(
            name="loss_landscapes.explore",
            title="The loss around a network",
            about="Drag the centre, the rim of the zoomed view (diamond) and both ends of the "
            "line. Choose other directions: is what you see there too?",
            controls=_controls(landscape),
            compute=_Compute(landscape),
            panels=_panels(landscape, surface),
            readouts=[
                Readout("at_center", "Loss at the centre", ".4g"),
                Readout("lowest", "Lowest in the zoomed view", ".4g"),
                Readout("barrier", "Barrier along the line", ".3g"),
                Readout("curvature", "Curvature along the line", ".3g"),
                Readout("evaluated", "Losses evaluated"),
            ],
            call="loss_landscapes.explore(model, loss_fn, data, {state})",
            columns=2,
            height=390,
        )
        made.landscape = landscape
        landscape.changed = made.arrived
        return made

    def plane(self, **state: Any) -> str:
        """The key of the plane that is looked at."""
        now = self.checked(state)
        return _key(self.landscape.makers, now["plane"], now["draw"])

    # ---- numbers that arrive

    def face(self) -> Any:
        """A new live face; display its `widget` once."""
        made = super().face()
        self._shown = True
        if error := self.landscape.failed.get(self.plane()):  # it came before there was a face
            made.refresh(error)
        return made

    def arrived(self, error: Exception | None) -> bool:
        """Redraw what is open; False when all that was shown has been closed."""
        if self._shown and not self._faces:
            return False
        self.refresh(error)
        return True

    def close(self) -> None:
        """Close the live faces and end the evaluation; what is known stays."""
        super().close()
        self.landscape.close()

    # ---- taken away

    def to_frame(self) -> pd.DataFrame:
        """The losses evaluated so far, of planes and zoomed views: `plane`, `a`, `b`, `loss`."""
        frame = pd.DataFrame(self.landscape.rows(), columns=["plane", "a", "b", "loss"])
        return frame.sort_values(["plane", "b", "a"], ignore_index=True)

    def save(self, path: str | Path) -> Path:
        """Write `to_frame()` as CSV or NPZ (by the name's ending), in one rename.

        Raises:
            ValueError: another ending.
        """
        target, frame = Path(path), self.to_frame()
        stream = io.BytesIO()
        if target.suffix == ".csv":
            frame.to_csv(stream, index=False)
        elif target.suffix == ".npz":
            a, b, loss = (frame[name].to_numpy() for name in ("a", "b", "loss"))
            np.savez_compressed(stream, plane=frame["plane"].to_numpy(str), a=a, b=b, loss=loss)
        else:
            raise ValueError(f"path: expected a name ending in .csv or .npz, got {target.name!r}")
        ledger.replace_bytes(target, stream.getvalue())
        return target

    def export(self, **state: Any) -> dict[str, Any]:
        """The exported face: the planes known so far, on coarser grids that a page can hold."""
        return self.frozen().export(**self.checked(state))

    def frozen(self) -> Explorer:
        """What is known now as an explorer that evaluates nothing, in both languages the same."""
        grids = {plane: grid.shown for plane, grid in self.landscape.grids.items()}
        side = next(n for n in (33, 25, 17, 9) if n == 9 or n * n * len(grids) <= CELLS)
        nodes = np.linspace(-1, 1, min(side, self.landscape.n)) * self.landscape.radius
        planes = {}
        for plane, loss in grids.items():
            coarse = Square(loss, self.landscape.radius).mesh(nodes, nodes)
            described = self.landscape.describe(plane) | {"loss": coarse}
            planes[plane] = {key: _plain(value) for key, value in described.items()}
        data = {
            "radius": self.landscape.radius, "window": WINDOW, "steps": STEPS, "beyond": BEYOND,
            "drawn": DRAWN, "planes": planes,
        }  # fmt: skip
        kinds = list(dict.fromkeys(plane.split(" ")[0] for plane in planes))
        draws = [d for d in self.control("draw").values if any(f"{k} {d}" in planes for k in kinds)]
        controls: list[Control] = [
            _choice(kinds, self.state["plane"]),
            Steps("draw", "Draw", draws or [1]),
            *(c for c in self.controls if c.name not in ("plane", "draw")),
        ]
        return Explorer(
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(Explorer)
                if f.init and f.name not in ("controls", "compute", "script", "data")
            },
            controls=controls,
            compute=_Frozen(data),
            script=SCRIPT,
            data=data,
        )


class _Compute:
    """What is known at a state of the controls; tells the landscape what is looked at."""

    def __init__(self, landscape: Landscape) -> None:
        self.landscape = landscape

    def __call__(self, plane: str, draw: int, **now: Any) -> dict[str, Any]:
        land, key = self.landscape, _key(self.landscape.makers, plane, draw)
        line = (now["a0"], now["b0"], now["a1"], now["b1"])
        wanted = Wanted(key, (now["a"], now["b"], now["zoom"]), line)
        land.want(wanted)
        near, along = land.near(wanted), land.along(wanted)
        return view(land.describe(key), land.square(key), near=near, along=along, **now)


class _Frozen:
    """The same from stored grids alone."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.squares = {
            key: Square(np.asarray(plane["loss"], float), data["radius"])
            for key, plane in data["planes"].items()
        }

    def __call__(self, plane: str, draw: int, **now: Any) -> dict[str, Any]:
        key = _key(self.squares, plane, draw)
        known = self.data["planes"][key]
        paths = {name: np.asarray(known[name], float) for name in ("path_a", "path_b")}
        return view(known | paths, self.squares[key], **now)


def _key(planes: Mapping[str, Any], kind: str, draw: int) -> str:
    return f"{kind} {draw}" if f"{kind} {draw}" in planes else kind


def _plain(value: Any) -> Any:
    return export.plain(value, 4) if isinstance(value, np.ndarray) else value


# ---- what the reader moves and sees


def _choice(kinds: list[str], value: str) -> Choice:
    labels = [LABELS.get(kind, kind) for kind in kinds]
    return Choice("plane", "Directions", kinds, value=value, labels=labels)


def _controls(landscape: Landscape) -> list[Control]:
    keys = [key.split(" ") for key in landscape.makers]
    kinds = list(dict.fromkeys(key[0] for key in keys))
    draws = sorted({int(key[1]) for key in keys if len(key) > 1}) or [1]
    reach, step = landscape.radius, landscape.radius / 50

    def place(name: str, label: str, at: float = 0.0) -> Slider:
        return Slider(name, label, -reach, reach, step=step, value=at * reach)

    return [
        _choice(kinds, kinds[0]),
        Steps("draw", "Draw", draws),
        Toggle("log", "Log scale"),
        place("a", "Centre a"), place("b", "Centre b"),
        Slider("zoom", "Zoom radius", 0.05 * reach, reach, step=step / 2,
               value=0.4 * reach),
        *(place(name, f"Line {'from' if name[1] == '0' else 'to'} {name[0]}", at)
          for name, at in ENDS.items()),
    ]  # fmt: skip


def _panels(landscape: Landscape, surface: bool) -> list[Panel]:
    reach = (-landscape.radius, landscape.radius)
    path: list[Draw] = []
    if "trajectory" in landscape.makers:
        path = [
            Line("path_a", "path_b", "path", color="purple", markers=True),
            Points("last_a", "last_b", color="purple", symbol="circle", size=11, opacity=1.0),
        ]
    zoomed = "The zoomed view, down to {lowest:.3g}"
    near: Draw = HeatMap("window_z", "window_a", "window_b", "{quantity}", contours=True)
    if surface:
        near = Surface("window_z", "window_a", "window_b", "{quantity}")
    return [
        Panel(
            "Loss over {plane_title}",
            Axis("a", reach), Axis("b", reach),
            [
                HeatMap("z", "nodes", "nodes", "{quantity}", contours=True),
                *path,
                Line("box_a", "box_b", color="#FFFFFF", width=1.5),
                Line("line_a", "line_b", color="orange"),
                Handle("a", "b", "centre", color="vermillion"),
                Handle("a", "b", "zoom", color="vermillion", radius="zoom"),
                Handle("a0", "b0", "from", color="ink"),
                Handle("a1", "b1", "to", color="orange"),
            ],
        ),
        Panel(zoomed, Axis("a"), Axis("b"), [near]),
        Panel(
            "Along the line: a barrier of {barrier:.3g}, curvature {curvature:.3g}",
            Axis("distance along the line", unit="lengths of the directions"),
            Axis("{quantity}"),
            [
                Line("s", "profile", "loss", color="orange"),
                Line("parabola_s", "parabola", "parabola at the point nearest to the centre",
                     color="blue", dash="dash"),
                VLine("foot", "centre", dash="dot"),
            ],
            weight=30,
        ),
    ]  # fmt: skip
