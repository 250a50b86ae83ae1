"""Explorer of the layered interaction graph; figures of edges needed and modules found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.loss_landscapes import interaction_basis as ib
from workbench.plots import mpl, theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
    VLine,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = (2, 5, 10, 20, 40, 80, 160)
BASE = 1000  # an edge from feature j to feature i is stored as the number BASE * j + i
FLOOR = -0.06  # where the pen moves from one layer to the next: on the frame of the panel
LABELS = {
    "neurons": "neurons",
    "pca": "PCA",
    "scaled": "PCA, scaled to effect",
    "output": "interaction basis",
    "next": "local interaction basis",
    "turned": "interaction basis, turned",
}
COLORS = {
    "neurons": "grey", "pca": "orange", "scaled": "vermillion", "output": "blue",
    "next": "green", "turned": "purple",
}  # fmt: skip

SCRIPT = """
function (controls, data) {
  const at = data.kept.indexOf(controls.keep), graph = data.graphs[controls.basis];
  let total = 0;
  function drawn(across) {
    const x = [], y = [];
    graph.edges.forEach((pairs, layer) => {
      let started = false, last = 0;
      for (let e = 0; e < Math.min(controls.keep, pairs.length); e++) {
        const j = Math.floor(pairs[e] / data.base), i = pairs[e] % data.base;
        const differs = (graph.side[layer][j] > 0.5) !== (graph.side[layer + 1][i] > 0.5);
        if (differs !== across) continue;
        if (!started) { x.push(layer); y.push(data.floor); started = true; }
        last = graph.place[layer][j];
        x.push(layer, layer + 1, layer); y.push(last, graph.place[layer + 1][i], last);
      }
      if (started) { x.push(layer); y.push(data.floor); }
    });
    return [x, y];
  }
  graph.edges.forEach(pairs => { total += Math.min(controls.keep, pairs.length); });
  const same = drawn(false), other = drawn(true), nodes = [[], [], []];
  graph.place.forEach((places, layer) => places.forEach((p, i) => {
    nodes[0].push(layer); nodes[1].push(p); nodes[2].push(graph.side[layer][i]);
  }));
  const result = {
    same_x: same[0], same_y: same[1], other_x: other[0], other_y: other[1],
    node_x: nodes[0], node_y: nodes[1], node_side: nodes[2],
    label: graph.label, total: total, score: graph.score[at], full: data.full,
    here_x: [total], here_y: [graph.score[at]]
  };
  Object.keys(data.graphs).forEach(name => {
    result["total_" + name] = data.graphs[name].total;
    result["score_" + name] = data.graphs[name].score;
  });
  return result;
}
"""


def explore_interactions(
    net: ib.Chain,
    bases: Mapping[str, Sequence[ib.Basis]],
    score: Callable[[Tensor], float],
    *,
    test: ib.Chain | None = None,
    sides: Mapping[str, Sequence[np.ndarray]] | None = None,
    kept: Sequence[int] = KEPT,
    **state: Any,
) -> Explorer:
    """The graph of strongest interactions, basis by basis, and what the network knows with them.

    Args:
        net: a cut network, `interaction_basis.cut(model, X)`; edges are averaged over its data.
        bases: by name ("neurons", "pca", "output", "next" get their usual labels), centred.
        score: of outputs, between 0 and 1; higher is better.
        test: the network cut on the data to score on; by default ``net``.
        sides: per basis and layer a number in [0, 1] for each feature: its colour and height.
            Interactions that join features below and above one half are drawn in red.
        kept: numbers of edges to choose from, in each pair of layers.
        state: where the controls start: ``basis``, ``keep``.

    Returns:
        The explorer; `.show()` it. All ablations are run here, once.
    """
    test = net if test is None else test
    kept = [int(k) for k in kept]
    graphs = {
        name: _graph(net, test, chosen, score, kept, None if sides is None else sides[name])
        | {"label": LABELS.get(name, name)}
        for name, chosen in bases.items()
    }
    full = 100 * score(test.outputs)
    count = len(net.names)

    def compute(basis: str, keep: int) -> dict[str, Any]:
        graph, at = graphs[basis], kept.index(keep)
        same, other = (_drawn(graph, keep, across) for across in (False, True))
        nodes = [
            (layer, p, s)
            for layer, (places, sides) in enumerate(zip(graph["place"], graph["side"], strict=True))
            for p, s in zip(places, sides, strict=True)
        ]
        node_x, node_y, node_side = np.array(nodes, float).T
        result = {
            "same_x": same[0], "same_y": same[1], "other_x": other[0], "other_y": other[1],
            "node_x": node_x, "node_y": node_y, "node_side": node_side,
            "label": graph["label"], "total": graph["total"][at], "score": graph["score"][at],
            "full": full,
            "here_x": np.array([graph["total"][at]], float),
            "here_y": np.array([graph["score"][at]]),
        }  # fmt: skip
        for name, each in graphs.items():
            result[f"total_{name}"] = np.array(each["total"], float)
            result[f"score_{name}"] = np.array(each["score"])
        return result

    totals = [t for graph in graphs.values() for t in graph["total"]]
    explorer = Explorer(
        name="loss_landscapes.interactions",
        title="Which interactions a network needs depends on the basis you look in",
        about="Keep fewer edges until the accuracy falls; then change the basis."
        + ("" if sides is None else " Height and colour: the half that a feature belongs to."),
        controls=[
            Choice("basis", "Basis", list(bases), value=list(bases)[-1],
                   labels=[graphs[name]["label"] for name in bases]),
            Steps("keep", "Strongest edges kept per pair of layers", kept,
                  value=kept[len(kept) // 2]),
        ],
        compute=compute,
        panels=[
            Panel(
                "{label}: {total} edges, accuracy {score:.1f}%",
                x=Axis("layer (0 is the input)", (-0.15, count - 0.85)),
                y=Axis("features" + ("" if sides is None else ", by half"), (FLOOR, 1.06)),
                draws=[
                    Line("same_x", "same_y", label="within a half", color="blue", width=0.6),
                    Line("other_x", "other_y", label="between halves", color="vermillion",
                         width=0.6),
                    *(VLine(float(layer), color="grey", dash="solid") for layer in range(count)),
                    Points("node_x", "node_y", label="half", value="node_side",
                           scale=(0.0, 1.0), colors="diverging", size=6.0),
                ],
                weight=1.3,
            ),
            Panel(
                "Accuracy that is left",
                x=Axis("edges kept, all layers", (0.8 * min(totals), 1.25 * max(totals)), log=True),
                y=Axis("accuracy", (0.0, 104.0), unit="%"),
                draws=[
                    HLine("full", "all edges", color="ink"),
                    *(
                        Line(f"total_{name}", f"score_{name}", label=graphs[name]["label"],
                             color=COLORS.get(name), markers=True)
                        for name in bases
                    ),
                    Points("here_x", "here_y", label="here", color="vermillion", symbol="ring",
                           size=13),
                ],
            ),
        ],
        readouts=[
            Readout("score", "accuracy", ".1f", unit="%"), Readout("full", "all edges", ".1f",
                                                                   unit="%"),
            Readout("total", "edges kept", ".0f"),
        ],
        script=SCRIPT,
        data={"graphs": graphs, "kept": kept, "full": full, "floor": FLOOR, "base": BASE},
        call="loss_landscapes.figures_interaction_basis.explore_interactions("
        "net, bases, score, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def _graph(
    net: ib.Chain,
    test: ib.Chain,
    bases: Sequence[ib.Basis],
    score: Callable[[Tensor], float],
    kept: Sequence[int],
    sides: Sequence[np.ndarray] | None,
) -> dict[str, Any]:
    """What the explorer draws of one basis: edges by strength, places of features, accuracies."""
    strengths = ib.edges(net, bases)
    strongest = []
    for strength in strengths:
        order = strength.flatten().argsort(descending=True)[: max(kept)].numpy()
        i, j = np.unravel_index(order, tuple(strength.shape))
        strongest.append((BASE * j + i).tolist())
    side = [
        np.full(len(b.values), 0.5) if sides is None else np.round(sides[layer], 2)
        for layer, b in enumerate(bases)
    ]
    accuracy = [
        round(100 * score(ib.ablate(test, bases, [ib.strongest(s, k) for s in strengths])), 2)
        for k in kept
    ]
    return {
        "edges": strongest,
        "side": [share.tolist() for share in side],
        "place": [_places(share) for share in side],
        "total": [sum(min(k, s.numel()) for s in strengths) for k in kept],
        "score": accuracy,
    }


def _places(side: np.ndarray) -> list[float]:
    """Heights between 0 and 1, in the order of ``side``."""
    heights = np.empty(len(side))
    heights[np.argsort(side, kind="stable")] = (np.arange(len(side)) + 0.5) / len(side)
    return np.round(heights, 3).tolist()


def _drawn(graph: Mapping[str, Any], keep: int, across: bool) -> tuple[np.ndarray, np.ndarray]:
    """The chosen edges as one line: out and back, then along the layer to the next edge."""
    points: list[tuple[float, float]] = []
    for layer, pairs in enumerate(graph["edges"]):
        part: list[tuple[float, float]] = []
        for j, i in (divmod(pair, BASE) for pair in pairs[:keep]):
            differs = (graph["side"][layer][j] > 0.5) != (graph["side"][layer + 1][i] > 0.5)
            if differs == across:
                here, there = graph["place"][layer][j], graph["place"][layer + 1][i]
                part += [(layer, here), (layer + 1, there), (layer, here)]
        if part:
            points += [(layer, FLOOR), *part, (layer, FLOOR)]
    x, y = np.array(points, float).reshape(-1, 2).T
    return x, y


# --- static figures ------------------------------------------------------------------------------


def draw_needed(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Edges needed per task and basis: a dot for each seed, mean and 95% interval.

    Args:
        frame: rows of `experiments.interaction_basis.sparsity`.
        ax: axes to draw on.
    """
    tasks, names = list(dict.fromkeys(frame.task)), list(LABELS)
    colors = theme.palette()
    for k, name in enumerate(names):
        for at, task in enumerate(tasks):
            values = frame.loc[frame.task == task, f"edges_{name}"].to_numpy(float)
            place = at + 0.16 * (k - (len(names) - 1) / 2)
            spread = np.linspace(-0.04, 0.04, len(values))
            ax.plot(place + spread, values, "o", ms=2.5, alpha=0.5, color=colors[COLORS[name]])
            mean, low, high = (float(np.ravel(q)[0]) for q in mpl.interval(values[:, None]))
            ax.errorbar(
                place, mean, [[mean - low], [high - mean]], fmt="D", ms=5, capsize=3,
                color=colors[COLORS[name]], label=LABELS[name] if at == 0 else None,
            )  # fmt: skip
    ax.set_yscale("log")
    ticks = [2, 5, 10, 20, 50, 100]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xticks(range(len(tasks)), [{"split": "two digits,\nsplit net"}.get(t, t) for t in tasks])
    ax.set_ylabel("edges needed (% of weights)")
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return ax


def draw_modules(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Agreement of modules with the two halves, layer by layer, mean and 95% interval.

    Args:
        frame: rows of `experiments.interaction_basis.modules`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    for name in ("neurons", "pca", "output"):
        mean, low, high = mpl.interval(np.stack(frame[f"layers_{name}"].to_list()))
        layers = np.arange(len(mean))
        ax.plot(layers, mean, "o-", color=colors[COLORS[name]], label=LABELS[name])
        ax.fill_between(layers, low, high, color=colors[COLORS[name]], alpha=0.2, lw=0)
    ax.set_xticks(range(len(mean)), ["input", "1", "2 (mixed)", "3", "output"])
    ax.set(xlabel="layer", ylabel="adjusted Rand index of modules", ylim=(-0.15, 1.08))
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return ax
