"""A page of text and free computation: which recipe has the lowest limit?

`fixed_data` trains every recipe of a grid (size x epochs x weight decay x members) on one slice of
text; `judge` chooses each recipe on the *other* slices and fits its asymptotes on this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.scaling_laws.experiments.infinite_compute_members import (
    Shape,
    State,
    log_probs,
    train,
    unstack,
)
from workbench.scaling_laws.experiments.tiny_lm_grid import split_text
from workbench.scaling_laws.infinite_compute import (
    PowerLaw,
    data_efficiency,
    distill_sequences,
    ensemble_losses,
    joint_asymptote,
    power_asymptote,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

DEFAULT_DECAY = 0.1  # of the standard recipe
RATE = 0.38  # learning rate times width
BASE = 1  # position of the size whose ensembles are scaled, the second smallest as in the paper
DATA_EXPONENTS = (0.05, 2.0)
SLICES = 7000  # slices of lower numbers served to choose sizes and grids


def alphabet(raw: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Bytes as 96 symbols: printable ASCII, the new line, and a blank for all others."""
    table = torch.zeros(256, dtype=torch.long)
    table[32:127] = torch.arange(95)
    table[10] = 95
    return table[raw.long()]


def windows(text: Int[Tensor, " n"], count: int, length: int, seed: int) -> Tensor:
    """Sequences from anywhere in the text; the first ones are the same for a larger count."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return alphabet(text[torch.from_numpy(starts)[:, None] + torch.arange(length)])


def material(seed: int, tokens: int, held_out: int, ctx: int, device: str) -> tuple[Tensor, Tensor]:
    """A slice to train on, (tokens / ctx, ctx + 1), and held-out windows of that seed."""
    train_text, test_text = _texts()
    own = windows(train_text, tokens // ctx, ctx + 1, SLICES + seed)
    test = windows(test_text, held_out, ctx + 1, 10 * SLICES + seed)
    return own.to(device), test.to(device)


@functools.cache
def _texts() -> tuple[Tensor, Tensor]:
    return split_text()


def fixed_data(
    seed: int,
    *,
    tokens: int = 1536,
    widths: Sequence[int] = (4, 8, 14, 24),
    budgets: Sequence[int] = (8, 16, 32, 64),
    decays: Sequence[float] = (0.1, 1.0, 3.0, 10.0),
    members: int = 4,
    held_out: int = 128,
    device: str = "cpu",
) -> dict[str, Any]:
    """Losses of every recipe on one slice: ``losses`` (sizes, epochs, decays, members).

    The entry for k members is the mean over all ensembles of k of the members trained. ``N``,
    ``epochs`` and ``decays`` are the other axes.
    """
    losses = np.empty((len(widths), len(budgets), len(decays), members))
    shapes = [Shape(d) for d in widths]
    own, test = material(seed, tokens, held_out, shapes[0].ctx, device)
    everyone = [w for w in decays for _ in range(members)]
    seeds = [1000 * seed + k for k in range(members)] * len(decays)
    for i, shape in enumerate(shapes):
        data = own.expand(len(everyone), -1, -1)
        rate = RATE / shape.d
        ends = train(shape, data, seeds=seeds, budgets=budgets, decay=everyone, lr=rate)
        for j, state in enumerate(ends):
            said, labels = log_probs(shape, state, test)
            for w, group in enumerate(said.split(members)):
                losses[i, j, w] = ensemble_losses(group, labels).cpu().numpy()
    return {
        "losses": losses,
        "N": np.array([shape.N for shape in shapes]),
        "epochs": np.array(budgets),
        "decays": np.array(decays),
    }


def more_data(
    seed: int,
    *,
    budgets: dict[int, Sequence[int]],
    widths: Sequence[int] = (14, 24),
    held_out: int = 128,
    device: str = "cpu",
) -> dict[str, Any]:
    """The standard recipe on slices of other lengths: ``standard`` (lengths, sizes, epochs)."""
    out = []
    for tokens, epochs in budgets.items():
        rows = []
        for d in widths:
            shape = Shape(d)
            own, test = material(seed, tokens, held_out, shape.ctx, device)
            ends = train(
                shape, own[None], seeds=[1000 * seed], budgets=epochs,
                decay=[DEFAULT_DECAY], lr=RATE / d,
            )  # fmt: skip
            rows.append([float(ensemble_losses(*log_probs(shape, e, test))[0]) for e in ends])
        out.append(rows)
    return {"standard": np.array(out), "tokens": np.array(list(budgets))}


def distill(
    seed: int,
    *,
    teacher: tuple[int, float],
    alone: tuple[int, float],
    tokens: int = 1536,
    width: int = 8,
    members: int = 4,
    written: int = 384,
    share: float = 0.75,
    budgets: Sequence[int] = (8, 16),
    decays: Sequence[float] = (0.1, 1.0),
    held_out: int = 128,
    device: str = "cpu",
) -> dict[str, Any]:
    """One model taught by an ensemble of its own size, and one taught by a single such model.

    Args:
        seed: of the slice, as in `fixed_data`.
        teacher: epochs and weight decay of the ensemble's members.
        alone: of the single teacher.
        tokens: of the slice.
        width: of members and students.
        members: of the teaching ensemble.
        written: sequences that a teacher writes; each begins with a symbol of the slice.
        share: of these in each batch of a student.
        budgets: students' epochs over the real text.
        decays: students' weight decays.
        held_out: windows.
        device: to train on.

    Returns:
        Losses of the teachers, and ``by_ensemble`` and ``by_single`` (epochs, decays).
    """
    shape = Shape(width)
    own, test = material(seed, tokens, held_out, shape.ctx, device)

    def fit(recipe: tuple[int, float], count: int) -> State:
        return train(
            shape, own.expand(count, -1, -1), seeds=[1000 * seed + k for k in range(count)],
            budgets=[recipe[0]], decay=[recipe[1]] * count, lr=RATE / width,
        )[0]  # fmt: skip

    result: dict[str, Any] = {}
    generator = torch.Generator(device).manual_seed(seed)
    first = own[torch.arange(written, device=device) % len(own), :1]
    for name, state in (("ensemble", fit(teacher, members)), ("single", fit(alone, 1))):
        said, labels = log_probs(shape, state, test)
        result[name] = float(ensemble_losses(said, labels)[-1])
        taught = distill_sequences(
            unstack(shape, state), first, shape.ctx + 1, ctx=shape.ctx, generator=generator
        )
        ends = train(
            shape, own.expand(len(decays), -1, -1), seeds=[1000 * seed + 500] * len(decays),
            budgets=budgets, decay=decays, lr=RATE / width,
            drawn=taught.expand(len(decays), -1, -1), share=share,
        )  # fmt: skip
        table = []
        for end in ends:
            said, labels = log_probs(shape, end, test)
            table.append([float(ensemble_losses(one[None], labels)[0]) for one in said])
        result[f"by_{name}"] = np.array(table)
    return result


def example(seed: int, *, epochs: int = 32, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Four members' log probabilities on held-out text, and the symbols that came."""
    shape = Shape(8)
    own, test = material(seed, 1536, 64, shape.ctx, "cpu")
    ends = train(
        shape, own.expand(4, -1, -1), seeds=range(4), budgets=[epochs], decay=[decay] * 4,
        lr=RATE / shape.d,
    )  # fmt: skip
    return log_probs(shape, ends[0], test)


# --- recipes -------------------------------------------------------------------------------------


def others(table: np.ndarray) -> np.ndarray:
    """For each slice (first axis) the mean over the other slices (of one slice alone: itself)."""
    if len(table) == 1:
        return table
    return np.asarray((table.sum(0) - table) / (len(table) - 1))


def chosen(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the epochs and the decay (the last two axes) with the lowest score."""
    flat = score.reshape(*score.shape[:-2], -1).argmin(-1)
    epochs, decays = np.unravel_index(flat, score.shape[-2:])
    return np.asarray(epochs), np.asarray(decays)


def judge(frame: pd.DataFrame, wide: pd.DataFrame | None = None) -> pd.DataFrame:
    """Recipes chosen on the other slices, their losses and asymptotes on this one.

    Args:
        frame: of `fixed_data`, a row a slice; its first decay is the standard recipe's.
        wide: of `fixed_data` for larger sizes, which enter the regularised recipe alone.

    Returns:
        A row a slice. ``standard``: the best size and epochs at the default decay;
        ``standard_top`` and ``regularised_top``: losses of the largest size of ``frame``;
        ``regularised``, ``ensemble`` and ``joint``: asymptotes; ``three_small`` and ``one_large``:
        three members of one size, and the next size, three times as large, alone; ``single``: one
        of the members' size alone. By size: ``standard_N``, ``regularised_N`` (with the sizes
        ``sizes``, those of ``wide`` too), ``limit_N``; ``epochs_*`` and ``decay_*``. By members:
        ``curve_K``. ``alpha_N`` and ``alpha_K`` are exponents of the regularised and the ensemble
        fit.
    """
    losses = np.stack(frame["losses"].tolist())  # (slices, sizes, epochs, decays, members)
    sizes, budgets, decays = (np.asarray(frame[q].iloc[0]) for q in ("N", "epochs", "decays"))
    count = np.arange(1, losses.shape[-1] + 1.0)
    s, n = np.indices(losses.shape[:2])
    elsewhere = others(losses)

    single = others(losses[..., 0])
    e_std, _ = chosen(single[..., :1])
    standard_n = losses[s, n, e_std, 0, 0]
    best_size = single[s, n, e_std, 0].argmin(1)

    e_reg, w_reg = chosen(single)
    regularised_n = losses[s, n, e_reg, w_reg, 0]
    every_size, every_loss = sizes, regularised_n
    if wide is not None:
        more = np.stack(wide["losses"].tolist())[..., 0]
        e, w = chosen(others(more))
        every_size = np.append(sizes, wide["N"].iloc[0])
        larger = more[*np.indices(e.shape), e, w]
        every_loss = np.column_stack([regularised_n, larger])
    by_size = power_asymptote(every_size, every_loss)

    e_ens, w_ens = chosen(power_asymptote(count, elsewhere).E)
    curves = losses[s, n, e_ens, w_ens]
    joint = joint_asymptote(sizes, curves)
    by_count = joint.members

    rows = np.arange(len(losses))
    out = pd.DataFrame(
        {
            "seed": frame["seed"].to_numpy(),
            "standard": standard_n[rows, best_size],
            "standard_top": standard_n[:, -1],
            "regularised_top": regularised_n[:, -1],
            "regularised": by_size.E,
            "ensemble": by_count.E[:, BASE],
            "joint": joint.E,
            "three_small": curves[:, BASE, 2],
            "one_large": regularised_n[:, BASE + 1],
            "single": regularised_n[:, BASE],
            "alpha_N": by_size.alpha,
            "alpha_K": by_count.alpha[:, BASE],
        }
    )
    arrays = {
        "standard_N": standard_n,
        "regularised_N": every_loss,
        "sizes": np.tile(every_size, (len(losses), 1)),
        "limit_N": by_count.E,
        "curve_K": curves[:, BASE],
        "epochs_regularised": budgets[e_reg],
        "decay_regularised": decays[w_reg],
        "epochs_ensemble": budgets[e_ens],
        "decay_ensemble": decays[w_ens],
    }
    for name, values in arrays.items():
        out[name] = list(values)
    out.attrs = dict(frame.attrs)
    return out


def data_law(judged: pd.DataFrame, runs: pd.DataFrame, tokens: int) -> tuple[PowerLaw, np.ndarray]:
    """The standard recipe's loss against tokens, a law a slice, and the losses (slices, lengths).

    Args:
        judged: of `judge`, at ``tokens``.
        runs: of `more_data`, the same slices in the same order.
        tokens: length of the slices in ``judged``.
    """
    table = np.stack(runs["standard"].tolist())  # (slices, lengths, sizes, epochs)
    flat = table.reshape(*table.shape[:2], -1)
    best = others(flat).argmin(-1)
    elsewhere = np.take_along_axis(flat, best[..., None], -1)[..., 0]
    lengths = np.append(np.asarray(runs["tokens"].iloc[0], float), tokens)
    values = np.column_stack([elsewhere, judged["standard"].to_numpy()])
    order = lengths.argsort()
    law = power_asymptote(lengths[order], values[:, order], alpha=DATA_EXPONENTS)
    return law, values[:, order]


def efficiencies(judged: pd.DataFrame, law: PowerLaw, tokens: int) -> pd.DataFrame:
    """Each recipe's equivalent data over the data it had, a row a slice."""
    names = ("standard", "regularised", "ensemble", "joint")
    return pd.DataFrame({q: data_efficiency(judged[q].to_numpy(), tokens, law) for q in names})


def students(judged: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Students' losses, their epochs and decay chosen on the other slices.

    Returns:
        A row a slice: ``single`` (a regularised model of the same size, untaught), ``ensemble``
        (the teacher), ``taught``, ``self_taught``.
    """
    out = pd.DataFrame({"seed": runs["seed"], "single": judged["single"].to_numpy()})
    out["ensemble"] = runs["ensemble"]
    for name, column in (("taught", "by_ensemble"), ("self_taught", "by_single")):
        table = np.stack(runs[column].tolist())
        e, w = chosen(others(table))
        out[name] = table[np.arange(len(table)), e, w]
    out.attrs = dict(runs.attrs)
    return out


def most_common(pairs: pd.DataFrame, kind: str, size: int = BASE) -> tuple[int, float]:
    """Epochs and decay that `judge` chose most often for one size; kind as in its columns."""
    found = [
        (int(e[size]), float(w[size]))
        for e, w in zip(pairs[f"epochs_{kind}"], pairs[f"decay_{kind}"], strict=True)
    ]
    return max(sorted(set(found)), key=found.count)


def fresh_data(made: str = "laptop") -> pd.DataFrame:
    """Losses of the family's finished runs on fresh data: sizes x tokens, at the best batch."""
    grid = tiny_lm_grid(made)
    done = grid[grid.phase == "decayed"]
    means = done.groupby(["N", "budget", "batch"], as_index=False).loss.mean()
    return means.pivot_table(index="N", columns="budget", values="loss", aggfunc="min")
