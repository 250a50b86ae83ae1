"""What cells display, in a kernel and without one."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from workbench.lab import exercise, show
from workbench.lab.progress import Progress, live


def test_without_a_kernel_the_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show.bundle("plain", html="<b>rich</b>")
    assert capsys.readouterr().out == "plain\n"


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a kernel's display would have received."""
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    screen = types.ModuleType("IPython.display")
    screen.display = lambda data, raw, metadata: seen.append((data, metadata))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    return seen


def test_one_output_carries_all_representations(displayed: list[Any]) -> None:
    show.bundle("t", png=b"\x89PNG", json={show.EXPLORER: {"a": 1}}, alt="a curve")
    ((data, metadata),) = displayed
    assert set(data) == {"text/plain", "image/png", show.EXPLORER}
    assert data["image/png"] == "iVBORw==" and metadata == {"image/png": {"alt": "a curve"}}


def test_nobody_watches_a_headless_kernel(
    displayed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    assert not live()
    monkeypatch.delenv("WORKBENCH_HEADLESS")
    assert live()


def test_a_silent_progress_bar_still_counts() -> None:
    with Progress("work", 3) as bar:
        bar.step()
        bar.step(2)
    assert bar.done == 3


def test_a_watched_bar_is_one_output_that_ends_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    handle = types.SimpleNamespace(update=seen.append)
    fake, screen = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    fake.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    screen.HTML = str  # type: ignore[attr-defined]
    screen.display = lambda html, display_id: seen.append(html) or handle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    monkeypatch.delenv("WORKBENCH_HEADLESS")
    with Progress("a < b", 2) as bar:
        bar._drawn -= 1
        bar.step()
    assert "0 of 2" in seen[0] and "a &lt; b: 1 of 2, about 0 s left" in seen[1]
    assert seen[-1] == ""


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (None, 1.0, "No answer yet"),
        (1.0 + 1e-9, 1.0, "Right."),
        (np.array([1.0, 2.0]), [1, 2], "Right."),
        ("Holds ", "holds", "Right."),
        (1.1, 1.0, "Not yet. think again"),
        ([1.0], 1.0, "Not yet. think again"),
        ("many", 1.0, "Not yet. think again"),
    ],
)
def test_exercises(
    answer: Any, expected: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exercise.check(answer, expected, hint="think again")
    assert said in capsys.readouterr().out
