"""The critical-difference diagram: methods on a line of mean ranks, and which cannot be told apart.

It takes `ax=None` and returns the axes it drew on, as the figures of `mpl` do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.plots import bindings, escape, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.21  # inches from one label to the next
BAR = 0.075  # inches from one bar to the next
LETTER = 0.066  # inches a letter of a label takes


def rank_diagram(
    ranks: Mapping[str, float],
    groups: Sequence[Sequence[str]] = (),
    *,
    cd: float | None = None,
    ax: Axes | None = None,
    title: str = "",
    highlight: Mapping[str, str] | None = None,
    note: str = "",
    xlabel: str = "mean rank (1 is best)",
) -> Axes:
    """Critical-difference diagram (Demšar 2006), the best on the left; bars join what is alike.

    Labels stand in two columns beside the axis, the better half on the left, each on a line of its
    own, so that any number of them stays readable.

    Args:
        ranks: mean rank by name, at least two.
        groups: names that a bar joins, such as `lab.ranks.Ranking.groups`.
        cd: length of the critical difference, drawn above the axis when given.
        ax: axes to draw on; made as tall as the labels need when None.
        title: the finding.
        highlight: colour (of the palette, or `#rrggbb`) by name, for methods to be picked out.
        note: small print under the diagram.
        xlabel: what the axis shows.

    Raises:
        ValueError: fewer than two methods, a rank that is not finite, or an unknown name in groups
            or highlight.
    """
    names = sorted(ranks, key=lambda name: ranks[name])
    highlight = dict(highlight or {})
    if len(names) < 2 or not all(math.isfinite(ranks[name]) for name in names):
        raise ValueError(f"ranks: expected finite ranks of at least two methods, got {dict(ranks)}")
    _known("groups", [name for group in groups for name in group], names)
    _known("highlight", highlight, names)
    spans = [(min(found), max(found)) for found in ([ranks[n] for n in g] for g in groups)]
    levels = _levels(spans)
    half = math.ceil(len(names) / 2)
    depth = BAR * (max(levels, default=-1) + 2)  # of the bars under the axis, inches
    height = depth + ROW * half + 0.1
    with theme.style():
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(8.2, height + 1.15 + 0.2 * bool(note)))[1]
        low, high = math.floor(min(ranks.values())), math.ceil(max(ranks.values()))
        high = max(high, low + 1, math.ceil(low + (cd or 0)))
        figure: Any = ax.get_figure(root=True)
        width = figure.get_figwidth() * ax.get_position().width
        aside = min(0.35 * width, LETTER * (max(map(len, names)) + 6) + 0.15)
        margin = aside / (width - 2 * aside) * (high - low)
        ax.set(xlim=(low - margin, high + margin), ylim=(-height, 0.2 if cd is None else 0.55))
        ax.axis("off")
        _axis(ax, low, high, xlabel)
        if cd is not None:
            _rule(ax, low, cd)
        pad = 0.004 * (high - low + 2 * margin)
        for (left, right), level in zip(spans, levels, strict=True):
            at = -BAR * (level + 1)
            ax.plot([left - pad, right + pad], [at, at], color=theme.INK, lw=3,
                    solid_capstyle="butt", zorder=3, gid="group")  # fmt: skip
        for i, name in enumerate(names):
            left = i < half
            y = -depth - ROW * ((i if left else len(names) - 1 - i) + 0.5)
            ink = theme.color(highlight.get(name, "ink"))
            end = low - 0.03 * (high - low) if left else high + 0.03 * (high - low)
            ax.plot([ranks[name], ranks[name], end], [0, y, y], lw=1.0,
                    color=ink if name in highlight else theme.FRAME, zorder=1)  # fmt: skip
            ax.plot(ranks[name], 0, "o", ms=4, color=ink, zorder=4)
            value, label = f"{ranks[name]:.1f}", escape.matplotlib(name)
            ax.annotate(f"{label}  {value}" if left else f"{value}  {label}", (end, y),
                        xytext=(-3 if left else 3, 0), textcoords="offset points", va="center",
                        ha="right" if left else "left", color=ink, fontsize=8.5, gid="label",
                        fontweight="bold" if name in highlight else "normal")  # fmt: skip
        if note:
            ax.annotate(escape.matplotlib(note), (0, -height), xycoords=("axes fraction", "data"),
                        va="top", fontsize=8, color=theme.MUTED)  # fmt: skip
        lines = bindings.wrap(title, max(24, int(width / 0.088)))
        ax.set_title(escape.matplotlib("\n".join(lines)), loc="left", fontweight="bold",
                     fontsize=11)  # fmt: skip
    return ax


def _known(argument: str, used: Iterable[str], names: Sequence[str]) -> None:
    if unknown := [name for name in used if name not in names]:
        raise ValueError(f"{argument}: {unknown[0]!r} has no rank; there are {list(names)}")


def _levels(spans: Sequence[tuple[float, float]]) -> list[int]:
    """A level for each bar, so that bars on one level do not touch."""
    ends: list[float] = []
    out = []
    for left, right in spans:
        free = [level for level, end in enumerate(ends) if end < left]
        level = free[0] if free else len(ends)
        ends[level : level + 1] = [right]
        out.append(level)
    return out


def _axis(ax: Any, low: int, high: int, xlabel: str) -> None:
    """The line of ranks with its ticks and numbers above."""
    ax.plot([low, high], [0, 0], color=theme.INK, lw=1.2, zorder=2)
    step = max(1, math.ceil((high - low) / 12))
    for tick in range(low, high + 1):
        numbered = (tick - low) % step == 0
        ax.plot([tick, tick], [0, 0.07 if numbered else 0.04], color=theme.INK, lw=1)
        if numbered:
            ax.annotate(str(tick), (tick, 0.08), ha="center", va="bottom", fontsize=8.5,
                        color=theme.MUTED)  # fmt: skip
    ax.annotate(escape.matplotlib(xlabel), (high, 0.08), xytext=(14, 0), va="bottom",
                textcoords="offset points", fontsize=8.5, color=theme.MUTED)  # fmt: skip


def _rule(ax: Any, low: int, cd: float) -> None:
    """The critical difference as a length above the axis."""
    y = 0.36
    ax.plot([low, low + cd], [y, y], color=theme.INK, lw=1.4, gid="cd")
    for end in (low, low + cd):
        ax.plot([end, end], [y - 0.05, y + 0.05], color=theme.INK, lw=1.4)
    ax.annotate(f"critical difference {cd:.2f}", (low + cd / 2, y + 0.06), ha="center",
                va="bottom", fontsize=8.5, color=theme.INK)  # fmt: skip
