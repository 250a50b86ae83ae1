"""The family's main explorer: reliability of your own predictions, live.

`explore(logits_or_probs, labels)` or `explore("predictions.csv")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, ndtri

from workbench.calibration import measures, prebinned
from workbench.calibration.bins import SCHEMES, BinStats, top_label
from workbench.calibration.figures_script import SCRIPT
from workbench.calibration.intervals import closed_form
from workbench.calibration.recalibrate import RECALIBRATORS, log_scores
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Bars,
    Choice,
    Diagonal,
    Explorer,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    VLine,
)
from workbench.plots.mpl import wilson

if TYPE_CHECKING:
    import pandas as pd

BIN_COUNTS = (5, 10, 15, 20, 25, 50, 100)
BY_HAND = "by hand"
METHODS = (BY_HAND, "temperature", "vector", "platt", "beta", "isotonic", "histogram")
NORMS = {"l1": "ECE", "l2": "RMS error", "max": "MCE"}
LABEL_NAMES = ("label", "labels", "y", "y_true", "target", "class")
SCORE_PREFIXES = ("logit", "prob", "score", "p_")
FIT_ROWS = 50_000  # more rows do not change a recalibrator, only the time to fit it
DIRECT = 500_000  # numbers; larger tables are collected beforehand (prebinned)
EXPORTED_BYTES, EXPORTED_ROWS = 70_000, 2000
Z = float(ndtri(0.975))


def explore(
    predictions: Any,
    labels: Any = None,
    *,
    calibration: tuple[Any, Any] | None = None,
    seed: int = 0,
    **state: Any,
) -> Explorer:
    """Explore the calibration of predictions: bins, scheme, norm, temperature, recalibrator.

    Measures are taken on rows that no recalibrator was fitted on: on `predictions` if `calibration`
    is given, otherwise on a random half of them, the other half being used for fitting.

    Args:
        predictions: (n, k) logits or probabilities (NumPy, torch, pandas), or the path of a CSV,
            TSV, NPZ or Parquet file that holds them and the labels.
        labels: (n,) class indices; for a file or a frame, the name of the label's column (by
            default one of label, labels, y, y_true, target, class). Scores are the columns that
            begin with logit, prob, score or p_, or else all others. Class names as labels are
            understood when the score columns carry them.
        calibration: logits or probabilities and labels to fit recalibrators on.
        seed: of the random halves.
        state: where the controls start: `temperature`, `bins`, `scheme`, `norm`, `recalibrator`.

    A table of more than 500,000 numbers is collected first (a million rows of ten classes: about
    2 s), after which a slider costs a look-up; `temperature` then moves in steps of 4.4%, and
    equal-mass bins end at the edge of a fine cell (see `prebinned`). The exported page works on at
    most 2,000 of the rows, drawn at random.
    """
    named = repr(str(predictions)) if isinstance(predictions, (str, Path)) else "predictions"
    second = f", {labels!r}" if isinstance(labels, str) else "" if labels is None else ", labels"
    scores, labels = read_predictions(predictions, labels)
    if calibration is None:
        order = np.random.default_rng(seed).permutation(len(labels))
        half = len(order) // 2
        if half < 1:
            raise ValueError("predictions: has one row; expected at least two")
        fit, rest = order[:half], order[half:]
        held_out = (scores[fit], labels[fit])
        scores, labels = scores[rest], labels[rest]
        where = f"measured on {len(labels):,} rows, fitted on the other {half:,}"
    else:
        held_out = read_predictions(*calibration)
        if held_out[0].shape[1] != scores.shape[1]:
            raise ValueError(
                f"calibration: has {held_out[0].shape[1]} classes; expected {scores.shape[1]}"
            )
        where = f"measured on {len(labels):,} rows, fitted on {len(held_out[1]):,} others"
    table = Predictions(scores, labels, *held_out)
    explorer = Explorer(
        name="calibration.reliability",
        title="Is a confidence of 0.8 right eight times in ten?",
        about=f"Raise the temperature until the bars meet the diagonal; {where}.",
        controls=[
            Slider("temperature", "Temperature (by hand)", 0.125, 8.0, step=math.log10(2) / 16,
                   value=1.0, log=True),
            Choice("recalibrator", "Recalibrator", METHODS, BY_HAND),
            Steps("bins", "Bins", BIN_COUNTS, 15),
            Choice("scheme", "Binning", SCHEMES, "equal-width"),
            Choice("norm", "Norm", tuple(NORMS), "l1", labels=tuple(NORMS.values())),
        ],
        compute=table.result,
        panels=_panels(),
        readouts=_readouts(),
        script=SCRIPT,
        data=Sample(table, seed),
        call=f"calibration.explore({named}{second}, {{state}})",
    )  # fmt: skip
    return explorer.set(**state)


# ---- reading


def read_predictions(predictions: Any, labels: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (or floored log-probabilities) and labels, from arrays, a frame or a file."""
    if isinstance(predictions, (str, Path)):
        from workbench.lab.data import read_table

        predictions = read_table(predictions)
    if labels is None or isinstance(labels, str):
        if not hasattr(predictions, "columns"):
            raise ValueError("labels: missing; expected class indices, one per row of predictions")
        predictions, labels = _columns(predictions, labels)
    scores = checks.to_numpy(log_scores(predictions))
    labels = checks.to_numpy(checks.as_labels(labels, scores.shape[1]))
    checks.same_length(predictions=scores, labels=labels)
    return scores, labels


def _columns(frame: pd.DataFrame, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of a table, by the names of its columns."""
    names = {str(column): column for column in frame.columns}
    if label is None:
        known = [name for name in names if name.lower() in LABEL_NAMES]
        if len(known) != 1:
            raise ValueError(
                f"labels: expected one column named {', '.join(LABEL_NAMES)}, found "
                f"{', '.join(known) or 'none'} among {', '.join(names)}; name it with labels="
            )
        label = known[0]
    elif label not in names:
        raise ValueError(f"labels: no column {label!r} among {', '.join(names)}")
    others = [name for name in names if name != label]
    for prefix in SCORE_PREFIXES:
        chosen = [name for name in others if name.lower().startswith(prefix)]
        if len(chosen) >= 2:
            others, bare = chosen, [_without(name, prefix) for name in chosen]
            break
    else:
        bare = others
    scores = frame[[names[name] for name in others]].to_numpy()
    values = frame[names[label]].to_numpy()
    if values.dtype.kind in "OUT" or str(values.dtype).startswith("str"):
        classes = {name: i for i, name in enumerate(bare)}
        unknown = [v for v in dict.fromkeys(map(str, values)) if v not in classes]
        if unknown:
            raise ValueError(
                f"labels: {unknown[0]!r} names no score column; there are {', '.join(bare)}"
            )
        values = np.array([classes[str(v)] for v in values])
    return scores, values


def _without(name: str, prefix: str) -> str:
    rest = name[len(prefix) :].lstrip("s") if prefix == "logit" else name[len(prefix) :]
    return rest.lstrip("_ .:") or name


# ---- computing


class Outcome(NamedTuple):
    """Recalibrated predictions, reduced to what the figure shows."""

    bins: Callable[[int, Any], BinStats]
    nll: tuple[float, float]
    brier: tuple[float, float]
    temperature: float


class Predictions:
    """Scores to be measured and scores to fit on; every recalibrator is fitted once, on demand."""

    def __init__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        fit_scores: np.ndarray,
        fit_labels: np.ndarray,
    ) -> None:
        self.scores, self.labels = scores, labels
        self._fit_on = fit_scores[:FIT_ROWS], fit_labels[:FIT_ROWS]
        self._fitted: dict[str, Any] = {}
        self._outcomes: dict[str, Outcome] = {}
        self.large = scores.size > DIRECT
        self._table = self._collect(scores) if self.large else None

    def _collect(self, scores: np.ndarray) -> prebinned.BinnedTable:
        from workbench.lab.progress import Progress

        with Progress("collecting statistics", prebinned.blocks(len(scores))) as bar:
            return prebinned.collect(scores, self.labels, progress=bar.step)

    def recalibrated(self, name: str, scores: np.ndarray) -> np.ndarray:
        """Probabilities of `scores` under the recalibrator called `name`."""
        if name not in self._fitted:
            fit_scores, fit_labels = self._fit_on
            self._fitted[name] = RECALIBRATORS[name](inputs="logits").fit(fit_scores, fit_labels)
        return self._fitted[name].transform(scores)

    def fitted_temperature(self, name: str) -> float:
        """The temperature in force under the recalibrator `name`; NaN where there is none."""
        return float(getattr(self._fitted.get(name), "temperature_", math.nan))

    def outcome(self, recalibrator: str, temperature: float) -> Outcome:
        """Statistics of the predictions under a recalibrator, or at a temperature by hand."""
        if recalibrator == BY_HAND:
            if self._table is not None:
                return _looked_up(self._table, self._table.nearest(temperature))
            log_probs = log_softmax(self.scores / temperature, axis=1)
            return _counted(np.exp(log_probs), log_probs, self.labels, temperature)
        if recalibrator not in self._outcomes:
            probs = self.recalibrated(recalibrator, self.scores)
            log_probs, t = log_scores(probs, "probs"), self.fitted_temperature(recalibrator)
            if self.large:
                table = prebinned.collect(log_probs, self.labels, octaves=0)
                found = _looked_up(table, 0)._replace(temperature=t)
            else:
                found = _counted(probs, log_probs, self.labels, t)
            self._outcomes[recalibrator] = found
        return self._outcomes[recalibrator]

    def result(
        self, temperature: float, recalibrator: str, bins: int, scheme: Any, norm: Any
    ) -> dict[str, Any]:
        """What the figure draws and reads out."""
        found = self.outcome(recalibrator, temperature)
        stats = found.bins(bins, scheme)
        error, right = closed_form(stats, norm), stats.count[:, 1].sum() / stats.n
        confidence = stats.total.sum() / stats.n
        low, high = wilson(stats.count[:, 1], stats.size)
        result: dict[str, Any] = {
            "mid": (stats.edges[1:] + stats.edges[:-1]) / 2,
            "width": np.diff(stats.edges),
            "accuracy_bin": stats.accuracy, "accuracy_low": low, "accuracy_high": high,
            "confidence_bin": stats.confidence, "share": stats.size / stats.n,
            "error": error.value, "error_low": error.low, "error_high": error.high,
            "overconfidence": float(measures.overconfidence(stats.count, stats.total)),
            "accuracy": right, "confidence": confidence, "direction": _direction(confidence, right),
            "in_force": found.temperature,
        }  # fmt: skip
        for name, (mean, deviation) in (("nll", found.nll), ("brier", found.brier)):
            reach = Z * deviation
            result |= {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}
        return result


def _looked_up(table: prebinned.BinnedTable, index: int) -> Outcome:
    nll, brier = (tuple(map(float, values[index])) for values in (table.nll, table.brier))
    temperature = float(table.temperatures[index])
    return Outcome(lambda bins, scheme: table.bins(index, bins, scheme), nll, brier, temperature)


def _counted(
    probs: np.ndarray, log_probs: np.ndarray, labels: np.ndarray, temperature: float
) -> Outcome:
    top = top_label(probs, labels)
    rows = np.arange(len(labels))
    return Outcome(
        lambda bins, scheme: measures.reliability_of(top, bins, scheme),
        _mean_error(-log_probs[rows, labels]),
        _mean_error(measures.row_brier(probs, labels)),
        temperature,
    )


def _mean_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(max(len(values) - 1, 1)))


def _direction(confidence: float, accuracy: float) -> str:
    points = 100 * abs(confidence - accuracy)
    return f"{'Over' if confidence > accuracy else 'Under'}confident by {points:.1f} points"


# ---- drawing


def _panels() -> list[Panel]:
    unit = (0.0, 1.0)
    return [
        Panel(
            "{direction}",
            x=Axis("confidence", unit), y=Axis("share of right predictions", unit),
            draws=[
                Bars("mid", "accuracy_bin", width="width", label="accuracy", color="blue",
                     opacity=0.6),
                Bars("mid", "confidence_bin", width="width", base="accuracy_bin", label="gap",
                     color="vermillion", opacity=0.35),
                Points("confidence_bin", "accuracy_bin", label="95% interval", color="ink",
                       low="accuracy_low", high="accuracy_high", size=5),
                Diagonal("calibrated"),
            ],
            square=True,
        ),
        Panel(
            "Mean confidence {confidence:.3f} (dotted), accuracy {accuracy:.3f} (dashed)",
            x=Axis("confidence", unit), y=Axis("share of rows", unit),
            draws=[
                Bars("mid", "share", width="width", label="rows", color="grey", opacity=0.6),
                VLine("accuracy", color="blue"),
                VLine("confidence", color="vermillion", dash="dot"),
            ],
            legend=False,
        ),
    ]  # fmt: skip


def _readouts() -> list[Readout]:
    return [
        Readout("error", "Calibration error", ".4f", low="error_low", high="error_high"),
        Readout("overconfidence", "OE", ".4f"),
        Readout("nll", "NLL", ".4f", low="nll_low", high="nll_high", unit="nats"),
        Readout("brier", "Brier", ".4f", low="brier_low", high="brier_high"),
        Readout("accuracy", "Accuracy", ".4f"),
        Readout("in_force", "Temperature in force", ".3f"),
    ]


class Sample(Mapping[str, Any]):
    """What the exported page computes with: rows and their recalibrated forms, made when asked."""

    def __init__(self, table: Predictions, seed: int) -> None:
        self._source, self._seed = table, seed
        self._made: dict[str, Any] | None = None

    def _make(self) -> dict[str, Any]:
        if self._made is not None:
            return self._made
        scores, labels = self._source.scores, self._source.labels
        bytes_per_row = 7 * scores.shape[1] + 18 * len(METHODS)
        rows = min(EXPORTED_ROWS, max(50, EXPORTED_BYTES // bytes_per_row))
        if len(labels) > rows:
            order = np.random.default_rng(self._seed).permutation(len(labels))[:rows]
            scores, labels = scores[order], labels[order]
        confidence, correct, numbers = [], [], []
        for name in METHODS[1:]:
            probs = self._source.recalibrated(name, scores)
            top, logs = top_label(probs, labels), log_scores(probs, "probs")
            confidence.append(top.confidence)
            correct.append(top.correct)
            nll = _mean_error(-logs[np.arange(len(labels)), labels])
            brier = _mean_error(measures.row_brier(probs, labels))
            numbers.append([*nll, *brier, self._source.fitted_temperature(name)])
        self._made = {
            "scores": scores - scores.max(1, keepdims=True), "labels": labels,
            "methods": list(METHODS[1:]), "numbers": np.array(numbers),
            "confidence": np.array(confidence), "correct": np.array(correct),
            "z": Z, "z_bins": ndtri(1 - 0.025 / np.arange(1, 301)),
        }  # fmt: skip
        return self._made

    def __getitem__(self, key: str) -> Any:
        return self._make()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())
