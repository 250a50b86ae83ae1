"""Validation at the door: a check returns its argument ready to use or says what is wrong.

NumPy arrays, pandas objects and lists come back as NumPy arrays; torch tensors stay tensors (same
device, dtype and graph). A message names the argument, the first offending row and what was
expected. Checks read the data once or twice and allocate at most one number per row, so that
a million rows of a hundred classes cost neither memory nor noticeable time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Dims: TypeAlias = int | tuple[int, ...] | None
Values: TypeAlias = Any  # numpy.ndarray | torch.Tensor: a method keeps the kind it was given

_CHUNK = 65_536  # rows looked at together when searching for the offending one


def is_tensor(values: Any) -> bool:
    """True for torch tensors; does not import torch (who holds a tensor has imported it)."""
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(values, torch_module.Tensor)


def as_array(values: Any, name: str = "values", *, ndim: Dims = None) -> Values:
    """Numbers as an array or tensor: not empty, of the expected number of dimensions."""
    if not is_tensor(values):
        values = values.to_numpy() if hasattr(values, "to_numpy") else values
        try:
            values = np.asarray(values)
            if values.dtype == object:
                values = values.astype(np.float64)
        except (ValueError, TypeError):
            raise TypeError(f"{name}: expected a rectangular array of numbers") from None
        if values.dtype.kind not in "biuf":
            raise TypeError(f"{name}: expected numbers, got dtype {values.dtype}")
    elif values.is_complex():
        raise TypeError(f"{name}: expected real numbers, got dtype {values.dtype}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and values.ndim not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(
            f"{name}: expected {expected} dimension(s), got shape {tuple(values.shape)}"
        )
    if 0 in values.shape:
        raise ValueError(f"{name}: is empty (shape {tuple(values.shape)}); expected at least a row")
    return values


def as_floats(values: Any, name: str = "values", *, ndim: Dims = None) -> Values:
    """Finite floating-point numbers; integers and booleans are converted."""
    values = as_array(values, name, ndim=ndim)
    if is_tensor(values):
        values = values if values.is_floating_point() else values.to(_torch().get_default_dtype())
    elif values.dtype.kind != "f":
        return values.astype(np.float64)
    # A finite sum proves finite terms; an infinite one may also be overflow, so look again.
    if not math.isfinite(_scalar(_sum(values))):
        row = _first_row(values, lambda part: ~_isfinite(part))
        if row is not None:
            raise ValueError(f"{name}: row {row} holds NaN or infinity; expected finite numbers")
    return values


def as_logits(logits: Any, name: str = "logits") -> Values:
    """Finite scores of shape (n, k) with at least two classes."""
    return _two_classes(as_floats(logits, name, ndim=2), name)


def as_probs(probs: Any, name: str = "probs", *, tol: float = 1e-3) -> Values:
    """Probabilities of shape (n, k): not negative, every row sums to one within ``tol``."""
    probs = as_array(probs, name, ndim=2)
    if is_tensor(probs):
        probs = probs if probs.is_floating_point() else probs.to(_torch().get_default_dtype())
        tol = max(tol, _torch().finfo(probs.dtype).eps)  # bfloat16 carries only 8 bits
    elif probs.dtype.kind != "f":
        probs = probs.astype(np.float64)
    _two_classes(probs, name)
    # Not negative and summing to one implies finite and at most one: two passes see everything.
    if not _scalar(_minimum(probs)) >= 0:
        row = _first_row(probs, lambda part: ~(part >= 0))
        raise ValueError(
            f"{name}: row {row} holds a negative value or NaN; expected probabilities (are these "
            "logits? Apply softmax first)"
        )
    sums = _sum(probs, axis=1)
    low, high = _scalar(sums.min()), _scalar(sums.max())
    if not (low >= 1 - tol and high <= 1 + tol):
        row = _first_row(sums, lambda part: ~((part >= 1 - tol) & (part <= 1 + tol)))
        raise ValueError(
            f"{name}: row {row} sums to {_scalar(sums[row]):.6g}; expected 1 (within {tol:.2g})"
        )
    return probs


def as_unit(values: Any, name: str = "confidence", *, ndim: int = 1) -> Values:
    """Numbers in [0, 1], for instance the confidence of each prediction."""
    values = as_floats(values, name, ndim=ndim)
    if not (_scalar(_minimum(values)) >= 0 and _scalar(values.max()) <= 1):
        row = _first_row(values, lambda part: ~((part >= 0) & (part <= 1)))
        raise ValueError(f"{name}: row {row} lies outside [0, 1]; expected numbers between 0 and 1")
    return values


def as_labels(
    labels: Any, k: int | None = None, name: str = "labels", *, min_classes: int = 1
) -> Values:
    """Class indices 0..k-1 of shape (n,) as int64; integral floats and booleans are converted.

    ``min_classes=2`` refuses labels that name one class only.
    """
    labels = as_array(labels, name, ndim=1)
    floating = labels.is_floating_point() if is_tensor(labels) else labels.dtype.kind == "f"
    if floating:
        row = _first_row(labels, lambda part: ~((part % 1) == 0))
        if row is not None:
            value = _scalar(labels[row])
            raise ValueError(f"{name}: row {row} is {value:g}; expected integer class indices")
    labels = labels.long() if is_tensor(labels) else labels.astype(np.int64, copy=False)
    low, high = int(_scalar(labels.min())), int(_scalar(labels.max()))
    if low < 0 or (k is not None and high >= k):
        row = _first_row(labels, lambda part: (part < 0) | (part >= (high + 1 if k is None else k)))
        expected = "a class index of 0 or more" if k is None else f"a class index in 0..{k - 1}"
        raise ValueError(f"{name}: row {row} is {int(_scalar(labels[row]))}; expected {expected}")
    if min_classes > 1:
        present = len(labels.unique() if is_tensor(labels) else np.unique(labels))
        if present < min_classes:
            raise ValueError(
                f"{name}: holds {present} class(es); expected at least {min_classes} different ones"
            )
    return labels


def same_length(**named: Any) -> int:
    """The common length of the named arguments: ``same_length(probs=probs, labels=labels)``."""
    lengths = {name: len(values) for name, values in named.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(lengths)}: expected the same number of rows, but {found}")
    return next(iter(lengths.values()))


def number(value: Any, name: str) -> float:
    """One finite real number."""
    if isinstance(value, (bool, np.bool_, str)) or value is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        result = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, got {result}")
    return result


def positive(value: Any, name: str, *, zero: bool = False) -> float:
    """A number above zero, or not below zero with ``zero=True``."""
    result = number(value, name)
    if result < 0 or (result == 0 and not zero):
        raise ValueError(f"{name}: expected a number {'>= 0' if zero else '> 0'}, got {result:g}")
    return result


def fraction(value: Any, name: str, *, zero: bool = True, one: bool = True) -> float:
    """A number between 0 and 1; ``zero=False`` or ``one=False`` excludes that end."""
    result = number(value, name)
    if not 0 <= result <= 1 or (result == 0 and not zero) or (result == 1 and not one):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name}: expected a number in {interval}, got {result:g}")
    return result


def count(value: Any, name: str, *, minimum: int = 1) -> int:
    """A whole number of at least ``minimum``."""
    result = number(value, name)
    if result != int(result) or result < minimum:
        raise ValueError(f"{name}: expected a whole number >= {minimum}, got {result:g}")
    return int(result)


def one_of(value: Any, options: Iterable[Any], name: str) -> Any:
    """One of the listed options."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def as_generator(
    generator: torch.Generator | int | None = None,
    name: str = "generator",
    *,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A torch generator: as given, seeded by an integer, or for None by torch's global state."""
    torch = _torch()
    if isinstance(generator, torch.Generator):
        return generator
    if generator is None:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ()).item()))
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        return torch.Generator(device).manual_seed(int(generator))
    raise TypeError(
        f"{name}: expected a torch.Generator, an integer or None, got {type(generator).__name__}"
    )


def as_rng(
    random_state: np.random.Generator | int | None = None, name: str = "random_state"
) -> np.random.Generator:
    """A NumPy generator: as given, seeded by an integer, or for None by NumPy's global state."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    if random_state is None:
        return np.random.default_rng(np.random.randint(2**31))
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
        return np.random.default_rng(count(random_state, name, minimum=0))
    raise TypeError(
        f"{name}: expected a numpy Generator, an integer or None, got {type(random_state).__name__}"
    )


def to_numpy(values: Any) -> np.ndarray:
    """The same numbers on the host, outside any graph."""
    if is_tensor(values):
        values = values.detach().cpu()
        return (values.float() if values.dtype is _torch().bfloat16 else values).numpy()
    return np.asarray(values)


def _torch() -> Any:
    import torch

    return torch


def _two_classes(values: Values, name: str) -> Values:
    if values.shape[1] < 2:
        raise ValueError(f"{name}: has one column; expected a column for each of >= 2 classes")
    return values


def _scalar(value: Any) -> float:
    return float(value.detach() if is_tensor(value) else value)


def _minimum(values: Values) -> Any:
    return values.detach().min() if is_tensor(values) else values.min()


def _isfinite(values: Values) -> Any:
    return values.isfinite() if is_tensor(values) else np.isfinite(values)


def _sum(values: Values, axis: int | None = None) -> Any:
    if is_tensor(values):
        torch = _torch()
        wide = torch.float32 if values.element_size() < 4 else values.dtype
        values = values.detach()
        return values.sum(dtype=wide) if axis is None else values.sum(axis, dtype=wide)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.sum(axis=axis, dtype=np.float32 if values.itemsize < 4 else None)


def _first_row(values: Values, bad: Callable[[Values], Any]) -> int | None:
    """Index of the first row with a bad entry; only called once something is known to be wrong."""
    values = values.detach() if is_tensor(values) else values
    if values.ndim == 0:
        return 0 if bool(bad(values)) else None
    for start in range(0, len(values), _CHUNK):
        flags = bad(values[start : start + _CHUNK])
        rows = flags.reshape(len(flags), -1).any(1)
        if bool(rows.any()):
            return start + int(rows.nonzero()[0][0])
    return None
