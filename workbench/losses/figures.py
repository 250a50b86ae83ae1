"""Explorer of losses against the margin: value, slope, curvature, and what each one guarantees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from workbench.losses import margins
from workbench.losses.comp_sum import comp_sum_loss
from workbench.losses.ldr_loss import ldr_kl
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)

POINTS = 73  # margins from -3 to 3
EXCESS = np.linspace(0, 0.7, 29)
SIGNS = ("convex", "not convex")

SCRIPT = """
function (controls, data) {
  const z = data.z;
  function at(grid, values, x) {
    const step = grid[1] - grid[0], last = grid.length - 1;
    const place = Math.min(Math.max((x - grid[0]) / step, 0), last - 1e-9);
    const i = Math.floor(place), t = place - i;
    return values[i] * (1 - t) + values[i + 1] * t;
  }
  const out = {z: z, excess_grid: data.excess, zero_one: data.zero_one};
  for (const [side, key] of [["a", controls.first], ["b", controls.second]]) {
    const found = data.losses[key];
    out[side] = key;
    for (const what of ["loss", "slope", "curvature"]) {
      out[side + "_" + what] = found[what];
      out[side + "_" + what + "_here"] = at(z, found[what], controls.margin);
    }
    out[side + "_bound"] = found.bound;
    out[side + "_bound_here"] = at(data.excess, found.bound, controls.excess);
    out[side + "_here"] = [out[side + "_loss_here"]];
    out[side + "_slope_mark"] = [out[side + "_slope_here"]];
    out[side + "_bound_mark"] = [out[side + "_bound_here"]];
    for (const what of ["sign", "calibrated", "bounded"]) out[side + "_" + what] = found[what];
  }
  out.at = controls.margin;
  out.here = [controls.margin];
  out.excess_here = [controls.excess];
  return out;
}
"""


def default_losses() -> dict[str, margins.Margin]:
    """The margin losses, and those papers' losses that have a margin when there are two classes."""
    return {
        **margins.MARGIN_LOSSES,
        "comp-sum, tau 0.5": _two(comp_sum_loss, tau=0.5),
        "comp-sum, tau 1.5": _two(comp_sum_loss, tau=1.5),
        "LDR-KL, lambda 1": _two(ldr_kl, lam=1.0, margin=0.1, normalize=False),
    }


def _two(loss: Callable[..., Tensor], **settings: Any) -> margins.Margin:
    return margins.two_class(lambda h, y, **options: loss(h, y, **settings, **options))


def explore(
    losses: Mapping[str, margins.Margin] | Iterable[str] | None = None, **state: Any
) -> Explorer:
    """Two losses against the margin: value, first and second derivative, and their guarantee.

    Args:
        losses: by name, functions of the margin z (g,) -> (g,), in torch and each entry for itself
            (a loss of logits and labels becomes one by `margins.two_class`); or names out of
            `default_losses`; default all of those.
        state: where the controls start: ``first``, ``second`` (names), ``margin``, ``excess``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: a name is not known, or there are fewer than two losses.
    """
    known = default_losses()
    if losses is None:
        chosen = known
    elif isinstance(losses, Mapping):
        chosen = dict(losses)
    else:
        names = list(losses)
        if unknown := [n for n in names if n not in known]:
            raise ValueError(f"losses: {unknown[0]!r} is none of {', '.join(known)}")
        chosen = {n: known[n] for n in names}
    if len(chosen) < 2:
        raise ValueError(f"losses: expected at least two, got {len(chosen)}")
    table = {name: _facts(loss) for name, loss in chosen.items()}
    z = np.linspace(-3, 3, POINTS)
    zero_one = np.where(z <= 0, 1.0, 0.0)

    def compute(first: str, second: str, margin: float, excess: float) -> dict[str, Any]:
        out: dict[str, Any] = {"z": z, "zero_one": zero_one, "excess_grid": EXCESS}
        for side, name in (("a", first), ("b", second)):
            found = table[name]
            out[side] = name
            for what in ("loss", "slope", "curvature"):
                out[f"{side}_{what}"] = found[what]
                out[f"{side}_{what}_here"] = float(np.interp(margin, z, found[what]))
            bound = float(np.interp(excess, EXCESS, found["bound"]))
            out |= {f"{side}_bound": found["bound"], f"{side}_bound_here": bound}
            out |= {
                f"{side}_here": np.array([out[f"{side}_loss_here"]]),
                f"{side}_slope_mark": np.array([out[f"{side}_slope_here"]]),
                f"{side}_bound_mark": np.array([bound]),
            }
            out |= {f"{side}_{what}": found[what] for what in ("sign", "calibrated", "bounded")}
        return out | {"at": margin, "here": np.array([margin]), "excess_here": np.array([excess])}

    names = list(chosen)
    explorer = Explorer(
        name="losses.margin",
        title="What a loss does with a margin, and what it promises about errors",
        about="A wrong example has a negative margin. Its pull is the slope: follow it to the left "
        "to see which losses give up on hopeless examples.",
        controls=[
            Choice("first", "First loss", names, value=names[0]),
            Choice("second", "Second loss", names, value=names[1]),
            Slider("margin", "Margin z = y f(x)", -3, 3, value=-1.0, step=0.125),
            Slider("excess", "Excess risk of the surrogate", 0, 0.7, value=0.1, step=0.025),
        ],
        compute=compute,
        panels=[
            Panel(
                "At z = {margin:.2f} it costs {a_loss_here:.2f} against {b_loss_here:.2f}",
                x=Axis("margin z", (-3, 3)), y=Axis("loss", (-0.1, 4)),
                draws=[
                    Line("z", "zero_one", label="error", color="grey", dash="dot", steps=True),
                    Line("z", "a_loss", label="first", color="blue"),
                    Line("z", "b_loss", label="second", color="vermillion"),
                    Points("here", "a_here", color="blue", size=9),
                    Points("here", "b_here", color="vermillion", size=9),
                ],
            ),
            Panel(
                "and pulls with {a_slope_here:.2f} against {b_slope_here:.2f}",
                x=Axis("margin z", (-3, 3)), y=Axis("slope of the loss", (-4, 1)),
                draws=[
                    HLine(0.0, color="grey", dash="dot"),
                    Line("z", "a_slope", label="first", color="blue"),
                    Line("z", "b_slope", label="second", color="vermillion"),
                    Points("here", "a_slope_mark", color="blue", size=9),
                    Points("here", "b_slope_mark", color="vermillion", size=9),
                ],
            ),
            Panel(
                "Below zero it is not convex",
                x=Axis("margin z", (-3, 3)), y=Axis("second derivative", (-0.6, 2.4)),
                draws=[
                    HLine(0.0, color="grey", dash="dot"),
                    VLine("at", color="grey", dash="dot"),
                    Line("z", "a_curvature", label="first", color="blue"),
                    Line("z", "b_curvature", label="second", color="vermillion"),
                ],
            ),
            Panel(
                "Excess error at most {a_bound_here:.0%} against {b_bound_here:.0%}",
                x=Axis("excess risk of the surrogate", (0, 0.7)),
                y=Axis("bound on the excess error", (0, 1.05)),
                draws=[
                    Line("excess_grid", "a_bound", label="first", color="blue"),
                    Line("excess_grid", "b_bound", label="second", color="vermillion"),
                    Points("excess_here", "a_bound_mark", color="blue", size=9),
                    Points("excess_here", "b_bound_mark", color="vermillion", size=9),
                ],
            ),
        ],
        readouts=[
            Readout("a", "first loss"), Readout("a_slope_here", "slope", ".2f"),
            Readout("a_sign", "shape"),
            Readout("a_calibrated", "calibrated"), Readout("a_bounded", "bounded"),
            Readout("b", "second loss"), Readout("b_slope_here", "slope", ".2f"),
            Readout("b_sign", "shape"),
            Readout("b_calibrated", "calibrated"), Readout("b_bounded", "bounded"),
        ],
        script=SCRIPT,
        data={
            "z": z, "zero_one": zero_one, "excess": EXCESS,
            "losses": {
                name: {k: v if isinstance(v, str) else v.tolist() for k, v in facts.items()}
                for name, facts in table.items()
            },
        },
        call="losses.explore(" + ("" if losses is None else "losses, ") + "{state})",
        columns=2,
        height=300,
    )  # fmt: skip
    return explorer.set(**state)


def _facts(loss: margins.Margin) -> dict[str, Any]:
    """What the explorer shows of one loss, rounded to what can be seen."""
    found = margins.shape(loss, -3, 3, POINTS)
    return {
        "loss": np.round(found.loss, 3),
        "slope": np.round(found.slope, 3),
        "curvature": np.round(found.curvature, 3),
        "bound": np.round(margins.error_bound(loss, EXCESS), 3),
        "sign": SIGNS[0] if found.convex else SIGNS[1],
        "calibrated": "yes" if found.calibrated else "no",
        "bounded": "yes" if found.bounded else "no",
    }
