"""Exercises at the end of a notebook: an empty answer is no failure, a wrong one gets a hint."""

from __future__ import annotations

from typing import Any

from workbench.lab import show

_BOX = (
    '<div style="border-left:6px solid {colour};padding:6px 14px;margin:6px 0;max-width:820px;'
    'background:var(--jp-layout-color1,#fff);color:var(--jp-content-font-color1,#1c1e21)">{text}</div>'
)


def check(answer: Any, expected: Any, *, hint: str, tol: float = 1e-6) -> None:
    """Tell the reader whether an answer is right.

    Args:
        answer: what the reader computed; None while there is none.
        expected: number, array or text; numbers may differ by ``tol`` relative to max(1, |value|).
        hint: shown beside a wrong answer; it should not give the answer away. Plain text.
        tol: tolerance of numbers.
    """
    if answer is None:
        colour, text = (
            "#5f6670",
            "No answer yet: replace None in the cell above and run both cells.",
        )
    elif _agrees(answer, expected, tol):
        colour, text = "#00795c", "Right."
    else:
        colour, text = "#b5460f", f"Not yet. {hint}"
    show.bundle(text, html=_BOX.format(colour=colour, text=text))


def _agrees(answer: Any, expected: Any, tol: float) -> bool:
    import numpy as np

    if isinstance(expected, str):
        return str(answer).strip().lower() == expected.lower()
    try:
        a = np.asarray(answer.detach().cpu() if hasattr(answer, "detach") else answer, dtype=float)
    except (TypeError, ValueError):
        return False
    b = np.asarray(expected, dtype=float)
    return a.shape == b.shape and bool((np.abs(a - b) <= tol * np.maximum(1, np.abs(b))).all())
