"""An explorer: controls, one pure function and panels, shown by three faces.

The definition holds no drawing. `live` draws it with ipywidgets and plotly in a kernel, `static`
with matplotlib, `export` as JSON that the site draws with the same plotly traces and no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.plots import fields
from workbench.plots.controls import Choice, Control, Slider, Steps, Toggle, nearest
from workbench.plots.panels import (
    Axis,
    Band,
    Bars,
    Diagonal,
    Draw,
    Handle,
    HeatMap,
    HLine,
    Line,
    Panel,
    Passage,
    Points,
    Readout,
    Surface,
    VLine,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.plots.live import LiveFace

Result = dict[str, Any]

__all__ = [
    "Axis", "Band", "Bars", "Choice", "Control", "Diagonal", "Draw", "Explorer", "HLine", "Handle",
    "HeatMap", "Line", "Panel", "Passage", "Points", "Readout", "Result", "Slider", "Steps",
    "Surface", "Toggle", "VLine",
]  # fmt: skip


@dataclass
class Explorer:
    """Controls + compute + panels.

    Args:
        name: stable identifier, `"family.explorer"`.
        title: what the reader explores; plain text.
        controls: `Slider`, `Steps`, `Choice`, `Toggle`; their names are compute's arguments.
        compute: pure function of the controls' values, returning arrays, numbers and words by name.
        panels: the plots; marks and titles name keys of the result.
        readouts: numbers shown beside the plots.
        passages: texts shaded token by token.
        script: `function(controls, data) {...}` in JavaScript returning the same result, for the
            exported face.
        data: arrays the script needs.
        grid: control values at which the exported face is precomputed, `{"bins": [5, 15]}`; True
            takes every position of every control. Controls left out stay at their value there.
        call: template of the line that restores a state, holding `{state}`.
        about: one sentence under the title: what to try.
        columns: panels per row; two or three fit by default.
        height: pixels of one row of panels.
    """

    name: str
    title: str
    controls: Sequence[Control]
    compute: Callable[..., Mapping[str, Any]]
    panels: Sequence[Panel]
    readouts: Sequence[Readout] = ()
    passages: Sequence[Passage] = ()
    script: str | None = None
    data: Mapping[str, Any] | None = None
    grid: Mapping[str, Iterable[Any]] | bool | None = None
    call: str | None = None
    about: str = ""
    columns: int | None = None
    height: int = 380
    _state: dict[str, Any] = field(init=False, repr=False)
    _faces: list[LiveFace] = field(init=False, repr=False, default_factory=list)
    _seconds: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        names = [control.name for control in self.controls]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two controls share a name, {names}")
        if not len(self.panels):
            raise ValueError(f"{self.name}: no panels")
        if self.script is not None and self.grid:
            raise ValueError(f"{self.name}: give either script or grid, not both")
        for readout in self.readouts:
            fields.check_format(readout.format)
        for handle in self.handles:
            for name in handle.keys():  # noqa: SIM118
                if not isinstance(self.control(name), Slider):
                    raise TypeError(f"{self.name}: a Handle moves sliders, and {name!r} is none")
        self._state = {control.name: control.initial for control in self.controls}

    # ---- state

    @property
    def state(self) -> dict[str, Any]:
        """The controls' present values."""
        return dict(self._state)

    def control(self, name: str) -> Control:
        """The control called `name`."""
        for control in self.controls:
            if control.name == name:
                return control
        known = ", ".join(c.name for c in self.controls)
        raise ValueError(f"{self.name}: no control {name!r}; there are {known or 'none'}")

    @property
    def handles(self) -> list[Handle]:
        """The points to drag, in the order of the panels."""
        return [d for panel in self.panels for d in panel.draws if isinstance(d, Handle)]

    def drag(self, handle: Handle, x: float, y: float) -> Explorer:
        """Move the sliders of `handle` as if it were dragged to (x, y); at most to their ends."""
        moves = {}
        for name, wanted in handle.moves(x, y, self.state).items():
            control = self.control(name)
            assert isinstance(control, Slider)  # checked at the start
            within = min(control.high, max(control.low, wanted))
            moves[name] = control.values[nearest(control, within)]
        return self.set(**moves)

    def checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The present state with `state` put in; refuses unknown names and values."""
        return self.state | {n: self.control(n).check(v) for n, v in state.items()}

    def set(self, **state: Any) -> Explorer:
        """Move controls; open live faces follow. Returns the explorer."""
        self._state = self.checked(state)
        for face in self._faces:
            face.follow(self.state)
        return self

    def restore(self) -> str:
        """Print and return the line of Python that restores the present state."""
        line = self.restoring(self.state)
        print(line)
        return line

    def restoring(self, state: Mapping[str, Any]) -> str:
        """The line of Python that restores `state`."""
        words = ", ".join(f"{name}={_literal(value)}" for name, value in state.items())
        call = self.call or "explorer.set({state})"
        if not words:
            call = call.replace(", {state}", "{state}")
        return call.replace("{state}", words)

    # ---- numbers

    def result(self, **state: Any) -> Result:
        """What compute returns for the present state (with `state` put in), as numpy and plain."""
        values = self.checked(state)
        start = time.perf_counter()
        found = {key: tidy(key, value) for key, value in self.compute(**values).items()}
        self._seconds = time.perf_counter() - start
        missing = [key for key in self.keys() if key not in found and key not in values]
        if missing:
            raise ValueError(
                f"{self.name}: compute returned no {', '.join(map(repr, missing))}; "
                f"it returned {', '.join(map(repr, found))}"
            )
        return {**{k: v for k, v in values.items() if k not in found}, **found}

    def keys(self) -> list[str]:
        """The keys of the result that panels, readouts and passages use, each once."""
        found: list[str] = []
        for panel in self.panels:
            for text in (panel.title, panel.x.text, panel.y.text):
                found += fields.names(text)
            for draw in panel.draws:
                found += draw.keys()
                if isinstance(draw, (VLine, HLine, HeatMap, Surface)):
                    found += fields.names(draw.label)
        for readout in self.readouts:
            found += readout.keys()
        for passage in self.passages:
            found += passage.keys()
        return list(dict.fromkeys(found))

    @property
    def seconds(self) -> float:
        """How long compute took last."""
        return self._seconds

    # ---- faces

    def show(self) -> None:
        """Display: live where a front end is attached, otherwise picture, text and JSON."""
        from workbench.plots import display

        display.show(self)

    _ipython_display_ = show

    def face(self) -> LiveFace:
        """A new live face; display its `widget` once."""
        from workbench.plots.live import LiveFace

        return LiveFace(self)

    def widget(self) -> Any:
        """A new live face as an ipywidget, to be displayed once."""
        return self.face().widget

    def figure(self, **state: Any) -> Figure:
        """The matplotlib twin of the present state (with `state` put in)."""
        from workbench.plots import static

        return static.figure(self, self.checked(state))

    def export(self, **state: Any) -> dict[str, Any]:
        """The exported face as a dict that JSON can hold; ValueError above the caps."""
        from workbench.plots import export

        return export.payload(self, self.checked(state))

    def refresh(self, error: Exception | None = None) -> None:
        """Redraw the open live faces because numbers have arrived; safe to call from any thread.

        The redrawing happens on the kernel's event loop; several calls before it are one.

        Args:
            error: what went wrong, shown in the faces until the next redraw.
        """
        for face in list(self._faces):
            face.refresh(error)

    def close(self) -> None:
        """Close the live faces and free their memory."""
        for face in list(self._faces):
            face.close()


def tidy(key: str, value: Any) -> Any:
    """A value of the result: numpy array, float, int, bool or str."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind == "U" or (
        array.dtype.kind in "OT" and all(isinstance(v, str) for v in array.flat)
    ):
        return array.astype(object) if array.ndim else str(array)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"compute's {key!r}: expected numbers or words, got {array.dtype}")
    return array if array.ndim else array.item()


def _literal(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else repr(value)
