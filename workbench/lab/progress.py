"""A progress bar that suits where it runs: notebook, terminal, or nowhere."""

from __future__ import annotations

import html
import os
import sys
import time
from types import TracebackType
from typing import Any


def live() -> bool:
    """Whether a person is watching a notebook: an IPython kernel that no runner started."""
    if os.environ.get("WORKBENCH_HEADLESS") or "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Progress:
    """``with Progress("training", total) as bar: bar.step()``; silent when nobody watches.

    In a notebook it is one HTML element, updated at most five times a second and removed at the
    end, so neither widgets nor floods of output are left behind.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start = self._drawn = time.monotonic()
        self._handle: Any = None
        self._rich: Any = None

    def __enter__(self) -> Progress:
        if live():
            from IPython.display import HTML, display

            self._handle = display(HTML(self._html()), display_id=True)
        elif sys.stderr.isatty() and not os.environ.get("WORKBENCH_HEADLESS"):
            from rich.console import Console
            from rich.progress import Progress as Rich

            self._rich = Rich(console=Console(stderr=True), transient=True)
            self._rich.start()
            self._rich.add_task(self.label, total=self.total)
        return self

    def step(self, n: int = 1) -> None:
        """Count ``n`` more pieces as done."""
        self.done += n
        if self._rich:
            self._rich.advance(0, n)
        elif self._handle and time.monotonic() - self._drawn > 0.2:
            from IPython.display import HTML

            self._drawn = time.monotonic()
            self._handle.update(HTML(self._html()))

    def _html(self) -> str:
        left = ""
        if self.done:
            each = (time.monotonic() - self._start) / self.done
            left = f", about {each * (self.total - self.done):.0f} s left"
        return (
            f"<progress value='{self.done}' max='{max(self.total, 1)}'></progress> "
            f"{html.escape(self.label)}: {self.done} of {self.total}{left}"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich:
            self._rich.stop()
        if self._handle:
            from IPython.display import HTML

            self._handle.update(HTML(""))
