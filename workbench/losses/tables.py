"""Tables on their way into a network: checked, split, and encoded without looking at test rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.lab import checks

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.compose import ColumnTransformer


def checked(X: Any, y: Any) -> tuple[pd.DataFrame, np.ndarray, tuple[str, ...]]:
    """A user's table and labels as frame, class numbers and the names of the classes, sorted.

    Raises:
        TypeError: X is no table of numbers or categories.
        ValueError: lengths differ, a label is missing, a number is infinite, or the labels are not
            classes.
    """
    import pandas as pd

    if not isinstance(X, pd.DataFrame):
        X = pd.DataFrame(np.asarray(checks.to_numpy(checks.as_array(X, "X", ndim=2))))
    labels = pd.Series(checks.to_numpy(y) if not hasattr(y, "isna") else y).reset_index(drop=True)
    if X.shape[1] == 0 or len(X) == 0:
        raise ValueError(f"X: is empty, shape {X.shape}")
    if X.columns.duplicated().any():
        raise ValueError(f"X: column {X.columns[X.columns.duplicated()][0]!r} occurs twice")
    checks.same_length(X=X, y=labels)
    if labels.isna().any():
        raise ValueError(f"y: row {int(labels.isna().to_numpy().argmax())} has no label")
    numbers = X.select_dtypes("number")
    if np.isinf(numbers.to_numpy(dtype=float, na_value=np.nan)).any():
        raise ValueError("X: holds infinity; expected finite numbers or missing values")
    codes, names = pd.factorize(labels, sort=True)
    if len(names) < 2:
        raise ValueError(f"y: holds {len(names)} class(es); expected at least 2 different ones")
    if len(names) > len(labels) / 2:
        raise ValueError(f"y: {len(names)} different values in {len(labels)} rows are no classes")
    return X.reset_index(drop=True), codes.astype(np.int64), tuple(map(str, names))


def encoder(table: pd.DataFrame) -> ColumnTransformer:
    """Numbers: median for missing values, then mean 0 and variance 1; categories: one column each.

    A missing category is a category; one not seen in training becomes a row of zeros. Fit it on
    the training part only.

    Raises:
        TypeError: a column holds neither numbers nor categories.
    """
    from pandas.api import types
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

    numbers = [c for c in table if types.is_numeric_dtype(table[c])]
    named = [c for c in table if c not in numbers]
    for column in named:
        kind = table[column].dtype
        text = types.is_object_dtype(kind) or types.is_string_dtype(kind)
        if not (text or isinstance(kind, types.CategoricalDtype)):
            raise TypeError(f"X: column {column!r} holds {kind}; expected numbers or categories")
    numeric = make_pipeline(
        FunctionTransformer(_floats),
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
    )
    categories = make_pipeline(
        FunctionTransformer(_words),
        OneHotEncoder(handle_unknown="ignore", sparse_output=False),
    )
    return ColumnTransformer([("numbers", numeric, numbers), ("categories", categories, named)])


def _floats(part: pd.DataFrame) -> pd.DataFrame:
    return part.astype(float)


def _words(part: pd.DataFrame) -> pd.DataFrame:
    return part.astype(object).where(part.notna(), "(missing)").astype(str)


def encoded(table: pd.DataFrame, rows: np.ndarray, *others: np.ndarray) -> list[Tensor]:
    """Inputs of the given rows, and of others, by an `encoder` fitted on the first."""
    fitted = encoder(table).fit(table.iloc[rows])
    parts = [fitted.transform(table.iloc[r]) for r in (rows, *others)]
    return [torch.tensor(np.asarray(p, np.float32)) for p in parts]


def wide(x: Tensor, width: int) -> Tensor:
    """Columns of zeros after those of x (n, d), for categories that only other folds have."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def held_out(
    y: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a training and a validation part, both shuffled, in equal proportions.

    Args:
        y: (n,) classes.
        share: of the rows that go to validation.
        rng: numpy generator.
    """
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    steps = np.floor((np.arange(len(y) + 1) + rng.random()) * share)
    out = np.diff(steps) > 0
    return rng.permutation(order[~out]), rng.permutation(order[out])
