"""From a user's table of runs to the columns a law reads, or to a message that says what is wrong.

Nothing is repaired in silence: what cannot be fitted is an error that names the column, and what is
left out or looks suspicious is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from workbench.scaling_laws.law import Law

#: What can be had from other columns: name, the columns it needs, how, and in words.
DERIVED: tuple[tuple[str, tuple[str, str], Callable[..., pd.Series], str], ...] = (
    ("D", ("C", "N"), lambda C, N: C / (6 * N), "FLOP / (6 N)"),
    ("N", ("C", "D"), lambda C, D: C / (6 * D), "FLOP / (6 D)"),
    ("D", ("M", "N"), lambda M, N: M * N, "M N"),
    ("D", ("S", "B"), lambda S, B: S * B, "S B"),
    ("M", ("D", "N"), lambda D, N: D / N, "D / N"),
    ("M", ("C", "N"), lambda C, N: C / (6 * N * N), "FLOP / (6 N^2)"),
    ("S", ("D", "B"), lambda D, B: D / B, "D / B"),
)
MEANING = {
    "N": "parameters",
    "D": "tokens",
    "C": "training FLOP",
    "M": "tokens per parameter",
    "S": "steps",
    "B": "batch size",
    "U": "unique tokens",
    "Ne": "encoder parameters",
    "Nd": "decoder parameters",
}


class FitWarning(UserWarning):
    """Something about a table or a fit that its reader should know."""


@dataclass(frozen=True)
class Runs:
    """Runs a law can be fitted to: ``frame`` has the law's inputs and ``loss``, and its index."""

    frame: pd.DataFrame
    named: Mapping[str, str]  # input -> the user's column, or how it was computed
    warnings: list[str] = field(default_factory=list)

    def label(self, name: str) -> str:
        """``'tokens' (D)``: the user's word first."""
        column = self.named.get(name, name)
        return f"column {column!r}" + (f" ({name})" if column != name else "")


def prepare(frame: pd.DataFrame, law: Law, columns: Mapping[str, str] | None = None) -> Runs:
    """Pick, compute and check the columns that ``law`` reads.

    Args:
        frame: one row a run (or a checkpoint).
        columns: the user's name for each input of the law, for ``loss``, and for what an input can
            be computed from (``C`` training FLOP, ``M`` tokens per parameter, ``B`` batch size,
            ``S`` steps); names that are the same need not be given.

    Raises:
        TypeError: ``frame`` is not a frame, or a column holds no numbers.
        ValueError: a column is missing, not positive or infinite, an input takes one value only, or
            tokens are fewer than the batch.
    """
    numbers, named = pick(frame, law, columns, also=("loss", "B", "C"))
    if "loss" not in numbers:
        raise ValueError(
            'columns: no column "loss"; name it, for example columns={"loss": "val_loss"}'
        )
    wanted = [*law.inputs, "loss"]
    runs = Runs(pd.DataFrame(numbers), named)
    table = _complete(runs, wanted)
    for name in table.columns:
        _positive(table[name], runs.label(name))
    table = _distinct(Runs(table, named, runs.warnings), wanted)
    runs = Runs(table[wanted], named, runs.warnings)
    _plausible(table, runs, law)
    return runs


def pick(
    frame: pd.DataFrame,
    law: Law,
    columns: Mapping[str, str] | None = None,
    *,
    also: Sequence[str] = (),
) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """The law's inputs (and what ``also`` names, if there), and the user's word for each.

    Raises:
        TypeError: ``frame`` is not a frame, or a column holds no numbers.
        ValueError: an input is neither there nor can be computed, or ``columns`` is wrong.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"frame: expected a pandas DataFrame, got {type(frame).__name__}")
    if frame.empty:
        raise ValueError("frame: holds no rows; expected one row a run")
    given = dict(columns or {})
    known = {*law.inputs, "loss", *MEANING}
    if unknown := set(given) - known:
        raise ValueError(
            f"columns: {law.name} knows no {sorted(unknown)[0]!r}; expected names among "
            f"{', '.join(sorted(known))}"
        )
    for name, column in given.items():
        if column not in frame.columns:
            raise ValueError(
                f"columns: {name} is said to be in {column!r}, but the frame has "
                f"{', '.join(map(repr, frame.columns))}"
            )
    named = {name: given.get(name, name) for name in known if given.get(name, name) in frame}
    if "loss" not in named and "L" in frame.columns:
        named["loss"] = "L"
    numbers = {}
    for name in law.inputs:
        numbers[name] = _input(name, named, frame)
    for name in also:
        if name in named and name not in numbers:
            numbers[name] = _numbers(frame[named[name]], named[name])
    return numbers, named


def at(label: object) -> str:
    """A label of the index as a message should print it."""
    return repr(label.item() if isinstance(label, np.generic) else label)


def _numbers(values: pd.Series, column: str) -> pd.Series:
    if values.dtype == bool or not pd.api.types.is_numeric_dtype(values):
        converted = pd.to_numeric(values, errors="coerce")
        if values.dtype == bool or (converted.isna() & values.notna()).any():
            raise TypeError(f"column {column!r}: expected numbers, got {values.dtype}")
        values = converted
    return values.astype(float)


def _input(name: str, named: dict[str, str], frame: pd.DataFrame) -> pd.Series:
    """A column of the table, or computed from others."""
    if name in named:
        return _numbers(frame[named[name]], named[name])
    for target, needs, formula, words in DERIVED:
        if target == name and all(q in named for q in needs):
            values = formula(*(_numbers(frame[named[q]], named[q]) for q in needs))
            named[name] = words
            return values
    ways = [" and ".join(needs) for target, needs, *_ in DERIVED if target == name]
    other = f", or {' or '.join(ways)} to compute it from" if ways else ""
    what = MEANING.get(name, name)
    raise ValueError(
        f'columns: no column for {name} ({what}); name it, for example columns={{"{name}": "..."}}'
        f"{other}. The frame has {', '.join(map(repr, frame.columns))}"
    )


def _complete(runs: Runs, wanted: list[str]) -> pd.DataFrame:
    missing = runs.frame[wanted].isna()
    if (rows := missing.any(axis=1)).any():
        where = ", ".join(runs.label(name) for name in wanted if missing[name].any())
        if rows.all():
            raise ValueError(f"{where}: every row lacks a value; nothing is left to fit")
        runs.warnings.append(
            f"{where}: {int(rows.sum())} of {len(rows)} rows lack a value and were left out; fill "
            "or drop them to silence this"
        )
    return runs.frame[~rows]


def _positive(values: pd.Series, label: str) -> None:
    bad = ~(np.isfinite(values) & (values > 0)) & values.notna()
    if bad.any():
        row = values.index[bad][0]
        raise ValueError(
            f"{label}: row {at(row)} is {values[row]:g}; a law of powers needs finite numbers "
            f"above zero. Drop such rows ({int(bad.sum())} of {len(values)}) or mend them"
        )


def _distinct(runs: Runs, wanted: list[str]) -> pd.DataFrame:
    doubled = runs.frame.duplicated(subset=wanted)
    if doubled.any():
        first = runs.frame.index[doubled][0]
        runs.warnings.append(
            f"{runs.label('loss')}: {int(doubled.sum())} rows (the first is {at(first)}) repeat "
            "another row exactly, sizes and loss; each run counts once. Repeated seeds differ in "
            "loss and are all kept"
        )
    return runs.frame[~doubled]


def _plausible(table: pd.DataFrame, runs: Runs, law: Law) -> None:
    """Errors and warnings about columns that cannot be what they are said to be."""
    for name in law.inputs:
        if table[name].nunique() == 1 and len(table) > 1:
            others = " and ".join(q for q in law.inputs if q != name)
            instead = f'; fit the law "power" in {others} instead' if others else ""
            raise ValueError(
                f"{runs.label(name)}: every run has the value {table[name].iloc[0]:g}, so the "
                f"parameters of its term and the constant cannot be told apart{instead}, or add "
                "runs of another size"
            )
    if {"D", "B"} <= set(table) and (table.D < table.B).any():
        row = table.index[table.D < table.B][0]
        raise ValueError(
            f"{runs.label('D')}: row {at(row)} saw fewer tokens ({table.D[row]:g}) than one batch "
            f"holds ({runs.label('B')}: {table.B[row]:g}); are the columns swapped?"
        )
    if {"N", "D"} <= set(table) and (table.D < table.N).mean() > 0.5:
        runs.warnings.append(
            f"{runs.label('D')}: most runs have fewer tokens than parameters "
            f"({runs.label('N')}); if the two are swapped, so are the exponents"
        )
    if {"N", "D", "C"} <= set(table):
        ratio = table.C / (6 * table.N * table.D)
        if ((ratio > 3) | (ratio < 1 / 3)).any():
            row = table.index[(ratio > 3) | (ratio < 1 / 3)][0]
            runs.warnings.append(
                f"{runs.label('C')}: row {at(row)} is {ratio[row]:.3g} times 6 N D; units or "
                "columns may be mixed up"
            )
