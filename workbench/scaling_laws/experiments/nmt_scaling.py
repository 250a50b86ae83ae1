"""Train small translation models of many encoder and decoder widths; predict the joint ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.lab.seeding import seeded
from workbench.scaling_laws.experiments.nmt_languages import Languages, make_languages
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.nmt_scaling import (
    Seq2Seq,
    fit_bivariate,
    fit_soft_l1,
    fit_total,
    loss_at,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

TESTS = ("all", "source", "target")
"""Test text: the crawl's mixture, source-original, target-original."""


def cells(widths: tuple[int, ...], base: int) -> dict[str, list[tuple[int, int]]]:
    """Encoder and decoder widths: both sweeps to fit, joint cells to predict.

    The joint cells are the symmetric ones and two lopsided ones, of the second narrowest width and
    the widest.
    """
    sweeps = [(w, base) for w in widths] + [(base, w) for w in widths if w != base]
    others = [w for w in widths if w != base]
    narrow, wide = others[min(1, len(others) - 2)], others[-1]
    joint = [*((w, w) for w in others), (narrow, wide), (wide, narrow)]
    return {"fit": sweeps, "predict": joint}


def train_cell(
    seed: int,
    widths: tuple[int, int],
    *,
    members: int = 6,
    steps: int = 1400,
    batch: int = 24,
    length: int = 6,
    test: int = 2000,
    rate: float = 0.15,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train models of one shape, each on two languages of its own; losses on three kinds of text.

    Member i has the languages, sentences and test text of seed + i, whatever its shape. Adam (0.9,
    0.95) with a learning rate of ``rate`` over the width of each side, warmed up over a twentieth
    of the steps and lowered linearly to zero over the last three fifths. No sentence is seen twice.

    Args:
        seed: of the first member.
        widths: of encoder and decoder, one layer each.
        members: models trained side by side.
        steps: of the optimiser.
        batch: sentences a step, half of each direction.
        length: words of a sentence.
        test: held-out sentences, half of each direction.
        rate: learning rate times width.
        device: where to train.

    Returns:
        ``Ne``, ``Nd``; for each kind of test text ``loss_*`` and ``floor_*`` (members,): mean
        cross-entropy in nats a word, of the model and of the exact conditional distribution.
    """
    text = crawl(seed, members, test, steps * batch, length)
    x, y, held_x, held_y = (words.to(device) for words in text[:4])
    with seeded(seed):
        model = Seq2Seq(members, (text.v, text.v), length, d=widths).to(device)
    sides: list[list[Tensor]] = [[], []]
    for name, weight in model.named_parameters():
        sides[not name.startswith(("encoder", "source"))].append(weight)
    peaks = [rate / width for width in widths]
    groups = [{"params": side, "lr": peak} for side, peak in zip(sides, peaks, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    for i in range(steps):
        factor = min(1.0, 20 * (i + 1) / steps, (1 - i / steps) / 0.6)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        rows = slice(i * batch, (i + 1) * batch)
        loss = model.losses(x[:, rows], y[:, rows]).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = zip(held_x.split(250, 1), held_y.split(250, 1), strict=True)
        losses = torch.cat([model.losses(a, b) for a, b in parts], 1).cpu().double()
    Ne, Nd = model.sizes
    return {"Ne": Ne, "Nd": Nd, **_by_test("loss", losses), **_by_test("floor", text.floors)}


class Text(NamedTuple):
    """Sentence pairs of several members, source-original and target-original in turn.

    Attributes:
        x, y: (members, n, length) to train on.
        held_x, held_y: the same, to test on.
        floors: (members, n) exact cross-entropy of each pair to test on, in nats a word.
        v: words in each language.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    floors: Tensor
    v: int


@lru_cache(maxsize=1)
def crawl(seed: int, members: int, test: int, train: int, length: int) -> Text:
    """Text of each member's languages, the same for models of all shapes."""
    parts = []
    for i in range(seed, seed + members):
        pair, rng = make_languages(i), np.random.default_rng([i, 1])
        held_x, held_y = _pairs(pair, rng, test, length)
        floors = -pair.log_probs(held_x, held_y) / length
        parts.append((*_pairs(pair, rng, train, length), held_x, held_y, floors))
    x, y, held_x, held_y, floors = (torch.stack(part) for part in zip(*parts, strict=True))
    return Text(x, y, held_x, held_y, floors, pair.v)


def _pairs(pair: Languages, rng: np.random.Generator, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Source-original and target-original pairs in turn."""
    forth = pair.source_original(n // 2, length, rng)
    back = pair.target_original(n // 2, length, rng)
    x, y = (torch.stack(side, 1).flatten(0, 1) for side in zip(forth, back, strict=True))
    return x, y


def _by_test(name: str, values: Tensor) -> dict[str, np.ndarray]:
    source, target = values[:, 0::2].mean(1), values[:, 1::2].mean(1)
    kinds = dict(zip(TESTS, ((source + target) / 2, source, target), strict=True))
    return {f"{name}_{kind}": mean.numpy() for kind, mean in kinds.items()}


def member_table(runs: pd.DataFrame, member: int, test: str = "all") -> pd.DataFrame:
    """Rows ``Ne``, ``Nd``, ``loss``, ``floor`` of one member over the cells of ``runs``."""
    return pd.DataFrame(
        {
            "Ne": runs.Ne,
            "Nd": runs.Nd,
            "loss": [values[member] for values in runs[f"loss_{test}"]],
            "floor": [values[member] for values in runs[f"floor_{test}"]],
        }
    )


def predict_joint(
    runs: pd.DataFrame, fit_on: list[tuple[int, int]], **options: Any
) -> pd.DataFrame:
    """Fit each member's sweeps, predict its joint cells.

    Args:
        runs: rows of `train_cell` over the grid ``widths``.
        fit_on: widths of the cells that the fits see.
        **options: of the fits, the same for all laws.

    Returns:
        A row a member: ``rmse_*`` on the joint cells, in nats, of the bivariate law (
        ``listing``: fitted as in the paper's listing), of the univariate one and of a sum of two
        power laws; their irreducible losses ``L_*`` and how far
        they are from the known floor, ``off_*``; ``r2`` inside; constants for each kind of test
        text; predictions and losses of the joint cells as arrays.
    """
    seen = runs.widths.map(tuple).isin([tuple(cell) for cell in fit_on])
    first = int(runs.seed.iloc[0])
    rows = []
    for member in range(len(runs.loss_all.iloc[0])):
        row: dict[str, Any] = {"seed": first + member}
        for test in TESTS:
            table = member_table(runs, member, test)
            fit = fit_bivariate(table[seen], **options)
            law = fit.law
            row |= {
                f"p_e_{test}": law.p_e,
                f"p_d_{test}": law.p_d,
                f"share_{test}": law.p_d / (law.p_e + law.p_d),
                f"L_{test}": law.L_inf,
                f"floor_{test}": float(table.floor.iloc[0]),
                f"r2_{test}": fit.r2,
                f"gain_{test}": float(table.loss.max() - table.loss.min()),
            }
            if test == "all":
                row |= _predictions(table, seen.to_numpy(), law, options)
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs = dict(runs.attrs)
    return frame


def _predictions(
    table: pd.DataFrame, seen: np.ndarray, law: Any, options: dict[str, Any]
) -> dict[str, Any]:
    train, joint = table[seen], table[~seen]
    total = fit_total(train, **options)
    names = {"N": "Ne", "D": "Nd"}
    free = {"alpha": (1e-6, 10.0), "beta": (1e-6, 10.0)}
    relative = {q: np.exp(np.log(train[q]).mean()) for q in ("Ne", "Nd")}
    scaled = {"objective": "lsq", "quiet": True, "bounds": free, **options}
    added = fit_law(train.assign(**{q: train[q] / relative[q] for q in relative}), "chinchilla",
                    columns=names, **scaled)  # fmt: skip
    predicted = {
        "bivariate": loss_at(joint.Ne, joint.Nd, law),
        "listing": loss_at(joint.Ne, joint.Nd, fit_soft_l1(train)),
        "total": total.predict(x=joint.Ne + joint.Nd),
        "sum": added.predict(N=joint.Ne / relative["Ne"], D=joint.Nd / relative["Nd"]),
    }
    floor = float(table.floor.iloc[0])
    inside = total.frame.predicted - total.frame.loss
    return {
        **{f"rmse_{q}": _rms(values - joint.loss) for q, values in predicted.items()},
        **{f"bias_{q}": float((values - joint.loss).mean()) for q, values in predicted.items()},
        "spread": float(joint.loss.std(ddof=0)),
        "L_total": total.params["E"],
        "L_sum": added.params["E"],
        "off_bivariate": abs(law.L_inf - floor),
        "off_total": abs(total.params["E"] - floor),
        "r2_total": 1 - (_rms(inside) / train.loss.std(ddof=0)) ** 2,
        "loss": joint.loss.to_numpy(),
        **{f"predicted_{q}": np.asarray(values) for q, values in predicted.items()},
    }


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def predict_largest(seed: int, *, made: str = "laptop", starts: int = 60) -> dict[str, float]:
    """The same question for language models: does a product of N and D beat a sum, or compute?

    Finished runs of one seed of the tiny grid at its middle batch; fits on all sizes but the
    largest, and predicts that.

    Args:
        seed: which of the table's seeds, counted round.
        made: scale at which the rows were trained.
        starts: of each fit.
    """
    table = tiny_lm_grid(made)
    table = table[table.phase == "decayed"]
    seeds = sorted(table.seed.unique())
    middle = sorted(table.batch.unique())[table.batch.nunique() // 2]
    table = table[(table.seed == seeds[seed % len(seeds)]) & (table.batch == middle)]
    top = table.N.max()
    train, largest = table[table["N"] < top], table[table["N"] == top]
    shared: dict[str, Any] = {"objective": "lsq", "starts": starts, "seed": seed, "quiet": True}
    product = fit_bivariate(train, columns={"Ne": "N", "Nd": "tokens"}, **shared)
    added = fit_law(train, "chinchilla", columns={"D": "tokens"}, **shared)
    compute = fit_law(train.assign(x=6.0 * train.N * train.tokens), "power", **shared)
    predicted = {
        "product": loss_at(largest.N, largest.tokens, product.law),
        "sum": added.predict(N=largest.N, D=largest.tokens),
        "compute": compute.predict(x=6.0 * largest.N * largest.tokens),
    }
    return {f"rmse_{q}": _rms(values - largest.loss) for q, values in predicted.items()} | {
        "p_N": product.law.p_e,
        "p_D": product.law.p_d,
        "spread": float(largest.loss.std(ddof=0)),
    }
