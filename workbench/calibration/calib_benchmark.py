r"""A benchmark study on calibration: many networks, 102 measurements, rank correlations.

Every network of an exhaustive search space is measured before ("pre") and after ("post") one
temperature, $T = \arg\min_T \mathrm{NLL}$ on validation data, has been applied. Five binned
measures, each at nine numbers of bins, twice: 90. Five measures without bins, twice, and two
AUROCs: 12.

| column               | measure                                                                |
|----------------------|------------------------------------------------------------------------|
| `ece_B`              | $\sum_b \frac{n_b}{n}|\bar a_b - \bar c_b|$, B equal-width bins          |
| `ece_em_B`           | the same, B equal-mass bins                                            |
| `cwce_B`, `cwce_em_B`| classwise ECE, equal width and equal mass                              |
| `mce_B`              | $\max_b |\bar a_b - \bar c_b|$                                          |
| `ks`, `kde_ece`, `mmce`, `nll`, `brier` | see `workbench.calibration.measures`                 |
| `auc_NAME`           | can confidence tell test images from those of NAME (before scaling)     |

The study then asks which measures rank the networks alike: Kendall's $\tau_b$ between columns,

$$\tau_b(x, y) = \frac{\sum_{ij}\mathrm{sgn}(x_i-x_j)\,\mathrm{sgn}(y_i-y_j)}
  {\sqrt{\sum_{ij}\mathrm{sgn}^2(x_i-x_j)}\sqrt{\sum_{ij}\mathrm{sgn}^2(y_i-y_j)}} ,$$

over all networks or over the most accurate ones (`table.nlargest(100, "acc")`).

Reference: Tao, Zhu, Guo, Dong, Xu 2023 (ICLR 2024), arXiv 2308.11838; the list of columns follows
the description of the authors' released tables. Overconfidence error, sometimes named among them,
is not one of the 102; it is `measures.oe` here.

Not included: the NATS-Bench networks themselves (117,702 trained checkpoints); the columns on
adversarial and corruption accuracy, which come from another data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import softmax
from scipy.stats import rankdata

from workbench.calibration import measures
from workbench.calibration.bins import (
    TopLabel,
    bin_statistics,
    equal_mass_edges,
    equal_width_edges,
    top_label,
)
from workbench.calibration.intervals import Interval
from workbench.calibration.temperature import fit_temperature
from workbench.lab import checks

BIN_COUNTS = (5, 10, 15, 20, 25, 50, 100, 200, 500)
BINNED = ("ece", "ece_em", "cwce", "cwce_em", "mce")
UNBINNED = ("ks", "kde_ece", "mmce", "nll", "brier")


@dataclass(frozen=True)
class Predictions:
    """What the study needs of one network.

    Attributes:
        logits: (n, k) on test rows.
        labels: (n,) classes of the test rows.
        validation_logits: (m, k) on the rows the temperature is fitted on; never test rows.
        validation_labels: (m,).
        foreign: logits on images of other kinds, by name, for the AUROC columns.
    """

    logits: Any
    labels: Any
    validation_logits: Any
    validation_labels: Any
    foreign: Mapping[str, Any] = field(default_factory=dict)


def metric_table(
    models: Mapping[Any, Predictions] | Sequence[Predictions],
    *,
    bin_counts: Sequence[int] = BIN_COUNTS,
) -> pd.DataFrame:
    """One row per network: `acc`, `temperature`, `pre_*` and `post_*` columns, `auc_*`.

    With the nine bin counts of the study and two foreign sets there are 102 measurements.
    """
    named = models.items() if isinstance(models, Mapping) else enumerate(models)
    rows = {name: metric_row(model, bin_counts=bin_counts) for name, model in named}
    if not rows:
        raise ValueError("models: is empty; expected predictions of at least one network")
    return pd.DataFrame.from_dict(rows, orient="index")


def metric_row(model: Predictions, *, bin_counts: Sequence[int] = BIN_COUNTS) -> dict[str, float]:
    """The measurements of one network."""
    logits = _logits(model.logits, "logits")
    labels = checks.to_numpy(checks.as_labels(model.labels, logits.shape[1]))
    temperature = fit_temperature(
        _logits(model.validation_logits, "validation_logits"), model.validation_labels
    )
    before, after = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    row = {"acc": float((logits.argmax(1) == labels).mean()), "temperature": temperature}
    for stage, probs in (("pre", before), ("post", after)):
        measured = all_measures(probs, labels, bin_counts=bin_counts)
        row |= {f"{stage}_{name}": value for name, value in measured.items()}
    for name, other in model.foreign.items():
        foreign = softmax(_logits(other, f"foreign[{name!r}]"), axis=1)
        row[f"auc_{name}"] = measures.ood_auroc(before, foreign)
    return row


def _logits(values: Any, name: str) -> Float[np.ndarray, "n k"]:
    return checks.to_numpy(checks.as_logits(values, name)).astype(np.float64)


def all_measures(
    probs: Any, labels: Any, *, bin_counts: Sequence[int] = BIN_COUNTS
) -> dict[str, float]:
    """Binned measures at every number of bins, and those without bins."""
    top = top_label(probs, labels)
    labels = checks.to_numpy(labels)
    found = {}
    for bins in bin_counts:
        found |= {f"{name}_{bins}": value for name, value in _of_top_label(top, bins).items()}
        for name, scheme in (("cwce", "equal-width"), ("cwce_em", "equal-mass")):
            value = measures.classwise_ece(probs, labels, bins=bins, scheme=scheme)
            found[f"{name}_{bins}"] = value
    for name in UNBINNED:
        found[name] = measures.MEASURES[name](probs, labels)
    return found


def _of_top_label(top: TopLabel, bins: int) -> dict[str, float]:
    width = bin_statistics(top.confidence, top.correct, equal_width_edges(bins))
    mass = bin_statistics(top.confidence, top.correct, equal_mass_edges(top.confidence, bins))
    return {
        "ece": float(measures.gap_error(width.count, width.total)),
        "ece_em": float(measures.gap_error(mass.count, mass.total)),
        "mce": float(measures.gap_error(width.count, width.total, "max")),
    }


# ---- rank correlations


def rank_correlations(
    table: pd.DataFrame, *, method: Literal["kendall", "spearman"] = "kendall"
) -> pd.DataFrame:
    """Correlation of the rankings of the rows by every pair of columns.

    Args:
        table: (m, q) numbers; a row per network.
        method: Kendall's tau-b or Spearman's rho.

    Returns:
        (q, q) frame; NaN where a column is constant.
    """
    checks.one_of(method, ("kendall", "spearman"), "method")
    values = _values(table)
    if method == "spearman":
        values = np.apply_along_axis(rankdata, 0, values)
        centred = values - values.mean(0)
        product = centred.T @ centred
    else:
        product = _sign_products(values)
    scale = np.sqrt(np.diag(product))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = product / np.outer(scale, scale)
    return pd.DataFrame(found, index=table.columns, columns=table.columns)


def _values(table: pd.DataFrame) -> Float[np.ndarray, "m q"]:
    values = checks.as_floats(table, "table", ndim=2)
    if len(values) < 2:
        raise ValueError("table: has one row; expected at least two networks to rank")
    return np.asarray(values, np.float64)


def _sign_products(values: Float[np.ndarray, "m q"]) -> Float[np.ndarray, "q q"]:
    """Sum over pairs of rows of the product of the signs of their differences, by blocks."""
    m, q = values.shape
    product = np.zeros((q, q))
    step = max(1, 4_000_000 // (m * q))
    for start in range(0, m, step):
        signs = np.sign(values[start : start + step, None] - values).astype(np.float32)
        signs = signs.reshape(-1, q)
        product += signs.T @ signs
    return product


def rank_interval(
    table: pd.DataFrame,
    first: str,
    second: str,
    *,
    n: int = 1000,
    level: float = 0.95,
    random_state: np.random.Generator | int | None = 0,
) -> Interval:
    """Kendall's tau-b of two columns with a percentile interval over bootstrapped networks.

    A network drawn w times counts w times; its pairs with itself are ties in both columns, which
    tau-b leaves out.
    """
    x, y = _values(table[[first, second]]).T
    a, b = (np.sign(v[:, None] - v) for v in (x, y))
    m, rng = len(x), checks.as_rng(random_state)
    weights = np.ones((1, m))
    drawn = rng.multinomial(m, np.full(m, 1 / m), size=checks.count(n, "n", minimum=2))
    weights = np.concatenate([weights, drawn])

    def pairs(matrix: np.ndarray) -> np.ndarray:
        return ((weights @ matrix) * weights).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        tau = pairs(a * b) / np.sqrt(pairs(a * a) * pairs(b * b))
    tails = (1 - checks.fraction(level, "level", zero=False, one=False)) / 2
    low, high = np.nanquantile(tau[1:], [tails, 1 - tails])
    return Interval(float(tau[0]), float(low), float(high))
