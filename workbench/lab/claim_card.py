"""How a claim looks: a card for notebooks, a few lines for terminals."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.lab.claims import Claim

COLOURS = {
    "holds": "#00795c",
    "refuted": "#b5460f",
    "inconclusive": "#7a5c00",
    "not judged": "#5f6670",
}


def number(value: float) -> str:
    """Four significant digits; scientific where plain would be unreadable."""
    if not math.isfinite(value):
        return "—"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def result_sentence(claim: Claim) -> str:
    """What was measured, in one sentence of plain text."""
    if claim.kind == "identity":
        return (
            f"Largest relative difference {number(claim.ours)} over {claim.n} values, "
            f"tolerance {number(claim.margin)}."
        )
    unit = f" {claim.unit}" if claim.unit else ""
    sides = f"ours {number(claim.ours)}, baseline {number(claim.baseline)}{unit}"
    if claim.n < 2:
        return f"One run: {sides}."
    return (
        f"{sides[0].upper()}{sides[1:]}; effect {number(claim.effect)}{unit}, 95% interval "
        f"{number(claim.low)} to {number(claim.high)} ({claim.n} pairs, {claim.interval})."
    )


def setting(claim: Claim) -> str:
    """Where the number comes from, in one line of plain text."""
    parts = [claim.data, claim.protocol]
    if claim.kind == "claim":
        parts.append(
            f"{claim.better} is better" + (f", margin {claim.margin:g}" * (claim.margin > 0))
        )
    parts.append(" ".join(p for p in (claim.scale and f"scale {claim.scale}", claim.device) if p))
    if claim.published is not None:
        parts.append(f"the paper reports {number(claim.published)}")
    return " · ".join(p for p in parts if p)


def card_text(claim: Claim) -> str:
    """The card for a terminal."""
    return (
        f"[{claim.verdict}] {claim.paper}: {claim.statement}\n  {result_sentence(claim)}\n"
        f"  {setting(claim)}"
    )


def card_html(claim: Claim) -> str:
    """The card for a notebook; readable in light and dark themes, and without its drawing."""
    colour = COLOURS[claim.verdict]
    return (
        f'<div class="workbench-claim" style="border:1px solid var(--jp-border-color2,#c8ccd2);'
        f"border-left:6px solid {colour};border-radius:4px;padding:10px 16px;margin:8px 0;"
        "max-width:820px;background:var(--jp-layout-color1,#fff);"
        'color:var(--jp-content-font-color1,#1c1e21)">'
        f'<div><strong style="background:{colour};color:#fff;border-radius:3px;padding:2px 9px;'
        f'margin-right:9px">{claim.verdict}</strong> {escape(claim.statement)}</div>'
        f'<div style="margin-top:7px">{escape(result_sentence(claim))}</div>'
        f"{_strip(claim)}"
        '<div style="margin-top:4px;font-size:90%;opacity:.75">'
        f"{escape(setting(claim))}</div></div>"
    )


def _strip(claim: Claim) -> str:
    """Paired differences as dots, their mean and interval as a bar, the margin as a line."""
    if claim.kind == "identity" or len(claim.differences) < 2:
        return ""
    width, mid = 640.0, 24.0
    points = [*claim.differences, claim.low, claim.high, 0.0, claim.margin]
    least, most = min(points), max(points)
    pad = 0.08 * ((most - least) or 1.0)

    def x(value: float) -> float:
        return round(14 + (width - 28) * (value - least + pad) / (most - least + 2 * pad), 1)

    colour = COLOURS[claim.verdict]
    each = "".join(f'<circle cx="{x(d)}" r="4"/>' for d in claim.differences)
    dots = f'<g fill="{colour}" fill-opacity=".35" transform="translate(0 {mid:g})">{each}</g>'
    margin = claim.margin
    label = f"margin {margin:g}" if margin else "no difference"
    anchor = "start" if x(margin) < width / 2 else "end"
    return (
        f'<svg viewBox="0 0 {width:g} 54" style="width:100%;max-width:{width:g}px;display:block;'
        'margin-top:4px" role="img" aria-label="paired differences, their mean and 95% interval">'
        f'<line x1="14" x2="{width - 14:g}" y1="{mid}" y2="{mid}" stroke="currentColor" '
        'stroke-opacity=".25"/>'
        f'<line x1="{x(margin)}" x2="{x(margin)}" y1="6" y2="42" stroke="currentColor" '
        'stroke-dasharray="3 3"/>'
        f'<text x="{x(margin)}" y="52" font-size="11" fill="currentColor" text-anchor="{anchor}">'
        f"{label}</text>{dots}"
        f'<line x1="{x(claim.low)}" x2="{x(claim.high)}" y1="{mid}" y2="{mid}" stroke="{colour}" '
        'stroke-width="3"/>'
        f'<circle cx="{x(claim.effect)}" cy="{mid}" r="5.5" fill="{colour}"/></svg>'
    )
