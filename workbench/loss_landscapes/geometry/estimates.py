"""A mean over random draws, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate; ``float(estimate)`` is its value.

    Attributes:
        value: mean of the samples.
        error: its standard error; NaN for a single sample.
        draws: number of samples.
        samples: (draws,) what each draw gave.
        complete: False if interrupted.
    """

    value: float
    error: float
    draws: int
    samples: np.ndarray
    complete: bool = True

    @classmethod
    def of(cls, samples: Sequence[float], complete: bool = True) -> Self:
        """Mean and standard error; without a sample the interruption goes on."""
        if not len(samples):
            raise KeyboardInterrupt
        x = np.asarray(samples, dtype=np.float64)
        error = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
        return cls(float(x.mean()), error, len(x), x, complete)

    def within(self, tol: float) -> bool:
        """Whether the standard error is below ``tol`` of the value."""
        return self.error <= tol * abs(self.value)

    def __float__(self) -> float:
        return self.value
