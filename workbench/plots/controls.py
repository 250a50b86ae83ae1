"""What a reader can move: sliders, steps, choices and toggles.

A control knows its positions, so that every face (live, static, exported) offers the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from workbench.plots.fields import check_format, number

MAX_POSITIONS = 2001


def _name(name: str) -> None:
    if not name.isidentifier():
        raise ValueError(f"name of a control must be a Python identifier, got {name!r}")


def _number(control: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{control}: expected a number, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Slider:
    """A number between `low` and `high`: every `step`, or geometric when `log` is set.

    A slider whose bounds and step are whole numbers hands integers to the compute function.
    `format` is a Python format for the value, `unit` stands behind it.
    """

    name: str
    label: str
    low: float
    high: float
    step: float | None = None
    value: float | None = None
    log: bool = False
    format: str | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        _name(self.name)
        if not self.low < self.high:
            raise ValueError(f"{self.name}: low must be below high, got {self.low}, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"{self.name}: a log slider starts above 0, got low={self.low}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"{self.name}: step must be positive, got {self.step}")
        if len(self.values) > MAX_POSITIONS:
            raise ValueError(
                f"{self.name}: {len(self.values)} positions are more than {MAX_POSITIONS}; "
                "choose a larger step"
            )
        check_format(self.format or "")
        self.check(self.initial)

    @property
    def whole(self) -> bool:
        """True when the slider moves over integers."""
        return not self.log and all(
            isinstance(v, (int, np.integer)) for v in (self.low, self.high, self.spacing)
        )

    @property
    def spacing(self) -> float:
        """Distance of two positions (of their base-10 logarithms when `log`)."""
        if self.log:
            return math.log10(self.high / self.low) / 100 if self.step is None else self.step
        if self.step is not None:
            return self.step
        ints = isinstance(self.low, int) and isinstance(self.high, int)
        return 1 if ints and self.high - self.low >= 5 else (self.high - self.low) / 100

    @property
    def values(self) -> list[float]:
        """All positions, both ends included."""
        if self.log:
            n = max(1, round(math.log10(self.high / self.low) / self.spacing))
            exponents = np.linspace(math.log10(self.low), math.log10(self.high), n + 1)
            found = [float(f"{10**e:.6g}") for e in exponents]
            return [float(self.low), *found[1:-1], float(self.high)]
        n = math.floor((self.high - self.low) / self.spacing + 1e-9)
        if n >= MAX_POSITIONS:  # refused by __post_init__, without building the list
            return [self.low] * (n + 1)
        if self.whole:
            found = [self.low + i * self.spacing for i in range(n + 1)]
        else:
            found = [float(f"{self.low + i * self.spacing:.10g}") for i in range(n + 1)]
        return found if math.isclose(found[-1], self.high) else [*found, self.high]

    @property
    def initial(self) -> float:
        """The value shown first: `value`, or the middle position."""
        if self.value is not None:
            return self.value
        return self.values[len(self.values) // 2]

    def check(self, value: Any) -> float:
        """`value` as this control's type; refuses what lies outside the bounds."""
        found = _number(self.name, value)
        if not self.low <= found <= self.high:
            raise ValueError(
                f"{self.name}: expected a value from {self.low} to {self.high}, got {value!r}"
            )
        return int(found) if self.whole and found.is_integer() else found

    def text(self, value: Any) -> str:
        """`value` as the reader sees it."""
        return f"{number(value, self.format or self.default_format)} {self.unit}".rstrip()

    @property
    def default_format(self) -> str:
        """A format that tells neighbouring positions apart."""
        if self.whole:
            return "d"
        if self.log:
            return ".3g"
        return f".{max(0, min(6, -math.floor(math.log10(self.spacing) + 1e-9)))}f"


@dataclass(frozen=True)
class _Options:
    name: str
    label: str
    options: Sequence[Any]
    value: Any = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _name(self.name)
        if not len(self.options):
            raise ValueError(f"{self.name}: no options given")
        if len(self.options) > MAX_POSITIONS:
            raise ValueError(f"{self.name}: more than {MAX_POSITIONS} options")
        if self.labels is not None and len(self.labels) != len(self.options):
            raise ValueError(
                f"{self.name}: {len(self.labels)} labels for {len(self.options)} options"
            )
        self.check(self.initial)

    @property
    def values(self) -> list[Any]:
        """All options, in order."""
        return list(self.options)

    @property
    def initial(self) -> Any:
        """The option shown first: `value`, or the first one."""
        return self.values[0] if self.value is None else self.value

    def check(self, value: Any) -> Any:
        """`value` as it stands among the options; refuses any other."""
        for option in self.values:
            if option == value and isinstance(option, bool) == isinstance(value, bool):
                return option
        raise ValueError(f"{self.name}: expected one of {self.values}, got {value!r}")

    def text(self, value: Any) -> str:
        """`value` as the reader sees it."""
        if self.labels is None:
            return str(value)
        return str(self.labels[self.values.index(self.check(value))])


@dataclass(frozen=True)
class Choice(_Options):
    """One of a few options, shown as a drop-down; `labels` are their names for the reader."""


@dataclass(frozen=True)
class Steps(_Options):
    """One of several ordered options, shown as a slider (bin counts 5, 10, 15, 50, ...)."""


@dataclass(frozen=True)
class Toggle:
    """On or off."""

    name: str
    label: str
    value: bool = False

    def __post_init__(self) -> None:
        _name(self.name)
        self.check(self.value)

    @property
    def values(self) -> list[bool]:
        """Off and on."""
        return [False, True]

    @property
    def initial(self) -> bool:
        """The position shown first."""
        return self.value

    def check(self, value: Any) -> bool:
        """`value` as a bool; refuses anything else."""
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{self.name}: expected True or False, got {value!r}")
        return bool(value)

    def text(self, value: Any) -> str:
        """`value` as the reader sees it."""
        return "on" if value else "off"


Control = Slider | Choice | Steps | Toggle


def nearest(control: Control, value: Any) -> int:
    """Index of the position of `control` that lies nearest to `value`."""
    if isinstance(control, Slider):
        positions = np.asarray(control.values, float)
        wanted = cast(float, value)
        if control.log:
            return int(np.argmin(np.abs(np.log(positions) - math.log(wanted))))
        return int(np.argmin(np.abs(positions - wanted)))
    return control.values.index(control.check(value))
