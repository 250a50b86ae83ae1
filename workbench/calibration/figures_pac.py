"""Explorer of partial programs: code with holes, its tree, and the threshold that decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.calibration.code_trees import Tree
from workbench.calibration.pac_code_sets import (
    TAUS,
    PartialProgram,
    aligned,
    binom_k,
    calibrate,
    nested_holes,
)
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Passage,
    Points,
    Readout,
    Slider,
    Steps,
    VLine,
)

COSTS = (0.0, 5.0)  # nats that the tint spans
HOLE = "??"


def explore_code_sets(
    trees: Sequence[Tree | str],
    costs: Sequence[ArrayLike],
    targets: Sequence[Tree | str],
    *,
    taus: ArrayLike = TAUS,
    shown: int = 8,
    **state: Any,
) -> Explorer:
    """Choose eps, delta and the number of holes; see which parts of a prediction survive.

    Args:
        trees: predicted programs, as `Tree.from_ast` makes them, or their texts.
        costs: for each, the cost of every node (`Tree.costs`).
        targets: the true programs.
        taus: grid of thresholds.
        shown: the first programs are for looking at, all others calibrate the threshold.
        state: where the controls start: `program`, `eps`, `delta`, `m`.

    Returns:
        The explorer; `.show()` it.
    """
    trees = [Tree.from_ast(t) if isinstance(t, str) else t for t in trees]
    targets = [Tree.from_ast(t) if isinstance(t, str) else t for t in targets]
    n = checks.same_length(trees=trees, costs=costs, targets=targets)
    if n < checks.count(shown, "shown") + 1:
        raise ValueError(f"shown: leaves none of {n} programs to calibrate with")
    for i, tree in enumerate(trees[:shown]):
        if tree.spans is None:
            raise ValueError(f"trees: entry {i} has no text; expected one made by Tree.from_ast")
    taus = np.asarray(taus, float)
    prices = [np.asarray(checks.to_numpy(c), float) for c in costs]
    right = [aligned(*pair) for pair in zip(trees, targets, strict=True)]
    masks: dict[int, list[NDArray]] = {}
    errors: dict[int, NDArray] = {}

    def solved(m: int) -> None:
        if m not in masks:
            masks[m] = [nested_holes(t, c, taus, m) for t, c in zip(trees, prices, strict=True)]
            errors[m] = np.array([(k & ~r).any(1) for k, r in zip(masks[m], right, strict=True)])

    places = [_places(tree) for tree in trees[:shown]]

    def compute(program: int, eps: float, delta: float, m: int) -> dict[str, Any]:
        solved(m)
        tree, cost = trees[program], prices[program]
        tau = calibrate(errors[m][shown:], taus, eps, delta)
        at = None if tau is None else int(np.searchsorted(taus, tau))
        kept = np.zeros(len(tree), bool) if at is None else masks[m][program][at]
        others = [np.zeros(t) if at is None else k[at] for t, k in
                  zip(map(len, trees[shown:]), masks[m][shown:], strict=True)]  # fmt: skip
        partial = PartialProgram(tree, kept)
        tokens, shade = tinted(tree, cost, partial.holes)
        x, depth, edge_x, edge_y = places[program]
        hole = np.zeros(len(tree), bool)
        hole[partial.holes] = True
        inside = ~kept & ~hole
        names = np.array([_short(tree, v) for v in range(len(tree))], dtype=object)
        k = binom_k(n - shown, eps, delta)
        return {
            "tokens": tokens, "shade": shade, "edge_x": edge_x, "edge_y": edge_y,
            "kept_x": x[kept], "kept_y": depth[kept], "kept_name": names[kept],
            "kept_cost": cost[kept], "hole_x": x[hole], "hole_y": depth[hole],
            "hole_name": names[hole], "gone_x": x[inside], "gone_y": depth[inside],
            "taus": taus, "error": errors[m][shown:].mean(0),
            "share": np.mean([mask.mean(1) for mask in masks[m][shown:]], 0),
            "tau": 1.0 if tau is None else tau, "allowed": 0.0 if k is None else k / (n - shown),
            "errors_allowed": "none: too few pairs" if k is None else f"{k} of {n - shown}",
            "threshold": "none passes" if tau is None else f"{tau:.3g}",
            "fraction": partial.fraction, "mean_kept": float(np.mean([o.mean() for o in others])),
            "inside": "yes" if not (kept & ~right[program]).any() else "no",
            "holes": len(partial.holes), "truth": targets[program].source,
        }  # fmt: skip

    return Explorer(
        name="calibration.code_sets",
        title="A prediction with holes is a set of programs",
        about="Lower eps: the threshold rises and dear nodes give way to holes.",
        controls=[
            Steps("program", "Program", list(range(shown)), value=0),
            Slider("eps", "eps: errors tolerated", 0.05, 0.5, step=0.05, value=0.3),
            Choice("delta", "delta: unlucky draws", [0.01, 0.05, 0.2], value=0.05),
            Choice("m", "Holes m", [1, 2, 3], value=1),
        ],
        compute=compute,
        panels=[
            Panel(
                "{fraction:.0%} of the nodes kept, {holes:d} hole(s)",
                x=Axis("place in the code", (-0.08, 1.08)),
                y=Axis("depth", (-0.5, max(p[1].max() for p in places) + 0.7), reverse=True),
                draws=[
                    Line("edge_x", "edge_y", color="grey", width=1.0),
                    Points("gone_x", "gone_y", label="in a hole", color="grey", symbol="cross"),
                    Points("hole_x", "hole_y", label="hole", text="hole_name",
                           color="vermillion", symbol="ring", size=13),
                    Points("kept_x", "kept_y", label="kept (tint: its cost)", text="kept_name",
                           value="kept_cost", scale=COSTS, size=11),
                ],
                weight=1.3,
            ),
            Panel(
                "Threshold {threshold}: {mean_kept:.0%} of all nodes kept",
                x=Axis("threshold τ", (0, 1)), y=Axis("share of programs / nodes", (0, 1)),
                draws=[
                    Line("taus", "error", label="sets that miss", color="vermillion"),
                    Line("taus", "share", label="nodes kept", color="blue"),
                    HLine("allowed", "errors allowed"),
                    VLine("tau", "chosen τ"),
                ],
            ),
        ],
        readouts=[
            Readout("errors_allowed", "Errors allowed in calibration"),
            Readout("threshold", "Threshold τ"),
            Readout("mean_kept", "Nodes kept, mean over calibration", ".1%"),
            Readout("inside", "Is the true program in this set?"),
            Readout("truth", "True program"),
        ],
        passages=[
            Passage("The partial program, tinted by cost in nats", "tokens", "shade", scale=COSTS)
        ],
        grid={"program": list(range(min(shown, 5))), "eps": [0.1, 0.2, 0.3, 0.4],
              "delta": [0.05, 0.2], "m": [1, 2, 3]},
        call="calibration.figures_pac.explore_code_sets(trees, costs, targets, {state})",
    ).set(**state)  # fmt: skip


def tinted(tree: Tree, costs: NDArray, holes: ArrayLike) -> tuple[NDArray, NDArray]:
    """The text in pieces of one node each, with the node's cost; holes as a sign without cost."""
    hole = np.zeros(len(tree.source), int)
    for number, v in enumerate(np.asarray(holes, int), 1):
        hole[slice(*tree.spans[v])] = number
    pieces, shade, before = [], [], None
    for letter, owner, inside in zip(tree.source, tree.owner, hole, strict=True):
        key = (int(inside), 0 if inside else int(owner))
        if inside and key != before:
            pieces.append(HOLE)
            shade.append(np.nan)
        elif not inside and key != before:
            pieces.append(letter)
            shade.append(costs[owner] if owner >= 0 else np.nan)
        elif not inside:
            pieces[-1] += letter
        before = key
    return np.array(pieces, dtype=object), np.array(shade)


def _places(tree: Tree) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Nodes at x (leaves evenly spread, parents above the middle) and depth, and the edges."""
    depth, x = np.zeros(len(tree), int), np.zeros(len(tree))
    for v in tree.order[1:]:
        depth[v] = depth[tree.parent[v]] + 1
    leaves = [v for v in tree.order if not tree.children[v]]
    x[leaves] = np.linspace(0, 1, len(leaves)) if len(leaves) > 1 else 0.5
    for v in tree.order[::-1]:
        if tree.children[v]:
            x[v] = x[list(tree.children[v])].mean()
    child = np.flatnonzero(tree.parent >= 0)
    up, gap = tree.parent[child], np.full(len(child), np.nan)
    edge_x = np.column_stack([x[up], x[child], gap]).ravel()
    edge_y = np.column_stack([depth[up], depth[child], gap]).ravel()
    return x, depth, edge_x, edge_y


def _short(tree: Tree, v: int, width: int = 12) -> str:
    """What is written beside a node: its text when short, else its kind."""
    text = tree.source[slice(*tree.spans[v])]
    return text if len(text) <= width else tree.labels[v].split("(")[0]
