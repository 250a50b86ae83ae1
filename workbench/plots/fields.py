"""Numbers and fields in text, in the few formats that every face of an explorer knows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

FORMAT = re.compile(r"^\+?,?(d|\.\d+[fge%])?$")


def check_format(spec: str) -> str:
    """`spec`, when the exported face can write it too: d, .Nf, .Ne, .Ng, .N%, with + or a comma."""
    if not FORMAT.match(spec):
        raise ValueError(f"format {spec!r} is not one of d, .Nf, .Ne, .Ng, .N% (with + or ,)")
    return spec


def number(value: Any, spec: str = "") -> str:
    """`value` in the format `spec`; words stay words, a missing number is a dash."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if spec.endswith("d") or (not spec and float(value).is_integer()):
        value = round(value)
    spec = spec or (".4g" if isinstance(value, float) else "d")
    text = format(value, spec)
    if not re.search("[1-9]", text):  # no minus before a zero
        text = format(abs(value), spec)
    return text.replace("-", "−", 1)


def parse(template: str) -> list[tuple[str, str | None, str]]:
    """`template` as (text, field name or None, format) pieces."""
    pieces = []
    for text, name, spec, conversion in Formatter().parse(template):
        if conversion or (name is not None and not name.isidentifier()):
            raise ValueError(f"title {template!r}: a field is a plain name with a format")
        pieces.append((text, name, check_format(spec or "")))
    return pieces


def names(template: str) -> list[str]:
    """The names of the fields of `template`."""
    return [name for _, name, _ in parse(template) if name is not None]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """`template` with its fields replaced by `values`."""
    return "".join(
        text + (number(values[name], spec) if name is not None else "")
        for text, name, spec in parse(template)
    )
