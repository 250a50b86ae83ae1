"""Explorer of a soup: plane of three members, way between two, greedy steps; figure of why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks
from workbench.loss_landscapes.geometry import Objective, slice_2d
from workbench.loss_landscapes.model_soups import State, accuracy_on, greedy_soup, triangle
from workbench.plots import theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HeatMap,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CORNERS = ("A", "B", "C")
SOUPS = ("uniform_soup", "greedy_soup")
FURTHEST = 2.0  # ratio of losses at which the colours of the plane end

SCRIPT = """
function (controls, data) {
  const i = data.pairs.indexOf(controls.pair), set = data.sets.indexOf(controls.on);
  const t = controls.alpha;
  const from = data.corners[data.first[i]], to = data.corners[data.second[i]];
  const k = Math.round(t * (data.alphas.length - 1)), s = controls.step - 1;
  const soup = data.soup[set][i], ensemble = data.ensemble[set][i], last = soup.length - 1;
  const chord = data.alphas.map(a => (1 - a) * soup[0] + a * soup[last]);
  const shown = data.tried.map((v, j) => j).slice(0, s + 1);
  const inside = shown.filter(j => data.taken[j]), out = shown.filter(j => !data.taken[j]);
  return {
    side: data.side, plane: data.plane[set], unit: data.unit[set],
    corner_x: data.corners.map(c => c[0]), corner_y: data.corners.map(c => c[1]),
    names: data.names, centre_x: [0], centre_y: [0],
    way_x: [from[0], to[0]], way_y: [from[1], to[1]],
    here_x: [(1 - t) * from[0] + t * to[0]], here_y: [(1 - t) * from[1] + t * to[1]],
    alphas: data.alphas, soup_line: soup.map((v, j) => v - chord[j]),
    ensemble_line: ensemble.map((v, j) => v - chord[j]), level: data.alphas.map(a => 0),
    here_alpha: [t], here_soup: [soup[k] - chord[k]],
    loss: soup[k], loss_ensemble: ensemble[k], gap: soup[k] - ensemble[k],
    inside_x: inside.map(j => j + 1), inside_y: inside.map(j => data.tried[j]),
    out_x: out.map(j => j + 1), out_y: out.map(j => data.tried[j]),
    pot_x: shown.map(j => j + 1), pot_y: shown.map(j => data.scores[j]),
    score: data.scores[s], pot: inside.map(j => data.members[j]).join(", "), size: inside.length
  };
}
"""


def explore_soups(
    model: nn.Module,
    states: Sequence[State],
    tests: Mapping[str, tuple[Tensor, Tensor]],
    *,
    held_out: tuple[Tensor, Tensor],
    corners: Sequence[int] | None = None,
    points: int = 21,
    rows: int = 500,
    **state: Any,
) -> Explorer:
    """Walk between your fine-tunings and watch the greedy soup being made.

    Args:
        model: the architecture, a classifier.
        states: of the fine-tunings, three or more.
        tests: data sets by name, each inputs and classes.
        held_out: inputs and classes on which the greedy soup decides.
        corners: which three members span the plane; default the best three on ``held_out``.
        points: of the plane, a side.
        rows: of each data set, at most.
        state: where the controls start: ``on``, ``pair``, ``alpha``, ``step``.

    Returns:
        The explorer; everything is computed here, a control only picks.
    """
    if len(states) < 3:
        raise ValueError(f"states: expected three or more, got {len(states)}")
    greedy = greedy_soup(states, accuracy_on(model, *held_out))
    chosen = [checks.count(i, "corners", minimum=0) for i in corners or greedy.order[:3]]
    alphas, pairs = np.linspace(0, 1, 21), list(combinations(range(3), 2))
    labels = [f"{CORNERS[i]} to {CORNERS[j]}" for i, j in pairs]
    planes, units, soups, ensembles = {}, {}, {}, {}
    for name, (x, y) in tests.items():
        objective = Objective(model, F.cross_entropy, (x[:rows], y[:rows]))
        plane = triangle(objective, [states[i] for i in chosen])
        span = 1.35 * float(np.abs(plane.coordinates).max())
        ends = [objective.flatten(dict(states[i])) for i in chosen]
        units[name] = objective(plane.origin)
        cut = slice_2d(objective, plane.d1, plane.d2, center=plane.origin, span=span, points=points)
        planes[name] = (cut.values / units[name]).clip(1 / FURTHEST, FURTHEST).round(3)
        soups[name] = np.array(
            [list(objective.values(torch.lerp(ends[i], ends[j], float(a)) for a in alphas))
             for i, j in pairs]
        ).round(5)  # fmt: skip
        logits = [_logits(objective, end, x[:rows]) for end in ends]
        ensembles[name] = np.array(
            [[float(F.cross_entropy(torch.lerp(logits[i], logits[j], float(a)), y[:rows]))
              for a in alphas] for i, j in pairs]
        ).round(5)  # fmt: skip
    flat = plane.coordinates
    members = [i + 1 for i in greedy.order]
    taken = np.isin(greedy.order, greedy.kept)
    tried, scores = (100 * np.array(values) for values in (greedy.tried, greedy.scores))
    names = [f"{c}: {i + 1}" for c, i in zip(CORNERS, chosen, strict=True)]
    data = {
        "pairs": labels, "first": [i for i, _ in pairs], "second": [j for _, j in pairs],
        "corners": flat.round(4), "side": cut.x.round(4), "sets": list(tests),
        "plane": np.stack(list(planes.values())), "unit": np.array(list(units.values())),
        "soup": np.stack(list(soups.values())), "ensemble": np.stack(list(ensembles.values())),
        "alphas": alphas, "names": names,
        "tried": tried.round(3), "scores": scores.round(3), "taken": taken, "members": members,
    }  # fmt: skip

    def compute(on: str, pair: str, alpha: float, step: int) -> dict[str, Any]:
        i = labels.index(pair)
        start, end = (data["corners"][c] for c in pairs[i])
        k = round(alpha * (len(alphas) - 1))
        soup, ensemble = soups[on][i], ensembles[on][i]
        chord = (1 - alphas) * soup[0] + alphas * soup[-1]
        shown = np.arange(step)
        inside, out = shown[taken[:step]], shown[~taken[:step]]
        here = (1 - alpha) * start + alpha * end
        return {
            "side": data["side"], "plane": planes[on], "unit": units[on],
            "corner_x": data["corners"][:, 0], "corner_y": data["corners"][:, 1],
            "names": np.array(names, object), "centre_x": np.zeros(1), "centre_y": np.zeros(1),
            "way_x": np.array([start[0], end[0]]), "way_y": np.array([start[1], end[1]]),
            "here_x": here[:1], "here_y": here[1:],
            "alphas": alphas, "soup_line": soup - chord, "ensemble_line": ensemble - chord,
            "level": np.zeros(len(alphas)),
            "here_alpha": np.array([alpha]), "here_soup": (soup - chord)[k : k + 1],
            "loss": float(soup[k]), "loss_ensemble": float(ensemble[k]),
            "gap": float(soup[k] - ensemble[k]),
            "inside_x": inside + 1, "inside_y": data["tried"][inside],
            "out_x": out + 1, "out_y": data["tried"][out],
            "pot_x": shown + 1, "pot_y": data["scores"][:step],
            "score": float(data["scores"][step - 1]), "size": len(inside),
            "pot": ", ".join(str(members[j]) for j in inside),
        }  # fmt: skip

    every = np.concatenate([(a[name] - c).ravel() for name in tests for a in (soups, ensembles)
                            for c in [_chords(soups[name], alphas)]])  # fmt: skip
    low, high = float(every.min()), float(every.max())
    room = 0.08 * max(high - low, 1e-6)
    wide = (float(data["side"][0]), float(data["side"][-1]))
    accuracy = (float(tried.min()), float(max(tried.max(), scores.max())))
    margin = 0.1 * max(accuracy[1] - accuracy[0], 0.1)
    explorer = Explorer(
        name="loss_landscapes.soups",
        title="Between fine-tunings of one start the loss is low",
        about="Walk from one member to another and compare with the ensemble of their logits; then "
        "let the greedy soup try one member after the other.",
        controls=[
            Choice("on", "Data", list(tests)),
            Choice("pair", "Way", labels),
            Slider("alpha", "α", 0.0, 1.0, step=0.05, value=0.5),
            Slider("step", "Greedy step", 1, len(states), step=1, value=len(states)),
        ],
        compute=compute,
        panels=[
            Panel(
                "Three members, {loss:.3f} nats at the ring",
                x=Axis("distance from their soup", wide), y=Axis("distance", wide),
                draws=[
                    HeatMap("plane", "side", "side", label="loss / loss of the soup of three",
                            scale=(1 / FURTHEST, FURTHEST), log=True, colors="diverging",
                            contours=True),
                    Line("way_x", "way_y", color="grey", dash="dot"),
                    Points("corner_x", "corner_y", text="names", color="blue", size=9),
                    Points("centre_x", "centre_y", label="soup of three", color="orange",
                           symbol="diamond", size=10),
                    Points("here_x", "here_y", label="here", color="vermillion", symbol="ring",
                           size=12),
                ],
                square=True,
            ),
            Panel(
                "α = {alpha:.2f}: soup minus ensemble {gap:.4f} nats",
                x=Axis("α", (0.0, 1.0)),
                y=Axis("loss minus mean of the ends", (low - room, high + room), unit="nats"),
                draws=[
                    Line("alphas", "level", color="grey", dash="dash"),
                    Line("alphas", "ensemble_line", label="ensemble", color="green"),
                    Line("alphas", "soup_line", label="soup", color="blue"),
                    Points("here_alpha", "here_soup", label="here", color="vermillion",
                           symbol="ring", size=12),
                ],
            ),
            Panel(
                "Greedy: {size:d} in the pot after step {step:d}, {score:.2f}% held out",
                x=Axis("step", (0.5, len(states) + 0.5)),
                y=Axis("held-out accuracy", (accuracy[0] - margin, accuracy[1] + margin), unit="%"),
                draws=[
                    Line("pot_x", "pot_y", label="pot", color="blue", steps=True),
                    Points("inside_x", "inside_y", label="kept", color="green", size=8),
                    Points("out_x", "out_y", label="left out", color="grey", symbol="cross",
                           size=7),
                    VLine("step", color="grey", dash="dot"),
                ],
            ),
        ],
        readouts=[
            Readout("loss", "loss of the soup", ".4f", unit="nats"),
            Readout("loss_ensemble", "of the ensemble", ".4f", unit="nats"),
            Readout("score", "greedy soup, held out", ".2f", unit="%"),
            Readout("pot", "members in the pot"),
        ],
        script=SCRIPT,
        data=data,
        call="loss_landscapes.figures_model_soups.explore_soups(model, states, tests, "
        "held_out=held_out, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_why(frame: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Gain of an averaged pair against its angle; and soup against ensemble, by learning rate.

    Args:
        frame: rows of `experiments.model_soups.cook`.
        axes: two.
    """
    colors = theme.palette()
    angle, gain = (np.concatenate(frame[name].to_list()) for name in ("angle", "gain"))
    edges = np.quantile(angle, np.linspace(0, 1, 9))
    group = np.clip(np.searchsorted(edges, angle, side="right") - 1, 0, 7)
    some = slice(None, None, max(1, len(angle) // 250))
    axes[0].plot(angle[some], gain[some], ".", ms=3, color=colors["grey"], alpha=0.5)
    means = pd.DataFrame({"group": group, "angle": angle, "gain": gain}).groupby("group").mean()
    axes[0].plot(means.angle, means.gain, "D-", ms=5, color=colors["blue"], label="mean of eighths")
    axes[0].axhline(0, color=colors["grey"], lw=0.8)
    axes[0].set(xlabel="angle of the two ways (degrees)", ylabel="gain over the two (points)")
    axes[0].legend(frameon=False, fontsize=8)
    rate, true, approx = (
        np.stack(frame[name].to_list()) for name in ("rate", "gap_true", "gap_approx")
    )
    names = ("green", "blue", "purple", "orange", "vermillion", "sky")
    for value, name in zip(np.unique(rate), names, strict=False):
        here = rate == value
        axes[1].plot(approx[here], true[here], ".", ms=5, color=colors[name], label=f"{value:g}")
    axes[1].axline((0, 0), slope=1, color=colors["grey"], lw=0.8)
    axes[1].set_xscale("symlog", linthresh=1e-3)
    axes[1].set_yscale("symlog", linthresh=1e-3)
    axes[1].set(xlabel="approximate gap (nats)", ylabel="true gap (nats)")
    axes[1].legend(frameon=False, fontsize=8, title="learning rate", title_fontsize=8)


def draw_released(table: pd.DataFrame, ax: Axes) -> None:
    """Accuracy on ImageNet against the mean of five shifts, released models and soups.

    Args:
        table: of `experiments.model_soups.released`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    named = table.set_index("model")
    chosen = table.model.iloc[0]
    marks: dict[str, tuple[Any, str, int, str]] = {
        "fine-tuned models": (
            table.model[~table.model.isin(["model_0", chosen, *SOUPS])],
            "o",
            4,
            "grey",
        ),
        "their start": (["model_0"], "s", 7, "orange"),
        "best on held-out data": ([chosen], "o", 8, "vermillion"),
        "uniform soup": (["uniform_soup"], "D", 8, "green"),
        "greedy soup": (["greedy_soup"], "*", 13, "blue"),
    }
    for label, (rows, marker, size, color) in marks.items():
        part = named.loc[list(rows)]
        ax.plot(part.ImageNet, part["shift"], marker, ms=size, color=colors[color], label=label)
    above = int((named["shift"].drop(list(SOUPS)) > named["shift"]["greedy_soup"]).sum())
    ax.set_title(f"{above} of {len(table) - 2} single models lie above the greedy soup", loc="left")
    ax.set(xlabel="ImageNet accuracy (%)", ylabel="mean accuracy on five shifts (%)")
    ax.legend(frameon=False, fontsize=8)


def _logits(objective: Objective, theta: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad(), objective.at(theta) as model:
        out: Tensor = model(x)
        return out


def _chords(values: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """The lines between the ends of each way."""
    chords: np.ndarray = (1 - alphas) * values[:, :1] + alphas * values[:, -1:]
    return chords
