"""Partial programs of a small transformer that completes `return` expressions."""

from __future__ import annotations

import ast
import io
import math
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from workbench import lab
from workbench.calibration.code_trees import Mask, Tree
from workbench.calibration.pac_code_sets import (
    TAUS,
    aligned,
    binom_k,
    calibrate,
    greedy_holes,
    nested_holes,
    optimal_holes,
)

CONTEXT, LENGTH = 32, 20  # tokens before the expression, and of the expression with its end
SLOTS = 16  # names of the context that the vocabulary lacks; the last one means any rare token
EPS, DELTA = (0.1, 0.2, 0.3), 0.05
END = "\n"
BETWEEN = "\0"  # programs in one text: a string token may hold newlines
_SKIP = {
    tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.NL, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip

Example = tuple[list[str], list[str]]  # tokens before the expression, tokens of the expression


def return_expressions(functions: int | None = None, nodes: int = 4) -> list[Example]:
    """One-line `return` expressions of the standard library with their contexts.

    Args:
        functions: look at this many functions only, spread evenly over the library.
        nodes: leave out expressions with fewer syntax nodes (`None`, `self.x` and the like).
    """
    found, every = [], lab.data.stdlib_functions()
    if functions is not None:
        every = every[:: max(1, len(every) // functions)]
    for function in every:
        source = function.source
        if "return " not in source or len(source) > 3000 or not source.isascii():
            continue
        if function.module.startswith("encodings"):  # a hundred copies of the same four functions
            continue
        wanted = {
            (node.lineno, node.col_offset)
            for node in ast.walk(function.tree)
            if isinstance(node, ast.Return)
            and node.lineno == node.end_lineno
            and sum(isinstance(n, (ast.expr, ast.keyword)) for n in ast.walk(node)) >= nodes
        }
        if not wanted:
            continue
        tokens = [
            (token.start, END if token.type == tokenize.NEWLINE else token.string)
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type not in _SKIP
        ]
        words = [word for _, word in tokens]
        for i, (start, _) in enumerate(tokens):
            if start in wanted:
                stop = words.index(END, i)
                if stop - i <= LENGTH - 1:
                    found.append((words[max(0, i + 1 - CONTEXT) : i + 1], words[i + 1 : stop]))
    return found


@dataclass(frozen=True)
class Vocabulary:
    """The commonest tokens; other names of a context are numbered in order of appearance."""

    words: tuple[str, ...]
    rare: int  # different training tokens that are not among them

    @classmethod
    def of(cls, examples: Sequence[Example], size: int) -> Vocabulary:
        """The `size` commonest tokens of contexts and expressions."""
        counts = Counter(word for context, words in examples for word in context + words)
        counts.pop(END, None)
        kept = [word for word, _ in counts.most_common(size)]
        slots = [f"<{i}>" for i in range(SLOTS)]
        return cls(("<pad>", END, *slots, *kept), max(1, len(counts) - size))

    def encode(self, example: Example) -> tuple[NDArray, list[str]]:
        """Indices of context (padded on the left) and expression, and the names in the slots.

        A name can be copied once it has stood there: in the expression its first appearance counts
        as rare.
        """
        index = {word: i for i, word in enumerate(self.words)}
        context, words = example
        names: list[str] = []
        row = np.zeros(CONTEXT + LENGTH, int)
        for place, word in enumerate([*context, *words, END], CONTEXT - len(context)):
            if word not in index:
                slot = names.index(word) if word in names else SLOTS - 1
                if word not in names and len(names) < SLOTS - 1:
                    names.append(word)
                    slot = len(names) - 1 if place < CONTEXT else SLOTS - 1
                row[place] = 2 + slot
            else:
                row[place] = index[word]
        return row, names


def sequence_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token; tokens of the context count 0.3."""
    target = rows[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none")
    weight = torch.full_like(target, 0.3, dtype=loss.dtype)
    weight[:, CONTEXT - 1 :] = 1.0
    weight = weight * (target > 0)
    return (loss.view_as(weight) * weight).sum() / weight.sum()


@torch.no_grad()
def complete(
    model: Any, rows: torch.Tensor, given: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy completion after the `given` first tokens of each expression.

    A rare token stands for any of `vocabulary.rare` ones, which share its probability; slots that
    no name has taken cannot be chosen.

    Returns:
        (n, LENGTH) tokens, and their negative log-likelihoods (0 where given).
    """
    rows = rows.clone()
    places = torch.arange(LENGTH, device=rows.device)
    rows[:, CONTEXT:] *= places < given[:, None]
    nll = torch.zeros(len(rows), LENGTH, device=rows.device)
    taken = torch.zeros(len(rows), SLOTS - 1, dtype=torch.bool, device=rows.device)
    for slot in range(SLOTS - 1):
        taken[:, slot] = (rows == 2 + slot).any(1)
    for t in range(LENGTH):
        logits = model.head(model.features(rows[:, : CONTEXT + t])[:, -1])
        logits[:, 0] = -torch.inf
        logits[:, 2 : 1 + SLOTS] = logits[:, 2 : 1 + SLOTS].masked_fill(~taken, -torch.inf)
        logp = logits.log_softmax(1)
        logp[:, 1 + SLOTS] -= math.log(vocabulary.rare)
        best, token = logp.max(1)
        ours = t >= given
        rows[ours, CONTEXT + t] = token[ours]
        nll[ours, t] = -best[ours]
    return rows[:, CONTEXT:], nll


def completions(
    seed: int,
    *,
    programs: int = 1500,
    steps: int = 1000,
    vocabulary: int = 1200,
    d: int = 64,
    layers: int = 2,
    reveal: float = 0.5,
    functions: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a transformer on `return` expressions and complete held-out ones, half of them given.

    Returns:
        `predictions`, `targets`, `given`: texts, joined by BETWEEN, where the prediction is Python;
        `starts`, `nll`, `counts`: offsets and costs of their tokens, end to end, and how many
        tokens each has (its end among them); `parsed`, `exact`: shares; `loss`: of the training.
    """
    examples = return_expressions(functions)
    order = np.random.default_rng(seed).permutation(len(examples))
    held = [examples[i] for i in order[:programs]]
    rest = [examples[i] for i in order[programs:]]
    words = Vocabulary.of(rest, vocabulary)
    rows = torch.from_numpy(np.stack([words.encode(example)[0] for example in rest]))
    with lab.seeded(seed):
        model = lab.models.GPT(len(words.words), d, layers, ctx=CONTEXT + LENGTH)
    history = lab.train.fit(
        model, sequence_loss, (rows, rows), steps=steps, batch_size=32, lr=3e-3, clip=1.0,
        schedule="cosine", warmup=20, weight_decay=0.01, seed=seed, device=device,
        every=max(1, steps // 10),
    )  # fmt: skip
    coded = [words.encode(example) for example in held]
    given = np.array([min(math.ceil(reveal * len(e)), len(e) - 1) for _, e in held])
    start = torch.from_numpy(np.stack([row for row, _ in coded])).to(device)
    tokens, nll = complete(model, start, torch.from_numpy(given).to(device), words)

    texts: dict[str, list[str]] = {"predictions": [], "targets": [], "given": []}
    starts, costs, counts, exact = [], [], [], 0
    for (_, names), (_, words_true), row, cost, known in zip(
        coded, held, tokens.tolist(), nll.double().cpu().numpy(), given, strict=True
    ):
        stop = row.index(1) if 1 in row else LENGTH - 1
        spoken = words_true[:known] + [_word(words, names, i) for i in row[known:stop]]
        text, target = " ".join(spoken), " ".join(words_true)
        try:
            tree = Tree.from_ast(text)
        except ValueError:
            continue
        ends = np.cumsum([len(word) + 1 for word in spoken])
        starts.append(np.concatenate([[0], ends[:-1], [len(text)]]))
        costs.append(cost[: stop + 1])
        counts.append(stop + 1)
        exact += bool(aligned(tree, target).all())
        for key, value in zip(texts, (text, target, " ".join(words_true[:known])), strict=True):
            texts[key].append(value)
    return {key: BETWEEN.join(lines) for key, lines in texts.items()} | {
        "starts": np.concatenate(starts), "nll": np.concatenate(costs), "counts": np.array(counts),
        "parsed": len(counts) / programs, "exact": exact / max(1, len(counts)),
        "loss": float(history.frame["loss"].iloc[-1]),
    }  # fmt: skip


def _word(words: Vocabulary, names: list[str], index: int) -> str:
    slot = index - 2
    if 0 <= slot < SLOTS:
        return names[slot] if slot < min(len(names), SLOTS - 1) else "unknown"
    return words.words[index]


def priced_trees(
    predictions: str, starts: NDArray, nll: NDArray, counts: NDArray
) -> list[tuple[Tree, NDArray]]:
    """The predicted trees with their node costs, out of what `completions` returns."""
    ends = np.cumsum(counts)
    parts = zip(np.split(starts, ends[:-1]), np.split(nll, ends[:-1]), strict=True)
    trees = [Tree.from_ast(text) for text in predictions.split(BETWEEN)]
    return [(tree, tree.costs(*part)) for tree, part in zip(trees, parts, strict=True)]


def threshold_holes(tree: Tree, costs: NDArray, taus: NDArray, m: int | None) -> Mask:
    """Baseline: a hole at every node that alone costs more than -log(tau).

    While there are more than `m` holes (None: any number), those below the lowest common ancestor
    with the smallest subtree become one.
    """
    rows = []
    for budget in -np.log(taus):
        kept = ~tree.below[costs > budget].any(0)
        while m is not None:
            hole = ~kept & ((tree.parent < 0) | kept[tree.parent])
            if hole.sum() <= m:
                break
            joins = kept & (tree.below @ hole.astype(int) >= 2)
            kept &= ~tree.below[np.where(joins, tree.size, len(tree) + 1).argmin()]
        rows.append(kept)
    return np.array(rows)


def released_reading(tree: Tree, costs: NDArray | None = None) -> tuple[Tree, NDArray]:
    """Labels and costs as the released code has them.

    It gives a node the text before and between its children, and text behind the last child only
    if there was some before. The name in `x.name` and the brackets of `x()` stand behind the only
    child: they have no cost, and two programs that differ only there count as equal.
    """
    silent = np.array([label.startswith("Attribute(") or
                       (label.startswith("Call(") and len(tree.children[v]) == 1)
                       for v, label in enumerate(tree.labels)])  # fmt: skip
    labels = tuple("" if s else label for s, label in zip(silent, tree.labels, strict=True))
    priced = np.zeros(len(tree)) if costs is None else np.where(silent, 0.0, costs)
    return replace(tree, labels=labels), priced


def methods(tree: Tree, costs: NDArray, holes: Sequence[int] = (1, 2, 3)) -> dict[str, Mask]:
    """Masks (t, n) over TAUS of every method compared."""
    budgets = -np.log(TAUS)
    found = {
        "all": np.repeat((costs.sum() <= budgets)[:, None], len(tree), 1),
        "node_free": threshold_holes(tree, costs, TAUS, None),
    }
    for m in holes:
        found |= {
            f"optimal{m}": nested_holes(tree, costs, TAUS, m),
            f"separate{m}": optimal_holes(tree, costs, budgets, m),
            f"greedy{m}": greedy_holes(tree, costs, budgets, m),
            f"node{m}": threshold_holes(tree, costs, TAUS, m),
        }
    return found


def resplit_study(
    seed: int,
    *,
    predictions: str,
    targets: str,
    starts: NDArray,
    nll: NDArray,
    counts: NDArray,
    parts: int = 5,
    pairs: int = 200,
    draws: int = 200,
) -> dict[str, float]:
    """Calibrate on random draws from one part of the programs and look at the true error.

    The part (`seed` modulo `parts`) is the population: each draw takes `pairs` programs with
    replacement, so the error of the calibrated threshold over the population is known exactly and
    the theorem's assumption (independent draws) holds to the letter.

    Returns:
        For each method of `methods`: `violation_{method}` and `kept_{method}`, the share of draws
        whose error exceeds eps and the mean share of nodes kept, both averaged over EPS, and the
        same for each eps as `..._{eps}`; `naive_separate3`, the violations when the smallest
        threshold that passes is taken although sets are not nested; `unnested`, the share of
        programs for which they are not; `violation_released` when costs and errors are counted as
        in `released_reading`; `nodes`, the mean size of a tree.
    """
    mine = np.arange(len(counts)) % parts == seed % parts
    trees = [t for t, keep in zip(priced_trees(predictions, starts, nll, counts), mine, strict=True)
             if keep]  # fmt: skip
    truth = [t for t, keep in zip(targets.split(BETWEEN), mine, strict=True) if keep]
    wrong: dict[str, list[NDArray]] = {}
    kept: dict[str, list[NDArray]] = {}
    unnested, lenient = 0, []
    for (tree, costs), target in zip(trees, truth, strict=True):
        right = aligned(tree, target)
        for name, masks in methods(tree, costs).items():
            wrong.setdefault(name, []).append((masks & ~right).any(1))
            kept.setdefault(name, []).append(masks.mean(1))
            unnested += name == "separate3" and bool((masks[1:] > masks[:-1]).any())
        masks = nested_holes(*(read := released_reading(tree, costs)), TAUS, 3)
        goal, _ = released_reading(Tree.from_ast(target))
        wrong.setdefault("released", []).append((masks & ~right).any(1))
        kept.setdefault("released", []).append(masks.mean(1))
        lenient.append((masks & ~aligned(read[0], goal)).any(1))
    rows = np.random.default_rng(seed).integers(len(trees), size=(draws, pairs))
    found = {"nodes": float(np.mean([len(t) for t, _ in trees])), "unnested": unnested / len(trees)}
    for name in wrong:
        errors, shares = np.array(wrong[name]), np.mean(kept[name], 0)
        seen = np.array(lenient) if name == "released" else errors
        for eps in EPS:
            taus = [calibrate(seen[draw], TAUS, eps, DELTA) for draw in rows]
            risk, share = _outcome(errors, shares, taus)
            found[f"violation_{name}_{eps}"] = float((risk > eps + 1e-12).mean())
            found[f"kept_{name}_{eps}"] = float(share.mean())
        for key in ("violation", "kept"):
            found[f"{key}_{name}"] = float(np.mean([found[f"{key}_{name}_{eps}"] for eps in EPS]))
    errors, naive = np.array(wrong["separate3"]), []
    for eps in EPS:
        k = binom_k(pairs, eps, DELTA)
        passes = errors[rows].sum(1) <= (-1 if k is None else k)
        taus = [TAUS[row.argmax()] if row.any() else None for row in passes]
        risk, _ = _outcome(errors, shares, taus)
        naive.append((risk > eps + 1e-12).mean())
    return found | {"naive_separate3": float(np.mean(naive))}


def _outcome(
    errors: Mask, shares: NDArray, taus: Sequence[float | None]
) -> tuple[NDArray, NDArray]:
    """Population error and kept share at each threshold; None is the hole at the root."""
    risk, share = np.append(errors.mean(0), 0.0), np.append(shares, 0.0)
    at = [len(TAUS) if tau is None else int(np.searchsorted(TAUS, tau)) for tau in taus]
    return risk[at], share[at]
