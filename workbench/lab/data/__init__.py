"""Data: one registry, three kinds of source, no silent download.

``digits``, ``mnist5000``, ``table`` and ``text`` read what installed packages carry. ``authors``,
``find`` and ``require`` look for files that only ``get`` (``workbench data get NAME``) brings.
``listing`` shows everything.
"""

from workbench.lab.data.loaders import (
    Arrays,
    Function,
    Split,
    Table,
    digits,
    mnist5000,
    read_table,
    stdlib_functions,
    table,
    tables,
    text,
)
from workbench.lab.data.sources import (
    ChecksumError,
    DataMissing,
    authors,
    find,
    get,
    listing,
    registry,
    require,
    where,
)

__all__ = [
    "Arrays",
    "ChecksumError",
    "DataMissing",
    "Function",
    "Split",
    "Table",
    "authors",
    "digits",
    "find",
    "get",
    "listing",
    "mnist5000",
    "read_table",
    "registry",
    "require",
    "stdlib_functions",
    "table",
    "tables",
    "text",
    "where",
]
