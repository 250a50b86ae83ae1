"""The live face: ipywidgets controls over one plotly FigureWidget, made once and updated in place.

A face is displayed once. A FigureWidget shown again, after its cell was cleared, still calls the
views that are gone and fails in the browser (plotly 7.1), so each `show` draws a new one; what an
earlier run of the cell has shown is closed and its memory freed.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from plotly.graph_objects import FigureWidget

from workbench.plots import bindings, escape, layout, passages, static
from workbench.plots.controls import Choice, Control, Slider, Steps, Toggle
from workbench.plots.export import ASSETS

if TYPE_CHECKING:
    from workbench.plots.explorer import Explorer

CHEAP = 0.02  # seconds: a computation below runs at once in the message that moved the control
SLOW = 0.25  # seconds: a computation above runs when the slider is let go
PAUSE = 0.01  # seconds in which queued moves arrive before a dearer computation starts
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
PARTS = ("layout", "style")
MUTED = "color:var(--jp-ui-font-color2,#5b6470)"
INK = "color:var(--jp-ui-font-color1,#1f2933)"


class LiveFace:
    """One explorer's widgets. `widget` is what gets displayed."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.closed = False
        self.updates = 0
        self.shown: tuple[str, str] | None = None  # the cell and its execution, see display
        self._following = False
        self._scheduled: asyncio.TimerHandle | None = None
        self._loop = _running()  # the kernel's, on which another thread has it redrawn
        self._refreshing = False
        self._wrong: Exception | None = None
        self._assigned: dict[int, Any] = {}
        # Before the figure, whose first drawing keeps the browser busy: anywidget gives up on a
        # model that is not loaded within two seconds.
        self._fit = _Fit()
        self.handles = _Handles() if explorer.handles else None
        if self.handles:
            self.handles.observe(self._dragged, names="moved")
        result = explorer.result()
        self.spec = layout.spec(
            explorer.panels, result, columns=explorer.columns, height=explorer.height
        )
        self.figure = self._draw(result)
        self._listen_to_clicks()
        self.controls = {c.name: _control(c, explorer.state[c.name]) for c in explorer.controls}
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        self.readouts = widgets.HTML()
        self.message = widgets.HTML()
        self.passages = [widgets.HTML() for _ in explorer.passages]
        self.line = widgets.HTML(layout={"display": "none"})
        self.share = widgets.ToggleButton(
            description="Share this state", icon="share", layout={"width": "auto"}
        )
        self.share.observe(self._shared, names="value")
        self.widget = widgets.VBox(self._parts(), layout={"width": "100%", "padding": "4px 0"})
        self._write(result)
        self._pace()
        explorer._faces.append(self)

    def _parts(self) -> list[Any]:
        explorer = self.explorer
        head = (
            f'<div style="font-size:16px;font-weight:600;{INK}">{escape.html(explorer.title)}</div>'
        )
        if explorer.about:
            head += f'<div style="line-height:1.4;{MUTED}">{escape.html(explorer.about)}</div>'
        bar = widgets.HBox(
            list(self.controls.values()),
            layout={"flex_flow": "row wrap", "width": "100%", "align_items": "center"},
        )
        tail = widgets.HBox([self.share, self.line], layout={"align_items": "center"})
        parts = [widgets.HTML(head), bar, self.readouts, self.message, self.figure, self._fit]
        parts += [self.handles] if self.handles else []
        parts += [*self.passages, tail]
        return [
            part
            for part in parts
            if not (part is self.readouts and not explorer.readouts)
            and not (part in (bar, tail) and not self.controls)
        ]

    # ---- figure

    def _draw(self, result: Mapping[str, Any]) -> FigureWidget:
        data, lay = self.spec.filled(result)
        for trace in data:
            for key, value in trace.items():
                trace[key] = _sent(key, value)
        figure = FigureWidget(data, lay)
        figure._config = figure._config | CONFIG
        return figure

    def _assign(self, figure: FigureWidget, result: Mapping[str, Any]) -> None:
        """Assign what has changed; an assignment that changes nothing costs nearly as much."""
        for i, binding in enumerate(self.spec.bindings):
            value = _sent(binding.prop, bindings.evaluate(binding, result))
            if i in self._assigned and _same(value, self._assigned[i]):
                continue
            target = figure.layout if binding.trace is None else figure.data[binding.trace]
            target[binding.prop] = value
            self._assigned[i] = value

    def _listen_to_clicks(self) -> None:
        for trace in self.figure.data:
            if trace.meta:
                trace.on_click(functools.partial(self._clicked, dict(trace.meta)))

    # ---- moves

    def _moved(self, change: Any) -> None:
        """A control moved in the browser: note the newest state, then update now or soon."""
        if self._following:
            return
        with self._guard():
            self.explorer._state = self.explorer.checked(
                {c.name: _value(c, self.controls[c.name]) for c in self.explorer.controls}
            )
        if self.explorer.seconds < CHEAP:
            self._answer()
        elif self._scheduled is None:
            loop = _running()
            if loop is None:  # called from Python, not from a front end
                self._answer()
            else:
                self._scheduled = loop.call_later(PAUSE, self._answer)

    def _answer(self) -> None:
        """Redraw this face and any other one of the same explorer."""
        self._scheduled = None
        self.update()
        for face in self.explorer._faces:
            if face is not self:
                face.follow(self.explorer.state)

    def _clicked(self, meta: Mapping[str, str], trace: Any, points: Any, selector: Any) -> None:
        """A point or a cell was clicked: move the controls that follow it."""
        if not points.point_inds:
            return
        at = points.point_inds[0]
        wanted = {"click": at} if np.ndim(at) == 0 else {"click_y": at[0], "click_x": at[1]}
        moves = {}
        for kind, index in wanted.items():
            name = meta.get(kind)
            if name and index < len(self.explorer.control(name).values):
                moves[name] = self.explorer.control(name).values[index]
        if moves:
            with self._guard():
                self.explorer.set(**moves)

    def _dragged(self, change: Any) -> None:
        """A handle is being dragged in the browser, which sends the next place when redrawn."""
        with self._guard():
            which, x, y, _ = change["new"]
            self.explorer.drag(self.explorer.handles[which], float(x), float(y))

    def follow(self, state: Mapping[str, Any]) -> None:
        """Move the controls to `state`, set from Python, and redraw once."""
        self._following = True
        try:
            for name, control in self.controls.items():
                control.value = state[name]
        finally:
            self._following = False
        self.update()

    def update(self) -> None:
        """Compute and redraw; on an error say so and keep the last good figure."""
        if self.closed:
            return
        with self._guard() as guard:
            result = self.explorer.result()
            with self.figure.batch_update():
                self._assign(self.figure, result)
            self._write(result)
            self.updates += 1
        if not guard.failed:
            self.message.value = ""
        self._pace()

    def refresh(self, error: Exception | None = None) -> None:
        """Redraw soon, on the event loop; may be called from any thread."""
        self._wrong = error or self._wrong
        if self.closed or self._refreshing:
            return
        if self._loop is None:
            self._refreshed()
        elif not self._loop.is_closed():
            self._refreshing = True
            self._loop.call_soon_threadsafe(self._refreshed)

    def _refreshed(self) -> None:
        self._refreshing = False
        self.update()
        wrong, self._wrong = self._wrong, None
        if wrong is not None and not self.closed:
            self._fail(wrong)

    def _guard(self) -> _Guard:
        return _Guard(self._fail)

    def _fail(self, error: Exception) -> None:
        self.message.value = (
            '<div role="alert" style="border-left:4px solid #D55E00;background:#fdf3ec;'
            f'color:#7a3500;padding:5px 10px">This position cannot be drawn: '
            f"{escape.html(error)}</div>"
        )

    def _pace(self) -> None:
        """Sliders answer while dragged, unless the computation is slow."""
        for control in self.controls.values():
            if hasattr(control, "continuous_update"):
                control.continuous_update = self.explorer.seconds < SLOW

    # ---- text

    def _write(self, result: Mapping[str, Any]) -> None:
        self.readouts.value = _readouts(self.explorer, result)
        for widget, passage in zip(self.passages, self.explorer.passages, strict=True):
            text = passages.html(result[passage.tokens], result[passage.shade], passage.scale)
            widget.value = (
                f'<div style="font-weight:600;{INK}">{escape.html(passage.title)}</div>'
                '<pre style="white-space:pre-wrap;background:#fff;color:#1f2933;padding:8px 10px;'
                f'border-radius:4px;line-height:1.6">{text}</pre>'
            )
        self._shared(None)

    def _shared(self, change: Any) -> None:
        """Show the line that restores the state, when asked for."""
        self.line.layout.display = "" if self.share.value else "none"
        if self.share.value:
            line = self.explorer.restoring(self.explorer.state)
            self.line.value = (
                '<code style="user-select:all;padding:4px 8px;background:#f4f6f8;color:#1f2933">'
                f"{escape.html(line)}</code>"
            )

    # ---- end

    def close(self) -> None:
        """Remove this face from the page and free what it holds."""
        if self.closed:
            return
        self.closed = True
        if self._scheduled is not None:
            self._scheduled.cancel()
        _close(self.widget)
        self.figure.data = []  # after closing, so that no message follows
        self.explorer._faces.remove(self)


class _Fit(anywidget.AnyWidget):
    """Keeps the figures of the page as wide as their cells."""

    _esm = ASSETS / "fit.js"


class _Handles(anywidget.AnyWidget):
    """Tells which handle of the figure beside it is dragged where: [handle, x, y, time]."""

    _esm = "\n".join((ASSETS / name).read_text("utf-8") for name in ("explorer.js", "handles.js"))
    moved: Any = traitlets.List().tag(sync=True)


def _running() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs this code, None outside a kernel."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Guard:
    """Turns an exception inside the block into a call of `fail`."""

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        self.fail = fail
        self.failed = False

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed = True
        self.fail(error)
        return True


def _close(widget: Any) -> None:
    """Close a widget, its children, layout and style: closing the parent alone keeps them."""
    held = [*getattr(widget, "children", ()), *(getattr(widget, p, None) for p in PARTS)]
    widget.unobserve_all()
    widget.close()
    for part in held:
        if isinstance(part, widgets.Widget):
            _close(part)


def _sent(prop: str, value: Any) -> Any:
    """A property as it is sent. plotly sends a bar's `base` as JSON, which knows no NaN: a bar
    without a base has no height either, so any number does."""
    value = _compact(value)
    return np.nan_to_num(value) if prop == "base" and isinstance(value, np.ndarray) else value


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        numbers = first.dtype.kind in "fc" and second.dtype.kind in "fc"
        return np.array_equal(first, second, equal_nan=numbers)
    return type(first) is type(second) and not isinstance(first, np.ndarray) and first == second


def _compact(value: Any) -> Any:
    """Arrays as float32, half the bytes; whole numbers only where float32 holds them exactly."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    if value.dtype.kind != "f" and value.size and np.abs(value.astype(float)).max() >= 2**24:
        return value
    return value.astype(np.float32)


def _value(control: Control, widget: Any) -> Any:
    """A widget's value; a log slider's without the digits that its exponent leaves behind."""
    if isinstance(control, Slider) and control.log:
        return min(control.high, max(control.low, float(f"{widget.value:.6g}")))
    return widget.value


def _control(control: Control, value: Any) -> Any:
    style = {"description_width": "initial"}
    common: dict[str, Any] = {"description": control.label, "style": style}
    wide = {"width": "330px", "margin": "2px 22px 2px 0"}
    narrow = {"width": "auto", "margin": "2px 22px 2px 0"}
    if isinstance(control, Toggle):
        return widgets.Checkbox(value, indent=False, layout=narrow, **common)
    if isinstance(control, (Choice, Steps)):
        kind = widgets.Dropdown if isinstance(control, Choice) else widgets.SelectionSlider
        options = [(control.text(v), v) for v in control.values]
        return kind(
            options=options,
            value=value,
            layout=narrow if kind is widgets.Dropdown else wide,
            **common,
        )
    if control.unit:
        common["description"] += f" ({control.unit})"
    common |= {"readout_format": control.format or control.default_format, "layout": wide}
    if control.log:
        return widgets.FloatLogSlider(
            value,
            min=np.log10(control.low),
            max=np.log10(control.high),
            step=control.spacing,
            **common,
        )
    kind = widgets.IntSlider if control.whole else widgets.FloatSlider
    return kind(value, min=control.low, max=control.high, step=control.spacing, **common)


def _readouts(explorer: Explorer, result: Mapping[str, Any]) -> str:
    boxes = []
    for label, text, interval in static.readouts(explorer, result):
        small = f' <span style="{MUTED}">{escape.html(interval)}</span>' if interval else ""
        boxes.append(
            f'<div style="margin-right:32px"><div style="font-size:12px;line-height:1.3;{MUTED}">'
            f'{escape.html(label)}</div><span style="font-size:18px;font-weight:600;'
            f'font-variant-numeric:tabular-nums;{INK}">{escape.html(text)}</span>{small}</div>'
        )
    flow = '<div class="workbench-readouts" style="display:flex;flex-wrap:wrap">'
    return f"{flow}{''.join(boxes)}</div>"
