r"""PAC prediction sets of programs, written as one program with holes.

A prediction set of a code model is a *partial program*: the predicted syntax tree with some
subtrees replaced by holes; its set is every program that fills the holes. With :math:`\ell_v \ge 0`
the cost of node v (negative log-likelihood of its own tokens) and a threshold :math:`\tau`, keep

.. math::
    \max_{\alpha \in \{0,1\}^V} \sum_v \alpha_v
    \quad\text{s.t.}\quad \sum_v \alpha_v \ell_v \le -\log\tau,\quad
    \alpha_v \le \alpha_{parent(v)},\quad
    \#\{v : \alpha_v = 0,\ \alpha_{parent(v)} = 1\} \le m,

(a removed root is one hole) and nested over thresholds: :math:`\alpha^{\tau'} \le \alpha^{\tau}`
for :math:`\tau' > \tau`. On n held-out pairs let :math:`\hat k` be the largest k with
:math:`P(\mathrm{Bin}(n,\epsilon) \le k) \le \delta`. The least conservative :math:`\hat\tau` with
at most :math:`\hat k` errors misses the true program with probability at most :math:`\epsilon`,
except on a fraction :math:`\delta` of calibration draws.

Reference: Khakhar, Mell, Bastani: PAC Prediction Sets for Large Language Models of Code (2023),
arXiv 2302.08703, Section 3 and Algorithm 1.

How it is solved here: the paper hands the integer program to a solver. The number of removed nodes
is a small integer, so one pass over the tree in preorder is exact (`optimal_holes`); the joint
program over thresholds is a heaviest chain of hole sets ordered by inclusion (`nested_holes`).

*Not included*: the SQL grammar of the paper's second data set (any tree can be given as a parent
array, `Tree.from_parents`), because only Python's own parser comes with Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from workbench.calibration.code_trees import Mask, Tree
from workbench.lab import checks

TAUS = np.linspace(1e-5, 1 - 1e-5, 100)  # the paper's grid
_SLACK = 1e-9  # a sum of costs may exceed its budget by rounding


@dataclass(frozen=True)
class PartialProgram:
    """A predicted tree with the mask of its kept nodes: a set of programs.

    Args:
        tree: the prediction, (n nodes).
        kept: (n,) bool; a removed node's subtree must be removed too.
    """

    tree: Tree
    kept: Mask = field(repr=False)

    def __post_init__(self) -> None:
        kept = np.asarray(self.kept)
        if kept.shape != (len(self.tree),) or kept.dtype != bool:
            raise ValueError(f"kept: expected {len(self.tree)} booleans, got {kept.shape}")
        orphan = kept & (self.tree.parent >= 0) & ~kept[self.tree.parent]
        if orphan.any():
            raise ValueError(f"kept: node {int(orphan.argmax())} is kept but its parent is not")
        object.__setattr__(self, "kept", kept)

    @property
    def holes(self) -> NDArray[np.int64]:
        """Nodes where a hole stands: removed, with a kept parent (or the removed root)."""
        parent = self.tree.parent
        return np.flatnonzero(~self.kept & ((parent < 0) | self.kept[parent]))

    @property
    def fraction(self) -> float:
        """Share of the prediction's nodes that is kept."""
        return float(self.kept.mean())

    def contains(self, target: Tree | str) -> bool:
        """Whether filling the holes can give the target."""
        return contains(self, target)

    def render(self, hole: str = "??") -> str:
        """The program's text with every hole replaced by a sign."""
        return self.tree.render(self.holes, hole)


def binom_k(n: int, eps: float, delta: float) -> int | None:
    """Errors allowed among n held-out pairs: max{k : P(Bin(n, eps) <= k) <= delta}.

    Returns:
        The largest such k, or None when even k = 0 is too likely (n is too small).
    """
    n = checks.count(n, "n")
    eps = checks.fraction(eps, "eps", zero=False, one=False)
    delta = checks.fraction(delta, "delta", zero=False, one=False)
    allowed = np.flatnonzero(stats.binom.cdf(np.arange(n + 1), n, eps) <= delta)
    return int(allowed[-1]) if len(allowed) else None


def optimal_holes(tree: Tree | ArrayLike, costs: ArrayLike, budget: ArrayLike, m: int) -> Mask:
    """Exact solution of the program for one threshold, or for several apart from each other.

    In preorder each node i is either kept (go on at i + 1) or made a hole (go on behind its
    subtree). F[i, h, r], the largest cost that at most h holes can remove from nodes i.. when they
    remove exactly r nodes, follows from two later entries; the answer is the smallest r with
    F[0, m, r] >= total - budget. O(n^2 m) numbers for all budgets, exact for real costs.

    Args:
        tree: a `Tree`, or an (n,) array of parents (-1 for the root).
        costs: (n,) cost of each node in nats, not negative.
        budget: largest cost that may be kept, -log(tau): a number, or (t,) of them.
        m: largest number of holes.

    Returns:
        (n,) or (t, n) bool, True where a node is kept; among optima one that keeps the least cost.
        Rows need not be nested, see `nested_holes`.
    """
    tree, costs, m = _problem(tree, costs, m)
    budget = _budgets(budget)
    kept = _solve(tree, costs, np.atleast_1d(budget), m, np.ones(len(tree), bool))
    return kept if budget.ndim else kept[0]


def nested_holes(
    tree: Tree | ArrayLike,
    costs: ArrayLike,
    taus: ArrayLike = TAUS,
    m: int = 1,
    *,
    max_sets: int = 2000,
) -> Mask:
    """The joint program: hole sets for a grid of thresholds, nested, keeping most nodes in total.

    It never pays to remove more before one must, so a solution is a chain of hole sets
    S_1 < S_2 < ..., each used for as many thresholds as its kept cost allows. W(S), the most nodes
    kept up to the last threshold that S serves, is max over S' < S of W(S') + kept(S) (e(S) -
    e(S')), with e(S) the number of thresholds S can serve: a heaviest path, exact.

    Args:
        tree, costs, m: as for `optimal_holes`.
        taus: (t,) thresholds in (0, 1], rising.
        max_sets: when the tree has more hole sets than this, a restriction is solved instead:
            threshold by threshold from the lowest, each optimal given the holes before it.

    Returns:
        (t, n) bool, True where a node is kept; rows shrink as tau rises.
    """
    tree, costs, m = _problem(tree, costs, m)
    taus = _taus(taus)
    budgets = np.maximum(-np.log(taus), 0.0)
    removed = _hole_sets(tree, m, max_sets)
    if removed is None:
        return _one_by_one(tree, costs, budgets, m)
    return _heaviest_chain(tree, costs, budgets, removed)


def greedy_holes(
    tree: Tree | ArrayLike, costs: ArrayLike, budget: ArrayLike, m: int, *, rule: str = "leaf"
) -> Mask:
    """Holes chosen one after the other until the kept cost fits the budget.

    Args:
        tree, costs, budget, m: as for `optimal_holes`.
        rule: ``leaf`` is the paper's baseline as released: remove the costliest leaf of what is
            kept; when m holes are in use, remove instead the costliest node that has lost a child,
            with its subtree. ``ratio`` removes the subtree with the largest cost per removed node
            among those that leave at most m holes.

    Returns:
        (n,) or (t, n) bool, True where a node is kept. The order of removals does not depend on the
        budget, so rows are nested.
    """
    tree, costs, m = _problem(tree, costs, m)
    budget = _budgets(budget)
    rule = checks.one_of(rule, ("leaf", "ratio"), "rule")
    pick = _costliest_leaf if rule == "leaf" else _best_ratio
    path = [np.ones(len(tree), bool)]
    while path[-1].any() and costs[path[-1]].sum() > budget.min() + _SLACK:
        path.append(path[-1] & ~tree.below[pick(tree, costs, path[-1], m)])
    masks = np.array(path)
    fits = masks @ costs <= np.atleast_1d(budget)[:, None] + _SLACK  # (t, steps)
    kept = masks[fits.argmax(1)]
    return kept if budget.ndim else kept[0]


def contains(partial: PartialProgram, target: Tree | str) -> bool:
    """Whether the target program is in the set of a partial program (trees compared, not text)."""
    return not (partial.kept & ~aligned(partial.tree, target)).any()


def aligned(tree: Tree, target: Tree | str) -> Mask:
    """Nodes of a prediction that stand in the target too, at the same place, up to the root.

    Filling the holes can give the target exactly when every kept node is aligned; so one call
    serves all thresholds: ``errors = (masks & ~aligned(tree, target)).any(1)``.

    Returns:
        (n,) bool.
    """
    target = Tree.from_ast(target) if isinstance(target, str) else target
    mate = np.full(len(tree), -1)  # the target's node at the same place
    for v in tree.order:
        up = tree.parent[v]
        if up < 0:
            twin = target.order[0]
        else:
            twin = -1 if mate[up] < 0 else target.children[mate[up]][tree.rank[v]]
        if twin >= 0 and tree.labels[v] == target.labels[twin]:
            same = len(tree.children[v]) == len(target.children[twin])
            mate[v] = twin if same else -1
    return mate >= 0


def calibrate(errors: ArrayLike, taus: ArrayLike, eps: float, delta: float) -> float | None:
    """The least conservative threshold that calibration data support (Algorithm 1).

    Thresholds are tried from the most conservative (largest) down, until one has more than
    `binom_k` errors. For nested sets, whose errors fall as tau rises, that is the smallest tau
    with few enough errors. For sets that are not nested it is a sequential test that stays valid,
    whereas "the smallest tau that happens to pass" is not.

    Args:
        errors: (n, t) bool, whether the set of pair i at threshold j misses its target.
        taus: (t,) thresholds, rising.
        eps: error that may be exceeded only with probability delta.
        delta: share of calibration draws that may go wrong.

    Returns:
        tau, or None when no threshold passes: then only the hole at the root is safe.
    """
    errors = checks.as_array(errors, "errors", ndim=2)
    taus = _taus(taus)
    if errors.shape[1] != len(taus):
        raise ValueError(
            f"errors: expected a column for each of {len(taus)} taus, got {errors.shape[1]}"
        )
    k = binom_k(len(errors), eps, delta)
    if k is None:
        return None
    fails = np.asarray(checks.to_numpy(errors), bool).sum(0) > k
    first = int(np.flatnonzero(fails)[-1]) + 1 if fails.any() else 0
    return float(taus[first]) if first < len(taus) else None


def _problem(tree: Tree | ArrayLike, costs: ArrayLike, m: int) -> tuple[Tree, NDArray, int]:
    tree = tree if isinstance(tree, Tree) else Tree.from_parents(tree)
    costs = np.asarray(checks.to_numpy(checks.as_floats(costs, "costs", ndim=1)), float)
    if len(costs) != len(tree):
        raise ValueError(f"costs: expected one for each of {len(tree)} nodes, got {len(costs)}")
    if (costs < 0).any():
        raise ValueError(f"costs: node {int((costs < 0).argmax())} is negative; expected >= 0")
    return tree, costs, checks.count(m, "m")


def _budgets(budget: ArrayLike) -> NDArray:
    budget = np.asarray(checks.to_numpy(checks.as_floats(budget, "budget", ndim=(0, 1))), float)
    if budget.min() < 0:
        raise ValueError(f"budget: expected numbers >= 0, got {budget.min():g}")
    return budget


def _taus(taus: ArrayLike) -> NDArray:
    taus = np.asarray(checks.to_numpy(checks.as_floats(taus, "taus", ndim=1)), float)
    if taus[0] <= 0 or taus[-1] > 1 or (np.diff(taus) <= 0).any():
        raise ValueError("taus: expected rising thresholds in (0, 1]")
    return taus


def _solve(tree: Tree, costs: NDArray, budgets: NDArray, m: int, free: Mask) -> Mask:
    """`optimal_holes` where nodes that are not free must be removed, (t, n)."""
    n, order, size = len(tree), tree.order, tree.size
    subtree = tree.below @ costs
    best = np.full((n + 1, m + 1, n + 1), -np.inf)
    best[n, :, 0] = 0.0
    for i in range(n - 1, -1, -1):
        v = order[i]
        if free[v]:
            best[i] = best[i + 1]
        jump = best[i + size[v], :-1, : n + 1 - size[v]] + subtree[v]
        np.maximum(best[i, 1:, size[v] :], jump, out=best[i, 1:, size[v] :])
    fewest = (best[0, m] >= costs.sum() - budgets[:, None] - _SLACK).argmax(1)
    removals, which = np.unique(fewest, return_inverse=True)
    kept = np.ones((len(removals), n), bool)
    for row, r in zip(kept, removals, strict=True):
        i, h = 0, m
        while i < n:
            v = order[i]
            if free[v] and best[i, h, r] == best[i + 1, h, r]:
                i += 1
            else:
                row[tree.below[v]] = False
                i, h, r = i + size[v], h - 1, r - size[v]
    return kept[which]


def _one_by_one(tree: Tree, costs: NDArray, budgets: NDArray, m: int) -> Mask:
    kept, rows = np.ones(len(tree), bool), []
    for budget in budgets:
        if costs[kept].sum() > budget + _SLACK:
            kept = _solve(tree, costs, np.array([budget]), m, kept)[0]
        rows.append(kept)
    return np.array(rows)


def _hole_sets(tree: Tree, m: int, limit: int) -> Mask | None:
    """All sets that at most m holes can remove, (sets, n) bool; None above the limit."""
    n = len(tree)
    end = np.arange(n) + tree.size[tree.order]  # preorder position behind each subtree
    layer, after = np.zeros((1, n), bool), np.zeros(1, int)
    layers, total = [layer], 1
    for _ in range(m):
        grown = n - after  # next holes start behind the last subtree: each set is met once
        total += int(grown.sum())
        if total > limit:
            return None
        base = np.repeat(np.arange(len(layer)), grown)
        start = np.concatenate([np.arange(a, n) for a in after]) if len(after) else base
        layer, after = layer[base] | tree.below[tree.order[start]], end[start]
        layers.append(layer)
    return np.concatenate(layers)


def _heaviest_chain(tree: Tree, costs: NDArray, budgets: NDArray, removed: Mask) -> Mask:
    left = costs.sum() - removed @ costs
    serves = (left[:, None] <= budgets + _SLACK).sum(1)
    serves[removed.all(1)] = len(budgets)
    removed, serves = removed[serves > 0], serves[serves > 0]
    rank = np.lexsort((serves, removed.sum(1)))
    removed, serves = removed[rank], serves[rank]
    kept = len(tree) - removed.sum(1)
    bits = np.packbits(removed, axis=1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
    weight, before = np.zeros(len(kept), int), np.full(len(kept), -1)
    for s in range(len(kept)):
        inside = ~(bits[:s] & ~bits[s]).any(1) & (serves[:s] < serves[s])
        gain = np.where(inside, weight[:s] - kept[s] * serves[:s], 0)
        weight[s] = kept[s] * serves[s]
        if inside.any():  # every gain is positive: the set inside keeps more nodes
            before[s] = int(gain.argmax())
            weight[s] += gain[before[s]]
    full = np.flatnonzero(serves == len(budgets))
    s, rows = int(full[weight[full].argmax()]), np.empty((len(budgets), len(tree)), bool)
    while s >= 0:
        rows[: serves[s]] = ~removed[s]
        s = int(before[s])
    return rows


def _holes_after(tree: Tree, kept: Mask) -> NDArray[np.int64]:
    """Number of holes if each kept node were removed too."""
    parent = tree.parent
    hole = ~kept & ((parent < 0) | kept[parent])
    return hole.sum() + 1 - tree.below @ hole.astype(int)


def _costliest_leaf(tree: Tree, costs: NDArray, kept: Mask, m: int) -> int:
    kept_children = np.bincount(tree.parent[kept & (tree.parent >= 0)], minlength=len(tree))
    lost = np.array([len(c) for c in tree.children]) > kept_children
    hole = ~kept & ((tree.parent < 0) | kept[tree.parent])
    choice = kept & (kept_children == 0) if hole.sum() < m else kept & lost
    return int(np.where(choice, costs, -np.inf).argmax())


def _best_ratio(tree: Tree, costs: NDArray, kept: Mask, m: int) -> int:
    gone = tree.below @ kept.astype(int)
    ratio = (tree.below @ (costs * kept)) / np.maximum(gone, 1)
    return int(np.where(kept & (_holes_after(tree, kept) <= m), ratio, -np.inf).argmax())
