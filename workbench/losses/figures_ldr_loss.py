"""Explorer of the adversary over labels and of learned lambdas; figures of ranks and accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from workbench import plots
from workbench.losses.experiments.ldr_loss import BINS, RANKED, SETTINGS
from workbench.losses.ldr_loss import aldr_kl, aldr_lambda, worst_case
from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Bars,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    VLine,
)
from workbench.plots.explorer import Choice as Options
from workbench.plots.mpl import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shares = Mapping[str, np.ndarray]

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
NAMES = ["label", "rival 1", "rival 2"]
WRITTEN = np.array([[0.0, -0.17], [1.0, -0.17], [0.5, 0.88]])  # where the names stand
SIDE = 10
LATTICE = np.array(
    [(SIDE - i - j, i, j) for i in range(SIDE + 1) for j in range(SIDE + 1 - i)]
) / float(SIDE)
PATH = np.geomspace(0.05, 50, 41)
UPDATES = 15  # of lambda: as many as it takes to settle
SHOWN = 9  # epochs the slider offers
PLACE = (np.arange(BINS) + 0.5) / BINS / 2 + 0.5

SCRIPT = """
function (controls, data) {
  const c = controls.margin, lam = controls.lam, h = [0, controls.rival1, controls.rival2];
  const d = h.map((v, k) => k ? v + c : 0);
  function softmax(values, t) {
    const top = Math.max(...values), e = values.map(v => Math.exp((v - top) / t));
    const total = e.reduce((a, b) => a + b);
    return e.map(v => v / total);
  }
  const kl = p => p.reduce((s, v) => s + (v > 0 ? v * Math.log(3 * v) : 0), 0);
  const gain = (p, t) => p.reduce((s, v, k) => s + v * d[k], 0) - t * kl(p);
  const psi = t => {
    const top = Math.max(...d);
    return t * Math.log(d.reduce((s, v) => s + Math.exp((v - top) / t), 0) / 3) + top;
  };
  const put = p => [p[1] * data.corners[1][0] + p[2] * data.corners[2][0],
                    p[2] * data.corners[2][1]];
  let own = lam;
  for (let i = 0; i < data.updates; i++) {
    own = lam * (1 - kl(softmax(h, own)) / (2 * Math.log(3)));
  }
  const value = psi(lam), path = data.path.map(t => put(softmax(d, t)));
  const here = softmax(d, lam), spot = put(here), at = data.lattice.map(put);
  const found = {
    lattice_x: at.map(q => q[0]), lattice_y: at.map(q => q[1]),
    below: data.lattice.map(p => gain(p, lam) - value),
    edge_x: [0, 1, 0.5, 0], edge_y: [0, 0, data.corners[2][1], 0],
    name_x: data.written.map(q => q[0]), name_y: data.written.map(q => q[1]), name: data.names,
    path_x: path.map(q => q[0]), path_y: path.map(q => q[1]), here_x: [spot[0]], here_y: [spot[1]],
    t: data.path, curve: data.path.map(psi), largest: Math.max(...d),
    mean: (d[0] + d[1] + d[2]) / 3, lam_x: [lam], value_y: [value], value: value,
    own: own, own_text: ['ALDR'], own_x: [own], own_y: [psi(own)], share: here[0]
  };
  if (data.shares) {
    const at = data.epochs.indexOf(controls.epoch), rows = data.shares[controls.noise][at];
    const means = data.means[controls.noise][at];
    found.place = data.place; found.width = data.place.map(() => data.bar);
    found.clean = rows[0]; found.flipped = rows[1];
    found.clean_mean = means[0]; found.flipped_mean = means[1];
  }
  return found;
}
"""


def explore_ldr(shares: Shares | None = None, **state: Any) -> Explorer:
    """Move two rivals, the margin and lambda: whom the adversary picks, and what the loss is.

    Args:
        shares: learned lambdas to show beside it: per kind of noise (epochs, 2, bins), shares of
            clean and flipped rows with lambda / lambda_0 in equal bins from 0.5 to 1, as from
            `learned` or, for your own memory, `experiments.ldr_loss.shares`.
        state: where the controls start: ``rival1``, ``rival2``, ``margin``, ``lam``; with shares
            also ``noise`` and ``epoch``.

    Returns:
        The explorer; `.show()` it.
    """
    tables = dict(shares or {})
    last = min((len(t) for t in tables.values()), default=0)
    epochs = [int(e) for e in np.unique(np.linspace(1, last, SHOWN).round())] if tables else []
    tables = {name: np.asarray(t)[np.array(epochs) - 1] for name, t in tables.items()}
    means = {name: t @ PLACE for name, t in tables.items()}
    tables = {name: (t / t.max((1, 2), keepdims=True)).round(2) for name, t in tables.items()}
    at = LATTICE @ CORNERS
    divergence = np.sum(np.where(LATTICE > 0, LATTICE * np.log(3 * LATTICE + 1e-300), 0), 1)

    def compute(
        rival1: float, rival2: float, margin: float, lam: float, noise: str = "", epoch: int = 0
    ) -> dict[str, Any]:
        h = torch.tensor([0.0, rival1, rival2], dtype=torch.float64)
        d = np.array([0.0, rival1 + margin, rival2 + margin])
        own = torch.tensor(lam, dtype=torch.float64)
        for _ in range(UPDATES):
            own = aldr_lambda(h, own, lam0=lam)

        ts = torch.tensor([*PATH, lam, float(own)], dtype=torch.float64)
        rows = h.expand(len(ts), 3), torch.zeros(len(ts), dtype=torch.long)
        psi = aldr_kl(*rows, ts, lam0=lam, margin=margin) + math.log(3) / lam * (ts - lam) ** 2
        weights = worst_case(*rows, lam=ts, margin=margin).numpy()
        curve, value, settled = psi[:-2].numpy(), float(psi[-2]), float(psi[-1])
        path, here = weights[:-2] @ CORNERS, weights[-2]
        spot, adapted = here @ CORNERS, float(own)
        found = {
            "lattice_x": at[:, 0], "lattice_y": at[:, 1],
            "below": LATTICE @ d - lam * divergence - value,
            "edge_x": CORNERS[[0, 1, 2, 0], 0], "edge_y": CORNERS[[0, 1, 2, 0], 1],
            "name_x": WRITTEN[:, 0], "name_y": WRITTEN[:, 1], "name": np.array(NAMES),
            "path_x": path[:, 0], "path_y": path[:, 1],
            "here_x": spot[:1], "here_y": spot[1:],
            "t": PATH, "curve": curve,
            "largest": float(d.max()), "mean": float(d.mean()),
            "lam_x": np.array([lam]), "value_y": np.array([value]), "value": value,
            "own": adapted, "own_text": np.array(["ALDR"]), "own_x": np.array([adapted]),
            "own_y": np.array([settled]), "share": float(here[0]),
        }  # fmt: skip
        if not tables:
            return found
        place = epochs.index(epoch)
        (clean, flipped), (clean_mean, flipped_mean) = tables[noise][place], means[noise][place]
        return found | {
            "place": PLACE, "width": np.full(BINS, 0.5 / BINS), "clean": clean, "flipped": flipped,
            "clean_mean": float(clean_mean), "flipped_mean": float(flipped_mean),
        }  # fmt: skip

    panels = [
        Panel(
            "{share:.0%} on the label",
            x=Axis("label to rival 1", (-0.12, 1.14)),
            y=Axis("weight of rival 2", (-0.2, 1.02)),
            draws=[
                Line("edge_x", "edge_y", color="grey", width=1.0),
                Points("lattice_x", "lattice_y", value="below", scale=(-4, 0), size=9, opacity=0.75,
                       label="gain below the worst case"),
                Line("path_x", "path_y", color="ink"),
                Points("name_x", "name_y", text="name", color="grey", size=0.1),
                Points("here_x", "here_y", color="vermillion", symbol="diamond", size=13),
            ],
            square=True, legend=False, weight=1.5,
        ),
        Panel(
            "From largest {largest:.2f} to mean {mean:.2f}",
            x=Axis("λ", (0.05, 50), log=True), y=Axis("loss ψ", (-2, 3.3)),
            draws=[
                HLine("largest", color="grey"), HLine("mean", color="grey"),
                Line("t", "curve", color="blue"),
                Points("lam_x", "value_y", color="vermillion", symbol="diamond", size=12),
                Points("own_x", "own_y", text="own_text", color="green", symbol="ring", size=13),
            ],
            legend=False,
        ),
    ]  # fmt: skip
    readouts = [
        Readout("value", "loss ψ", ".4f"), Readout("share", "weight on the label", ".3f"),
        Readout("own", "λ after ALDR's updates", ".4f"),
    ]  # fmt: skip
    controls: list[Any] = [
        Slider("rival1", "Rival 1 minus label", -2.0, 2.0, step=0.1, value=1.0),
        Slider("rival2", "Rival 2 minus label", -2.0, 2.0, step=0.1, value=-1.0),
        Slider("margin", "Margin c", 0.0, 1.0, step=0.1, value=0.1),
        Slider("lam", "λ", 0.05, 50.0, value=1.0, log=True),
    ]
    if tables:
        controls += [
            Options("noise", "Noise", list(tables)),
            Steps("epoch", "Epoch", epochs, value=epochs[-1]),
        ]
        panels.append(
            Panel(
                "Clean {clean_mean:.3f}, flipped {flipped_mean:.3f}",
                x=Axis("λ of a training row / λ₀", (0.49, 1.01)),
                y=Axis("rows / tallest bar", (0, 1.05)),
                draws=[
                    Bars("place", "clean", width="width", label="clean", color="blue", opacity=0.6),
                    Bars("place", "flipped", width="width", label="flipped", color="vermillion",
                         opacity=0.5),
                    VLine("clean_mean", color="blue"), VLine("flipped_mean", color="vermillion"),
                ],
            )
        )  # fmt: skip
    data: dict[str, Any] = {
        "corners": CORNERS, "names": NAMES, "written": WRITTEN, "lattice": LATTICE,
        "path": PATH, "updates": UPDATES,
    }  # fmt: skip
    if tables:
        data |= {"shares": {name: t.tolist() for name, t in tables.items()}, "epochs": epochs}
        data |= {"means": {name: m.tolist() for name, m in means.items()}}
        data |= {"place": PLACE, "bar": 0.5 / BINS}
    return Explorer(
        name="losses.ldr",
        title="An adversary over labels, and the λ that each example learns",
        about="Lower λ: the diamond runs to the worst rival. Raise it: all labels count alike.",
        controls=controls,
        compute=compute,
        panels=panels,
        readouts=readouts,
        script=SCRIPT,
        data=data,
        call="losses.figures_ldr_loss.explore_ldr(" + ("shares, " if tables else "") + "{state})",
    ).set(**state)


def learned(frame: pd.DataFrame, lam0: float = 1.0) -> dict[str, np.ndarray]:
    """Shares of lambda for `explore_ldr`, mean over seeds of `experiments.ldr_loss`."""
    mean = np.mean(list(frame[f"hist_{lam0:g}"]), axis=0)
    return dict(zip(list(SETTINGS)[1:], mean, strict=True))


def draw_ranks(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Mean rank over noise settings of each loss: a dot a seed, mean and interval, best on top."""
    values = np.column_stack([frame[f"rank_{name}"] for name in RANKED])
    mean, low, high = interval(values)
    for place, k in enumerate(np.argsort(mean)):
        ink = theme.color("vermillion" if RANKED[k] == "ALDR" else "blue")
        ax.plot(values[:, k], np.full(len(values), place), "o", ms=4, alpha=0.4, color=ink)
        ax.errorbar(mean[k], place, xerr=[[mean[k] - low[k]], [high[k] - mean[k]]], fmt="D", ms=6,
                    color=ink, capsize=3, elinewidth=2)  # fmt: skip
    ax.set_yticks(range(len(RANKED)), [escape.matplotlib(RANKED[k]) for k in np.argsort(mean)])
    ax.set(xlabel="mean rank over five settings (1 is best)", xlim=(1, len(RANKED)))
    ax.invert_yaxis()
    return ax


def draw_accuracy(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Test accuracy of each loss under each setting, mean over seeds; rows as in `draw_ranks`."""
    order = np.argsort([frame[f"rank_{name}"].mean() for name in RANKED])
    top = np.mean(list(frame.top), axis=0)[: len(RANKED), :, 0]
    names = ["clean", "symm.\n0.3", "symm.\n0.6", "symm.\n0.9", "next class\n0.3"]
    table = pd.DataFrame(top[order], index=np.array(RANKED)[order], columns=names)
    return plots.heatmap(table, ax=ax, cells=".1f", label="top-1 accuracy (%)", scale=(10, 100))
